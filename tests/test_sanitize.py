"""The sanitizer script reads reports as the tools write them (the run itself needs a GPU)."""

import sys

from tests.gpu import sanitize

FAKE = """#!{python}
import sys
print("========= COMPUTE-SANITIZER")
for form in ("warp", "block", "grid", "radix", "batched"):
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
    names = lines["tool"].split()[1:6]
    assert sorted(names) == ["batched", "block", "grid", "radix", "warp"]
    counts = dict(zip(names, lines["memcheck"].split()[1:6], strict=True))
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


def test_every_form_is_run():
    assert {form for form, _, _ in sanitize.cases()} == {
        "warp",
        "block",
        "grid",
        "radix",
        "batched",
    }
