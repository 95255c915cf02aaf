"""Two GPUs in one process: whose stream, whose memory, whose modules."""

import threading

import pytest
import torch

import torch_bridge
from tests import oracle
from tests.bridge.fake_cuda import problem_of
from tests.bridge.helpers import assert_format, assert_triple, ids_of
from tests.gpu.graphs import capture
from torch_bridge._direct import fast_path, store
from torch_bridge._direct.machine import Machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs"),
]
DEVICES = (torch.device("cuda", 0), torch.device("cuda", 1))
SIZES = (60, 9000)  # pairs for 16 experts and blocks of 8: one kernel, two kernels


@pytest.fixture(scope="module", autouse=True)
def loaded():
    torch.cuda.set_device(
        0
    )  # jax, which the tests ask for its GPUs, may have left another one current
    for device in DEVICES:
        torch_bridge.warmup(num_experts=16, block_size=8, max_tokens=max(SIZES), device=device)
    assert torch.cuda.current_device() == 0


def case(n, seed=0, dtype=torch.int32):
    array, ids = ids_of(dtype, num_tokens=n // 3, seed=seed)
    return ids, oracle.align_numpy(array, block_size=8, num_experts=16)


def empties(want, device, more=0):
    rows = len(want.sorted_token_ids) + more
    return [torch.full((k,), -7).int().to(device) for k in (rows, -(-rows // 8), 1)]


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("n", SIZES)
def test_gpu_call_on_a_device_that_is_not_current(n, current):
    """Through every entry; the results, and what is current, stay where they were."""
    with torch.cuda.device(current):
        for device in (*DEVICES[::-1], *DEVICES):
            ids, want = case(n, device.index)
            there, out = ids.to(device), empties(want, device)
            for _ in range(3):
                for got in (
                    torch_bridge.moe_align_block_size(there, 16, 8),
                    torch_bridge.moe_align_block_size(there, 16, 8, path="direct"),
                    tuple(torch.ops.moe_align_jax.block_align(there, 16, 8)),
                    tuple(torch_bridge.moe_align_block_size(there, 16, 8, out=out)),
                    torch_bridge.vllm.moe_align_block_size(there, 8, 16),
                    torch_bridge.sglang.moe_align_block_size(there, 8, 16, True)[2:],
                ):
                    assert {x.device for x in got} == {device}
                    assert torch.cuda.current_device() == current
                    if len(got) == 3:
                        assert_triple(got, want)
                    else:
                        assert got[0].tolist() == list(want.num_tokens_post_padded)
            larger = empties(want, device, more=40)
            torch_bridge.vllm.ops_moe_align_block_size(there, 16, 8, *larger)
            assert larger[0].tolist() == [*want.sorted_token_ids, *[ids.numel()] * 40]


def test_gpu_each_device_has_its_own_module():
    programs = []
    for device in DEVICES:
        ids = case(SIZES[1])[0].to(device)
        problem = torch_bridge._specs.AlignSpec(ids.numel(), 16, 8)
        program = store.here.programs.get((device.index, problem_of(problem, {"topk_ids": ids})))
        assert program is not None
        programs.append(program)
    handles = [{spec.function for spec in program.specs} for program in programs]
    assert handles[0] and handles[1] and not handles[0] & handles[1]


def test_gpu_second_device_of_a_kind_compiles_nothing(monkeypatch, tmp_path):
    """What the first one compiled lies on disk."""
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("the two GPUs are of different kinds")
    monkeypatch.setenv("TORCH_BRIDGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(store, "here", store.Store(Machine()))
    fast_path.forget_all()
    sizes = {"num_experts": 16, "block_size": 8, "max_tokens": 1, "dtypes": [torch.int32]}
    assert torch_bridge.warmup(**sizes, device="cuda:1") == 1
    monkeypatch.setattr(store.here.machine, "compile", lambda *a: pytest.fail("compiled"))
    assert torch_bridge.warmup(**sizes, device="cuda:0") == 1
    ids = torch.tensor([3], dtype=torch.int32)
    for device in DEVICES:
        got = torch_bridge.moe_align_block_size(ids.to(device), 16, 8, path="direct")
        assert got[0].tolist() == [0, *[1] * 7] and got[1].tolist() == [3]


def test_gpu_threads_that_go_from_device_to_device():
    """Eight of them, on streams of their own and on the default ones, with either device current."""
    cases = [case(n, seed) for n in SIZES for seed in range(3)]
    start, errors = threading.Barrier(8), []

    def work(thread):
        try:
            torch.cuda.set_device(thread % 2)
            streams = [torch.cuda.Stream(d) for d in DEVICES]
            start.wait()
            for k in range(60):
                device = DEVICES[(thread + k) % 2 if thread < 4 else thread % 2]
                ids, want = cases[(thread * 7 + k) % len(cases)]
                if k % 3 == 0:
                    with torch.cuda.stream(streams[device.index]):
                        got = torch_bridge.moe_align_block_size(ids.to(device), 16, 8)
                        assert_triple(got, want)
                else:
                    got = torch_bridge.moe_align_block_size(ids.to(device), 16, 8)
                    assert_triple(got, want)
                assert got[0].device == device and torch.cuda.current_device() == thread % 2
        except BaseException as error:  # noqa: B036 - shown below
            errors.append((thread, error))
            start.abort()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors, errors


@pytest.mark.parametrize("n", SIZES)
def test_gpu_capture_on_the_second_device(n):
    """Replayed with changed ids, between calls on the first one."""
    first, second = DEVICES
    ids, _ = case(n)
    held, elsewhere = ids.to(second), ids.to(first)
    with torch.cuda.device(second):
        torch_bridge.moe_align_block_size(held, 16, 8)
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            got = torch_bridge.moe_align_block_size(held, 16, 8)
    for seed in range(5):
        other, want = case(n, seed)
        held.copy_(other)
        elsewhere.copy_(other)
        torch.cuda.synchronize(second)
        with torch.cuda.device(second):
            graph.replay()
        assert_triple(torch_bridge.moe_align_block_size(elsewhere, 16, 8), want)
        torch.cuda.synchronize(second)
        assert_triple(got, want)
    assert {x.device for x in got} == {second}


def test_gpu_capture_needs_the_warmup_of_its_device():
    sizes = {"num_experts": 19, "block_size": 8, "max_tokens": 8, "dtypes": [torch.int32]}
    torch_bridge.warmup(**sizes, device="cuda:0")
    ids = torch.zeros(8, dtype=torch.int32, device=DEVICES[1])
    with torch.cuda.device(DEVICES[1]):
        number = torch.zeros((), device=DEVICES[1])
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            number += 1
            with pytest.raises(RuntimeError, match=r"torch_bridge\.warmup") as caught:
                torch_bridge.moe_align_block_size(ids, 19, 8)
            assert_format(caught.value)
        torch_bridge.warmup(**sizes, device="cuda:1")
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            got = torch_bridge.moe_align_block_size(ids, 19, 8)
        graph.replay()
    want = oracle.align([0] * 8, block_size=8, num_experts=19)
    assert_triple(got, want)


@pytest.mark.parametrize("path", ["auto", "direct"])
@pytest.mark.parametrize("wrong", ["out[0]", "out[1]", "out[2]", "expert_map", "num_valid_pairs"])
def test_gpu_tensors_of_another_device_are_refused(wrong, path):
    """Also after a good call, which opened the short way; nothing is written."""
    first, second = DEVICES
    ids, want = case(SIZES[0])
    ids, out = ids.to(second), empties(want, second)
    local = torch.arange(16, dtype=torch.int32)
    good = {"out": tuple(out)}
    if not wrong.startswith("out"):
        good[wrong] = (local if wrong == "expert_map" else torch.tensor(60)).to(second)
    for _ in range(2):
        torch_bridge.moe_align_block_size(ids, 16, 8, path=path, **good)
    for tensor in out:
        tensor.fill_(-7)
    bad = dict(good)
    if wrong.startswith("out"):
        bad["out"] = tuple(x.to(first) if f"out[{i}]" == wrong else x for i, x in enumerate(out))
    else:
        bad[wrong] = good[wrong].to(first)
    with pytest.raises(ValueError) as caught:
        torch_bridge.moe_align_block_size(ids, 16, 8, path=path, **bad)
    assert_format(caught.value)
    assert wrong in str(caught.value) and "cuda:" in str(caught.value)
    assert all((x == -7).all() for x in bad["out"])
    torch_bridge.moe_align_block_size(ids, 16, 8, path=path, **good)
    assert (out[0] != -7).all()
