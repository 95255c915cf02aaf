"""The bridge on a GPU, on both paths: streams, reuse of memory, threads. Skipped, and counted, without one.

What only the direct path can do (capture, sizes at launch, no jax) is in test_direct_gpu.py.
"""

import concurrent.futures
import random
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import torch_bridge
from tests import oracle
from tests.bridge.helpers import DTYPES, X64, assert_format, assert_triple, ids_of, load_programs
from tests.gpu.graphs import capture
from torch_bridge import _plan, _specs, dlpack, sglang, to_jax, to_torch, vllm
from torch_bridge._dlpack_path import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

TRIES = 100
SLEEP = 50_000_000  # GPU cycles, about 30 ms: longer than any alignment here


@pytest.fixture(params=["direct", "dlpack"])
def path(request):
    return request.param


def _large(seed, num_tokens=20_000, dtype=torch.int32):
    array, ids = ids_of(dtype, "uniform", num_tokens, 4, 64, seed=seed)
    return ids.cuda(), oracle.align_numpy(array, block_size=32, num_experts=64)


def _busy_jax():
    """Fills XLA's compute stream for tens of milliseconds; returns without waiting."""
    global _heavy
    if _heavy is None:
        _heavy = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda _, y: y @ x * 1e-3, x))
        _heavy(_matrix()).block_until_ready()
    return _heavy(_matrix())


_heavy, _square = None, None


def _matrix():
    global _square
    if _square is None:
        _square = jax.device_put(np.ones((4096, 4096), np.float32), jax.devices("gpu")[0])
    return _square


# -- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 37, 3000])
def test_gpu_every_dtype(dtype, num_tokens, path):
    array, ids = ids_of(dtype, num_tokens=num_tokens)
    options = {"block_size": 8, "num_experts": 16, "return_inverse": True}
    got = torch_bridge.align_blocks(ids.cuda(), path=path, **options)
    assert all(x.is_cuda for x in got)
    want = oracle.align(array.ravel(), **options)
    oracle.assert_same(type(got)(*[x.cpu() for x in got]), want)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 16, 63])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_gpu_any_alignment(dtype, offset, path):
    array, ids = ids_of(dtype, num_tokens=500)
    padded = torch.zeros(offset + ids.numel(), dtype=dtype, device="cuda")
    view = padded[offset:].view(ids.shape)
    view.copy_(ids)
    want = oracle.align(array.ravel(), block_size=8, num_experts=16)
    assert_triple(torch_bridge.moe_align_block_size(view, 16, 8, path=path), want)


def test_gpu_strided_inputs(path):
    for dtype in DTYPES:
        array, ids = ids_of(dtype, num_tokens=100)
        both = np.repeat(array, 2, axis=1)
        view = torch.from_numpy(both).cuda()[:, ::2]
        want = oracle.align(array.ravel(), block_size=8, num_experts=16)
        assert_triple(torch_bridge.moe_align_block_size(view, 16, 8, path=path), want)


def test_gpu_no_pairs_and_out(path):
    none = torch.zeros(0, 2, dtype=torch.int64).cuda()
    got = torch_bridge.moe_align_block_size(none, 4, 4, path=path)
    assert [x.tolist() for x in got] == [[], [], [0]]
    ids, want = _large(0)
    out = tuple(torch.full((len(x),), -7, dtype=torch.int32).cuda() for x in want[:3])
    assert_triple(torch_bridge.moe_align_block_size(ids, 64, 32, out=out, path=path), want)


def test_gpu_drop_ins():
    array, ids = ids_of(torch.int64, num_tokens=300)
    local = torch.from_numpy(oracle.local_map("second", 16, 1))
    on_cpu = vllm.moe_align_block_size(ids, 8, 16, local, True, True, True)
    on_gpu = vllm.moe_align_block_size(ids.cuda(), 8, 16, local.cuda(), True, True, True)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))
    on_cpu = sglang.moe_align_block_size(ids, 8, 16, return_inactive_prefix_count=True)
    on_gpu = sglang.moe_align_block_size(ids.cuda(), 8, 16, return_inactive_prefix_count=True)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))
    counts = torch.arange(20)
    on_cpu = vllm.batched_moe_align_block_size(15, 8, counts)
    on_gpu = vllm.batched_moe_align_block_size(15, 8, counts.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))


def test_gpu_devices_must_agree():
    ids = torch.zeros(4, 2, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="same device") as caught:
        torch_bridge.moe_align_block_size(ids, 4, 4, expert_map=torch.arange(4))
    assert_format(caught.value)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gpu_compile(backend, path):
    compiled = torch.compile(
        lambda x: torch_bridge.moe_align_block_size(x, 64, 32, path=path),
        backend=backend,
        fullgraph=True,
    )
    ids, want = _large(1, 500)
    assert_triple(tuple(compiled(ids)), want)


# -- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_gpu_contiguous_ids_are_not_copied_through_dlpack(dtype, monkeypatch):
    share, seen = dlpack.share, []

    def spy(tensor):
        array = share(tensor)
        seen.append((tensor.data_ptr(), array.unsafe_buffer_pointer()))
        return array

    monkeypatch.setattr(dlpack, "share", spy)
    ids, want = _large(0, 500, dtype)
    explained = torch_bridge.explain(ids, 64, 32, path="dlpack")
    assert set(explained.copies) == {"outputs"}
    assert_triple(torch_bridge.moe_align_block_size(ids, 64, 32, path="dlpack"), want)
    assert seen == [(ids.data_ptr(), ids.data_ptr())]
    assert jax.config.jax_enable_x64 == X64


def test_gpu_plan_names_the_kernels_on_hopper():
    ids, _ = _large(0, 500)
    explained = torch_bridge.explain(ids, 64, 32, path="dlpack")
    newer = torch.cuda.get_device_capability() >= (9, 0)
    assert explained.implementation == ("mosaic_gpu" if newer else "xla")


def test_gpu_fact_xla_refuses_a_pointer_off_16_bytes():
    """Why a misaligned view is copied on this path."""
    view = torch.arange(65, dtype=torch.int32, device="cuda")[1:]
    array = jax.dlpack.from_dlpack(view, copy=False)
    with pytest.raises(Exception, match="must be a multiple"):
        jax.jit(lambda x: x + 1)(array).block_until_ready()


@pytest.mark.parametrize("dtype", sorted(dlpack._DTYPES, key=str), ids=str)
def test_gpu_converters_share_memory(dtype):
    values = torch.arange(24 * dtype.itemsize, dtype=torch.uint8) % 2
    tensor = values.view(dtype).reshape(4, 6).cuda()
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    back = to_torch(array)
    assert back.data_ptr() == tensor.data_ptr() and back.dtype == dtype
    assert np.asarray(array).tobytes() == values.numpy().tobytes()


OPTIONS = {
    "map": {"expert_map": "second"},
    "filter": {"expert_map": "any", "ignore_invalid_experts": True},
    "limit": {"num_valid_pairs": 50},
    "limit tensor": {"num_valid_pairs": torch.tensor(50)},
    "padded": {"pad_sorted_ids": True},
    "all": {
        "expert_map": "any",
        "ignore_invalid_experts": True,
        "num_valid_pairs": torch.tensor([70], dtype=torch.int32),
        "pad_sorted_ids": True,
    },
}


@pytest.fixture(scope="module")
def options_loaded():
    sizes = [(3 * num_tokens, 16, 8) for num_tokens in (9, 37, 900)]
    load_programs(sizes, OPTIONS.values(), return_counts=True, return_inverse=True)
    load_programs(sizes, OPTIONS.values())


@pytest.mark.parametrize("num_tokens", [9, 37, 900])
@pytest.mark.parametrize("name", OPTIONS)
def test_gpu_options(name, num_tokens, path, options_loaded):
    array, ids = ids_of(torch.int64, num_tokens=num_tokens)
    given, plain = dict(OPTIONS[name]), dict(OPTIONS[name])
    if "expert_map" in given:
        plain["expert_map"] = oracle.local_map(given["expert_map"], 16, 1)
        given["expert_map"] = torch.from_numpy(plain["expert_map"]).cuda()
    if isinstance(given.get("num_valid_pairs"), torch.Tensor):
        plain["num_valid_pairs"] = int(given["num_valid_pairs"])
        given["num_valid_pairs"] = given["num_valid_pairs"].cuda()
    sizes = {"block_size": 8, "num_experts": 16, "return_inverse": True}
    want = oracle.align(array.ravel(), **sizes, **plain)
    got = torch_bridge.align_blocks(ids.cuda(), path=path, **sizes, **given)
    oracle.assert_same(type(got)(*[x.cpu() for x in got]), want)
    triple = torch_bridge.moe_align_block_size(ids.cuda(), 16, 8, path=path, **given)
    assert_triple(triple, want)


# -- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_gpu_call_is_ordered_on_the_current_stream(side, path):
    """The ids are written behind a sleep, and the results read at once: 100 tries without a sync."""
    base, want = _large(2)
    stream = torch.cuda.Stream() if side else torch.cuda.default_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for attempt in range(TRIES):
            ids = torch.full_like(base, 63)
            if attempt % 10 == 0:
                torch.cuda._sleep(SLEEP)
            ids.copy_(base)
            got = torch_bridge.moe_align_block_size(ids, 64, 32, path=path)
            kept = tuple(x.clone() for x in got)
            for tensor in got:
                tensor.fill_(-1)
            assert_triple(kept, want)


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_gpu_host_does_not_wait(side, path):
    base, _ = _large(2)
    torch_bridge.moe_align_block_size(base, 64, 32, path=path)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if side else torch.cuda.default_stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50 * SLEEP)
        start = time.perf_counter()
        torch_bridge.moe_align_block_size(base, 64, 32, path=path)
        host = time.perf_counter() - start
        assert not stream.query(), "the sleep was over before the call returned"
    torch.cuda.synchronize()
    assert host < 0.3


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_gpu_ids_may_be_overwritten_right_after_the_call(side, path):
    base, want = _large(3)
    stream = torch.cuda.Stream() if side else torch.cuda.default_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for attempt in range(TRIES):
            ids = base.clone()
            if attempt % 10 == 0:
                _busy_jax()
            got = torch_bridge.moe_align_block_size(ids, 64, 32, path=path)
            ids.fill_(1)
            assert_triple(got, want)


def test_gpu_without_the_hand_over_the_overwrite_is_seen(monkeypatch):
    """The export makes torch's stream wait for the program; XLA is held up so that it must matter."""
    monkeypatch.setattr(dlpack, "to_torch", lambda result: result)
    monkeypatch.setattr(run, "hand_over", lambda results, **options: results)
    base, want = _large(3)
    problem = _specs.AlignSpec(base.numel(), 64, 32)
    made = _plan.resolve("f", problem, {"topk_ids": base}, path="dlpack")
    jax.block_until_ready(run.run_in_jax(made, {"topk_ids": base}))
    wrong = 0
    for _ in range(10):
        ids = base.clone()
        torch.cuda.synchronize()
        _busy_jax()
        got = run.run_in_jax(made, {"topk_ids": ids})
        ids.fill_(1)
        wrong += not np.array_equal(np.asarray(got[0]), want.sorted_token_ids)
    assert wrong > 0


# -- memory --------------------------------------------------------------------------------------


def _late_copy(monkeypatch):
    """torch's copy of the results comes after a sleep on torch's stream."""
    copy_all = run._copy_all

    def late(targets, sources):
        torch.cuda._sleep(SLEEP)
        copy_all(targets, sources)

    monkeypatch.setattr(run, "_copy_all", late)


def _align_while_jax_reuses_memory(path="dlpack"):
    """A call on a side stream, then jax programs without torch inputs that take such memory."""
    base, want = _large(4)
    fill = jax.jit(lambda: [jnp.full(len(x), -3, jnp.int32) for x in want[:3]])
    jax.block_until_ready(fill())
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        got = torch_bridge.moe_align_block_size(base, 64, 32, path=path)
        fillers = [fill() for _ in range(8)]
        jax.block_until_ready(fillers)
        stream.synchronize()
        return got, want


def test_gpu_results_are_copied_before_xla_reuses_their_memory(monkeypatch, path):
    _late_copy(monkeypatch)
    for _ in range(10):
        assert_triple(*_align_while_jax_reuses_memory(path))


def test_gpu_without_keeping_the_memory_results_are_lost(monkeypatch):
    _late_copy(monkeypatch)
    monkeypatch.setattr(run._KeptMemory, "keep_until_read", lambda self, views: None)
    wrong = 0
    for _ in range(10):
        got, want = _align_while_jax_reuses_memory()
        wrong += not np.array_equal(got[0].cpu().numpy(), want.sorted_token_ids)
    assert wrong > 0


def test_gpu_tensors_may_be_dropped_in_any_order_under_pressure(path):
    """torch and jax take and scribble over memory of the same sizes all the while."""
    rng = random.Random(0)
    base, want = _large(5)
    fields = dict(zip(oracle.Expected._fields, want, strict=True))
    rows = len(want.sorted_token_ids)
    scribble = jax.jit(lambda x: jnp.full(rows, x, jnp.int32))
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for attempt in range(TRIES):
        with torch.cuda.stream(rng.choice(streams)):
            ids = base.clone()
            local = torch.arange(64, dtype=torch.int64, device="cuda")
            got = torch_bridge.align_blocks(
                ids, num_experts=64, block_size=32, expert_map=local, path=path
            )
            alive = {"ids": ids, "map": local}
            alive |= {k: v for k, v in got._asdict().items() if v is not None}
            del ids, local, got
            names = list(alive)
            rng.shuffle(names)
            for name in names:
                del alive[name]
                torch.full((base.numel(),), 9, dtype=torch.int32, device="cuda")
                torch.full((rows,), 9, dtype=torch.int32, device="cuda")
                scribble(np.int32(attempt))
                if rng.random() < 0.3:
                    for other, tensor in alive.items():
                        if other in fields:
                            np.testing.assert_array_equal(tensor.cpu().numpy(), fields[other])


def test_gpu_calls_do_not_accumulate_memory(path):
    base, _ = _large(6)
    for _ in range(20):
        torch_bridge.moe_align_block_size(base, 64, 32, path=path)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(2000):
        torch_bridge.moe_align_block_size(base, 64, 32, path=path)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
    assert run.kept_memory._bytes <= run._MAX_KEPT_BYTES


def test_gpu_eight_threads_on_streams_of_their_own(path):
    start = threading.Barrier(8)

    def work(thread):
        cases = []
        for size in range(3):
            dtype = (torch.int32, torch.int64, torch.uint8)[(thread + size) % 3]
            array, ids = ids_of(dtype, "outside", 50 + 970 * size, 2, 16, seed=thread)
            options = {"block_size": 8, "num_experts": 16}
            cases.append((ids.cuda(), options, oracle.align(array.ravel(), **options)))
        torch.cuda.synchronize()
        start.wait()
        stream = torch.cuda.default_stream() if thread == 0 else torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for attempt in range(TRIES):
                ids, options, want = cases[attempt % len(cases)]
                given = ids.clone()
                got = torch_bridge.align_blocks(given, path=path, **options)
                given.zero_()
                oracle.assert_same(type(got)(*[x.cpu() if x is not None else x for x in got]), want)
        return TRIES

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [TRIES] * 8


# -- capture -------------------------------------------------------------------------------------


def test_gpu_capture_through_dlpack_is_refused_and_the_context_works_on():
    base, want = _large(7, 500)
    out = tuple(torch.full((len(x),), -7, dtype=torch.int32).cuda() for x in want[:3])
    torch_bridge.moe_align_block_size(base, 64, 32, path="dlpack")
    graph = torch.cuda.CUDAGraph()
    number = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with capture(graph):
        number += 1
        for given in ({}, {"out": out}):
            with pytest.raises(RuntimeError, match="capture") as caught:
                torch_bridge.moe_align_block_size(base, 64, 32, path="dlpack", **given)
            assert_format(caught.value)
        with pytest.raises(RuntimeError, match="capture"):
            to_jax(base)
        number += 1
    graph.replay()  # the capture went on and is whole
    assert number.item() == 2
    assert all((x == -7).all() for x in out)
    assert_triple(torch_bridge.moe_align_block_size(base, 64, 32, path="dlpack"), want)


def test_gpu_second_device(path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    ids, want = _large(8, 500)
    got = torch_bridge.moe_align_block_size(ids.to("cuda:1"), 64, 32, path=path)
    assert all(x.device == torch.device("cuda", 1) for x in got)
    assert torch.cuda.current_device() == 0
    assert_triple(got, want)
