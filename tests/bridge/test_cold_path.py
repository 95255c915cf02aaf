"""A first call decides once and goes straight on; a call like it goes from the entry point to the launch."""

import collections
import sys
import types

import pytest
import torch

import torch_bridge
from tests.bridge.fake_cuda import assert_results, want_of
from tests.bridge.helpers import ids_of
from torch_bridge import _ops, _plan, _specs, sglang, vllm
from torch_bridge._direct import call as direct_call
from torch_bridge._direct import disk_cache, fast_path

ARRAY, IDS = ids_of(torch.int32)
COUNTS = torch.tensor([3, 0, 13, 1, 20, 4], dtype=torch.int32)
OURS = ("/torch_bridge/", "/moe_align_jax/")


class Trace:
    """The functions of our two packages that a call passes, in order, without what they call in tests/.

    (There stand the fake driver, which runs our emulator, and the compiler, which is another process.)
    """

    def __init__(self, call):
        self.calls: list[tuple[str, str]] = []
        self._in_tests = 0
        sys.setprofile(self._note)
        try:
            self.result = call()
        finally:
            sys.setprofile(None)

    def _note(self, frame: types.FrameType, event: str, _) -> None:
        file = frame.f_code.co_filename
        if event in ("call", "return") and "/tests/" in file:
            # The lambda of the test itself is the first call.
            self._in_tests += (1 if event == "call" else -1) * (frame.f_code.co_name != "<lambda>")
        elif event == "call" and not self._in_tests and any(part in file for part in OURS):
            self.calls.append((file, frame.f_code.co_name))

    @property
    def changes(self) -> int:
        """How often a call goes from one file to another."""
        files = [file for file, _ in self.calls]
        return sum(a != b for a, b in zip(files, files[1:], strict=False))

    @property
    def counts(self) -> collections.Counter:
        return collections.Counter(name for _, name in self.calls)

    def __str__(self) -> str:
        return "\n".join(f"{file} {name}" for file, name in self.calls)


@pytest.fixture
def gpu(fake):
    """A machine that launches calls on CPU tensors directly, whose sources and tables have been read."""
    fake.launches_directly = True
    disk_cache.source_digest()
    return fake


def test_a_first_call_is_short(gpu):
    """Here the size arithmetic of the bucket is known, by `explain`, and the program is compiled."""
    torch_bridge.explain(IDS, 16, 8)
    trace = Trace(lambda: torch_bridge.moe_align_block_size(IDS, 16, 8))
    assert len(gpu.compiles) == 1
    assert_results(_specs.AlignSpec(IDS.numel(), 16, 8), trace.result, want_of_ids())
    assert 20 < len(trace.calls) <= 60, trace
    assert trace.changes <= 20, trace
    once = ("attempt", "check_alignment", "resolve", "problem_for", "failure", "copies")
    once += ("first_launch", "program_for", "prepare", "load", "store", "launch", "keep")
    assert {name: trace.counts[name] for name in once} == dict.fromkeys(once, 1)


def test_a_first_call_of_an_unknown_bucket_is_hardly_longer(gpu):
    """Its arithmetic (tuning table, sizes of the form) is counted too."""
    trace = Trace(lambda: torch_bridge.moe_align_block_size(IDS.repeat(7, 1), 13, 8))
    assert len(trace.calls) <= 75 and trace.changes <= 30, trace


def test_a_first_call_of_a_loaded_program_is_shorter(gpu):
    torch_bridge.moe_align_block_size(IDS, 16, 8)
    trace = Trace(lambda: torch_bridge.moe_align_block_size(IDS[:30], 16, 8))
    assert len(gpu.compiles) == 1
    assert len(trace.calls) <= 50 and trace.changes <= 22, trace
    assert not {"prepare", "load", "store"} & set(trace.counts)


def want_of_ids():
    return want_of(_specs.AlignSpec(IDS.numel(), 16, 8), ARRAY, {})


def buffers(*sizes):
    return tuple(torch.empty(n, dtype=torch.int32) for n in sizes)


ROWS = _specs.AlignSpec(IDS.numel(), 16, 8).capacity
SGLANG_ROWS = _specs.SglangSpec(IDS.numel(), 16, 8).capacity
OUT = buffers(ROWS, -(-ROWS // 8), 1)
LARGER = buffers(ROWS + 40, -(-(ROWS + 40) // 8), 1)
SGLANG_OUT = buffers(SGLANG_ROWS, -(-SGLANG_ROWS // 8), 1)
BATCHED_OUT = buffers(6 * 16, 6 * 2, 1)
SCRATCH = torch.zeros(18, dtype=torch.int32)
MAP = torch.arange(16, dtype=torch.int32) - 3
# Entry points, and the functions that a repeated call passes.
ENTRIES = {
    "align": (lambda: torch_bridge.moe_align_block_size(IDS, 16, 8), 5),
    "topk": (lambda: torch_bridge.moe_align_block_size(IDS, 16, 8, 3), 5),
    "map": (lambda: torch_bridge.moe_align_block_size(IDS, 16, 8, expert_map=MAP), 5),
    "out": (lambda: torch_bridge.moe_align_block_size(IDS, 16, 8, out=OUT), 6),
    "blocks": (lambda: torch_bridge.align_blocks(IDS, num_experts=16, block_size=8), 6),
    "vllm": (lambda: vllm.moe_align_block_size(IDS, 8, 16), 5),
    "vllm in place": (lambda: vllm.ops_moe_align_block_size(IDS, 16, 8, *OUT), 6),
    "vllm, larger": (lambda: vllm.ops_moe_align_block_size(IDS, 16, 8, *LARGER), 6),
    "batched": (lambda: vllm.batched_moe_align_block_size(13, 8, COUNTS), 5),
    "batched in place": (
        lambda: vllm.ops_batched_moe_align_block_size(13, 8, COUNTS, *BATCHED_OUT),
        6,
    ),
    "sglang": (lambda: sglang.moe_align_block_size(IDS, 8, 16), 6),
    "sglang in place": (
        lambda: sglang.ops_moe_align_block_size(IDS, 17, 8, *SGLANG_OUT, SCRATCH),
        7,
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_call_is_known_after_the_first_one(name, gpu):
    """From the second call on nothing is checked or planned; by the fourth, torch's guards answer."""
    call, num_functions = ENTRIES[name]
    call()
    for _ in range(3):
        gpu.launched.clear()
        trace = Trace(call)
        assert len(gpu.launched) == 1
        assert not {"resolve", "check_alignment", "program_for"} & set(trace.counts), trace
    assert len(trace.calls) == num_functions, trace
    assert trace.changes == 2 or name.startswith(("blocks", "sglang")), trace


def test_explain_shows_the_object_that_a_first_call_obeys(gpu, monkeypatch):
    decided, launch = [], direct_call.first_launch
    resolve = _plan.resolve

    def noted(*arguments, **options):
        decided.append(resolve(*arguments, **options))
        return decided[-1]

    obeyed = []
    monkeypatch.setattr(_plan, "resolve", noted)
    monkeypatch.setattr(
        direct_call,
        "first_launch",
        lambda store, one, *a: obeyed.append(one) or launch(store, one, *a),
    )
    strided = torch.stack([IDS, IDS], 1)[:, 0]
    explained = torch_bridge.explain(strided, 16, 8)
    assert explained is decided[0].plan and not obeyed
    torch_bridge.moe_align_block_size(strided, 16, 8)
    assert decided[1]._replace(function="explain") == decided[0]
    assert len(obeyed) == 1 and obeyed[0] is decided[1]
    assert explained.path == "direct" and set(explained.copies) == {"topk_ids"}


@pytest.mark.parametrize("name", ["num_valid_pairs", "expert_map"])
def test_a_lazily_negated_operand_is_read_with_its_sign(name, gpu):
    """Its memory holds the other sign: the plan says that it is copied, and it is."""
    plain = {"num_valid_pairs": torch.tensor(50, dtype=torch.int32), "expert_map": MAP}[name]
    negated = torch._neg_view(-plain)
    assert negated.is_neg() and torch.equal(negated, plain)
    spec, operands = _specs.AlignSpec(IDS.numel(), 16, 8), {"topk_ids": IDS, name: negated}
    assert "negation" in _plan.resolve("f", spec, operands).plan.copies[name]
    assert_results(spec, _ops.run(spec, operands), want_of(spec, ARRAY, {name: plain}))


def test_the_key_of_a_spec_is_what_entry_points_write(gpu):
    for call, _ in ENTRIES.values():
        fast_path.forget_all()
        call()
        assert len(fast_path.known_calls()) == 1
