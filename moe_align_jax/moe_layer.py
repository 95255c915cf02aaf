"""fused_moe: the expert layer of a Mixture-of-Experts model in one call, and what it would run."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax import block_align
from moe_align_jax._align.arguments import (
    capacity_of,
    check_expert_map,
    check_integer_array,
    narrow_count,
    narrow_map,
)
from moe_align_jax._align.location import tables_of_layer
from moe_align_jax._core import checks
from moe_align_jax._core.int32 import narrow_on_host
from moe_align_jax._grouped_matmul import arguments as matmul_arguments
from moe_align_jax._grouped_matmul import choice as implementations
from moe_align_jax._grouped_matmul import quantized
from moe_align_jax._grouped_matmul.options import check_flag
from moe_align_jax._grouped_matmul.problem import E4M3, Activation, Scales
from moe_align_jax._lowering import select
from moe_align_jax._lowering.reverse_mode import in_our_words, reverse_mode_only
from moe_align_jax._lowering.sharding import replicate, vary_together
from moe_align_jax._masked_quant.problem import ScaleLayout
from moe_align_jax._moe_layer import arguments, forms, layer, plan
from moe_align_jax._moe_layer.checkpoints import ExpertWeights
from moe_align_jax._moe_layer.plan import LayerProblem
from moe_align_jax.expert_location import ExpertLocation
from moe_align_jax.types import AlignedBlocks, Implementation, Selection

__all__ = ["ExpertWeights", "fused_moe", "moe_block_size", "select_moe_implementation"]

type _Quantized = tuple[jax.Array, jax.Array]
type _Weights = jax.Array | tuple[jax.Array, jax.Array] | tuple[_Quantized, _Quantized]

_I32 = jnp.int32


def fused_moe(
    x: jax.Array | _Quantized,
    w_gate_up: _Weights,
    w_down: jax.Array | _Quantized,
    topk_weights: jax.Array,
    topk_ids: jax.Array | np.ndarray,
    *,
    activation: Activation | None = "silu",
    gated: bool = True,
    interleaved: bool = False,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    bias_gate_up: jax.Array | None = None,
    bias_down: jax.Array | None = None,
    transpose_rhs: bool = False,
    weights_on_input: bool = False,
    aligned: AlignedBlocks | None = None,
    expert_map: jax.Array | np.ndarray | None = None,
    expert_location: ExpertLocation | None = None,
    num_valid_tokens: int | jax.Array | None = None,
    return_tokens_per_expert: bool = False,
    preferred_element_type: Any = None,
    scale_layout: ScaleLayout | None = None,
    block_size: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The experts of a Mixture-of-Experts layer: each token through its top_k ones, and their weighted sum.

    For each token t, with e = topk_ids[t, k], over the k whose e is an expert:

        hidden = act(x[t] @ gate[e] + bias) * (x[t] @ up[e] + bias)
        y[t]   = sum over k of topk_weights[t, k] * (hidden @ down[e] + bias_down[e])

    On a GPU: an alignment of the pairs by expert, a matrix multiplication that gathers the tokens (of many
    rows and columns, that reads a copy `[P, H]` of them) and applies the activation, one back to H columns,
    and the sum. Products are accumulated in float32; `hidden` and the experts' results are rounded to x's
    dtype; the sum over k is made in float32, in order, without atomics, and rounded once. With T * K <= E / 4
    there is no alignment: each pair is a block of its own, and the second product's kernel may make the sum,
    of results that are not rounded, in another fixed order.

    Args:
        x: `[T, H]` bfloat16, float16 or float32. Or (e4m3 values, scales), as for `grouped_matmul`; then the
            weights are such pairs too, `hidden` is quantised by rows and 128 columns (N is a multiple of
            128), and there is no derivative. See docs/fp8.md.
        w_gate_up: `[E, H, 2 N]` of x's dtype, gate in the first N columns, up in the rest; or a pair (gate,
            up) of `[E, H, N]`. Without `gated`, `[E, H, N]`. Or float32, as master weights: cast to x's
            dtype here, with a float32 gradient.
        w_down: `[E, N, H]` of x's dtype, or float32.
        topk_weights: `[T, K]`, any float dtype. Those of dropped pairs are not used, and may be NaN.
        topk_ids: `[T, K]`, any integer dtype. Ids outside `[0, E)` are dropped.
        activation, gated, interleaved, swiglu_limit, swiglu_alpha: of the first product, as for
            `grouped_matmul`. Static.
        bias_gate_up: `[E, 2 N]` in the order of w_gate_up's columns (gate, then up, for a pair); `[E, N]` if
            not gated. Any float dtype.
        bias_down: `[E, H]`, any float dtype.
        transpose_rhs: weights are `[E, 2 N, H]` (`[E, N, H]`, each of a pair) and `[E, H, N]`, as Hugging
            Face and vLLM keep them. Static.
        weights_on_input: the weights multiply the tokens (x[t] * topk_weights[t, k], rounded to x's dtype)
            instead of the experts' results. With K > 1 that makes a copy of x for each k. Static.
        aligned: an alignment of topk_ids made before, with its row_of_pair: of `route_and_align`, or of
            `moe_align_block_size(..., return_inverse=True)`. It needs `block_size`. expert_map,
            expert_location and num_valid_tokens are then the alignment's, and left out here. One made by
            hand must have the pairs of each block ahead of its padding, as for `grouped_matmul`, and as
            row_of_pair the inverse of its sorted_token_ids. (Eager calls on a CPU check both.)
        expert_map: `[G]` any integer dtype, the local id of each of G experts, -1 for those of other devices:
            topk_ids are in `[0, G)`, and the weights are those of E local experts.
        expert_location: topk_ids are logical experts, and E (or G) counts physical slots, as for
            `moe_align_block_size`. Of one layer (`location.layer(i)`).
        num_valid_tokens: None, a Python int or a scalar integer array (a device value, not static): tokens
            from this one on are not real; their results are zero.
        return_tokens_per_expert: also return the pairs that each expert got. Static.
        preferred_element_type: the result's dtype, bfloat16, float16 or float32; None for x's, and bfloat16
            for e4m3. Static.
        scale_layout: how scales of x lie, as for `grouped_matmul`. Static.
        block_size: rows per block of the alignment; None for what suits the sizes (`moe_block_size`). Static.
        implementation: None for the best available ("mosaic_gpu" on a Hopper or newer GPU for what its
            kernels take: see `select_moe_implementation`), or a name, which runs or raises. Static.

    Returns:
        `[T, H]`; with `return_tokens_per_expert` also int32 `[E]` (with `aligned`: what that holds). A token
        without an expert is zero. The same call gives the same bits in every run; another T may give other
        bits, since the tiles follow from the sizes.

    Raises:
        TypeError: an array has another dtype, or an option is not static.
        ValueError: shapes do not fit each other, an option is out of range, or an operand is sharded over
            Explicit mesh axes (call it inside `jax.shard_map`).
        NotImplementedError: the named implementation cannot run here (eagerly at the call, under jit at
            lowering); the message says why.

    Under plain jit with weights that are sharded over the Auto axes of a mesh, XLA gathers them whole to each
    device: use `sharded_fused_moe`, or `jax.shard_map` with `expert_map`, or `dispatch` and `combine`.

    The derivative, for x, the weights, biases and topk_weights, keeps the products of w_gate_up, under the
    name "fused_moe_gate_up" for policies of `jax.checkpoint`; each cotangent has its primal's dtype. Its
    products are by the same implementation. With a derivative those of w_gate_up are rounded to x's dtype
    before the activation.

    Example:
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> w_up = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
        >>> w_down = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
        >>> weights, ids = jnp.array([[1.0, 0.5], [1.0, 0.5]]), jnp.array([[0, 1], [1, -1]])
        >>> fused_moe(x, w_up, w_down, weights, ids, activation="relu2", gated=False).tolist()
        [[21.0, 84.0], [360.0, 640.0]]

    Source: the contract of vLLM 0.33's `fused_experts` (Apache-2.0); no code taken.
    """
    function = "fused_moe"
    select.check_implementation(function, implementation)
    values, x_scales = quantized.check_rows(function, "x", x, 2)
    w_gate_up, first_scales = quantized.split_weights(function, "w_gate_up", w_gate_up)
    down, down_scales = quantized.split_weights(function, "w_down", w_down)
    for name, of_w in (("w_gate_up", first_scales), ("w_down", down_scales)):
        quantized.check_both(function, x_scales, name, of_w, transpose_rhs)
    tokens, hidden = values.shape
    weights, first, down, ffn = arguments.check_experts(
        function,
        hidden,
        values.dtype,
        w_gate_up,
        down,
        transposed=transpose_rhs,
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        bias=bias_gate_up is not None,
    )
    given_scales = x_scales, first_scales, down_scales
    scaled = arguments.check_scales(function, values, first, down, ffn, given_scales, scale_layout)
    experts = down.shape[0]
    columns = 2 * ffn if weights.gated else ffn
    bias_gate_up = arguments.check_bias(function, "bias_gate_up", bias_gate_up, (experts, columns))
    bias_down = arguments.check_bias(function, "bias_down", bias_down, (experts, hidden))
    topk_weights, topk_ids = arguments.check_routing(function, values, topk_weights, topk_ids)
    weights_on_input = check_flag(function, "weights_on_input", weights_on_input)
    counted = check_flag(function, "return_tokens_per_expert", return_tokens_per_expert)
    out_dtype = matmul_arguments.result_dtype(function, values, preferred_element_type)
    has_bias_down, e4m3 = bias_down is not None, x_scales is not None
    blocks = _blocks_of(
        function,
        topk_ids,
        experts,
        kind=plan.kind_of_blocks(weights, hidden, ffn, e4m3, has_bias_down),
        block_size=block_size,
        aligned=aligned,
        expert_map=expert_map,
        expert_location=expert_location,
        num_valid_tokens=num_valid_tokens,
        counted=counted,
        implementation=implementation,
    )
    problem = LayerProblem(
        tokens,
        topk_ids.shape[1],
        hidden,
        ffn,
        experts,
        str(values.dtype),
        out_dtype,
        weights,
        has_bias_down,
        weights_on_input,
        blocks.size,
        blocks.where[0].shape[0],
        blocks.as_pairs,
        blocks.checked,
        scaled.scales,
        scaled.down,
    )
    problem = forms.planned(problem)
    operands = layer.Operands(
        *(values, first, down, bias_gate_up, bias_down, topk_weights, tuple(blocks.where)),
        *(blocks.row_of_pair, scaled.arrays, scaled.down_arrays),
    )
    operands = _check_operands(function, problem, operands)
    if problem.scales is None:  # e4m3 has no derivative at all
        operands = reverse_mode_only(function, operands)
    with in_our_words(function):
        y = layer.run(operands, problem=problem, implementation=implementation)
    return (y, blocks.counts) if counted else y


class _Blocks(NamedTuple):
    """The blocks that a layer's products take, and which row is whose.

    Attributes:
        where: sorted_token_ids, expert_ids and num_tokens_post_padded.
        row_of_pair: see `AlignedBlocks`.
        counts: pairs of each expert, if they are asked for.
        size: rows of a block.
        as_pairs: whether each pair is a block of its own.
        checked: whether a block may have an expert that is none of the layer's.
    """

    where: Any
    row_of_pair: Any
    counts: Any
    size: int
    as_pairs: bool
    checked: bool


def _blocks_of(
    function: str,
    topk_ids: Any,
    experts: int,
    *,
    kind: Any,
    block_size: Any,
    aligned: AlignedBlocks | None,
    expert_map: Any,
    expert_location: ExpertLocation | None,
    num_valid_tokens: Any,
    counted: bool,
    implementation: Implementation | None,
) -> _Blocks:
    """The blocks of a layer: those that the caller brings, those of an alignment, or the pairs themselves.

    Args:
        kind: of the blocks, which tells their usual size: of `plan.kind_of_blocks`.
        counted: whether the pairs of each expert are asked for.
        The others are those of `fused_moe`.
    """
    if block_size is not None:
        block_size = checks.check_block_size(function, block_size)
    elif aligned is not None:
        remedy = "Pass the one that aligned was made with (moe_block_size tells a good one)."
        checks.refuse(ValueError, function, "block_size", "be given with aligned", "None", remedy)
    for name, value in (
        ("expert_map", expert_map),
        ("expert_location", expert_location),
        ("num_valid_tokens", num_valid_tokens),
    ):
        if aligned is not None and value is not None:
            remedy = "It is an argument of the alignment: pass it where aligned is made."
            checks.refuse(ValueError, function, name, "be left out with aligned", value, remedy)
    slots = _num_slots(function, experts, expert_map)
    if expert_location is not None:
        _check_location(function, expert_location, slots)
    tokens, top_k = topk_ids.shape
    pairs = tokens * top_k
    if aligned is None and plan.without_alignment(pairs, slots):
        where, row_of_pair = _blocks_of_pairs(
            function, topk_ids, experts, slots, expert_map, expert_location, num_valid_tokens
        )
        counts = _count(where[1], experts=experts) if counted else None
        return _Blocks(where, row_of_pair, counts, 1, as_pairs=True, checked=False)
    block_size = block_size or plan.block_size_for(pairs, slots, kind)
    if aligned is not None:
        where, row_of_pair = _check_aligned(function, aligned, block_size, pairs, experts)
        counts = aligned.tokens_per_expert
        return _Blocks(where, row_of_pair, counts, block_size, as_pairs=False, checked=True)
    capacity_of(function, pairs, block_size, slots, False)  # refuses in this function's name
    made = block_align.moe_align_block_size(
        topk_ids,
        block_size=block_size,
        num_experts=slots,
        expert_map=expert_map,
        ignore_invalid_experts=expert_map is not None,
        num_valid_pairs=_num_valid_pairs(function, num_valid_tokens, tokens, top_k),
        return_inverse=True,
        expert_location=expert_location,
        # Where the kernels cannot run, the products say so, in this function's name.
        implementation=None if implementation == "mosaic_gpu" else implementation,
    )
    counts = made.tokens_per_expert[:experts] if counted else None
    return _Blocks(
        *(made[:3], made.row_of_pair, counts, block_size),
        as_pairs=False,
        checked=expert_map is not None,
    )


def _num_slots(function: str, experts: int, expert_map: Any) -> int:
    """What ids may be: G with an expert map, E without one."""
    if expert_map is None:
        return experts
    remedy = "Pass one local id (or -1) per expert of all devices."
    expert_map = check_integer_array(function, "expert_map", expert_map, remedy)
    if expert_map.ndim != 1 or expert_map.shape[0] < experts:
        rule = f"have shape [G] with G at least {experts}, the experts of the weights"
        checks.refuse(ValueError, function, "expert_map", rule, expert_map, remedy)
    return expert_map.shape[0]


def _check_location(function: str, location: Any, slots: int) -> None:
    """That it is of one layer and one GPU, with the slots that the weights (or the map) are of."""
    found = getattr(location, "num_physical_experts", slots)
    if found != slots:
        rule = f"have {slots} physical experts, as the weights (or expert_map) have"
        remedy = "Ids are logical, but it is slots that have weights."
        checks.refuse(ValueError, function, "expert_location", rule, found, remedy)
    tables_of_layer(function, location, slots)


def _num_valid_pairs(function: str, tokens: Any, num_tokens: Any, top_k: int) -> Any:
    if tokens is None:
        return None
    tokens = arguments.check_tokens(function, tokens)
    if plan.is_static(num_tokens) and isinstance(tokens, np.integer):
        return min(int(tokens), num_tokens) * top_k
    return jnp.clip(narrow_count(jnp.asarray(tokens)), 0, num_tokens) * top_k


def _blocks_of_pairs(
    function: str,
    topk_ids: Any,
    experts: int,
    slots: int,
    expert_map: Any,
    expert_location: Any,
    num_valid_tokens: Any,
) -> tuple[Any, jax.Array]:
    """`Operands.where` and `row_of_pair`, where block i is pair i; a dropped pair has none of the experts."""
    limit = _num_valid_pairs(function, num_valid_tokens, *topk_ids.shape)
    if expert_location is not None:
        from moe_align_jax import expert_dispatch

        ids: Any = expert_dispatch.to_physical_ids(topk_ids, expert_location)
    else:
        ids = narrow_on_host(topk_ids, slots)
    if expert_map is not None:
        expert_map = check_expert_map(function, expert_map, slots)
    return _map_pairs(ids, expert_map, limit, experts=experts, slots=slots)


@functools.partial(jax.jit, static_argnames=("experts", "slots"))
def _map_pairs(
    ids: jax.Array, expert_map: Any, limit: Any, *, experts: int, slots: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    ids = replicate(ids)
    flat = lax.reshape(ids, (math.prod(ids.shape),))
    # Without a map or a limit the ids are passed on as they are: the products test their range, and of one
    # token a launch that only replaced those outside it is 1 of 6.
    flat = narrow_map(flat, slots)
    if expert_map is not None:
        expert_map = narrow_map(replicate(expert_map), slots)
        flat, expert_map = vary_together([flat, expert_map])
        known = (flat >= 0) & (flat < slots)
        flat = jnp.where(known, expert_map[jnp.where(known, flat, 0)], -1)
    if limit is not None:
        flat = jnp.where(lax.iota(_I32, flat.shape[0]) < limit, flat, -1)
    return layer.blocks_of_pairs(flat, experts)


@functools.partial(jax.jit, static_argnames="experts")
def _count(expert_of_pair: jax.Array, *, experts: int) -> jax.Array:
    every = lax.iota(_I32, experts)
    return jnp.sum(expert_of_pair[:, None] == every[None, :], axis=0, dtype=_I32)


def _check_aligned(
    function: str, aligned: Any, block_size: int, pairs: Any, experts: int
) -> tuple[Any, Any]:
    where = matmul_arguments.check_aligned(function, aligned, block_size)
    row_of_pair = getattr(aligned, "row_of_pair", None)
    if row_of_pair is None:
        rule, remedy = "be there", "Align with return_inverse=True."
        checks.refuse(ValueError, function, "aligned.row_of_pair", rule, "None", remedy)
    if row_of_pair.dtype != np.int32 or row_of_pair.size != pairs:
        rule = f"be int32 and of {pairs} pairs, as topk_ids has"
        remedy = "Pass the topk_ids that were aligned."
        kind = ValueError if row_of_pair.dtype == np.int32 else TypeError
        checks.refuse(kind, function, "aligned.row_of_pair", rule, row_of_pair, remedy)
    matmul_arguments.check_order(function, where, pairs, block_size, experts)
    matmul_arguments.check_inverse(function, where[0], row_of_pair)
    return where, row_of_pair


def _check_operands(
    function: str, problem: LayerProblem, operands: layer.Operands
) -> layer.Operands:
    """Arrays of jax, none of them sharded over Explicit axes; small ones are gathered."""
    names = ["x", *(["w_gate_up"] * len(operands.w_gate_up)), "w_down"]
    arrays = [operands.x, *operands.w_gate_up, operands.w_down]
    for name in ("bias_gate_up", "bias_down"):
        if (bias := getattr(operands, name)) is not None:
            names.append(name)
            arrays.append(bias)
    more = (*operands.scales, *operands.down_scales)
    names += ["scales"] * len(more)
    matmul_arguments.check_unsharded(function, names, (*arrays, *more))
    widest = max(problem.ffn, problem.hidden)
    matmul_arguments.check_memory(function, problem.num_rows * widest, problem.dtype)
    as_jax = jax.tree.map(
        lambda a: a if isinstance(a, jax.Array) else jnp.asarray(np.asarray(a)), operands
    )
    return as_jax._replace(topk_weights=replicate(as_jax.topk_weights))


def moe_block_size(
    num_tokens: int, *, top_k: int, num_experts: int, dtype: Any = "bfloat16"
) -> int:
    """Rows per block that `fused_moe` takes for these sizes: for an alignment that is made before it.

    Of weights whose gate and up take turns in columns, of a gelu, and of sizes that are no multiple of 64, it
    takes 64 or 128 in place of 48 and more; with biases and more than 16 experts 128 in place of 144 and 184.
    Of 128 experts all of these have blocks of 8, too, where this says 16.

    Args:
        num_tokens: T.
        top_k: K.
        num_experts: E of the weights; G, where there is an expert map.
        dtype: of x.

    Returns:
        8 to 192: by the pairs that an expert has on average.

    Raises:
        TypeError, ValueError: a size is not an int, or is out of range; dtype is none.

    Example:
        >>> [moe_block_size(t, top_k=8, num_experts=128) for t in (16, 128, 1024, 8192)]
        [16, 16, 80, 184]
        >>> [moe_block_size(t, top_k=2, num_experts=8) for t in (16, 128, 1024, 4096, 8192)]
        [8, 48, 144, 176, 176]
    """
    function, remedy = "moe_block_size", "Pass the shapes of x and of the weights."
    top_k = checks.check_positive_int(function, "top_k", top_k, remedy)
    num_experts = checks.check_num_experts(function, num_experts)
    num_tokens = checks.check_int(function, "num_tokens", num_tokens, 0, remedy)
    found = select.check_dtype(function, dtype, (*matmul_arguments.DTYPES, E4M3))
    kind = plan.POWERS_OF_TWO if found == E4M3 else plan.HEIGHTS
    return plan.block_size_for(num_tokens * top_k, num_experts, kind)


def select_moe_implementation(
    x_shape: Sequence[int],
    w_down_shape: Sequence[int],
    *,
    top_k: int,
    dtype: Any = "bfloat16",
    preferred_element_type: Any = None,
    activation: Activation | None = "silu",
    gated: bool = True,
    interleaved: bool = False,
    pair: bool = False,
    bias_gate_up: bool = False,
    bias_down: bool = False,
    transpose_rhs: bool = False,
    weights_on_input: bool = False,
    has_aligned: bool = False,
    num_global_experts: int | None = None,
    block_size: int | None = None,
    platform: str | None = None,
    implementation: Implementation | None = None,
) -> Selection:
    """Says what `fused_moe` would run for these shapes, and why the others would not.

    Args:
        x_shape: `[T, H]`.
        w_down_shape: of w_down: `[E, N, H]`, with `transpose_rhs` `[E, H, N]`.
        top_k: K.
        dtype: of x and the weights. For float8_e4m3fn, scales are those of rows and blocks.
        preferred_element_type, activation, gated, interleaved, transpose_rhs, weights_on_input, block_size,
            implementation: as for `fused_moe`.
        pair: whether gate and up are two arrays.
        bias_gate_up, bias_down: whether there are any.
        has_aligned: whether an alignment is passed.
        num_global_experts: G of an expert map; None without one.
        platform: "cuda", "cpu", ... for which to lower; None for this process's default backend.

    Returns:
        `Selection(implementation, form, reasons)`. The form tells how pairs are put into blocks, "pairs" or
        the rows per block, and the tiles of both products, as `select_matmul_implementation` names them.

    Raises:
        NotImplementedError: the named implementation cannot run for that platform and size.
        TypeError, ValueError: as `fused_moe`.

    Example:
        >>> shape = {"w_down_shape": (128, 768, 2048), "top_k": 8, "platform": "cuda"}
        >>> select_moe_implementation((1, 2048), **shape).form.split(",")[0]
        'pairs'
        >>> selection = select_moe_implementation((8192, 2048), **shape)
        >>> selection.implementation, selection.form.split(",")[0]
        ('mosaic_gpu', 'blocks of 184')
    """
    function = "select_moe_implementation"
    select.check_implementation(function, implementation)
    tokens, hidden = matmul_arguments.check_shape(function, "x_shape", x_shape, 2)
    down = matmul_arguments.check_shape(function, "w_down_shape", w_down_shape, 3)
    top_k = checks.check_positive_int(function, "top_k", top_k, "Pass topk_ids.shape[1].")
    weights = matmul_arguments.make_weights(
        function,
        transposed=transpose_rhs,
        pair=check_flag(function, "pair", pair),
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        bias=check_flag(function, "bias_gate_up", bias_gate_up),
    )
    experts, ffn = down[0], down[2 if weights.transposed else 1]
    if not experts or down[1 if weights.transposed else 2] != hidden:
        shape = "[E, H, N]" if weights.transposed else "[E, N, H]"
        rule = f"be {shape} with H = {hidden} and an expert"
        checks.refuse(ValueError, function, "w_down_shape", rule, str(list(down)), "See x_shape.")
    kinds = (*matmul_arguments.DTYPES, str(E4M3))
    x = jax.ShapeDtypeStruct((tokens, hidden), select.check_dtype(function, dtype, kinds))
    slots = experts
    if num_global_experts is not None:
        argument, remedy = "num_global_experts", "Pass the length of expert_map, or None."
        slots = checks.check_int(function, argument, num_global_experts, experts, remedy)
    pairs = tokens * top_k
    has_aligned = check_flag(function, "has_aligned", has_aligned)
    as_pairs = not has_aligned and plan.without_alignment(pairs, slots)
    if block_size is not None:
        block_size = checks.check_block_size(function, block_size)
    bias_down = check_flag(function, "bias_down", bias_down)
    kind = plan.kind_of_blocks(weights, hidden, ffn, x.dtype == E4M3, bias_down)
    rows = 1 if as_pairs else block_size or plan.block_size_for(pairs, slots, kind)
    num_rows = checks.max_num_tokens_padded(pairs, block_size=rows, num_experts=slots)
    problem = LayerProblem(
        tokens,
        top_k,
        hidden,
        ffn,
        experts,
        str(x.dtype),
        matmul_arguments.result_dtype(function, x, preferred_element_type),
        weights,
        bias_down,
        check_flag(function, "weights_on_input", weights_on_input),
        rows,
        pairs if as_pairs else num_rows,
        as_pairs,
        False,
        Scales("row_major", "blocks") if x.dtype == E4M3 else None,
        "blocks" if x.dtype == E4M3 else "",
    )
    platform = select.check_platform(function, platform)
    return _selection(forms.planned(problem), platform, implementation)


def _selection(problem: LayerProblem, platform: str, implementation: str | None) -> Selection:
    both = (problem.first_forward, problem.second)
    function = "select_moe_implementation"
    choice, reasons = implementations.choose(function, both, platform, implementation)
    blocks = "pairs" if problem.pairs else f"blocks of {problem.block_size}"
    if choice == "xla":
        return Selection(choice, f"{blocks}, loop", reasons)
    if choice == "emulator":
        tiles = forms.tiles_of(problem, None, copies=False)
    else:
        tiles = forms.tiles_of(problem, select.gpu_kind())
    return Selection(choice, ", ".join([blocks, *tiles]), reasons)
