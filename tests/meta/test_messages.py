"""Values that no argument takes get an error in our words, whatever they are, and not NumPy's or jax's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import moe_align_jax as maj
from moe_align_jax import masked_quant
from moe_align_jax.adapters import haliax
from tests.expert_parallel.exchanges import mesh_of, over
from torch_bridge import deep_gemm, sglang, vllm

IDS, X = np.array([[1, 0], [1, -1]], np.int32), np.ones((2, 128), np.float32)
W = np.ones((2, 128, 128), np.float32)
LOGITS, SIZES = np.zeros((2, 2), np.float32), np.array([1, 1], np.int32)
ALIGNED = maj.moe_align_block_size(IDS, block_size=2, num_experts=2)
ROWS, LAYOUT = maj.permute_to_masked(X, IDS, num_experts=2)
QUANT = np.ones((2, 4, 256), jnp.bfloat16), SIZES
LOAD = np.array([[5, 1], [2, 2]])
SPLIT = {"num_replicas": 2, "num_groups": 1, "num_nodes": 1, "num_gpus": 2}
STATE = maj.init_expert_load("stat", num_layers=1, num_physical_experts=2)
HUGE = 10**400  # beyond float64
LONGEST = 10**5000  # more digits than Python writes
ARRAYS = [np.zeros(0), np.zeros((2, 3)), np.array(["xla", "x"]), jnp.zeros(2), torch.zeros(2)]


def _align(**options):
    return maj.moe_align_block_size(IDS, **{"block_size": 2, "num_experts": 2} | options)


def _multiply(**options):
    return maj.grouped_matmul(X, W, ALIGNED, block_size=2, top_k=2, **options)


def _layer(**options):
    weights = np.ones((2, 2), np.float32)
    return maj.fused_moe(X, W, W, weights, IDS, **{"gated": False} | options)


def _dispatch(**options):
    def body(x, ids, weights):
        operands = {"x": x, "topk_ids": ids, "topk_weights": weights}
        given = operands | {"axis_name": "ep", "num_experts": 2} | options
        return maj.dispatch(**given).tokens_per_expert

    return over(mesh_of(1), body)(X, IDS, np.ones((2, 2), np.float32))


def _sharded(**options):
    mesh, weights = mesh_of(1), np.ones((2, 2), np.float32)
    given = {"mesh": mesh, "expert_axis": "ep", "gated": False} | options
    return maj.sharded_fused_moe(X, W, W, weights, IDS, **given)


# Strings by their names, which an array is not.
NAMES = {
    "implementation of moe_align_block_size": lambda v: _align(implementation=v),
    "implementation of ragged_dot": lambda v: haliax.ragged_dot(X, W, SIZES, implementation=v),
    "platform": lambda v: maj.select_implementation(
        (2, 2), block_size=2, num_experts=2, platform=v
    ),
    "scale_format": lambda v: maj.silu_and_mul_masked_quant(*QUANT, scale_format=v),
    "scale_layout": lambda v: maj.quantize_rowwise(X, scale_layout=v),
    "activation": lambda v: _multiply(activation=v),
    "scoring": lambda v: maj.route_topk(LOGITS, top_k=1, scoring=v),
    "scoring of load_balancing_loss": lambda v: maj.load_balancing_loss(LOGITS, SIZES, scoring=v),
    "drop": lambda v: maj.drop_over_capacity(IDS, num_experts=2, capacity=1, drop=v),
    "algorithm": lambda v: maj.rebalance_experts(LOAD, **SPLIT, algorithm=v),
    "mode": lambda v: maj.init_expert_load(v, num_layers=1, num_physical_experts=2),
    "mode of dispatch": lambda v: _dispatch(mode=v),
    "transport": lambda v: _dispatch(transport=v),
    "payload": lambda v: _dispatch(payload=v),
    "method": lambda v: _sharded(method=v),
    "op": lambda v: vllm.warmup_router(v, num_experts=2, topk=1, max_tokens=1),
}


def refuses(call, argument, kind, match=""):
    with pytest.raises(kind) as raised:
        call()
    found = re.fullmatch(rf"[\w.]+: {argument} must .+; got .+\. .+", str(raised.value))
    assert found and re.search(match, str(raised.value)), raised.value


@pytest.mark.parametrize("name", NAMES)
def test_arrays_are_no_names(name):
    for value in ARRAYS:
        refuses(lambda value=value: NAMES[name](value), name.split()[0], ValueError)


NUMBERS = {
    "swiglu_limit": lambda v: maj.silu_and_mul_masked_quant(*QUANT, swiglu_limit=v),
    "amax_floor": lambda v: maj.silu_and_mul_masked_quant(*QUANT, amax_floor=v),
    "amax_floor of quantize_rowwise": lambda v: maj.quantize_rowwise(X, amax_floor=v),
    "swiglu_alpha": lambda v: _layer(gated=True, swiglu_alpha=v),
    "scaling_factor": lambda v: maj.route_topk(LOGITS, top_k=1, scaling_factor=v),
    "capacity_factor": lambda v: maj.expert_capacity(4, top_k=2, num_experts=2, capacity_factor=v),
    "rate": lambda v: maj.update_router_bias(LOGITS[0], SIZES, rate=v),
    "swiglu_limit of grouped_matmul": lambda v: _multiply(activation="silu", swiglu_limit=v),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite(name):
    beyond_float32 = () if name == "capacity_factor" else (1e39, np.float64(3.4028236e38))
    others = (float("inf"), float("nan"), np.float32(np.inf))
    for value in (HUGE, -HUGE, LONGEST, *others, *beyond_float32):
        refuses(lambda value=value: NUMBERS[name](value), name.split()[0], ValueError)


def test_the_greatest_float32_is_finite():
    most = np.finfo(np.float32).max
    for value in (most, float(most)):
        q, scales = maj.quantize_rowwise(X, amax_floor=value)
        np.testing.assert_array_equal(scales, np.full((2, 1), most / np.float32(448)))
        assert not np.asarray(q, np.float32).any()
    refuses(
        lambda: maj.update_router_bias(LOGITS[0].astype(np.float16), SIZES, rate=7e4),
        *("rate", ValueError, "float16"),
    )


def test_a_capacity_beyond_every_number_of_pairs_is_all_of_them():
    sizes = {"top_k": 2**31 - 1, "num_experts": 1}
    assert maj.expert_capacity(2**31 - 1, **sizes, capacity_factor=1e308) == 2**31 - 1


@pytest.mark.parametrize("value", [2**31, HUGE, LONGEST], ids=["int32", "float64", "text"])
def test_sizes_of_any_length_are_refused(value):
    refuses(lambda: _align(num_experts=value), "num_experts", ValueError, "at most 2")
    refuses(lambda: _align(block_size=value), "block_size", ValueError, "at most 2")
    shared = {"num_fused_shared_experts": value}
    refuses(lambda: _align(**shared), "num_fused_shared_experts", ValueError, "an int|int")


OFFSETS = [10**30, np.array([2**32])]


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
def test_a_group_offset_beyond_int32_is_that_of_no_matrix(offset):
    """2**32 was group 0."""
    out = maj.ragged_dot(X, W[:1], SIZES, group_offset=offset)
    assert not np.any(out)
    assert np.any(maj.ragged_dot(X, W[:1], SIZES, group_offset=0))
    if isinstance(offset, (int, np.integer)) and -(2**63) <= offset < 2**63:
        with jax.enable_x64(True):
            assert not np.any(maj.ragged_dot(X, W[:1], SIZES, group_offset=jnp.int64(offset)))


WRONG = {
    "precision": lambda: maj.ragged_dot(X, W, SIZES, precision="exact"),
    "out_sharding": lambda: maj.ragged_dot(X, W, SIZES, out_sharding="ep"),
    "group_offset": lambda: maj.gmm(X, W[:1], SIZES, group_offset=True),
    "preferred_element_type": lambda: _multiply(preferred_element_type=torch.zeros(2)),
    "out_dtype": lambda: maj.unpermute_from_masked(ROWS, LAYOUT, out_dtype=torch.zeros(2)),
    "aligned": lambda: maj.padded_group_sizes((1, 2), block_size=2),
    "num_fused_shared_experts": lambda: _align(num_fused_shared_experts=np.zeros(2)),
    "sharding": lambda: maj.init_expert_load(
        "stat", num_layers=1, num_physical_experts=2, sharding="ep"
    ),
    "mesh": lambda: maj.select_transport(2, top_k=2, num_ranks=2, mesh=("ep",)),
    "num_tokens": lambda: maj.moe_block_size(False, top_k=2, num_experts=2),
    "weight": lambda: maj.rebalance_experts(torch.ones(2, 2, requires_grad=True), **SPLIT),
    "weight of bools": lambda: maj.rebalance_experts(LOAD > 1, **SPLIT),
    "weight under jit": lambda: jax.jit(
        lambda load: maj.rebalance_experts(load, **SPLIT).expert_count
    )(LOAD),
    "physical_count": lambda: maj.balancedness(LOAD > 1, num_gpus=2),
    "physical_count of records": lambda: maj.balancedness(
        np.zeros(2, [("tokens", "i4")]), num_gpus=2
    ),
    "max_tokens": lambda: maj.init_expert_load(
        "stat", num_layers=1, num_physical_experts=2, max_tokens="4"
    ),
    "num_rows": lambda: maj.select_matmul_implementation(
        (2, 128), (2, 128, 128), block_size=2, num_rows="2"
    ),
    "top_k": lambda: maj.select_matmul_implementation(
        (2, 128), (2, 128, 128), block_size=2, top_k=True
    ),
    "x_shape": lambda: maj.select_matmul_implementation((True, 128), (2, 128, 128), block_size=2),
    "dtype": lambda: maj.select_matmul_implementation(
        (2, 128), (2, 128, 128), block_size=2, dtype=None
    ),
    "dtype of a layer": lambda: maj.select_moe_implementation(
        (2, 128), (2, 128, 128), top_k=2, dtype="float64"
    ),
    "has_aligned": lambda: maj.select_moe_implementation(
        (2, 128), (2, 128, 128), top_k=2, has_aligned="no"
    ),
    "dtype of a router": lambda: maj.select_router_implementation((2, 4), top_k=2, dtype=4),
    "dtype of blocks": lambda: maj.moe_block_size(2, top_k=1, num_experts=2, dtype="int8"),
    "dtype of no blocks": lambda: maj.moe_block_size(2, top_k=1, num_experts=2, dtype=X),
    "expert_location": lambda: _layer(expert_location=X),
    "x of objects": lambda: maj.permute_to_masked(np.array([[None], [1]]), IDS, num_experts=2),
    "x of text": lambda: maj.permute_to_contiguous(np.array([["a"], ["b"]]), IDS, num_experts=2),
    "x of long doubles": lambda: maj.permute_to_masked(X.astype(np.longdouble), IDS, num_experts=2),
    "topk_weights of long doubles": lambda: maj.unpermute_from_masked(
        ROWS, LAYOUT, np.ones((2, 2), np.longdouble)
    ),
    "num_global_experts": lambda: maj.select_moe_implementation(
        (2, 128), (2, 128, 128), top_k=2, num_global_experts="4"
    ),
    "has_bias": lambda: maj.select_router_implementation((2, 4), top_k=2, has_bias=X),
    "shape": lambda: maj.select_router_implementation((2, True), top_k=1),
    "dtype of a quantisation": lambda: masked_quant.select_quant_implementation(
        (2, 4, 256), dtype="int32"
    ),
    "options": lambda: masked_quant.select_quant_implementation((2, 4, 256), floor=1),
}


AXES = ["expert_axis", "data_axes", "tensor_axis", "fsdp_axis"]


@pytest.mark.parametrize("axis", AXES)
def test_what_is_no_name_is_no_axis(axis):
    """An array was compared with every axis of the mesh, and an int of 5,000 digits written."""
    for value in [*ARRAYS, HUGE, LONGEST, b"ep"]:
        given = (value,) if axis == "data_axes" else value
        refuses(lambda given=given: _sharded(**{axis: given}), axis, TypeError)
    refuses(lambda: _sharded(**{axis: "tp"}), axis, ValueError, "; got 'tp'. ")


NARROW = {
    "batched_moe_align_block_size": lambda n: (
        maj.batched_moe_align_block_size(n, max_tokens_per_batch=4, block_size=2).expert_ids
    ),
    "silu_and_mul_masked_quant": lambda n: maj.silu_and_mul_masked_quant(QUANT[0], n)[1],
    "load_balancing_loss": lambda n: maj.load_balancing_loss(LOGITS, n),
    "update_router_bias": lambda n: maj.update_router_bias(LOGITS[0], n, rate=0.1),
    "record_expert_load": lambda n: maj.record_expert_load(STATE, 0, n).pending["0"],
}


@pytest.mark.parametrize("name", NARROW)
def test_integers_of_four_bits_are_integers(name):
    """NumPy knows no bounds of these."""
    np.testing.assert_array_equal(NARROW[name](SIZES.astype(jnp.int4)), NARROW[name](SIZES))


def test_a_state_is_one_of_expert_load():
    for call in (
        lambda v: maj.record_expert_load(v, 0, SIZES),
        maj.commit_expert_load,
        maj.collect_expert_load,
    ):
        for value in (None, 1, "stat", [], SIZES, ALIGNED):
            refuses(lambda value=value, call=call: call(value), "load", TypeError)


MASKED = {
    "topk_ids": lambda m: maj.moe_align_block_size(m(IDS), block_size=2, num_experts=2),
    "x": lambda m: maj.quantize_rowwise(m(X)),
    "lhs": lambda m: maj.ragged_dot(m(X), W, SIZES),
    "logits": lambda m: maj.route_topk(m(LOGITS), top_k=1),
    "correction_bias": lambda m: maj.route_topk(LOGITS, top_k=1, correction_bias=m(LOGITS[0])),
    "token_mask": lambda m: maj.route_topk(LOGITS, top_k=1, token_mask=m(SIZES > 0)),
    "masked_m": lambda m: maj.silu_and_mul_masked_quant(QUANT[0], m(SIZES)),
    "tokens_per_expert": lambda m: maj.load_balancing_loss(LOGITS, m(SIZES)),
    "topk_weights": lambda m: maj.fused_moe(X, W, W, m(LOGITS), IDS, gated=False),
    "num_valid_tokens": lambda m: _layer(num_valid_tokens=m(SIZES[:1])),
    "x of dispatch": lambda m: _dispatch(x=m(X)),
    "topk_weights of dispatch": lambda m: _dispatch(topk_weights=m(LOGITS + 1)),
    "weight": lambda m: maj.rebalance_experts(m(LOAD), **SPLIT),
    "physical_count": lambda m: maj.balancedness(m(LOAD), num_gpus=2),
    "physical_to_logical_map": lambda m: maj.expected_physical_count(LOAD, m(LOAD % 2)),
    "previous": lambda m: maj.rebalance_experts(LOAD, **SPLIT, previous=m(LOAD % 2)),
    "x of permute_to_masked": lambda m: maj.permute_to_masked(m(X), IDS, num_experts=2),
}


@pytest.mark.parametrize("name", MASKED)
def test_arrays_with_a_mask_are_refused(name):
    """NumPy's functions drop the mask in silence; jax refuses the array in words of its own."""
    masked = lambda array: np.ma.masked_array(array, np.zeros(array.shape, bool))  # noqa: E731
    refuses(lambda: MASKED[name](masked), name.split()[0], TypeError, "got masked ")


SPANS = {
    "topk_ids": lambda m: maj.moe_align_block_size(m(IDS), block_size=2, num_experts=2),
    "topk_ids of drop_over_capacity": lambda m: maj.drop_over_capacity(
        m(IDS), num_experts=2, capacity=1
    ),
    "topk_ids of fused_moe": lambda m: maj.fused_moe(X, W, W, LOGITS, m(IDS), gated=False),
    "topk_ids of permute_to_masked": lambda m: maj.permute_to_masked(X, m(IDS), num_experts=2),
    "tokens_per_expert": lambda m: maj.record_expert_load(STATE, 0, m(SIZES)),
    "group_sizes": lambda m: maj.ragged_dot(X, W, m(SIZES)),
    "masked_m": lambda m: maj.silu_and_mul_masked_quant(QUANT[0], m(SIZES)),
}


@pytest.mark.parametrize("name", SPANS)
def test_spans_of_time_are_no_integers(name):
    """NumPy has timedelta64 among its signed integers."""
    refuses(lambda: SPANS[name](lambda array: array.astype("m8[s]")), name.split()[0], TypeError)


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_a_class_of_numbers_is_a_value_as_any_other(kind):
    """It has a dtype and a shape, but those of its numbers."""
    shown = rf"got type <class 'numpy\.{kind.__name__}'>"
    refuses(lambda: _align(block_size=kind), "block_size", TypeError, shown)
    refuses(lambda: maj.ragged_dot(X, W, SIZES, kind), "precision", TypeError, shown)
    refuses(lambda: _layer(expert_map=kind), "expert_map", TypeError, shown)


class Nameless:
    def __repr__(self):
        raise RuntimeError


class Shapeless:
    """As a nested tensor of PyTorch."""

    dtype = torch.float32

    @property
    def shape(self):
        raise RuntimeError


def test_a_value_that_cannot_be_written_is_named_by_its_type():
    refuses(lambda: _align(block_size=[LONGEST]), "block_size", TypeError, "got a list. ")
    refuses(lambda: _align(block_size=Nameless()), "block_size", TypeError, "got a Nameless. ")
    refuses(lambda: _align(block_size=Shapeless()), "block_size", TypeError, "got a Shapeless. ")
    refuses(lambda: _sharded(mesh=""), "mesh", TypeError, "got ''. ")
    dtype = "preferred_element_type"
    refuses(lambda: _layer(preferred_element_type=Nameless()), dtype, TypeError, "got a Nameless. ")
    call = lambda: maj.ragged_dot(X, W, SIZES, Nameless())  # noqa: E731
    refuses(call, "precision", TypeError, "got a Nameless. ")


@pytest.mark.parametrize("tokens", [2, 64])
def test_the_layer_speaks_of_its_own_arguments(tokens):
    """With few tokens it makes no alignment, with many it does: both refuse the same, in its name."""
    weights, x = np.ones((16, 128, 128), np.float32), np.ones((tokens, 128), np.float32)
    ids, scores = np.zeros((tokens, 2), np.int32), np.ones((tokens, 2), np.float32)
    logical = [*range(8), *range(8)]

    def layer(slots, layer=0, **options):
        location = maj.ExpertLocation.from_map([slots, slots], num_gpus=2, **options)
        location = location if layer is None else location.layer(layer)
        return maj.fused_moe(
            x, weights, weights, scores, ids, gated=False, expert_location=location
        )

    assert layer(logical).shape == x.shape
    refuses(
        lambda: layer(logical, None), "expert_location", ValueError, "fused_moe.* one of 2 layers"
    )
    refuses(
        lambda: layer([0, 1, 2, 1]),
        "expert_location",
        ValueError,
        "fused_moe.* 16 physical .* got 4",
    )
    refuses(
        lambda: layer(logical, dispatch="static"),
        "expert_location",
        ValueError,
        "fused_moe.*for_rank",
    )


@pytest.mark.parametrize("name", WRONG)
def test_what_is_of_another_kind_is_a_type_error(name):
    refuses(WRONG[name], name.split()[0], TypeError)


LOSSES = {
    "load_balancing_loss": lambda axis: maj.load_balancing_loss(LOGITS, SIZES, axis_name=axis),
    "router_z_loss": lambda axis: maj.router_z_loss(LOGITS, axis_name=axis),
    "update_router_bias": lambda axis: maj.update_router_bias(LOGITS[0], SIZES, axis_name=axis),
}


@pytest.mark.parametrize("name", LOSSES)
def test_an_axis_is_of_the_mesh_around_it(name):
    refuses(lambda: LOSSES[name]("ep"), "axis_name", ValueError, f"^{name}: .*; got 'ep'")
    refuses(lambda: LOSSES[name](("ep", "tp")), "axis_name", ValueError)
    refuses(lambda: LOSSES[name](["ep"]), "axis_name", TypeError)
    refuses(lambda: LOSSES[name](("ep", "ep")), "axis_name", ValueError, "name each axis once; got")


def test_dispatch_names_each_axis_once():
    refuses(lambda: _dispatch(axis_name=("ep", "ep")), "axis_name", ValueError, "axis once; got")


@pytest.mark.parametrize("kind", ["masked", "struct", "torch"])
def test_quantised_rows_of_dispatch_are_arrays(kind):
    """A mask, and the shape of an array, reached jax; of torch's dtypes none equals jax's."""
    codes, scales = maj.quantize_rowwise(X)
    make = {
        "masked": lambda a: np.ma.masked_array(np.asarray(a), False),
        "struct": lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
        "torch": lambda a: torch.zeros(a.shape),
    }[kind]
    for x in ((make(codes), scales), (codes, make(scales))):
        refuses(lambda x=x: _dispatch(x=x), "x", TypeError)


def test_a_handle_is_one_of_dispatch():
    for handle in (None, (), maj.DispatchHandle(*[None] * 6), jnp.zeros(2)):
        refuses(lambda handle=handle: maj.combine(X, handle), "handle", TypeError)


def _route_into(weights, renormalize=False, scale=1.0):
    ids = torch.full((2, 1), 7, dtype=torch.int32)
    args = (weights, ids, ids.clone(), torch.zeros(2, 2), renormalize, None, scale)
    try:
        vllm.topk_sigmoid(*args)
    finally:
        assert ids.tolist() == [[7], [7]]  # nothing is written


def _quantise_into(written, x, scales):
    sglang.silu_and_mul_masked_post_quant_fwd(x, written, scales, 128, torch.ones(1).int())


@pytest.mark.parametrize("argument", ["input", "output_scale"])
def test_sglangs_quantisation_has_no_gradient(argument):
    """torch's own words came, and where the scales needed one the codes were written."""
    x, scales = torch.ones(1, 4, 256, dtype=torch.bfloat16), torch.zeros(1, 4, 1)
    written = torch.zeros(1, 4, 128, dtype=torch.float8_e4m3fn)
    {"input": x, "output_scale": scales}[argument].requires_grad_()
    refuses(lambda: _quantise_into(written, x, scales), argument, NotImplementedError, "gradient")
    assert not written.float().any()


def test_vllms_router_writes_no_result_that_needs_a_gradient():
    weights = torch.zeros(2, 1, requires_grad=True)
    refuses(lambda: _route_into(weights), "topk_weights", NotImplementedError, "gradient")
    refuses(lambda: _route_into(torch.zeros(2, 1), scale=1e39), "routed_scaling_factor", ValueError)


def test_arrays_are_no_options_of_the_bridge():
    """Their truth was asked for, or they were compared with numbers."""
    x, w1, w2 = torch.ones(1, 2), torch.ones(2, 4, 2), torch.ones(2, 2, 2)
    layer = (
        *(x.bfloat16(), w1.bfloat16(), w2.bfloat16()),
        torch.ones(1, 1),
        torch.ones(1, 1).int(),
    )
    for value in (*ARRAYS, None, 1, "no"):
        refuses(
            lambda value=value: vllm.fused_experts(*layer, apply_router_weight_on_input=value),
            *("apply_router_weight_on_input", TypeError, "^fused_experts: "),
        )
        if value is not None and not isinstance(value, int):
            refuses(
                lambda value=value: deep_gemm.transform_sf_into_required_layout(
                    torch.ones(2, 4, 1), 4, 128, (1, 128), value
                ),
                *("num_groups", TypeError),
            )
