"""An ExpertLocation in an alignment: what is checked of it, the arrays that are read, the slots of pairs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax._align import replicas
from moe_align_jax._align.arguments import check_integer_array, narrow_map
from moe_align_jax._align.primitive import align
from moe_align_jax._core import checks, int32
from moe_align_jax._core.checks import fail
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._lowering.sharding import replicate
from moe_align_jax.expert_location import Dispatch, ExpertLocation, check_dispatch
from moe_align_jax.types import AlignedBlocks, AlignProblem

_I32 = jnp.int32


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
        got = f"{checks.describe(shared)} for ids {list(shape)}"
        rule = "be at most the columns of topk_ids"
        fail(function, argument, rule, got, "Pass ids [..., top_k].")
    return int(shared)


def narrow_on_host(ids: Any, num_experts: int, shared: int) -> Any:
    """int32 of a NumPy array, where jax would wrap int64; a shared column keeps what int32 can hold."""
    limit = np.full(ids.shape[-1:], num_experts)
    if shared:
        limit[-shared:] = INT32_MAX
    return int32.narrow_on_host(ids, limit)


def chosen_by(location: ExpertLocation, dispatch: Dispatch) -> Dispatch:
    """The dispatch that is computed: of replicated tokens, none may depend on the GPU."""
    if location.tokens == "replicated" and dispatch == "static":
        return "dynamic"
    return dispatch


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


def tables_of_layer(
    function: str, location: Any, num_experts: int
) -> tuple[Dispatch, dict[str, Any]]:
    """`alignment_tables` of a location of one layer, for functions that have no argument `layer`."""
    if (layers := getattr(location, "num_layers", None)) is not None:
        got, remedy = f"one of {layers} layers", "Pass expert_location.layer(i)."
        fail(function, "expert_location", "be of one layer", got, remedy)
    return alignment_tables(function, location, None, num_experts, 0)


def _checked_layer(function: str, layer: Any, num_layers: int) -> Any:
    if layer is None:
        fail(function, "layer", "be given", None, "expert_location is of all layers.")
    if isinstance(layer, (int, np.integer)) and not isinstance(layer, bool):
        if not 0 <= layer < num_layers:
            rule, remedy = f"be in [0, {num_layers})", "Pass a layer of expert_location."
            fail(function, "layer", rule, layer, remedy)
        return np.int32(layer)
    remedy = "Pass an int, or an integer scalar that the program computes."
    layer = check_integer_array(function, "layer", layer, remedy)
    if layer.size != 1:
        fail(function, "layer", "be a scalar", checks.describe(layer), remedy)
    return layer


def arrays_of(
    operands: dict[str, jax.Array], dispatch: str, shared: int
) -> tuple[dict[str, Any], list[jax.Array]]:
    """The sizes of an expert location for AlignProblem, and its arrays in the order of its inputs."""
    if not dispatch:
        return {}, []
    ids, layered = operands["topk_ids"], "layer" in operands
    sizes: dict[str, Any] = {"dispatch": dispatch}
    if dispatch == "static":
        names = ("static_dispatch_map",)
        sizes["num_logical"] = operands[names[0]].shape[-1]
    else:
        names = ("logical_to_physical_map", "num_replicas", "first_token")
        sizes["num_logical"], sizes["replica_width"] = operands[names[0]].shape[-2:]
        sizes["top_k"] = ids.shape[-1] if ids.ndim > 1 else 1
    if shared:
        sizes |= {"top_k": ids.shape[-1], "num_shared": shared}
    if layered:
        sizes["num_layers"] = operands[names[0]].shape[0]
        names += ("layer",)
    # Every value of a location fits int32, whatever the type that a caller's program gave it.
    arrays = [lax.convert_element_type(operands[name], _I32) for name in names]
    return sizes, [lax.reshape(x, (x.size,)) for x in arrays]


# -- the slots of pairs ------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("dispatch", "shared"))
def slots_of(
    ids: jax.Array, location: ExpertLocation, *, dispatch: Dispatch, shared: int
) -> jax.Array:
    """The slot of each pair, int32, in the shape of its logical ids; -1 for an id that is no expert."""
    with jax.named_scope("to_physical_ids"):
        if ids.size == 0:
            return jnp.zeros(ids.shape, _I32)
        top_k = ids.shape[-1] if ids.ndim > 1 else 1
        logical = narrow_map(ids.reshape(-1), INT32_MAX).reshape(-1, top_k)
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
    if isinstance(ids.size, int) and not ids.size:
        return ids
    flat = replicate(ids.reshape(-1))
    problem = AlignProblem(flat.size, num_experts, 1, flat.size, return_inverse=True)
    aligned = AlignedBlocks(*align(problem, None, flat))
    first_row = jnp.cumsum(aligned.tokens_per_expert, dtype=_I32) - aligned.tokens_per_expert
    expert = jnp.maximum(ids, 0)
    # An invalid pair has row -1; what it gets is not used, but must not be negative.
    return jnp.maximum(aligned.row_of_pair.reshape(ids.shape) - replicas.take(first_row, expert), 0)
