"""The sanitizer script reads reports as the tools write them (the run itself needs a GPU)."""

import sys

import pytest

from tests.gpu import direct_forms, sanitize

FAKE = """#!{python}
import sys
print("========= COMPUTE-SANITIZER")
for form in ("warp", "pairs", "block", "cluster", "grid", "sorted", "radix", "batched"):
    print("### form " + form)
    if form == "grid" and "{tool}" in sys.argv:
        print("========= Invalid __global__ write of size 4 bytes")
        print("=========     at kernel+0x1230")
print("### form end")
print("========= ERROR SUMMARY: " + ("1 error" if "{tool}" in sys.argv else "0 errors"))
"""


def fake(tmp_path, tool):
    path = tmp_path / "compute-sanitizer"
    path.write_text(FAKE.format(python=sys.executable, tool=tool))
    path.chmod(0o755)
    return str(path)


def test_table_names_the_form_that_a_report_stands_under(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize", "--sanitizer", fake(tmp_path, "memcheck")])
    assert sanitize.main() == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    names = lines["tool"].split()[1:9]
    assert set(names) == {form for form, _, _ in sanitize.cases()} and len(set(names)) == 8
    counts = dict(zip(names, lines["memcheck"].split()[1:9], strict=True))
    assert counts == {name: "1" if name == "grid" else "0" for name in names}
    assert lines["memcheck"].endswith("1 in its summary") and lines["racecheck"].endswith("clean")


def test_clean_run_exits_with_zero(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize", "--sanitizer", fake(tmp_path, "no tool")])
    assert sanitize.main() == 0
    assert capsys.readouterr().out.count("clean") == 4


def test_run_that_dies_is_not_clean(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize", "--sanitizer", "/bin/false"])
    assert sanitize.main() == 1
    assert capsys.readouterr().out.count("did not finish") == 4


@pytest.mark.parametrize("form", ["warp", "block", "batched"])
def test_direct_calls_run_and_are_right_on_a_cpu(form):
    """What the child does on a GPU, without one; a form's options are those of its last case."""
    _, size, options = [case for case in sanitize.cases() if case[0] == form][-1]
    if form == "batched":
        direct_forms.run_batched("cpu", *size)
    else:
        direct_forms.run_form("cpu", size._replace(num_pairs=min(size.num_pairs, 300)), options)


def test_direct_run_looks_at_our_kernels_only(tmp_path, monkeypatch, capsys):
    """Their names come from a child without the sanitizer; one that fails stops the run."""
    seen = tmp_path / "seen"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        + FAKE.split("import sys\n")[1].format(tool="no tool")
        + f"print(sys.argv[1:], os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'], "
        f"file=open({str(seen)!r}, 'a'))\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sys, "argv", ["sanitize", "--path", "direct", "--sanitizer", str(tool)])
    lines = f"print('{sanitize.KERNEL}moe_align_a'); print('{sanitize.KERNEL}moe_align_b')"
    monkeypatch.setattr(sanitize, "child", lambda path: [sys.executable, "-c", lines])
    assert sanitize.main() == 0
    calls = seen.read_text().splitlines()
    assert len(calls) == 4 and all(line.endswith(" 1") for line in calls)
    for line in calls:
        assert "--kernel-name=kne=moe_align_a" in line and "--kernel-name=kne=moe_align_b" in line
        assert "application-only" in line
    monkeypatch.setattr(sanitize, "child", lambda path: [sys.executable, "-c", "print('broken')"])
    with pytest.raises(RuntimeError, match="broken"):
        sanitize.main()


def test_every_form_is_run():
    assert {form for form, _, _ in sanitize.cases()} == {
        "warp",
        "pairs",
        "block",
        "cluster",
        "grid",
        "sorted",
        "radix",
        "batched",
    }
