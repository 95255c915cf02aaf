"""to_physical_ids: which replica of its expert each token takes."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_align_jax._align.arguments import check_integer_array
from moe_align_jax._align.location import check_shared, chosen_by, narrow_on_host, slots_of
from moe_align_jax._core import checks, fork
from moe_align_jax._core.checks import fail
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

    ids = check_integer_array(
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
    ids = narrow_on_host(ids, location.num_logical_experts, shared)
    return slots_of(ids, location, dispatch=dispatch, shared=shared)
