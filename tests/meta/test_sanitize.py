"""The sanitizer script reads reports as the tools write them, and runs every kernel (which needs a GPU)."""

import sys

import jax
import pytest

from moe_align_jax._align import tables
from moe_align_jax._layout import kernels as row_kernels
from tests import forms
from tests.gpu import direct_forms, sanitize, sanitizer_cases

NAMES = sanitizer_cases.names("jit")
SPOILT = "grid cluster local_sort"
FAKE = f"""#!{sys.executable}
import sys
print("========= COMPUTE-SANITIZER")
tool = "TOOL" in sys.argv
for name in {NAMES[:-1]}:
    print("### form " + name)
    if name == {SPOILT!r} and tool:
        print("========= Invalid __global__ write of size 4 bytes")
        print("=========     at kernel+0x1230")
print("### form end")
print("========= ERROR SUMMARY: " + ("1 error" if tool else "0 errors"))
"""


def fake(tmp_path, tool):
    path = tmp_path / "compute-sanitizer"
    path.write_text(FAKE.replace("TOOL", tool))
    path.chmod(0o755)
    return str(path)


def test_table_names_what_a_report_stands_under(tmp_path, monkeypatch, capsys):
    """Also what was not run."""
    monkeypatch.setattr(sys, "argv", ["sanitize", "--sanitizer", fake(tmp_path, "memcheck")])
    assert sanitize.main() == 1
    out, counted = capsys.readouterr().out.split("\nReports:\n")
    verdicts = {line.split()[0]: line for line in out.splitlines() if line}
    assert verdicts["memcheck"].endswith("1 in its summary")
    assert verdicts["racecheck"].endswith("clean")
    head, *lines = counted.splitlines()
    assert head.split() == list(sanitize.TOOLS)
    cells = {line[: -11 * 4].strip(): line[-11 * 4 :].split() for line in lines}
    want = {name: ["0"] * 4 for name in NAMES[:-1]} | {NAMES[-1]: ["-"] * 4}
    assert cells == want | {SPOILT: ["1", "0", "0", "0"]}


def test_clean_run_exits_with_zero(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize", "--sanitizer", fake(tmp_path, "no tool")])
    assert sanitize.main() == 0
    assert capsys.readouterr().out.count("clean") == 4


def test_run_that_dies_is_not_clean(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize", "--sanitizer", "/bin/false"])
    assert sanitize.main() == 1
    assert capsys.readouterr().out.count("did not finish") == 4


def test_only_initcheck_looks_at_kernels_that_are_not_ours():
    """It must see what they write; the others take long over them."""
    for tool in sanitize.TOOLS:
        _, options = sanitize.settings("jit", tool, [])
        assert ("kns=_mosaic_gpu_kernel" in options) == (tool != "initcheck"), tool
    assert "kns=_mosaic_gpu_kernel" in sanitize.settings("peers", "initcheck", [])[1]


# -- what is run ---------------------------------------------------------------------------------------


def test_every_variant_is_run():
    """At the smallest size that has it, plain and with all options."""
    ran = {}
    for case in sanitizer_cases.cases():
        if case.name != "batched":
            ran.setdefault(case.size.variant, []).append(case)
    assert set(ran) == {size.variant for size in forms.SIZES}
    assert len({str(variant) for variant in ran}) == len(ran)
    for variant, pair in ran.items():
        alike = [s for s in forms.SIZES if s.variant == variant and s.num_experts > 1]
        assert pair[0].size == pair[1].size == min(alike)
        assert [case.options for case in pair] == [forms.OPTIONS[0], forms.OPTIONS[-1]]
        assert {case.name for case in pair} == {str(variant)}
    assert {v.form for v in ran} == {row.config.form for row in tables.table("").rows}


def test_sizes_have_every_variant_of_the_table():
    """At both sides of each row's end, where E is least and most, up to 131,072 pairs."""
    have = {size.variant for size in forms.SIZES}
    for row in tables.table("").rows:
        for num_experts in (row.first_expert, row.last_expert or 65_535):
            for num_pairs in ((row.num_pairs or 131_072), (row.num_pairs or 131_072) + 1):
                for block_size in (1, 16, 128):
                    size = forms.Size(num_pairs, num_experts, block_size)
                    assert num_pairs > 131_072 or size.variant in have, size


@pytest.mark.parametrize("form", sanitizer_cases.E4M3)
def test_every_form_of_e4m3_is_a_case_of_its_tests(form):
    """Its name ends with that of its tiles."""
    make, config = sanitizer_cases.e4m3_case(form)
    assert callable(make) and form.endswith(config.name[: len(form.split(", ")[-1])])


def test_racecheck_leaves_out_large_sizes_whose_variants_it_sees_at_small_ones():
    short = {case.name for case in sanitizer_cases.cases("racecheck")}
    small = {case.name.removesuffix(", small") for case in sanitizer_cases.small_cases()}
    left_out = {case.name for case in sanitizer_cases.cases()} - short
    # A radix pass sorts nothing in shared memory; one of several tiles has several rounds.
    radix = {f"radix cluster {what}7 kernels" for what in ("", "rounds ")}
    assert left_out and left_out <= small | radix and "radix cluster tiles 7 kernels" in small
    assert sanitizer_cases.cases("memcheck") == sanitizer_cases.cases()


@pytest.mark.parametrize("case", sanitizer_cases.small_cases(), ids=lambda c: c.name)
def test_small_cases_take_their_own_config(case, monkeypatch):
    """They run and are right in the emulator, by kernels of that variant."""
    build, seen = forms.kernels.build, []

    def recorded(problem, config, **more):
        seen.append(config)
        return build(problem, config, **more)

    monkeypatch.setattr(forms.kernels, "build", recorded)
    with jax.default_device(jax.devices("cpu")[0]):
        sanitizer_cases.align(case, "emulator")
    monkeypatch.undo()
    assert [f"{forms.variant_of(case.size, config)}, small" for config in seen] == [case.name]
    table = forms.variant_of(case.size, tables.config_for(forms.problem(case.size, case.options)))
    assert f"{table}, small" != case.name


@pytest.mark.parametrize("name", ["warp", "block", "batched"])
def test_calls_run_and_are_right_on_a_cpu(name):
    """What the children do on a GPU, without one; of a variant the case with all options."""
    case = [case for case in sanitizer_cases.cases() if case.name == name][-1]
    direct_forms.run("cpu", case)
    with jax.default_device(jax.devices("cpu")[0]):
        sanitizer_cases.align(case, "emulator")


def test_the_other_kernels_are_right_on_a_cpu(monkeypatch):
    """By XLA and Pallas' interpreter; every size is one that a kernel takes."""
    run_sum = row_kernels.run_sum

    def interpreted(problem, *operands):
        return run_sum(problem, *operands, interpret=True)

    monkeypatch.setattr(row_kernels, "run_sum", interpreted)
    with jax.default_device(jax.devices("cpu")[0]):
        sanitizer_cases.masked_quant("xla")
        sanitizer_cases.permute()
        sanitizer_cases.weighted_sum(widest=2000)  # the interpreter takes seconds for wider rows
        sanitizer_cases.router("emulator")
    sums = sanitizer_cases.row_sums()
    assert not any(map(row_kernels.sum_unsupported, sums)) and min(s.width for s in sums) < 2000
    assert {"masked_quant", "permute", "weighted_sum", "router"} <= set(NAMES)
    # These run on a GPU alone: their bodies are in tests/matmul and tests/moe_layer.
    assert {"matmul", "matmul, clusters", "expert layer"} <= set(NAMES)
    assert {"weight gradients", "activation gradient"} <= set(NAMES)


def test_initcheck_leaves_out_what_it_does_not_see():
    seen = [name for name, _ in sanitizer_cases.runs("jit", "initcheck")]
    left_out = [name for name in NAMES if name not in seen]
    assert left_out == ["matmul, heights", "weight gradients", "activation gradient"]
    assert [name for name, _ in sanitizer_cases.runs("jit", "memcheck")].count(left_out[0]) == 1


def test_peers_need_two_gpus(monkeypatch):
    assert sanitizer_cases.names("peers")[:2] == ["normal nvlink", "normal fp8 nvlink"]
    monkeypatch.setattr(jax, "devices", lambda platform: ["one"])
    with pytest.raises(RuntimeError, match="two GPUs; got 1"):
        next(run for _, run in sanitizer_cases.runs("peers"))()


def test_direct_run_looks_at_our_kernels_only(tmp_path, monkeypatch, capsys):
    """Their names come from a child without the sanitizer; one that fails stops the run."""
    seen = tmp_path / "seen"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        + FAKE.split("import sys\n")[1]
        + f"print(sys.argv[1:], os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'], "
        f"file=open({str(seen)!r}, 'a'))\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sys, "argv", ["sanitize", "--path", "direct", "--sanitizer", str(tool)])
    lines = f"print('{sanitize.KERNEL}moe_align_a'); print('{sanitize.KERNEL}moe_align_b')"
    monkeypatch.setattr(sanitize, "child", lambda *a: [sys.executable, "-c", lines])
    assert sanitize.main() == 0
    calls = seen.read_text().splitlines()
    assert len(calls) == 4 and all(line.endswith(" 1") for line in calls)
    for line in calls:
        assert "--kernel-name=kne=moe_align_a" in line and "--kernel-name=kne=moe_align_b" in line
        assert "application-only" in line
    monkeypatch.setattr(sanitize, "child", lambda *a: [sys.executable, "-c", "print('broken')"])
    with pytest.raises(RuntimeError, match="broken"):
        sanitize.main()
