"""to_jax and to_torch, the DLPack facts that they rely on, and what happens without each guard."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import torch_bridge
from tests import oracle
from tests.bridge.helpers import X64, assert_format, assert_triple, misaligned
from torch_bridge import dlpack, to_jax, to_torch
from torch_bridge._dlpack_path import run

ALL_DTYPES = sorted(dlpack._DTYPES, key=str)


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).reshape(-1).tolist())


def _sample(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(24 * dtype.itemsize, dtype=torch.uint8) % 2
    return values.view(dtype).reshape(4, 6)


# -- facts ---------------------------------------------------------------------------------------


def test_fact_jax_narrows_int64_silently():
    with warnings.catch_warnings(), jax.enable_x64(False):
        warnings.simplefilter("error")
        array = jax.dlpack.from_dlpack(torch.tensor([2**40 + 7]), copy=False)
    assert array.dtype == np.int32 and array.tolist() == [7]


def test_fact_int64_is_shared_under_a_local_x64_context():
    tensor = torch.tensor([2**40 + 7])
    with jax.enable_x64(True):
        array = jax.dlpack.from_dlpack(tensor, copy=False)
    assert array.dtype == np.int64 and array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert jax.config.jax_enable_x64 == X64


def test_fact_imported_arrays_stay_on_their_device():
    array = jax.dlpack.from_dlpack(torch.arange(4, dtype=torch.int32))
    assert array.committed and array.devices() == {jax.devices("cpu")[0]}


def test_fact_a_misaligned_pointer_needs_a_copy():
    with pytest.raises(ValueError, match="aligned"):
        jax.dlpack.from_dlpack(misaligned(torch.arange(40, dtype=torch.int32)), copy=False)


def test_fact_strides_are_refused():
    with pytest.raises(Exception, match="striding"):
        jax.dlpack.from_dlpack(torch.arange(64, dtype=torch.int32)[::2])


def test_fact_a_negated_view_loses_its_sign():
    view = torch._neg_view(torch.arange(16, dtype=torch.int32))
    assert view[1] == -1
    assert jax.dlpack.from_dlpack(view)[1] == 1


def test_fact_a_fake_tensor_is_imported_as_garbage():
    """No error: at best a warning. This is why the bridge looks first."""
    with FakeTensorMode():
        fake = torch.zeros(16, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            array = jax.dlpack.from_dlpack(fake)
        except Exception as error:  # a torch that refuses by itself is as good
            assert "Fake" in str(error) or "data" in str(error) or "storage" in str(error)
        else:
            assert isinstance(array, jax.Array)


def test_fact_an_exported_array_outlives_jax_and_is_writable():
    array = jnp.arange(1000, dtype=jnp.int32) * 3
    tensor = torch.from_dlpack(array)
    array.delete()
    del array
    tensor += 1
    assert torch.equal(tensor, torch.arange(1000, dtype=torch.int32) * 3 + 1)


# -- to_jax, to_torch ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_to_jax_shares_memory_of_every_dtype_and_back(dtype):
    tensor = _sample(dtype)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert str(array.dtype) == str(dtype).removeprefix("torch.") and array.shape == (4, 6)
    assert np.asarray(array).tobytes() == _bits(tensor)
    back = to_torch(array)
    assert back.dtype == dtype and back.shape == (4, 6) and back.data_ptr() == tensor.data_ptr()
    assert jax.config.jax_enable_x64 == X64


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1)])
def test_to_jax_shapes_and_back(shape):
    tensor = torch.full(shape, 7, dtype=torch.int64)
    array = to_jax(tensor)
    assert array.shape == shape and array.dtype == np.int64 and (np.asarray(array) == 7).all()
    assert torch.equal(to_torch(array), tensor)


NEEDS_COPY = {
    "misaligned": lambda: misaligned(torch.arange(6).view(2, 3)),
    "transposed": lambda: torch.arange(6).view(3, 2).t(),
    "strided": lambda: torch.arange(12).view(2, 6)[:, ::2],
    "strided unsigned": lambda: torch.arange(12).view(torch.uint64).view(2, 6)[:, ::2],
    "negated": lambda: torch._neg_view(torch.arange(6).view(2, 3)),
    "conjugated": lambda: torch.tensor([[1 + 2j, 3j, -1j]]).conj(),
}


@pytest.mark.parametrize("case", NEEDS_COPY)
def test_to_jax_copies_only_when_allowed(case):
    tensor = NEEDS_COPY[case]()
    with pytest.raises(ValueError, match="without a copy") as caught:
        to_jax(tensor)
    assert_format(caught.value)
    array = to_jax(tensor, allow_copy=True)
    assert array.unsafe_buffer_pointer() != tensor.data_ptr()
    assert np.asarray(array).tolist() == tensor.tolist()


def _fake():
    with FakeTensorMode():
        return torch.zeros(4)


BAD_TENSORS = {
    "array": (lambda: np.arange(3), TypeError),
    "fake": (_fake, TypeError),
    "meta": (lambda: torch.zeros(3, device="meta"), TypeError),
    "sparse": (lambda: torch.eye(3).to_sparse(), TypeError),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]), TypeError),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        TypeError,
    ),
    "dtype": (lambda: torch.zeros(4, dtype=torch.complex32), TypeError),
    "grad": (lambda: torch.zeros(3, requires_grad=True), ValueError),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_to_jax_refuses(case):
    make, kind = BAD_TENSORS[case]
    with pytest.raises(kind) as caught:
        to_jax(make())
    assert_format(caught.value)


def test_to_jax_refuses_a_vmapped_tensor():
    with pytest.raises(TypeError, match="must have data"):
        torch.func.vmap(to_jax)(torch.zeros(3, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_to_jax_refuses_a_tensor_with_a_tangent():
    with forward_ad.dual_level(), pytest.raises(ValueError, match="must have no tangent") as caught:
        to_jax(forward_ad.make_dual(torch.zeros(3), torch.ones(3)))
    assert_format(caught.value)


def test_to_jax_refuses_a_device_that_jax_lacks(monkeypatch):
    def no_backend(backend=None):
        raise RuntimeError("no such backend")

    dlpack._platform.cache_clear()
    monkeypatch.setattr(jax, "local_devices", no_backend)
    try:
        with pytest.raises(NotImplementedError) as caught:
            to_jax(torch.zeros(3))
    finally:
        dlpack._platform.cache_clear()
    assert_format(caught.value)


def _sharded():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices("cpu")[:2])
    spec = jax.sharding.PartitionSpec("x")
    return jax.device_put(jnp.zeros(4), jax.sharding.NamedSharding(mesh, spec))


def _deleted():
    array = jnp.zeros(3)
    array.delete()
    return array


BAD_ARRAYS = {
    "numpy": (lambda: np.zeros(3), TypeError),
    "key": (lambda: jax.random.key(0), TypeError),
    "int4": (lambda: jnp.zeros(4, jnp.int4), TypeError),
    "sharded": (_sharded, ValueError),
    "deleted": (_deleted, ValueError),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_to_torch_refuses(case):
    if case == "sharded" and jax.device_count("cpu") < 2:
        pytest.skip("needs two CPU devices (XLA_FLAGS was set before)")
    make, kind = BAD_ARRAYS[case]
    with pytest.raises(kind) as caught:
        to_torch(make())
    assert_format(caught.value)


def test_to_torch_refuses_a_tracer():
    with pytest.raises(TypeError) as caught:
        jax.jit(to_torch)(jnp.zeros(3))
    assert_format(caught.value)


# -- each guard, taken out -----------------------------------------------------------------------


def test_without_the_x64_guard_an_id_aliases(monkeypatch):
    ids = torch.tensor([3, 2**32 + 3])
    want = oracle.align(ids.tolist(), block_size=2, num_experts=4)
    assert_triple(torch_bridge.moe_align_block_size(ids, 4, 2), want)
    with jax.enable_x64(False):
        monkeypatch.setattr(jax, "enable_x64", lambda on: contextlib.nullcontext())
        got = torch_bridge.moe_align_block_size(ids, 4, 2)
    assert got[0].tolist() != list(want.sorted_token_ids)


def test_without_the_copy_rule_a_negated_view_aligns_wrongly(monkeypatch):
    ids = torch._neg_view(torch.tensor([-1, 1, -2, 3]))
    want = oracle.align([1, -1, 2, -3], block_size=2, num_experts=4)
    assert_triple(torch_bridge.moe_align_block_size(ids, 4, 2), want)
    monkeypatch.setattr(dlpack, "copy_reason", lambda tensor, boundary: None)
    got = torch_bridge.moe_align_block_size(ids, 4, 2)
    assert got[0].tolist() != list(want.sorted_token_ids)


@pytest.mark.parametrize("case", ["misaligned", "strided"])
def test_without_the_copy_rule_jax_refuses(monkeypatch, case):
    """The import is strict: a copy that the plan does not list is an error, never silent."""
    ids = NEEDS_COPY[case]()
    want = oracle.align(ids.flatten().tolist(), block_size=2, num_experts=12)
    assert_triple(torch_bridge.moe_align_block_size(ids, 12, 2), want)
    monkeypatch.setattr(dlpack, "copy_reason", lambda tensor, boundary: None)
    monkeypatch.setattr(run, "_flat", lambda name, tensor: tensor)
    with pytest.raises(Exception, match="aligned|striding"):
        torch_bridge.moe_align_block_size(ids, 12, 2)


def test_without_the_fake_guard_garbage_passes(monkeypatch):
    fake = _fake()
    monkeypatch.setattr(dlpack, "is_fake", lambda tensor: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            array = to_jax(fake)
        except Exception as error:
            assert "must have data" not in str(error)  # not our error: the guard was ours
        else:
            assert isinstance(array, jax.Array)


def test_jax_may_not_change_torchs_current_device(monkeypatch):
    """As its GPU client does when it starts, on a machine with several GPUs."""
    import jax

    current = [0]

    def start(backend):
        current[0] = 1
        raise RuntimeError("no such backend")

    monkeypatch.setattr(jax, "local_devices", start)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.__setitem__(0, index))
    assert dlpack._platform.__wrapped__("cuda", 0) is None
    assert current == [0]
