"""compile_worker.py without a GPU: Mosaic's host code, the self-test on a fake driver, the process."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from moe_align_jax.types import AlignProblem, BatchedAlignProblem
from tests import oracle
from tests.bridge.fake_cuda import FakeCuda
from torch_bridge._direct import compile_worker, disk_cache, driver, selftest
from torch_bridge._direct.problems import bucket_problem

SCRIPT = pathlib.Path(compile_worker.__file__)
POOL = ThreadPoolExecutor(4)
BUFFERS = ("topk_ids", "num_pairs", "sorted_token_ids", "expert_ids")


def host_code(
    *,
    table="%2",
    function="mosaic_gpu_launch_kernel",
    numbers=(16, 1, 1, 0, 0, 0, 256, 1, 1, 4096, 0),
    order=(0, 1, 2, 3),
    calls=1,
    foreign=(),
):
    """What Mosaic's host function looks like: buffers loaded, stored into a struct, and one launch."""
    lines = [
        "; ModuleID = 'host'",
        "declare void @other(ptr)",
        "",
        "define void @main(ptr %0, ptr %1) {",
    ]
    for index in range(len(BUFFERS)):
        if index:
            lines.append(f"  %a{index} = getelementptr ptr, ptr {table}, i32 {index}")
        lines.append(f"  %b{index} = load ptr, ptr {f'%a{index}' if index else table}, align 8")
    lines.append("  %k = ptrtoint ptr %handle to i64")
    struct = "{ " + ", ".join(["ptr"] * len(order)) + " }"
    lines.append(f"  %s = alloca {struct}, align 8")
    lines.append(f"  %q = alloca [{len(order)} x i64], align 8")
    for slot, index in enumerate(order):
        lines.append(f"  %p{slot} = getelementptr {struct}, ptr %s, i32 0, i32 {slot}")
        value = "%k" if slot in foreign else f"%b{index}"
        lines.append(f"  store ptr {value}, ptr %p{slot}, align 8")
        lines.append(f"  %q{slot} = getelementptr i64, ptr %q, i32 {slot}")
        lines.append(f"  store ptr %p{slot}, ptr %q{slot}, align 8")
    text = ", ".join(f"i32 {x}" for x in numbers)
    behind = "ptr %1, ptr %q"  # the stream, the parameters
    if function == "mosaic_gpu_build_kernel_spec":
        lines.append(f"  %n = alloca [{len(order)} x i32], align 4")
        for slot in range(len(order)):
            lines.append(f"  %n{slot} = getelementptr i32, ptr %n, i32 {slot}")
            lines.append(f"  store i32 0, ptr %n{slot}, align 4")
        behind = "ptr %q, ptr %n"  # the parameters, their sizes
    lines += [f"  call void @{function}(ptr %0, {text}, {behind})"] * calls
    return "\n".join(
        [*lines, "  ret void", "}", "", "define void @unused() {", "  ret void", "}", ""]
    )


V11 = {"table": "%2"}
V12 = {
    "table": "%1",
    "function": "mosaic_gpu_build_kernel_spec",
    "numbers": (16, 1, 1, 0, 0, 0, 256, 1, 1, 4096, 0, 4),
}


@pytest.mark.parametrize("layout", [V11, V12], ids=["jaxlib 0.11", "jaxlib 0.12"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_launch_is_read(layout, order):
    got = compile_worker.read_launch(host_code(**layout, order=order), "align", BUFFERS)
    assert got.entry == "align" and got.shared_bytes == 4096
    assert got.grid == (16, 1, 1) and got.block == (256, 1, 1) and got.cluster == (1, 1, 1)
    assert got.parameters == tuple(BUFFERS[i] for i in order)


@pytest.mark.parametrize("layout", [V11, V12], ids=["jaxlib 0.11", "jaxlib 0.12"])
def test_launch_in_clusters_is_read(layout):
    numbers = layout.get("numbers", (16, 1, 1, 0, 0, 0, 256, 1, 1, 4096, 0))
    numbers = (*numbers[:3], 8, 1, 1, *numbers[6:])
    got = compile_worker.read_launch(host_code(**layout | {"numbers": numbers}), "align", BUFFERS)
    assert got.cluster == (8, 1, 1) and got.block == (256, 1, 1)


REFUSED = {
    "a cluster of 16": {"numbers": (16, 1, 1, 16, 1, 1, 256, 1, 1, 4096, 0)},
    "a grid of broken clusters": {"numbers": (15, 1, 1, 2, 1, 1, 256, 1, 1, 4096, 0)},
    "a shorter launch": {"numbers": (16, 1, 1, 0, 0, 0, 256, 1, 1, 4096)},
    "a longer launch": {"numbers": (16, 1, 1, 0, 0, 0, 256, 1, 1, 4096, 0, 0, 0)},
    "two launches": {"calls": 2},
    "no launch": {"calls": 0},
    "another function": {"function": "mosaic_gpu_launch_cooperative"},
    "an unknown parameter": {"foreign": (1,)},
    "no parameters": {"order": ()},
}


@pytest.mark.parametrize("layout", [V11, V12], ids=["jaxlib 0.11", "jaxlib 0.12"])
@pytest.mark.parametrize("case", REFUSED)
def test_launch_of_an_unknown_form_is_refused(case, layout):
    with pytest.raises(compile_worker.CompileError):
        compile_worker.read_launch(host_code(**layout | REFUSED[case]), "align", BUFFERS)


def test_launch_with_more_buffers_than_the_call_is_refused():
    with pytest.raises(compile_worker.CompileError, match="no buffer of the call"):
        compile_worker.read_launch(host_code(), "align", BUFFERS[:3])


def test_launch_with_a_parameter_left_out_is_refused():
    text = host_code().replace("  store ptr %b1, ptr %p1, align 8\n", "")
    with pytest.raises(compile_worker.CompileError, match="not understood"):
        compile_worker.read_launch(text, "align", BUFFERS)


# -- what Mosaic prints ---------------------------------------------------------------------------


def ptx_of(name, *, parameters=4):
    given = ",\n".join(f"\t.param .u64 {name}_param_{k}" for k in range(parameters))
    head = "//\n// Generated by LLVM NVPTX Back-End\n//\n\n.version 8.8\n.target sm_90a\n\n"
    return (
        f"{head}.visible .entry {name}_mosaic_gpu_kernel(\n{given}\n)\n{{\n\tret; // {name}\n}}\n\n"
    )


def host_of(name):
    return host_code(**V11).replace("@main(", f"@{name}_mosaic_gpu(") + "\n\n"


def printer(*names, left_out=()):
    """A MosaicGpuCompile that prints as native code does: to descriptor 1, whatever sys.stdout is."""

    def compile_module(module, size):
        assert os.environ["MOSAIC_GPU_DUMP_PTX"] and "MOSAIC_GPU_DUMP_TO" not in os.environ
        name = names[int(module)]
        for part in (ptx_of(name), host_of(name)):
            if name not in left_out:
                time.sleep(0.002)
                os.write(1, part.encode())
        return 1

    return compile_module


@pytest.fixture
def compiler(monkeypatch):
    """A compiler whose native half is `printer`."""
    monkeypatch.setattr(compile_worker.Compiler, "__init__", lambda self: None)
    made = compile_worker.Compiler()  # type: ignore[call-arg]
    made._pool, made.lower_seconds = POOL, 0.0
    monkeypatch.setattr(compile_worker, "lower", lambda kernel: str(kernel.index).encode())
    return made


def kernels_named(*names):
    given = {name: (8,) for name in BUFFERS[:2]}, {name: (8,) for name in BUFFERS[2:]}
    return [
        SimpleNamespace(name=name, index=k, inputs=given[0], outputs=given[1])
        for k, name in enumerate(names)
    ]


def test_kernels_are_told_apart_whatever_is_printed_first(compiler, capfd):
    names = [f"align_{k}" for k in range(7)]
    compiler._compile = printer(*names)
    for _ in range(5):
        found = compiler(kernels_named(*names))
        for name, (text, how) in zip(names, found, strict=True):
            assert f"ret; // {name}\n" in text and text.count(".entry") == 1
            assert how.entry == f"{name}_mosaic_gpu_kernel" and how.parameters == BUFFERS
    assert capfd.readouterr().out == ""
    os.write(1, b"back")
    assert capfd.readouterr().out == "back"


def test_the_users_own_dump_is_put_off_and_back(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    compiler._compile = printer("align")
    assert len(compiler(kernels_named("align"))) == 1
    left = {x: y for x, y in os.environ.items() if x.startswith("MOSAIC_GPU_DUMP")}
    assert left == {"MOSAIC_GPU_DUMP_TO": str(tmp_path)} and not [*tmp_path.iterdir()]


WRONG_DUMPS = {
    "nothing": ("", "named its kernels"),
    "no host code": (ptx_of("a"), "host code of"),
    "no PTX": (host_of("a"), "host code of"),
    "another kernel": (ptx_of("b") + host_of("b"), "named its kernels"),
    "a kernel too many": (ptx_of("a") + host_of("a") + ptx_of("b") + host_of("b"), "named its"),
    "one twice": (2 * ptx_of("a") + host_of("a"), "more than one kernel"),
    "two in one": (ptx_of("a") + ptx_of("b")[4:].split("\n", 1)[1] + host_of("a"), "more than one"),
    "too few parameters": (ptx_of("a", parameters=3) + host_of("a"), "takes other parameters"),
}


@pytest.mark.parametrize("case", WRONG_DUMPS)
def test_a_dump_of_an_unknown_form_is_refused(case, compiler):
    text, match = WRONG_DUMPS[case]
    compiler._compile = lambda module, size: os.write(1, text.encode()) + 1
    with pytest.raises(compile_worker.CompileError, match=match):
        compiler(kernels_named("a"))


def test_a_kernel_that_is_refused_is_named(compiler):
    prints = printer("a", "b", "c")
    compiler._compile = lambda module, size: None if module == b"1" else prints(module, size)
    with pytest.raises(compile_worker.CompileError, match="refused b$"):
        compiler(kernels_named("a", "b", "c"))


# -- trials ---------------------------------------------------------------------------------------

TRIALS = {
    "plain": {},
    "int64": {"id_words": 2},
    "label": {"expert_map": "label"},
    "filter": {"expert_map": "filter", "has_num_valid_pairs": True},
    "few of the experts are here": {"expert_map": "filter", "num_local": 3},
    "minus one": {"minus_one": True},
}


@pytest.mark.parametrize("options", TRIALS.values(), ids=TRIALS)
@pytest.mark.parametrize(
    ("n", "num_experts", "block_size"), [(1, 1, 1), (40, 8, 16), (3000, 100, 4)]
)
def test_align_trial_is_what_the_oracle_says(n, num_experts, block_size, options):
    options = {**options, "return_inverse": True, "sized_at_launch": True}
    problem = AlignProblem(n, num_experts, block_size, 0, **options)
    trial = selftest.align_example(problem, n, seed=n)
    first = trial.sizes["first_id"]
    held = trial.inputs["topk_ids"]
    assert (
        held.dtype == (np.int64 if problem.id_words == 2 else np.int32) and held.size == first + n
    )
    ids = held[first:] + (1 if problem.minus_one else 0)
    given = {"block_size": block_size, "num_experts": num_experts, "return_inverse": True}
    if problem.expert_map:
        here = trial.inputs["expert_map"] < (problem.num_local or num_experts)
        given["expert_map"] = np.where(here, trial.inputs["expert_map"], -1)
        given["ignore_invalid_experts"] = problem.expert_map == "filter"
    if problem.has_num_valid_pairs:
        given["num_valid_pairs"] = int(trial.inputs["num_valid_pairs"][0])
    want = oracle.align(ids.tolist(), **given)
    if problem.minus_one:
        want = want._replace(expert_ids=[max(x - 1, -1) for x in want.expert_ids])
    assert trial.sizes["num_pairs"] == n
    assert trial.sizes["capacity"] == oracle.capacity(n, block_size, num_experts, False)
    for name, expect in want._asdict().items():
        np.testing.assert_array_equal(trial.expected[name], expect, err_msg=name)
    if n > 1000:  # it tries what it is there for
        assert 0 < sum(want.tokens_per_expert) < n


@pytest.mark.parametrize(
    ("num_experts", "most", "block_size"), [(1, 1, 1), (8, 16, 8), (300, 13, 16)]
)
def test_batched_trial_is_what_the_oracle_says(num_experts, most, block_size):
    trial = selftest.batched_example(BatchedAlignProblem(num_experts, most, block_size), seed=3)
    given = trial.inputs["expert_num_tokens"]
    want = oracle.align_batched(given.tolist(), max_tokens_per_batch=most, block_size=block_size)
    for name in oracle.Expected._fields[:4]:
        np.testing.assert_array_equal(trial.expected[name], getattr(want, name), err_msg=name)
    if num_experts > 100:
        assert given.min() < 0 and given.max() > most


# -- proving, with a driver that emulates ---------------------------------------------------------


@pytest.fixture
def fake():
    return FakeCuda()


def compare(fake, problem, launches, cubins, shapes):
    machine_driver = driver.Driver(fake)
    compile_worker.compare_with_numpy(driver, machine_driver, problem, launches, cubins, shapes)


SELF_TESTED = [
    bucket_problem(8, 8, 4),
    bucket_problem(
        *(60, 8, 4, 2),
        expert_map="label",
        has_num_valid_pairs=True,
        return_counts=True,
        return_inverse=True,
    ),
    bucket_problem(100, 9, 4, return_counts=True, minus_one=True),
    bucket_problem(2500, 8, 16, expert_map="filter", return_inverse=True),
    BatchedAlignProblem(8, 16, 8),
]


@pytest.mark.parametrize(
    "problem", SELF_TESTED, ids=[f"{p.name[:5]} {p.num_pairs}" for p in SELF_TESTED]
)
def test_self_test_passes_a_right_program(problem, fake):
    launches, cubins, shapes = fake.compiled(problem)
    compare(fake, problem, launches, cubins, shapes)
    assert len(fake.launched) == 2 * len(launches)
    assert not fake._memory  # all of it was freed


@pytest.mark.parametrize("size", [(5, 4, 2, 16), (300, 9000, 4, 1200), (2500, 8, 16, 2620)])
def test_self_test_passes_a_program_of_one_size(size, fake):
    """Whose ids start where their memory does: as a benchmark compares with."""
    for problem in (AlignProblem(*size), AlignProblem(*size, id_words=2, expert_map="filter")):
        launches, cubins, shapes = fake.compiled(problem)
        assert not set(shapes) & {"num_pairs", "capacity", "first_id"}
        before = len(fake.launched)
        compare(fake, problem, launches, cubins, shapes)
        assert len(fake.launched) == before + len(launches) and not fake._memory
    launches, cubins, shapes = fake.compiled(problem)
    kernel, _, how = fake.kernels[-1]
    broken = dataclasses.replace(kernel, body=_off_by_one("sorted_token_ids")(kernel.body))
    fake.kernels[-1] = (broken, problem, how)
    with pytest.raises(compile_worker.CompileError, match=r"sorted_token_ids\[0\]"):
        compare(fake, problem, launches, cubins, shapes)


def _off_by_one(name):
    """A body that gets one cell of an output wrong."""

    def wrong(body):
        def run(t, r):
            body(t, r)
            t.block_sync()
            with t.if_(t.thread_id().eq(0) & t.cta_id().eq(0)):
                t.store(getattr(r, name), 0, t.load(getattr(r, name), 0) + 1)

        return run

    return wrong


@pytest.mark.parametrize("name", ["sorted_token_ids", "expert_ids", "num_tokens_post_padded"])
def test_self_test_finds_a_wrong_cell(name, fake):
    launches, cubins, shapes = fake.compiled(SELF_TESTED[0])
    kernel, problem, how = fake.kernels[-1]
    broken = dataclasses.replace(kernel, body=_off_by_one(name)(kernel.body))
    fake.kernels[-1] = (broken, problem, how)
    with pytest.raises(compile_worker.CompileError, match=rf"{name}\[0\]"):
        compare(fake, SELF_TESTED[0], launches, cubins, shapes)
    assert not fake._memory


def test_self_test_reports_a_launch_that_the_driver_refuses(fake):
    launches, cubins, shapes = fake.compiled(SELF_TESTED[0])
    fake.result = 1
    with pytest.raises(driver.DriverError, match=r"launching a kernel failed: .*error 1\)\.$"):
        compare(fake, SELF_TESTED[0], launches, cubins, shapes)
    fake.result = 901  # a capture that another thread has ended
    with pytest.raises(driver.DriverError, match=r"error 901\)\. Another call .*thread_local"):
        compare(fake, SELF_TESTED[0], launches, cubins, shapes)


# -- the process ----------------------------------------------------------------------------------


def _serve(request: str, code: str | None = None) -> dict:
    command = [sys.executable, str(SCRIPT)] if code is None else [sys.executable, "-c", code]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None;"
    f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
)
REQUEST = {
    "device": 4096,
    "folder": ".",
    "sources": disk_cache.source_digest(),
    "problems": [],
}
NO_SUCH_DEVICE = json.dumps(REQUEST)


@pytest.mark.parametrize("code", [None, WITHOUT_TORCH], ids=["script", "without torch"])
@pytest.mark.parametrize(
    ("request_", "kind"),
    [("no json", "JSONDecodeError"), ("{}", "KeyError"), (NO_SUCH_DEVICE, "OSError|DriverError")],
)
def test_a_bad_request_is_answered(request_, kind, code):
    answer = _serve(request_, code)
    assert set(answer) == {"error"}
    assert answer["error"].split(":")[0] in kind.split("|")


def test_sources_that_changed_since_the_request_are_not_compiled():
    """Their programs would be kept under the key of what the asking process had imported."""
    other = "0" * len(REQUEST["sources"])
    answer = _serve(json.dumps({**REQUEST, "sources": other}))
    assert set(answer) == {"error", "for_every_program"} and "were changed" in answer["error"]
    assert answer["for_every_program"] is True


def test_answer_says_what_each_step_took(monkeypatch, tmp_path):
    """Lowering is the real one; the others take as long as they sleep."""

    class Compiler(compile_worker.Compiler):
        def __init__(self, pool):
            self._pool, self.lower_seconds = pool, 0.0

        def _compile(self, module, size):
            time.sleep(0.02)
            raise compile_worker.CompileError("no plugin")

    problem = AlignProblem(8, 8, 4, 32, sized_at_launch=True)
    request = {"device": 0, "folder": str(tmp_path), "problems": []}
    request["problems"] = [["AlignProblem", problem._asdict()]] * 2
    slow = SimpleNamespace(
        enter=lambda device: None, assemble=lambda ptx: time.sleep(0.03) or ptx.encode()
    )
    module = SimpleNamespace(Driver=lambda: slow, DriverError=driver.DriverError)
    monkeypatch.setattr(compile_worker, "_beside", lambda name: module)
    monkeypatch.setattr(compile_worker, "Compiler", Compiler)
    assert [set(one) for one in compile_worker._serve(request)] == [{"error"}] * 2

    call, how = (
        Compiler.__call__,
        compile_worker.KernelLaunch("k", *[(1, 1, 1)] * 3, 0, ("topk_ids",)),
    )

    def compiled(self, kernels):
        with pytest.raises(compile_worker.CompileError, match="no plugin"):
            call(self, kernels)
        return [("ptx", how)] * len(kernels)

    monkeypatch.setattr(Compiler, "__call__", compiled)
    monkeypatch.setattr(compile_worker, "compare_with_numpy", lambda *a: time.sleep(0.04))
    begun = time.monotonic()
    first, second = (one["seconds"] for one in compile_worker._serve(request))
    whole = time.monotonic() - begun
    for steps in (first, second):
        assert steps["compile"] >= 0.02 and steps["assemble"] >= 0.03 and steps["self_test"] >= 0.04
        assert steps["lower"] > 0
    assert whole - 1 < sum(first.values()) + sum(second.values()) <= whole + 0.01


def test_lowering_needs_neither_torch_nor_a_gpu(monkeypatch):
    """The whole way to Mosaic's module, in a process of its own."""
    code = f"""
import importlib.util, json, os, sys
sys.modules["torch"] = None
os.environ["JAX_PLATFORMS"] = "cpu"
spec = importlib.util.spec_from_file_location("launch", {str(SCRIPT)!r})
launch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launch)
from moe_align_jax import types
problem = types.AlignProblem(8, 8, 4, 32, sized_at_launch=True)
made = []
def compiler(kernels):
    made.extend(launch.lower(kernel) for kernel in kernels)
    how = launch.KernelLaunch(kernels[0].name, (1, 1, 1), (1, 1, 1), (1, 1, 1), 0, ())
    return [("ptx", how)] * len(kernels)
launches, texts, shapes = launch.compile_program(compiler, problem)
from moe_align_jax._masked_quant import selftest as trial
files = [m.__file__ for n, m in sys.modules.items() if n.startswith("moe_align_jax.")]
print(json.dumps([len(made), made[0][:4].hex(), list(shapes), files]))
"""
    count, magic, shapes, files = _serve("", code)
    # All that it imports of ours is a part of the key.
    hashed, read = set(), pathlib.Path.read_bytes
    monkeypatch.setattr(
        pathlib.Path, "read_bytes", lambda path: (hashed.add(str(path)), read(path))[1]
    )
    disk_cache.code_digest.__wrapped__()
    assert len(files) > 10 and not set(files) - hashed
    assert count == 1 and bytes.fromhex(magic) == b"ML\xefR"  # MLIR bytecode
    problem = AlignProblem(8, 8, 4, 32, sized_at_launch=True)
    assert shapes == [*problem.inputs, *problem.outputs]


def test_another_jaxlib_is_refused(monkeypatch):
    import jaxlib.version

    for version in ("0.11.1", "0.13.0", "1.0.0"):
        monkeypatch.setattr(jaxlib.version, "__version__", version)
        with pytest.raises(compile_worker.MachineError, match="needs jaxlib"):
            compile_worker.Compiler(POOL)


def test_this_jaxlib_is_not_refused():
    with pytest.raises(compile_worker.MachineError, match="does not load"):
        compile_worker.Compiler(POOL, "/dev/null")  # no library: it gets as far as loading it


REASONS = {
    "machine": (compile_worker.MachineError("no plugin"), True),
    "import": (ImportError("half installed"), True),
    "memory": (driver.DriverError("out of memory", 2), None),
    "disk": (OSError(28, "No space left on device"), None),
}


@pytest.mark.parametrize("name", REASONS)
def test_an_error_says_whether_every_program_meets_it(name, monkeypatch, capsys):
    error, for_every_program = REASONS[name]

    def fails(request):
        raise error

    monkeypatch.setattr(compile_worker, "_serve", fails)
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert compile_worker.main() == 0
    answer = json.loads(capsys.readouterr().out)
    assert str(error) in answer["error"] and answer.get("for_every_program") == for_every_program


@pytest.mark.parametrize(("code", "mode", "kept"), [(46, 3, True), (46, 0, False), (2, 3, False)])
def test_exclusive_compute_mode_is_told_from_what_may_pass(code, mode, kept, fake, monkeypatch):
    def refuse(device):
        raise driver.DriverError("cuDevicePrimaryCtxRetain failed", code)

    fake.compute_mode = mode
    machine_driver = driver.Driver(fake)
    monkeypatch.setattr(machine_driver, "enter", refuse)
    with pytest.raises(RuntimeError, match="PrimaryCtxRetain") as caught:
        compile_worker._enter(driver, machine_driver, 0)
    assert isinstance(caught.value, compile_worker.MachineError) == kept
    assert ("nvidia-smi -c DEFAULT" in str(caught.value)) == kept
