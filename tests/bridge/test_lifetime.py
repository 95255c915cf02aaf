"""Memory and threads on a CPU: overwritten inputs, dropped tensors, eight threads at once."""

import concurrent.futures
import gc
import random
import threading

import jax
import numpy as np
import pytest
import torch

import torch_bridge
from tests import oracle
from tests.bridge.helpers import X64, assert_triple, ids_of
from torch_bridge import _plan, _specs, dlpack
from torch_bridge._dlpack_path import run

TRIES = 100
NUM_TOKENS = 20_000  # long enough a program that jax runs it asynchronously


def _large(seed):
    array, ids = ids_of(torch.int32, "uniform", NUM_TOKENS, 4, 64, seed=seed)
    return ids, oracle.align_numpy(array, block_size=32, num_experts=64)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_input_may_be_overwritten_right_after_the_call(dtype):
    base, want = _large(0)
    for _ in range(TRIES):
        ids = base.to(dtype, copy=True)
        got = torch_bridge.moe_align_block_size(ids, 64, 32)
        ids.fill_(1)
        assert_triple(got, want)


def test_without_the_hand_over_an_overwritten_input_is_seen(monkeypatch):
    """The export waits for the program. Without it the program reads what the caller wrote later."""
    monkeypatch.setattr(dlpack, "to_torch", lambda result: result)
    monkeypatch.setattr(run, "hand_over", lambda results, **options: results)
    base, want = _large(0)
    problem = _specs.AlignSpec(base.numel(), 64, 32)
    wrong = 0
    for _ in range(TRIES):
        ids = base.clone()
        operands = {"topk_ids": ids}
        got = run.run_in_jax(_plan.resolve("f", problem, operands), operands)
        ids.fill_(1)
        wrong += not np.array_equal(np.asarray(got[0]), want.sorted_token_ids)
    assert wrong > 0


def test_out_is_complete_when_the_call_returns():
    base, want = _large(1)
    out = tuple(torch.empty(len(x), dtype=torch.int32) for x in want[:3])
    for _ in range(TRIES):
        for tensor in out:
            tensor.fill_(-7)
        torch_bridge.moe_align_block_size(base, 64, 32, out=out)
        assert_triple(out, want)


def test_tensors_may_be_dropped_in_any_order():
    """Inputs and results, while jax and torch take and give memory of the same sizes."""
    rng = random.Random(0)
    base, want = _large(2)
    gc.freeze()  # each collection below looks at what this test makes, in place of all that there is
    fields = dict(zip(oracle.Expected._fields, want, strict=True))
    for _ in range(TRIES):
        ids = base.clone()
        local = torch.arange(64, dtype=torch.int32)
        got = torch_bridge.align_blocks(ids, num_experts=64, block_size=32, expert_map=local)
        alive = {"ids": ids, "map": local} | {
            k: v for k, v in got._asdict().items() if v is not None
        }
        del ids, local, got
        names = list(alive)
        rng.shuffle(names)
        for name in names:
            del alive[name]
            torch.full((len(want.sorted_token_ids),), 9, dtype=torch.int32)
            jax.numpy.full(len(want.sorted_token_ids), 9, dtype=np.int32)
            if rng.random() < 0.05:
                gc.collect()
            for other, tensor in alive.items():
                if other in fields:
                    np.testing.assert_array_equal(tensor.numpy(), fields[other])


def test_results_survive_the_jax_arrays_and_clear_caches():
    base, want = _large(3)
    got = torch_bridge.moe_align_block_size(base, 64, 32)
    jax.clear_caches()
    gc.collect()
    assert_triple(got, want)


def test_calls_do_not_accumulate_arrays():
    base, _ = _large(4)
    torch_bridge.moe_align_block_size(base, 64, 32)
    gc.collect()
    before = len(jax.live_arrays())
    for _ in range(TRIES):
        torch_bridge.moe_align_block_size(base, 64, 32)
    gc.collect()
    assert len(jax.live_arrays()) <= before


def test_eight_threads():
    """100 tries each, of sizes, dtypes and options that differ from thread to thread."""
    start = threading.Barrier(8)

    def work(thread):
        cases = []
        for size in range(3):
            dtype = (torch.int32, torch.int64, torch.uint8)[(thread + size) % 3]
            array, ids = ids_of(dtype, "outside", 50 + 97 * size, 2, 16, seed=thread)
            options = {"block_size": 8, "num_experts": 16, "return_inverse": size == 1}
            cases.append((ids, options, oracle.align(array.ravel(), **options)))
        start.wait()
        for attempt in range(TRIES):
            ids, options, want = cases[attempt % len(cases)]
            given = ids.clone()
            got = torch_bridge.align_blocks(given, **options)
            given.zero_()
            oracle.assert_same(got, want)
        return TRIES

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [TRIES] * 8
    assert jax.config.jax_enable_x64 == X64


def test_x64_is_never_on_in_another_thread(monkeypatch):
    """The context around an int64 import is the thread's own."""
    import_, seen = jax.dlpack.from_dlpack, []

    def look(tensor, **options):
        here = jax.config.jax_enable_x64
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            there = pool.submit(lambda: jax.config.jax_enable_x64).result()
        seen.append((here, there))
        return import_(tensor, **options)

    monkeypatch.setattr(jax.dlpack, "from_dlpack", look)
    torch_bridge.moe_align_block_size(torch.arange(8), 8, 4)
    assert seen == [(True, X64)]


class _Event:
    """A CUDA event that passes when it is told to."""

    def __init__(self):
        self.passed = False

    def record(self):
        pass

    def query(self):
        return self.passed

    def synchronize(self):
        self.passed = True


class _View:
    nbytes = 64 << 20


def test_kept_memory_is_released_behind_its_event(monkeypatch):
    """The book-keeping of XLA's memory on CUDA, with events of our own."""
    events = []

    def new_event():
        events.append(_Event())
        return events[-1]

    monkeypatch.setattr(torch.cuda, "Event", new_event)
    kept = run._KeptMemory()
    for _ in range(3):
        kept.keep_until_read([_View()])  # type: ignore[list-item]
    assert len(kept._entries) == 3 and not any(x.passed for x in events)
    events[0].passed = True
    kept.keep_until_read([_View()])  # type: ignore[list-item]
    assert len(kept._entries) == 3 and kept._bytes == 3 * _View.nbytes
    for _ in range(2):  # beyond 256 MiB the oldest is waited for
        kept.keep_until_read([_View()])  # type: ignore[list-item]
    assert events[1].passed and not events[2].passed
    assert len(kept._entries) == 4 and kept._bytes == 4 * _View.nbytes
