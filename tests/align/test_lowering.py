"""Programs lowered for CUDA on a machine without a GPU: what stands in them, and who decides."""

import collections
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.mlir import ir

import moe_align_jax as maj
from moe_align_jax._align import kernels
from tests import forms

MOSAIC = "mosaic_gpu_v2"
# Beside the kernels: views of the same bytes, constants, and what holds a function together.
ALLOWED = {
    *("builtin.module", "func.func", "func.return", "func.call"),
    *("stablehlo.reshape", "stablehlo.bitcast_convert", "stablehlo.constant"),
}


def lower(function, *arguments, platforms=("cuda",)):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms)


def operations(lowered) -> collections.Counter:
    """How often each operation stands in the StableHLO module; custom calls by their target."""
    counts: collections.Counter = collections.Counter()

    def visit(operation):
        name = operation.name
        if name == "stablehlo.custom_call":
            name = f"custom_call {ir.StringAttr(operation.attributes['call_target_name']).value}"
        counts[name] += 1
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return counts


def assert_only_kernels(lowered) -> int:
    counts = operations(lowered)
    kernels = counts.pop(f"custom_call {MOSAIC}", 0)
    assert kernels and set(counts) <= ALLOWED, counts
    return kernels


def call(size: forms.Size, options: dict):
    """A function of (ids, map, number of valid pairs) with the given options, and their shapes."""

    def function(ids, expert_map, num_valid_pairs):
        return maj.moe_align_block_size(
            ids,
            block_size=size.block_size,
            num_experts=size.num_experts,
            expert_map=expert_map if options["map"] else None,
            ignore_invalid_experts=options["map"] == "filter",
            num_valid_pairs=num_valid_pairs if options["num_valid_pairs"] else None,
            return_inverse=options["return_inverse"],
            pad_sorted_ids=options["pad_sorted_ids"],
        )

    shapes = ((size.num_pairs,), (size.num_experts,), ())
    return function, tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)


def test_sizes_reach_every_form():
    folder = pathlib.Path(kernels.__file__).parent
    shared = {"__init__", "common", "counting", "placing"}
    files = {path.stem for path in folder.glob("*.py")} - shared
    assert {size.form for size in forms.SIZES} | {"batched"} == files


def test_the_check_sees_another_operation():
    """The guard of this file: a program with one XLA addition is refused."""
    function, shapes = call(forms.SIZES[1], forms.OPTIONS[0])
    lowered = lower(lambda *a: function(*a).expert_ids + 1, *shapes)
    with pytest.raises(AssertionError, match="stablehlo.add"):
        assert_only_kernels(lowered)


@pytest.mark.parametrize("size", forms.SIZES, ids=str)
def test_cuda_program_holds_only_kernels(size):
    for options in forms.PAIRWISE:
        function, shapes = call(size, options)
        assert_only_kernels(lower(function, *shapes))


@pytest.mark.parametrize("num_experts", [1, 64, 256, 1000, 4095, 65_535])
@pytest.mark.parametrize("num_pairs", [8, 600, 3000])
def test_cuda_program_under_vmap_holds_only_kernels(num_experts, num_pairs):
    function, shapes = call(forms.Size(num_pairs, num_experts, 16), forms.OPTIONS[-1])
    batched = [jax.ShapeDtypeStruct((5, *s.shape), s.dtype) for s in shapes]
    plain = assert_only_kernels(lower(function, *shapes))
    assert assert_only_kernels(lower(jax.vmap(function), *batched)) == plain
    some = jax.vmap(function, in_axes=(0, None, None))
    assert assert_only_kernels(lower(some, batched[0], *shapes[1:])) == plain
    twice = [jax.ShapeDtypeStruct((3, *s.shape), s.dtype) for s in batched]
    assert assert_only_kernels(lower(jax.vmap(jax.vmap(function)), *twice)) == plain


@pytest.mark.parametrize("size", forms.BATCHED_SIZES, ids=str)
def test_batched_cuda_program_holds_only_kernels(size):
    num_experts, max_tokens, block_size = size
    function = functools.partial(
        maj.batched_moe_align_block_size, max_tokens_per_batch=max_tokens, block_size=block_size
    )
    counts = jax.ShapeDtypeStruct((num_experts,), jnp.int32)
    assert_only_kernels(lower(function, counts))
    assert_only_kernels(
        lower(jax.vmap(function), jax.ShapeDtypeStruct((7, num_experts), jnp.int32))
    )


@pytest.mark.parametrize("dtype", ["int64", "uint64", "uint32"])
def test_cuda_program_reads_wide_ids_without_converting_them(dtype):
    with jax.enable_x64(True):
        shape = jax.ShapeDtypeStruct((4096,), dtype)
        lowered = lower(
            functools.partial(maj.moe_align_block_size, block_size=64, num_experts=64), shape
        )
    assert_only_kernels(lowered)


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint16"])
def test_cuda_program_widens_narrow_ids_once(dtype):
    shape = jax.ShapeDtypeStruct((4096,), dtype)
    counts = operations(
        lower(functools.partial(maj.moe_align_block_size, block_size=64, num_experts=64), shape)
    )
    assert counts.pop("stablehlo.convert") == 1 and counts.pop(f"custom_call {MOSAIC}")
    assert set(counts) <= ALLOWED


def test_cuda_program_of_no_pairs_launches_nothing():
    function, shapes = call(forms.Size(0, 8, 16), forms.OPTIONS[-1])
    assert not [name for name in operations(lower(function, *shapes)) if "custom_call" in name]


@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("tpu",), ("rocm",)])
def test_one_trace_lowers_for_each_platform(platforms):
    function, shapes = call(forms.SIZES[4], forms.OPTIONS[0])
    traced = jax.jit(function).trace(*shapes)
    for chosen in (platforms, ("cpu",), ("cuda",)):
        counts = operations(traced.lower(lowering_platforms=chosen))
        kernels = counts[f"custom_call {MOSAIC}"]
        assert bool(kernels) == (chosen == ("cuda",)) and bool(counts["stablehlo.sort"]) != bool(
            kernels
        )


def test_layers_of_one_model_share_one_lowering():
    function, shapes = call(forms.SIZES[9], forms.OPTIONS[0])
    one = operations(lower(function, *shapes))
    three = operations(lower(lambda *a: [function(*a) for _ in range(3)], *shapes))
    assert three[f"custom_call {MOSAIC}"] == one[f"custom_call {MOSAIC}"] > 0
    assert three["func.call"] == one["func.call"] + 2


# -- names run or raise, at lowering and never at trace -------------------------------------------------


def named(implementation):
    return functools.partial(
        maj.moe_align_block_size, block_size=4, num_experts=8, implementation=implementation
    )


REFUSED = [
    ("mosaic_gpu", "cpu", "run on NVIDIA GPUs only, not on 'cpu'"),
    ("mosaic_gpu", "tpu", "run on NVIDIA GPUs only, not on 'tpu'"),
    ("mosaic_gpu", "rocm", "run on NVIDIA GPUs only, not on 'rocm'"),
    ("emulator", "cuda", "by NumPy on a CPU, not on 'cuda'"),
    ("emulator", "tpu", "by NumPy on a CPU, not on 'tpu'"),
]


@pytest.mark.parametrize(("implementation", "platform", "reason"), REFUSED)
def test_named_implementation_raises_at_lowering_not_at_trace(implementation, platform, reason):
    traced = jax.jit(named(implementation)).trace(jax.ShapeDtypeStruct((12,), jnp.int32))
    with pytest.raises(NotImplementedError, match=re.escape(reason)) as caught:
        traced.lower(lowering_platforms=(platform,))
    assert str(caught.value).startswith("moe_align_block_size: implementation must be one that can")


@pytest.mark.parametrize(
    ("implementation", "platform", "kernel"), [("mosaic_gpu", "cuda", True), ("xla", "cuda", False)]
)
def test_named_implementation_is_the_one_lowered(implementation, platform, kernel):
    shape = jax.ShapeDtypeStruct((4000,), jnp.int32)
    counts = operations(lower(named(implementation), shape, platforms=(platform,)))
    assert bool(counts[f"custom_call {MOSAIC}"]) == kernel


# -- a batch that the grid cannot hold ------------------------------------------------------------------


def test_vmap_beyond_the_grid_is_a_value_error_at_lowering():
    batched = jax.vmap(named(None))
    limit = jax.ShapeDtypeStruct((65_535, 4), jnp.int32)
    assert_only_kernels(lower(batched, limit))
    traced = jax.jit(batched).trace(jax.ShapeDtypeStruct((65_536, 4), jnp.int32))
    with pytest.raises(
        ValueError, match="a vmapped batch must be at most 65535 on a GPU; got 65536"
    ):
        traced.lower(lowering_platforms=("cuda",))
    deep = jax.vmap(jax.vmap(named(None)))
    traced = jax.jit(deep).trace(jax.ShapeDtypeStruct((100, 1000, 4), jnp.int32))
    with pytest.raises(ValueError, match="got 100000"):
        traced.lower(lowering_platforms=("cuda",))


# -- jax.export -----------------------------------------------------------------------------------------


def test_export_for_cuda_and_cpu_together_runs_on_the_cpu():
    function = functools.partial(maj.moe_align_block_size, block_size=4, num_experts=8)
    ids = np.random.default_rng(0).integers(-1, 9, (40, 2)).astype(np.int32)
    exported = jax.export.export(jax.jit(function), platforms=["cuda", "cpu"])(
        jax.ShapeDtypeStruct(ids.shape, ids.dtype)
    )
    assert MOSAIC in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cuda", "cpu")
    with jax.default_device(jax.devices("cpu")[0]):
        got = again.call(ids)
    want = function(ids, implementation="xla")
    for have, expect in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.array_equal(have, expect)


def test_export_for_cuda_alone_serialises():
    function = functools.partial(maj.moe_align_block_size, block_size=64, num_experts=64)
    exported = jax.export.export(jax.jit(function), platforms=["cuda"])(
        jax.ShapeDtypeStruct((8192,), jnp.int32)
    )
    assert MOSAIC in jax.export.deserialize(exported.serialize()).mlir_module()


@pytest.mark.parametrize("pad", [False, True])
def test_shape_polymorphic_export_of_xla_runs_at_several_sizes(pad):
    function = functools.partial(
        maj.moe_align_block_size,
        block_size=4,
        num_experts=8,
        pad_sorted_ids=pad,
        return_inverse=True,
        implementation="xla",
    )
    [tokens] = jax.export.symbolic_shape("tokens", constraints=("tokens >= 1",))
    exported = jax.export.export(jax.jit(function), platforms=["cpu"])(
        jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
    )
    for num_tokens in (1, 3, 4, 5, 100):
        ids = np.random.default_rng(num_tokens).integers(-1, 9, (num_tokens, 2)).astype(np.int32)
        got, want = exported.call(ids), function(ids)
        for have, expect in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.array_equal(have, expect)


def test_shape_polymorphic_export_of_the_kernels_says_what_to_do():
    [tokens] = jax.export.symbolic_shape("tokens", constraints=("tokens >= 1",))
    shape = jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
    with pytest.raises(
        NotImplementedError, match="static shapes; export a symbolic shape with 'xla'"
    ):
        jax.export.export(jax.jit(named(None)), platforms=["cuda"])(shape)


def test_symbolic_tokens_of_router_and_alignment_say_what_to_do():
    """The alignment behind the router compared symbols with the limits of its kernels."""
    [tokens] = jax.export.symbolic_shape("tokens", constraints=("tokens >= 1",))
    shape = jax.ShapeDtypeStruct((tokens, 4), jnp.float32)

    def export(implementation):
        run = functools.partial(maj.route_and_align, top_k=2, block_size=4)
        call = jax.jit(functools.partial(run, implementation=implementation))
        return jax.export.export(call, platforms=["cpu", "cuda"])(shape)

    with pytest.raises(
        NotImplementedError, match="static shapes; export a symbolic shape with 'xla'"
    ):
        export(None)
    logits = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    want = maj.route_and_align(logits, top_k=2, block_size=4)
    for got, each in zip(
        jax.tree.leaves(export("xla").call(logits)), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(got, each, rtol=1e-6)


# -- the same on a real GPU -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("size", forms.SIZES, ids=str)
def test_optimised_cuda_program_holds_only_kernels(size):
    """What XLA makes of it: custom calls, views of the same bytes, and tuples; no fill, copy or fusion."""
    allowed = {
        "parameter",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "custom-call",
        "call",
        "constant",
    }
    for options in forms.OPTIONS[:: 5 if size.num_pairs > 10_000 else 1]:
        function, shapes = call(size, options)
        compiled = jax.jit(function).lower(*shapes).compile().as_text()
        found = set(
            re.findall(r"^\s*(?:ROOT )?\S+ = .*? ([a-z][a-z0-9-]*)\(", compiled, re.MULTILINE)
        )
        targets = set(re.findall(r'custom_call_target="([^"]+)"', compiled))
        assert found <= allowed and targets == {MOSAIC}, (options, found, targets)
