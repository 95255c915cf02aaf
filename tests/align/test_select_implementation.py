"""What would run and why not the rest: on this machine, and on machines simulated here."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._lowering import select
from moe_align_jax.masked_quant import select_quant_implementation
from tests import forms

SIZE = {"block_size": 64, "num_experts": 64}
REAL_DEVICES = jax.devices


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine whose jax has no CUDA backend, also where this one has."""

    def devices(backend=None):
        if backend == "cuda":
            raise RuntimeError("Unknown backend cuda")
        return REAL_DEVICES(backend)

    monkeypatch.setattr(jax, "devices", devices)


def gpu_of(monkeypatch, *capabilities):
    gpus = [types.SimpleNamespace(compute_capability=c, platform="gpu") for c in capabilities]
    monkeypatch.setattr(
        jax, "devices", lambda kind=None: gpus if kind == "cuda" else REAL_DEVICES()
    )


def chosen(platform="cuda"):
    return maj.select_implementation((4096, 2), platform=platform, **SIZE)


def has_kernels(**options):
    """Whether a program lowered for CUDA holds our kernels: the choice as it is really made."""
    ids = jax.ShapeDtypeStruct((4096, 2), jnp.int32)
    function = jax.jit(lambda x: maj.moe_align_block_size(x, **SIZE, **options))
    return "mosaic_gpu_v2" in function.trace(ids).lower(lowering_platforms=("cuda",)).as_text()


def test_cuda_without_a_gpu_here_is_ahead_of_time(no_gpu):
    assert chosen().implementation == "mosaic_gpu" and has_kernels()


@pytest.mark.parametrize("capability", ["9.0", "10.0", "12.0"])
def test_hopper_and_newer_take_the_kernels(monkeypatch, capability):
    gpu_of(monkeypatch, capability)
    assert chosen().implementation == "mosaic_gpu" and has_kernels()
    assert "faster" in chosen().reasons["xla"]


@pytest.mark.parametrize("capabilities", [("8.0",), ("7.5",), ("9.0", "8.6")])
def test_older_gpu_takes_xla_and_says_why(monkeypatch, capabilities):
    gpu_of(monkeypatch, *capabilities)
    selection = chosen()
    assert selection.implementation == "xla" and selection.form == "sort"
    reason = selection.reasons["mosaic_gpu"]
    assert "compute capability 9.0 (Hopper) or newer" in reason
    assert f"a GPU here has {min(map(float, capabilities))}" in reason
    assert not has_kernels()
    with pytest.raises(NotImplementedError, match="Hopper"):
        has_kernels(implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="Hopper"):
        maj.select_implementation((4, 2), implementation="mosaic_gpu", platform="cuda", **SIZE)


@pytest.mark.parametrize("version", ["0.10.9", "0.11.1", "0.13.0", "0.13.0.dev20270101", "1.0.0"])
def test_unknown_jax_takes_xla_and_says_why(monkeypatch, no_gpu, version):
    monkeypatch.setattr(jax, "__version__", version)
    selection = chosen()
    assert selection.implementation == "xla"
    assert selection.reasons["mosaic_gpu"] == (
        f"the kernels need jax >= 0.11.2, < 0.13.0; this is jax {version}"
    )
    assert not has_kernels()
    with pytest.raises(NotImplementedError, match=f"this is jax {version}"):
        has_kernels(implementation="mosaic_gpu")


@pytest.mark.parametrize("version", ["0.11.2", "0.11.9", "0.12.0", "0.12.0.1", "0.12.3"])
def test_known_jax_takes_the_kernels(monkeypatch, no_gpu, version):
    monkeypatch.setattr(jax, "__version__", version)
    assert chosen().implementation == "mosaic_gpu"


def test_kernels_that_do_not_import_are_a_reason(monkeypatch, no_gpu):
    import moe_align_jax._simt

    monkeypatch.setitem(sys.modules, "moe_align_jax._simt.mosaic", None)
    monkeypatch.delattr(moe_align_jax._simt, "mosaic", raising=False)
    selection = chosen()
    assert selection.implementation == "xla"
    assert "does not import here" in selection.reasons["mosaic_gpu"]
    assert not has_kernels()


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_other_platforms_take_xla(platform):
    selection = chosen(platform)
    assert selection.implementation == "xla"
    assert selection.reasons["mosaic_gpu"].endswith(f"NVIDIA GPUs only, not on {platform!r}")
    assert set(selection.reasons) == {"mosaic_gpu", "emulator"}


def test_emulator_runs_only_when_named():
    assert "only when named" in chosen("cpu").reasons["emulator"]
    selection = maj.select_implementation((4, 2), platform="cpu", implementation="emulator", **SIZE)
    assert selection.implementation == "emulator" and selection.form == "warp"
    assert selection.reasons["xla"] == "implementation='emulator' was asked for"


@pytest.mark.parametrize("size", forms.SIZES, ids=str)
def test_form_is_that_of_the_size(no_gpu, size):
    for shape in (
        size.num_pairs,
        (size.num_pairs,),
        [1, size.num_pairs],
        np.zeros(size.num_pairs, np.int8),
    ):
        selection = maj.select_implementation(
            shape, block_size=size.block_size, num_experts=size.num_experts, platform="cuda"
        )
        assert (selection.implementation, selection.form) == ("mosaic_gpu", size.form)


def test_no_pairs_have_the_empty_form():
    assert maj.select_implementation((0, 8), platform="cuda", **SIZE).form == "empty"


def test_gpu_is_another_name_of_cuda(no_gpu):
    assert chosen("gpu") == chosen("cuda")


def test_default_platform_is_that_of_the_process():
    assert maj.select_implementation((4, 2), **SIZE) == maj.select_implementation(
        (4, 2), platform=jax.default_backend(), **SIZE
    )


@pytest.mark.parametrize("name", ["xla", "emulator", None])
def test_named_implementation_runs_and_nothing_else(monkeypatch, name):
    """The contract suite would show nothing if a name fell back to another implementation."""
    from moe_align_jax._align import reference
    from moe_align_jax._simt import emulator

    ran = []
    for module, function in ((reference, "block_align"), (emulator, "run")):
        real = getattr(module, function)
        spy = lambda *a, real=real, module=module, **k: ran.append(module) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr(module, function, spy)
    ids = np.arange(77, dtype=np.int32)  # a size that no other test has compiled
    with jax.default_device(jax.devices("cpu")[0]):
        out = maj.moe_align_block_size(ids, block_size=3, num_experts=77, implementation=name)
    assert out.tokens_per_expert.tolist() == [1] * 77
    assert set(ran) == {emulator if name == "emulator" else reference}


def test_pieces_of_a_version():
    assert select.jax_version()[:2] == tuple(map(int, jax.__version__.split(".")[:2]))


QUESTIONS = {
    "select_implementation": lambda p: maj.select_implementation((4, 2), platform=p, **SIZE),
    "select_transport": lambda p: maj.select_transport(4, top_k=2, num_ranks=2, platform=p),
    "select_quant_implementation": lambda p: select_quant_implementation((2, 4, 256), platform=p),
    "select_matmul_implementation": lambda p: maj.select_matmul_implementation(
        (8, 128), (4, 128, 128), block_size=8, platform=p
    ),
    "select_moe_implementation": lambda p: maj.select_moe_implementation(
        (8, 128), (4, 128, 128), top_k=2, platform=p
    ),
    "select_router_implementation": lambda p: maj.select_router_implementation(
        (8, 128), top_k=2, platform=p
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize(
    ("platform", "got"), [("foo", "'foo'"), ("", "''"), ("CPU", "'CPU'"), (3, "int 3")]
)
def test_an_unknown_platform_is_an_error_that_names_those_that_there_are(name, platform, got):
    with pytest.raises(ValueError) as raised:
        QUESTIONS[name](platform)
    text = str(raised.value)
    assert text.startswith(f"{name}: platform must be None or one of 'gpu', 'cpu', 'tpu', 'rocm', ")
    assert f"; got {got}. " in text


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("platform", [None, "cpu", "gpu", "cuda", "rocm", "tpu"])
def test_every_platform_that_jax_names_gets_an_answer(name, platform):
    answer = QUESTIONS[name](platform)
    chosen = answer.transport if name == "select_transport" else answer.implementation
    assert chosen in ("mosaic_gpu", "xla", "nvlink", "nvlink_window", "all_to_all")


def test_a_platform_of_a_plugin_is_known_where_it_has_devices(monkeypatch):
    device = types.SimpleNamespace(platform="metal", device_kind="M", compute_capability="0")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    assert QUESTIONS["select_implementation"]("metal").implementation == "xla"
