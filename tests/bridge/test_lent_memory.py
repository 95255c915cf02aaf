"""jax does not hold the memory of an operator's inputs: each operator on the DLPack path, and the import.

On a CPU jax holds it; there the tests have it lent too, so that the book-keeping is tested without a GPU.
"""

import ctypes
import functools
import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import torch_bridge
from tests import oracle
from tests.bridge import test_deep_gemm as gemm
from tests.bridge import test_moe as layer
from tests.bridge import test_sglang_masked as masked
from tests.bridge.helpers import assert_triple, ids_of
from tests.moe_layer import oracle as layer_oracle
from torch_bridge import dlpack, to_jax
from torch_bridge._dlpack_path import run
from torch_bridge.deep_gemm import calls

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPS = torch.ops.moe_align_jax


# -- one call of each kind: (inputs, what to call with them, the check of what that returns) -------


def fresh(device, tensors):
    """Copies, in memory of torch's allocator, which jax may share."""
    return [x.to(device, copy=True) for x in tensors]


def align(device):
    array, ids = ids_of(torch.int64, "uniform", 3000)
    want = oracle.align(array.ravel(), block_size=8, num_experts=16)
    return (
        fresh(device, [ids]),
        lambda ids: torch_bridge.moe_align_block_size(ids, 16, 8, path="dlpack"),
        lambda got: assert_triple(got, want),
    )


def fused_layer(device):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=rng)
    up, down = torch.randn(6, 128, 128, generator=rng), torch.randn(6, 128, 64, generator=rng)
    ids = torch.rand(64, 6, generator=rng).argsort(1)[:, :2].to(torch.int32)
    inputs = [x.bfloat16(), (up / 8).bfloat16(), (down / 8).bfloat16(), x[:, :2].abs(), ids]
    want = layer_oracle.layer(*layer.plain(*inputs), transpose_rhs=True)[0]
    return (
        fresh(device, inputs),
        lambda *given: torch_bridge.fused_moe(*given, transpose_rhs=True, path="dlpack"),
        lambda got: layer.assert_near(got.cpu(), want),
    )


def router(device):
    numbers = np.random.default_rng(0).permuted(np.arange(64.0 * 96).reshape(64, 96), axis=1)
    logits = torch.from_numpy(numbers / 10).float()
    want = logits.double().softmax(1).topk(4)

    def call(logits, bias):
        weights = torch.empty(64, 4, device=device)
        ids = torch.empty(64, 4, dtype=torch.int32, device=device)
        OPS.route_into_dlpack(
            *(logits, bias, None, weights, ids, None), "softmax", False, 1.0, 1, 1, False
        )
        return weights, ids

    def check(got):
        assert torch.equal(got[1].cpu().long(), want.indices)
        torch.testing.assert_close(got[0].cpu().double(), want.values, rtol=1e-4, atol=0)

    return fresh(device, [logits, torch.zeros(96)]), call, check


def product(device):
    rng = np.random.default_rng(1)
    group = gemm.labels(gemm.COUNTS, 128)
    a, wide_a = gemm.make_a(rng, "row-major", len(group))
    b, wide_b = gemm.make_b(rng)
    real = group >= 0
    want = np.einsum("mk,mnk->mn", wide_a[real], wide_b[group[real]], optimize=True)

    def call(a, a_scales, b, b_scales, labels):
        d = torch.empty(len(group), gemm.N, dtype=torch.bfloat16, device=device)
        given = (a, a_scales, b, b_scales, d, labels, 128, 0)
        calls.run("dlpack", calls.checked("f", calls.CONTIGUOUS, *given))
        return d

    inputs = fresh(device, [*a, *b, torch.from_numpy(group)])
    return inputs, call, lambda d: gemm.check(d.cpu()[torch.from_numpy(real)], want)


def masked_quant(device):
    x, q, scales, rows = masked.buffers(4, 8, 512, device=device)
    checked = x.cpu().clone()

    def call(x):
        OPS.silu_and_mul_masked_quant_into_dlpack(x, rows, q, scales, 128, False, 0.0, 0.0)
        return q, scales

    return [x], call, lambda got: masked.check(checked, *got, rows)


FAMILIES = [align, fused_layer, router, product, masked_quant]
# Of the inputs above, those that jax does not get as they are: labels of rows become block labels.
NOT_SHARED = {"product": 1}


@pytest.fixture
def arrays(monkeypatch):
    """jax's arrays on the inputs of calls, kept beyond the calls: they must not hold the memory."""
    kept, share = [], dlpack.share

    def lend(tensor):
        if tensor.is_cuda:
            kept.append(share(tensor))
        else:
            kept.append(dlpack._imported(tensor, dlpack._Lent(tensor)))
        return kept[-1]

    monkeypatch.setattr(dlpack, "share", lend)
    return kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_inputs_are_released_when_the_caller_drops_them(family, device, arrays):
    """While jax has the arrays still, as it does until it has seen the program end."""
    inputs, call, check = family(device)
    gc.collect()
    storages = [StorageWeakRef(x.untyped_storage()) for x in inputs]
    got = call(*inputs)
    shared = len(inputs) - NOT_SHARED.get(family.__name__, 0)
    at = {array.unsafe_buffer_pointer() for array in arrays}
    assert sum(x.data_ptr() in at for x in inputs) == shared
    del inputs
    assert all(x.expired() for x in storages)
    check(got)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_gpu_memory_falls_before_the_program_has_run(family):
    """XLA is busy; torch has the inputs' memory back, and results are right although it reuses it."""
    inputs, call, check = family("cuda")
    check(call(*inputs))  # compiled
    sizes = [x.untyped_storage().nbytes() for x in inputs]
    busy = _busy_jax()
    got = call(*inputs)
    before = torch.cuda.memory_allocated()
    del inputs
    fallen, ended = before - torch.cuda.memory_allocated(), busy.is_ready()
    again = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in sizes]
    assert not ended, "XLA was not busy for long enough: this test says nothing"
    assert fallen >= sum(sizes)
    check(got)
    assert all(bool((x == 0xFF).all()) for x in again)


@pytest.mark.gpu
def test_gpu_a_fault_behind_the_launch_waits_for_the_program(monkeypatch):
    """No stream waits for a program whose results were not exported: the host does."""
    [ids], call, check = align("cuda")
    check(call(ids))

    def fault(result):
        raise KeyboardInterrupt

    monkeypatch.setattr(dlpack, "to_torch", fault)
    busy = _busy_jax()
    with pytest.raises(KeyboardInterrupt):
        call(ids)
    end = time.monotonic() + 0.01  # the GPU was waited for; XLA notes that in a thread of its own
    while not busy.is_ready():
        assert time.monotonic() < end


@functools.cache
def _busy():
    square = jax.device_put(np.ones((4096, 4096), np.float32), jax.devices("gpu")[0])
    many = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: y @ x / 4096, x))
    many(square).block_until_ready()
    return functools.partial(many, square)


def _busy_jax():
    """Fills XLA's compute stream for about 100 ms or more; returns without waiting."""
    torch.cuda.synchronize()
    return _busy()()


# -- the import ------------------------------------------------------------------------------------


def _lent(tensor):
    return dlpack._imported(tensor, dlpack._Lent(tensor))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", sorted(dlpack._DTYPES, key=str), ids=str)
def test_lent_memory_has_every_dtype(dtype, device):
    values = torch.arange(24 * dtype.itemsize, dtype=torch.uint8) % 2
    tensor = values.to(device).view(dtype).reshape(4, 6)
    array = _lent(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert str(array.dtype) == str(dtype).removeprefix("torch.") and array.shape == (4, 6)
    assert np.asarray(array).tobytes() == values.numpy().tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 5, 1)], ids=str)
def test_lent_memory_has_every_shape(shape, device):
    tensor = torch.full(shape, 7, dtype=torch.int32, device=device)
    array = _lent(tensor)
    assert array.shape == shape and int(jnp.sum(array)) == 7 * tensor.numel()


@pytest.mark.parametrize("device", DEVICES)
def test_to_jax_holds_the_memory(device):
    tensor = torch.arange(1000, dtype=torch.int32, device=device)
    storage = StorageWeakRef(tensor.untyped_storage())
    array = to_jax(tensor)
    del tensor
    assert not storage.expired()
    assert np.array_equal(array, np.arange(1000))


def test_what_is_lent_is_freed_with_the_array(monkeypatch):
    """The copy of DLPack's structure, by its deleter, which XLA calls when it drops the array."""
    freed = []
    free = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(("PyMem_RawFree", ctypes.pythonapi))
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda at: (freed.append(at), free(at))[0])
    monkeypatch.setattr(dlpack, "_FREE", ctypes.cast(deleter, ctypes.c_void_p).value)
    allocate, made = dlpack._allocate, []
    monkeypatch.setattr(dlpack, "_allocate", lambda n: made.append(allocate(n)) or made[-1])
    tensor = torch.arange(1000)
    arrays = [_lent(tensor) for _ in range(5)]
    assert len(made) == 5 and not freed
    del arrays
    gc.collect()
    assert sorted(freed) == sorted(made)


def test_a_program_may_return_an_input(monkeypatch):
    """Its result is copied while the operator has the inputs still."""
    monkeypatch.setattr(dlpack, "share", _lent)
    tensor = torch.arange(1000, dtype=torch.int32)
    views = dlpack.call_jax(lambda arrays: [arrays["x"], arrays["x"] + 1], {"x": tensor})
    kept = run.hand_over(views, copy=True, out=None)
    tensor.zero_()
    assert [int(x[5]) for x in kept] == [5, 6]
