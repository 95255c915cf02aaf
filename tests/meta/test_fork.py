"""Calls in a forked process: an error in place of a hang where jax was running, a result where it was not."""

import os

import pytest

from tests import forked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# What a process does before it forks, and what its child then does. `ids` are others than those before, so
# that the child has something to compile: that is what hangs.
PREPARE = """
import os, warnings, sys
import numpy as np
warnings.simplefilter("ignore")  # jax's own, at the fork
"""
FORK = """
sys.stdout.flush()
child = os.fork()
if child == 0:
    try:
        print("result", work())
    except BaseException as error:
        print(type(error).__name__, "|", error, "|", os.getpid(), os.getppid())
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
print("parent", parent())
"""
LIBRARY = "import jax, jax.numpy as jnp, moe_align_jax as maj\n"
ALIGN = """
def align(n):
    out = maj.moe_align_block_size(np.zeros(n, np.int32), block_size=4, num_experts=4)
    return out.num_tokens_post_padded.tolist()
parent = lambda: align(9)
"""
BRIDGE = "import torch, torch_bridge\n"
BRIDGE_ALIGN = """
def align(n, **options):
    ids = torch.zeros(n, dtype=torch.int32)
    return torch_bridge.moe_align_block_size(ids, 4, 4, **options)[2].tolist()
parent = lambda: align(9)
"""


@pytest.fixture(scope="module")
def library():
    with forked.start(LIBRARY, JAX_PLATFORMS="cpu") as process:
        yield process


@pytest.fixture(scope="module")
def bridge():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    with forked.start(BRIDGE, JAX_PLATFORMS="cpu") as process:
        yield process


def run(process, *parts):
    """Lines that the script and its child print."""
    done = process.run(PREPARE + "".join(parts) + FORK)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def assert_refused(lines, function):
    kind, text, processes = lines[0].split(" | ")
    child, parent = processes.split()
    assert kind == "RuntimeError"
    assert text.startswith(f"{function}: the call must be made in a process that was not forked")
    assert f"got process {child}, forked off process {parent}. " in text and '"spawn"' in text


ARRAYS = """
align(3)
x, ids = np.ones((3, 2), np.float32), np.zeros((3, 1), np.int32)
rows, masked = maj.permute_to_masked(x, ids, num_experts=2)
flat, contiguous = maj.permute_to_contiguous(x, ids, num_experts=2)
load = maj.init_expert_load("stat", num_layers=1, num_physical_experts=2)
location = maj.ExpertLocation.trivial(1, 2, 4)
moves = maj.plan_expert_moves([[0, 1]], [[1, 0]], num_gpus=1)
aligned = maj.moe_align_block_size(ids, block_size=4, num_experts=2)
recorder = maj.ExpertDistributionRecorder("stat", num_layers=1, num_physical_experts=2, num_gpus=1)
recorder.start_record()
"""
CALLS = {
    "moe_align_block_size": "align(4097)",
    "batched_moe_align_block_size": "maj.batched_moe_align_block_size("
    "np.ones(3, np.int32), max_tokens_per_batch=4, block_size=2)",
    "padded_group_sizes": "maj.padded_group_sizes(aligned, block_size=8)",
    "permute_to_masked": "maj.permute_to_masked(x, ids, num_experts=3)",
    "unpermute_from_masked": "maj.unpermute_from_masked(rows, masked)",
    "permute_to_contiguous": "maj.permute_to_contiguous(x, ids, num_experts=3)",
    "unpermute_from_contiguous": "maj.unpermute_from_contiguous(flat, contiguous)",
    "silu_and_mul_masked_quant": "maj.silu_and_mul_masked_quant("
    "np.ones((1, 2, 256), np.float32), np.ones(1, np.int32))",
    "dispatch": "maj.dispatch(x, ids, x[:, :1], axis_name='ep', num_experts=2)",
    "combine": "maj.combine(x, None)",
    "init_expert_load": "maj.init_expert_load('stat', num_layers=3, num_physical_experts=2)",
    "record_expert_load": "maj.record_expert_load(load, 0, aligned.tokens_per_expert)",
    "commit_expert_load": "maj.commit_expert_load(load)",
    "collect_expert_load": "maj.collect_expert_load(load)",
    "ExpertLoad": "load.recording(True)",
    "metrics": "recorder.metrics()",
    "to_physical_ids": "maj.to_physical_ids(ids, location, layer=0)",
    "ExpertLocation.from_map": "maj.ExpertLocation.from_map([[0, 1, 0]])",
    "ExpertLocation.from_counts": "maj.ExpertLocation.from_counts("
    "[[1, 2]], num_physical_experts=2, num_gpus=1)",
    "ExpertLocation.layer": "location.layer(0)",
    "ExpertLocation.for_rank": "location.for_rank(0)",
    "ExpertLocation.update": "location.update(location, [0])",
    "update_expert_weights": "maj.update_expert_weights(x, moves)",
}


def test_every_function_that_runs_jax_refuses_in_a_process_forked_after_a_call(library):
    work = f"""
calls = {CALLS!r}
def work():
    found = []
    for name, call in calls.items():
        try:
            found.append(f"{{name}} gave {{eval(call)}}")
        except RuntimeError as error:
            text = str(error)
            if not text.startswith(name + ": the call must") or str(os.getpid()) not in text:
                found.append(f"{{name}}: {{text}}")
    raise LookupError(found)
"""
    lines = run(library, ALIGN, ARRAYS, work)
    assert lines[0].startswith("LookupError | [] |") and lines[-1] == "parent [12]"


def test_a_process_forked_after_a_call_gets_an_error_that_names_the_processes(library):
    lines = run(library, ALIGN, "align(3)\nwork = lambda: align(4097)")
    assert_refused(lines, "moe_align_block_size")
    assert lines[-1] == "parent [12]"


def test_a_process_forked_after_any_use_of_jax_is_refused(library):
    lines = run(library, ALIGN, "jnp.zeros(3) + 1\nwork = lambda: align(4097)")
    assert_refused(lines, "moe_align_block_size")


def test_a_trace_in_the_forked_process_is_refused(library):
    lines = run(library, ALIGN, "align(3)\nwork = lambda: jax.jit(lambda: align(99))()")
    assert_refused(lines, "moe_align_block_size")


def test_a_process_forked_before_the_first_use_of_jax_calls(library):
    lines = run(library, ALIGN, "work = lambda: (align(4097), align(5))")
    assert lines == ["result ([4100], [8])", "parent [12]"]


def test_children_of_a_refused_process_are_refused(library):
    nested = """
align(3)
def work():
    child = os.fork()
    if child == 0:
        try:
            align(4097)
        except RuntimeError:
            os._exit(7)
        os._exit(8)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    assert run(library, ALIGN, nested)[0] == "result 7"


# -- torch_bridge on a CPU ---------------------------------------------------------------------------


BRIDGE_CALLS = {
    "moe_align_block_size": "align(4097)",
    "a named path": "align(4097, path='dlpack')",
    "align_blocks": "torch_bridge.align_blocks(ids, num_experts=4, block_size=4)",
    "out": "torch_bridge.moe_align_block_size(ids, 4, 4, out=torch_bridge."
    "moe_align_block_size(ids, 4, 4))",
    "vllm": "torch_bridge.vllm.moe_align_block_size(ids.view(-1, 1), 4, 4)",
    "sglang": "torch_bridge.sglang.moe_align_block_size(ids.view(-1, 1), 4, 4)",
    "to_jax": "torch_bridge.to_jax(torch.zeros(4096))",
    "to_torch": "torch_bridge.to_torch(array)",
    "explain": "torch_bridge.explain(ids, 4, 4)",
}


def test_the_bridge_refuses_in_a_process_forked_after_a_call(bridge):
    work = f"""
align(3)
import jax.numpy
array = jax.numpy.zeros(3)
ids = torch.zeros(4097, dtype=torch.int32)
def work():
    found = []
    for name, call in {BRIDGE_CALLS!r}.items():
        try:
            found.append(f"{{name}} gave {{eval(call)}}")
        except RuntimeError as error:
            if "the call must be made in a process that was not forked" not in str(error):
                found.append(f"{{name}}: {{error}}")
    raise LookupError(found)
"""
    lines = run(bridge, BRIDGE_ALIGN, work)
    assert lines[0].startswith("LookupError | [] |") and lines[-1] == "parent [12]"


def test_the_bridge_calls_in_a_process_forked_before_jax_was_used(bridge):
    lines = run(bridge, BRIDGE_ALIGN, "work = lambda: (align(4097), 'jax' in sys.modules)")
    assert lines == ["result ([4100], True)", "parent [12]"]


def test_what_the_bridge_does_without_jax_goes_on_after_a_fork(bridge):
    work = """
align(3)
def work():
    no_pairs = align(0)
    recorder = torch_bridge.sglang.ExpertDistributionRecorder
    return no_pairs, recorder.__name__
"""
    lines = run(bridge, BRIDGE_ALIGN, work)
    assert lines[0] == "result ([0], 'ExpertDistributionRecorder')"
