"""launch.py without a GPU: reading Mosaic's host code, the trials, proving by a fake driver, the process."""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from moe_align_jax.types import AlignProblem, BatchedAlignProblem
from tests import oracle
from tests.torch_bridge.fake_cuda import FakeCuda
from torch_bridge import direct, driver, launch, modules, trials

SCRIPT = pathlib.Path(launch.__file__)
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
    lines.append("  %k = load ptr, ptr %handle, align 8")
    struct = "{ " + ", ".join(["ptr"] * len(order)) + " }"
    lines.append(f"  %s = alloca {struct}, align 8")
    for slot, index in enumerate(order):
        lines.append(f"  %p{slot} = getelementptr {struct}, ptr %s, i32 0, i32 {slot}")
        value = "%k" if slot in foreign else f"%b{index}"
        lines.append(f"  store ptr {value}, ptr %p{slot}, align 8")
    text = ", ".join(f"i32 {x}" for x in numbers)
    lines += [f"  call void @{function}(ptr %k, {text}, ptr %s, ptr %q)"] * calls
    return "\n".join(
        [*lines, "  ret void", "}", "", "define void @unused() {", "  ret void", "}", ""]
    )


V11 = {"table": "%2"}
V12 = {
    "table": "%1",
    "function": "mosaic_gpu_build_kernel_spec",
    "numbers": (16, 1, 1, 0, 0, 0, 256, 1, 1, 4096, 4, 0),
}


@pytest.mark.parametrize("layout", [V11, V12], ids=["jaxlib 0.11", "jaxlib 0.12"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_launch_is_read(layout, order):
    got = launch.read_launch(host_code(**layout, order=order), "align", BUFFERS)
    assert got.entry == "align" and got.shared_bytes == 4096
    assert got.grid == (16, 1, 1) and got.block == (256, 1, 1) and got.cluster == (1, 1, 1)
    assert got.parameters == tuple(BUFFERS[i] for i in order)


@pytest.mark.parametrize("layout", [V11, V12], ids=["jaxlib 0.11", "jaxlib 0.12"])
def test_launch_in_clusters_is_read(layout):
    numbers = layout.get("numbers", (16, 1, 1, 0, 0, 0, 256, 1, 1, 4096, 0))
    numbers = (*numbers[:3], 8, 1, 1, *numbers[6:])
    got = launch.read_launch(host_code(**layout | {"numbers": numbers}), "align", BUFFERS)
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
    with pytest.raises(launch.CompileError):
        launch.read_launch(host_code(**layout | REFUSED[case]), "align", BUFFERS)


def test_launch_with_more_buffers_than_the_call_is_refused():
    with pytest.raises(launch.CompileError, match="is no buffer of the call"):
        launch.read_launch(host_code(), "align", BUFFERS[:3])


def test_launch_with_a_parameter_left_out_is_refused():
    text = host_code().replace("  store ptr %b1, ptr %p1, align 8\n", "")
    with pytest.raises(launch.CompileError, match="not understood"):
        launch.read_launch(text, "align", BUFFERS)


# -- trials ---------------------------------------------------------------------------------------

TRIALS = {
    "plain": {},
    "int64": {"id_words": 2},
    "label": {"expert_map": "label"},
    "filter": {"expert_map": "filter", "has_num_valid_pairs": True},
    "minus one": {"minus_one": True},
}


@pytest.mark.parametrize("options", TRIALS.values(), ids=TRIALS)
@pytest.mark.parametrize(
    ("n", "num_experts", "block_size"), [(1, 1, 1), (40, 8, 16), (3000, 100, 4)]
)
def test_align_trial_is_what_the_oracle_says(n, num_experts, block_size, options):
    options = {**options, "return_inverse": True, "sized_at_launch": True}
    problem = AlignProblem(n, num_experts, block_size, 0, **options)
    trial = trials.align_trial(problem, n, seed=n)
    first = trial.words["first_id"]
    held = trial.arrays["topk_ids"]
    assert (
        held.dtype == (np.int64 if problem.id_words == 2 else np.int32) and held.size == first + n
    )
    ids = held[first:] + (1 if problem.minus_one else 0)
    given = {"block_size": block_size, "num_experts": num_experts, "return_inverse": True}
    if problem.expert_map:
        given["expert_map"] = trial.arrays["expert_map"]
        given["ignore_invalid_experts"] = problem.expert_map == "filter"
    if problem.has_num_valid_pairs:
        given["num_valid_pairs"] = int(trial.arrays["num_valid_pairs"][0])
    want = oracle.align(ids.tolist(), **given)
    if problem.minus_one:
        want = want._replace(expert_ids=[max(x - 1, -1) for x in want.expert_ids])
    assert trial.words["num_pairs"] == n
    assert trial.words["capacity"] == oracle.capacity(n, block_size, num_experts, False)
    for name, expect in want._asdict().items():
        np.testing.assert_array_equal(trial.want[name], expect, err_msg=name)
    if n > 1000:  # it tries what it is there for
        assert 0 < sum(want.tokens_per_expert) < n


@pytest.mark.parametrize(
    ("num_experts", "most", "block_size"), [(1, 1, 1), (8, 16, 8), (300, 13, 16)]
)
def test_batched_trial_is_what_the_oracle_says(num_experts, most, block_size):
    trial = trials.batched_trial(BatchedAlignProblem(num_experts, most, block_size), seed=3)
    given = trial.arrays["expert_num_tokens"]
    want = oracle.align_batched(given.tolist(), max_tokens_per_batch=most, block_size=block_size)
    for name in oracle.Expected._fields[:4]:
        np.testing.assert_array_equal(trial.want[name], getattr(want, name), err_msg=name)
    if num_experts > 100:
        assert given.min() < 0 and given.max() > most


# -- proving, with a driver that emulates ---------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(driver, "library", lambda: fake)
    return fake


PROVED = [
    direct.program_problem(8, 8, 4, 1, "", False, False, False, False),
    direct.program_problem(60, 8, 4, 2, "label", True, True, True, False),
    direct.program_problem(100, 9, 4, 1, "", False, True, False, True),
    direct.program_problem(2500, 8, 16, 1, "filter", False, False, True, False),
    BatchedAlignProblem(8, 16, 8),
]


@pytest.mark.parametrize("problem", PROVED, ids=[f"{p.name[:5]} {p.num_pairs}" for p in PROVED])
def test_prove_passes_a_right_program(problem, fake):
    launches, cubins, shapes = fake.compiled(problem)
    launch.prove(driver, problem, launches, cubins, shapes)
    assert len(fake.launched) == 2 * len(launches)
    assert not fake._memory  # all of it was freed


@pytest.mark.parametrize("size", [(5, 4, 2, 16), (300, 9000, 4, 1200), (2500, 8, 16, 2620)])
def test_prove_passes_a_program_of_one_size(size, fake):
    """Whose ids start where their memory does: as a benchmark compares with."""
    for problem in (AlignProblem(*size), AlignProblem(*size, id_words=2, expert_map="filter")):
        launches, cubins, shapes = fake.compiled(problem)
        assert not set(shapes) & {"num_pairs", "capacity", "first_id"}
        before = len(fake.launched)
        launch.prove(driver, problem, launches, cubins, shapes)
        assert len(fake.launched) == before + len(launches) and not fake._memory
    launches, cubins, shapes = fake.compiled(problem)
    kernel, _, how = fake.kernels[-1]
    broken = dataclasses.replace(kernel, body=_off_by_one("sorted_token_ids")(kernel.body))
    fake.kernels[-1] = (broken, problem, how)
    with pytest.raises(launch.CompileError, match=r"sorted_token_ids\[0\]"):
        launch.prove(driver, problem, launches, cubins, shapes)


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
def test_prove_finds_a_wrong_cell(name, fake):
    launches, cubins, shapes = fake.compiled(PROVED[0])
    kernel, problem, how = fake.kernels[-1]
    broken = dataclasses.replace(kernel, body=_off_by_one(name)(kernel.body))
    fake.kernels[-1] = (broken, problem, how)
    with pytest.raises(launch.CompileError, match=rf"{name}\[0\]"):
        launch.prove(driver, PROVED[0], launches, cubins, shapes)
    assert not fake._memory


def test_prove_reports_a_launch_that_the_driver_refuses(fake):
    launches, cubins, shapes = fake.compiled(PROVED[0])
    fake.result = 1
    with pytest.raises(driver.DriverError, match=r"launching a kernel failed: .*error 1"):
        launch.prove(driver, PROVED[0], launches, cubins, shapes)


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
    "sources": modules.source_digest(),
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
    assert set(answer) == {"error", "until"} and "were changed" in answer["error"]
    assert answer["until"] == "restart"


def test_answer_says_what_each_step_took(monkeypatch, tmp_path):
    """Lowering is the real one; the others take as long as they sleep."""

    class Compiler(launch.Compiler):
        def __init__(self):
            self.lower_seconds = 0.0

        def _compile(self, module, size):
            time.sleep(0.02)
            raise launch.CompileError("no plugin")

    problem = AlignProblem(8, 8, 4, 32, sized_at_launch=True)
    request = {"device": 0, "folder": str(tmp_path), "problems": []}
    request["problems"] = [["AlignProblem", problem._asdict()]] * 2
    slow = SimpleNamespace(
        enter=lambda device: None, assemble=lambda ptx: time.sleep(0.03) or ptx.encode()
    )
    monkeypatch.setattr(launch, "_beside", lambda name: slow)
    monkeypatch.setattr(launch, "Compiler", Compiler)
    assert [set(one) for one in launch._serve(request)] == [{"error"}] * 2

    call, how = Compiler.__call__, launch.KernelLaunch("k", *[(1, 1, 1)] * 3, 0, ("topk_ids",))

    def compiled(self, kernel):
        with pytest.raises(launch.CompileError, match="no plugin"):
            call(self, kernel)
        return "ptx", how

    monkeypatch.setattr(Compiler, "__call__", compiled)
    monkeypatch.setattr(launch, "prove", lambda *a: time.sleep(0.04))
    begun = time.monotonic()
    first, second = (one["seconds"] for one in launch._serve(request))
    whole = time.monotonic() - begun
    for steps in (first, second):
        assert steps["compile"] >= 0.02 and steps["assemble"] >= 0.03 and steps["prove"] >= 0.04
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
def compiler(kernel):
    made.append(launch.lower(kernel))
    return "ptx", launch.KernelLaunch(kernel.name, (1, 1, 1), (1, 1, 1), (1, 1, 1), 0, ())
launches, texts, shapes = launch.compile_program(compiler, problem)
from moe_align_jax._kernels.masked_quant import trial
files = [m.__file__ for n, m in sys.modules.items() if n.startswith("moe_align_jax.")]
print(json.dumps([len(made), made[0][:4].hex(), list(shapes), files]))
"""
    count, magic, shapes, files = _serve("", code)
    # All that it imports of ours is a part of the key.
    hashed, read = set(), pathlib.Path.read_bytes
    monkeypatch.setattr(
        pathlib.Path, "read_bytes", lambda path: (hashed.add(str(path)), read(path))[1]
    )
    modules.code_digest.__wrapped__()
    assert len(files) > 10 and not set(files) - hashed
    assert count == 1 and bytes.fromhex(magic) == b"ML\xefR"  # MLIR bytecode
    problem = AlignProblem(8, 8, 4, 32, sized_at_launch=True)
    assert shapes == [*problem.inputs, *problem.outputs]


def test_another_jaxlib_is_refused(monkeypatch):
    import jaxlib.version

    for version in ("0.11.1", "0.13.0", "1.0.0"):
        monkeypatch.setattr(jaxlib.version, "__version__", version)
        with pytest.raises(launch.MachineError, match="needs jaxlib"):
            launch.Compiler()


def test_this_jaxlib_is_not_refused():
    with pytest.raises(launch.MachineError, match="does not load"):
        launch.Compiler("/dev/null")  # no library: it gets as far as loading it


REASONS = {
    "machine": (launch.MachineError("no plugin"), "changed"),
    "process": (launch.CompileError("other sources"), "restart"),
    "import": (ImportError("half installed"), "restart"),
    "memory": (driver.DriverError("out of memory", 2), None),
    "disk": (OSError(28, "No space left on device"), None),
}


@pytest.mark.parametrize("name", REASONS)
def test_an_error_says_how_long_it_holds(name, monkeypatch, capsys):
    error, until = REASONS[name]

    def fails(request):
        raise error

    monkeypatch.setattr(launch, "_serve", fails)
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launch.main() == 0
    answer = json.loads(capsys.readouterr().out)
    assert str(error) in answer["error"] and answer.get("until") == until


@pytest.mark.parametrize(("code", "mode", "kept"), [(46, 3, True), (46, 0, False), (2, 3, False)])
def test_exclusive_compute_mode_is_told_from_what_may_pass(code, mode, kept, fake, monkeypatch):
    def refuse(device):
        raise driver.DriverError("cuDevicePrimaryCtxRetain failed", code)

    fake.compute_mode = mode
    monkeypatch.setattr(driver, "enter", refuse)
    with pytest.raises(RuntimeError, match="PrimaryCtxRetain") as caught:
        launch._enter(driver, 0)
    assert isinstance(caught.value, launch.MachineError) == kept
    assert ("nvidia-smi -c DEFAULT" in str(caught.value)) == kept
