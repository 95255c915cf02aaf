"""to_physical_ids: which replica of its expert each token takes. And what of it the alignment does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax import block_align
from moe_align_jax._align import replicas
from moe_align_jax._core import checks, fork
from moe_align_jax._eplb.maps import fail
from moe_align_jax.expert_location import (
    Dispatch,
    ExpertLocation,
    check_dispatch,
    integer_scalar,
)

_I32 = jnp.int32


def to_physical_ids(
    topk_ids: jax.Array,
    location: ExpertLocation,
    *,
    layer: Any = None,
    dispatch: Dispatch | None = None,
    rank: Any = None,
    num_fused_shared_experts: int = 0,
) -> jax.Array:
    """Logical expert ids to physical slots: chooses a replica for every (token, k) pair.

    "static": `static_dispatch_map[rank, id]`, the same replica for every token of a GPU.
    "dynamic": by a hash of the token, in int32 with wrap-around, for the pair at flat position f:
    `t = first_token + f // top_k`, `h = ((t * -1640531535) >> 16) & 65535`,
    `slot = logical_to_physical_map[id, (h * num_replicas[id]) >> 16]`.
    "round_robin": `slot = logical_to_physical_map[id, (j + s) % num_replicas[id]]` for the j-th pair of its
    expert in the batch, with s the replica that "dynamic" gives token `first_token`; exactly even.
    All are deterministic; the same input gives the same bits. Where the location's tokens are "replicated",
    all GPUs choose alike: the rank has no influence, and "static" does what "dynamic" does.

    Args:
        topk_ids: `[..., top_k]` any integer dtype, logical ids; a vector holds one id per token. Ids outside
            `[0, El)` give -1.
        location: of all layers, or of one (`location.layer(i)`, or inside `lax.scan` over it).
        layer: the layer, an int or an integer scalar; None for the location of one layer.
        dispatch: None for the location's own.
        rank: None, or this GPU's number, an int or an integer scalar such as `lax.axis_index("ep")`. Needed
            for "static" of tokens per rank; for the others, tokens are numbered from
            `rank * num_tokens` on instead of from the location's `first_token`.
        num_fused_shared_experts: the last so many columns are left as they are. Static.

    Returns:
        int32 of the same shape: slots in `[0, Ep)`, or -1.

    Raises:
        TypeError: ids are not integers, or the location is none.
        ValueError: `layer` or `rank` is missing or out of range, or the dispatch is unknown.

    Example:
        >>> location = ExpertLocation.from_map([[0, 1, 2, 1]])
        >>> ids = jnp.array([[1, 0], [1, -1], [1, 2]])
        >>> to_physical_ids(ids, location, layer=0, dispatch="round_robin").tolist()
        [[1, 0], [3, -1], [1, 2]]

    Source: the contract of SGLang's logical to physical dispatch (Apache-2.0); no code taken.
    """
    function = "to_physical_ids"
    fork.check(function)
    if not isinstance(location, ExpertLocation):
        rule, got = "be an ExpertLocation", checks.describe(location)
        raise TypeError(checks.message(function, "location", rule, got, "Make one from a map."))
    if location.num_layers is not None:
        if layer is None:
            fail(function, "layer", "be given", None, "The location is of all layers.")
        location = location.layer(layer)
    elif layer is not None:
        got = checks.describe(layer)
        fail(function, "layer", "be left out", got, "The location is of one layer already.")
    dispatch = location.dispatch if dispatch is None else dispatch
    check_dispatch(function, dispatch)

    ids = block_align._check_integer_array(
        function, "topk_ids", topk_ids, "Pass the expert ids that top_k returned."
    )
    shared = check_shared(function, num_fused_shared_experts, ids.shape)
    if ids.ndim == 0:
        fail(function, "topk_ids", "have an axis", checks.describe(ids), "Pass ids [..., top_k].")

    if rank is not None:
        rank = integer_scalar(function, "rank", rank, "Pass the GPU's number.")
        # Of replicated tokens, the first is the same on every GPU: the location's.
        first = location.first_token
        if location.tokens == "per_rank":
            last = ids.shape[-1]
            num_tokens = ids.size // last if ids.ndim > 1 and last else ids.size
            first = rank * num_tokens
            if not isinstance(rank, int):
                first = rank.astype(_I32) * _I32(num_tokens)
        location = location.for_rank(rank, first_token=first)
    dispatch = chosen_by(location, dispatch)
    if dispatch == "static":
        if location.static_dispatch_map is None:
            remedy = 'Make it with num_gpus and dispatch="static".'
            fail(function, "location", "hold a static_dispatch_map", None, remedy)
        if location.static_dispatch_map.ndim != 1:
            fail(function, "rank", 'be given for dispatch="static"', None, "Pass the GPU's number.")
    if isinstance(ids, np.ndarray):
        ids = narrow_on_host(ids, location.num_logical_experts, shared)
    return _dispatched(ids, location, dispatch=dispatch, shared=shared)


def check_shared(function: str, shared: Any, shape: tuple[Any, ...]) -> int:
    """`num_fused_shared_experts` for ids of this shape.

    Raises:
        TypeError, ValueError: it is not an int, or more than the columns.
    """
    argument = "num_fused_shared_experts"
    if isinstance(shared, bool) or not isinstance(shared, (int, np.integer)):
        rule, got = "be a static Python int", checks.describe(shared)
        remedy = "Pass the columns of shared experts."
        raise TypeError(checks.message(function, argument, rule, got, remedy))
    if not 0 <= shared <= (shape[-1] if len(shape) > 1 else 0):
        got = f"{shared} for ids {list(shape)}"
        rule = "be at most the columns of topk_ids"
        fail(function, argument, rule, got, "Pass ids [..., top_k].")
    return int(shared)


@functools.partial(jax.jit, static_argnames=("dispatch", "shared"))
def _dispatched(
    ids: jax.Array, location: ExpertLocation, *, dispatch: Dispatch, shared: int
) -> jax.Array:
    with jax.named_scope("to_physical_ids"):
        if ids.size == 0:
            return jnp.zeros(ids.shape, _I32)
        top_k = ids.shape[-1] if ids.ndim > 1 else 1
        logical = block_align._narrow_map(ids.reshape(-1), 2**31 - 1).reshape(-1, top_k)
        routed = logical[:, : top_k - shared]
        mapped = _map_routed(routed, location, dispatch)
        return jnp.concatenate((mapped, logical[:, top_k - shared :]), axis=1).reshape(ids.shape)


def _map_routed(ids: jax.Array, location: ExpertLocation, dispatch: Dispatch) -> jax.Array:
    """`[T, K]` int32 slots of `[T, K]` int32 ids."""
    slots = location.logical_to_physical_map
    num_experts, width = slots.shape
    valid = (ids >= 0) & (ids < num_experts)
    expert = jnp.where(valid, ids, 0)
    if dispatch == "static":
        return jnp.where(valid, replicas.take(location.static_dispatch_map, expert), -1)
    first, flat = jnp.asarray(location.first_token), slots.reshape(-1)
    if dispatch == "dynamic":
        token = lax.broadcasted_iota(_I32, ids.shape, 0) + first
        chosen = replicas.dynamic(token, expert, flat, location.num_replicas, width)
        return jnp.where(valid, chosen, -1)
    count = replicas.take(location.num_replicas, expert)
    begin = (replicas.token_hash(first) * count) >> _I32(16)
    turn = _place_within_expert(jnp.where(valid, ids, -1), num_experts)
    replica = lax.rem(turn + begin, count)
    return jnp.where(valid, replicas.take(flat, expert * _I32(width) + replica), -1)


def _place_within_expert(ids: jax.Array, num_experts: int) -> jax.Array:
    """How many pairs before each one chose its expert: the alignment with blocks of one row knows."""
    aligned = block_align.moe_align_block_size(
        ids, block_size=1, num_experts=num_experts, return_inverse=True
    )
    first_row = jnp.cumsum(aligned.tokens_per_expert, dtype=_I32) - aligned.tokens_per_expert
    expert = jnp.maximum(ids, 0)
    # An invalid pair has row -1; what it gets is not used, but must not be negative.
    return jnp.maximum(aligned.row_of_pair.reshape(ids.shape) - replicas.take(first_row, expert), 0)


def narrow_on_host(ids: np.ndarray, num_experts: int, shared: int) -> np.ndarray:
    """int32, where jax would wrap int64; a shared column keeps what int32 can hold."""
    if ids.dtype == np.int32:
        return ids
    limit = np.full(ids.shape[-1:], num_experts)
    if shared:
        limit[-shared:] = checks.INT32_MAX
    in_range = (ids >= 0) & (ids < limit)
    return np.where(in_range, ids.astype(np.int32), np.int32(-1))


def chosen_by(location: ExpertLocation, dispatch: Dispatch) -> Dispatch:
    """The dispatch that is computed: of replicated tokens, none may depend on the GPU."""
    if location.tokens == "replicated" and dispatch == "static":
        return "dynamic"
    return dispatch


# -- for the alignment ----------------------------------------------------------------------------


def alignment_tables(
    function: str, location: Any, layer: Any, num_experts: int, shared: int
) -> tuple[Dispatch, dict[str, Any]]:
    """The dispatch of a location, and the arrays that an alignment into `num_experts` slots reads.

    With `shared` columns there may be slots behind the location's: theirs.

    Raises:
        TypeError, ValueError: as `moe_align_block_size` says.
    """
    if not isinstance(location, ExpertLocation):
        rule, got = "be an ExpertLocation", checks.describe(location)
        raise TypeError(checks.message(function, "expert_location", rule, got, "Make one."))
    slots = location.num_physical_experts
    if num_experts < slots or num_experts > slots and not shared:
        remedy = "Ids are logical, but it is slots that are aligned."
        rule = f"be the location's num_physical_experts ({slots})"
        rule += ", or more for those of shared experts" if shared else ""
        fail(function, "num_experts", rule, num_experts, remedy)
    check_dispatch(function, location.dispatch)
    dispatch = chosen_by(location, location.dispatch)
    tables = {}
    if location.num_layers is not None:
        tables["layer"] = _checked_layer(function, layer, location.num_layers)
    elif layer is not None:
        got, remedy = checks.describe(layer), "expert_location is of one layer already."
        fail(function, "layer", "be left out", got, remedy)
    if dispatch == "static":
        table = location.static_dispatch_map
        if table is None:
            remedy = 'Make it with num_gpus and dispatch="static".'
            fail(function, "expert_location", "hold a static_dispatch_map", None, remedy)
        if table.ndim != 1 + len(tables):
            got = checks.describe(table)
            rule = "have the static_dispatch_map of one GPU"
            fail(function, "expert_location", rule, got, "Pass expert_location.for_rank(rank).")
        tables["static_dispatch_map"] = table
    else:
        names = ("logical_to_physical_map", "num_replicas", "first_token")
        tables |= {name: getattr(location, name) for name in names}
        size = location.logical_to_physical_map.size
        checks.check_fits_int32(function, "expert_location", size, "a table")
    return dispatch, tables


def _checked_layer(function: str, layer: Any, num_layers: int) -> Any:
    if layer is None:
        fail(function, "layer", "be given", None, "expert_location is of all layers.")
    if isinstance(layer, (int, np.integer)) and not isinstance(layer, bool):
        if not 0 <= layer < num_layers:
            rule, remedy = f"be in [0, {num_layers})", "Pass a layer of expert_location."
            fail(function, "layer", rule, layer, remedy)
        return np.int32(layer)
    remedy = "Pass an int, or an integer scalar that the program computes."
    layer = block_align._check_integer_array(function, "layer", layer, remedy)
    if layer.size != 1:
        fail(function, "layer", "be a scalar", checks.describe(layer), remedy)
    return layer
