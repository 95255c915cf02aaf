"""rebalance_experts: which experts to replicate, and where each replica goes. NumPy on the host.

Runs once in a thousand steps or so, beside the model; all layers at once. Imports no jax.
"""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._core.checks import fail
from moe_align_jax._eplb import greedy, maps, spread
from moe_align_jax._eplb.keep import keep_in_place
from moe_align_jax._eplb.moves import ExpertMoves, MoveKind, plan_expert_moves

__all__ = [
    "ExpertMoves",
    "ExpertPlacement",
    "MoveKind",
    "balancedness",
    "expected_physical_count",
    "plan_expert_moves",
    "rebalance_experts",
]

Algorithm = Literal[
    "auto", "deepseek", "deepseek_hierarchical", "deepseek_vec", "deepseek_vec_hierarchical"
]
_FUNCTION = "rebalance_experts"


class _Sizes(NamedTuple):
    """What divides what; one group and one node for the global policy."""

    num_replicas: int
    num_groups: int
    num_nodes: int
    num_gpus: int
    spread: bool = False


class ExpertPlacement(NamedTuple):
    """Which replica of which expert each physical slot holds. L layers, El experts, Ep physical slots.

    Physical slot p lives on GPU `p // (Ep / num_gpus)`.

    Attributes:
        physical_to_logical_map: `[L, Ep]` int32. The expert that slot p holds.
        logical_to_physical_map: `[L, El, X]` int32 with X = `expert_count.max()`. The slots of expert i, in
            the order in which its replicas were made, then -1.
        expert_count: `[L, El]` int32. Replicas of each expert, >= 1.
    """

    physical_to_logical_map: np.ndarray
    logical_to_physical_map: np.ndarray
    expert_count: np.ndarray


def rebalance_experts(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    algorithm: Algorithm = "auto",
    previous: Any = None,
    previous_num_gpus: int | None = None,
    spread_replicas: bool = False,
) -> ExpertPlacement:
    """Replicates hot experts and spreads all replicas over the GPUs: DeepSeek's EPLB.

    Hierarchical: groups of experts are packed onto nodes, experts are replicated within their node, and the
    replicas are packed onto its GPUs, so that a group's tokens stay on one node. Global: one node and one
    group, whatever the machine. Layers are independent; float32; equal loads go to the lower index.

    Args:
        weight: `[L, El]` or, step by step, `[S, L, El]`, any real dtype, >= 0 and finite: the load of each
            expert. Steps are summed, except by "deepseek_vec".
        num_replicas: Ep, the physical slots, >= El and a multiple of num_gpus.
        num_groups: groups of experts, a divisor of El; 1 where the model has none.
        num_nodes: domains of fast interconnect.
        num_gpus: a multiple of num_nodes for the hierarchical policy.
        algorithm: "auto" is hierarchical where num_groups is a multiple of num_nodes, else global.
            "deepseek" is global and "deepseek_hierarchical" is hierarchical. "deepseek_vec" and
            "deepseek_vec_hierarchical" look at every step of `weight`: each further replica goes where it
            lowers the sum over steps of the heaviest replica's load most, and replicas are dealt to GPUs
            in snake order.
        previous: None, or `[L, slots]` the physical_to_logical_map in force: GPUs (and nodes, and slots
            within a GPU) are then renamed so that as few experts as possible change GPU. Loads per GPU
            stay what they are without it, up to their order. It may have other slots than Ep, and -1
            where a slot holds nothing, as all those of a dead GPU. Needs scipy, which jax brings.
        previous_num_gpus: GPUs of `previous`, a divisor of its slots; None for num_gpus. GPU g of it is GPU
            g of the result, if there is one.
        spread_replicas: True puts the replicas of an expert on different GPUs: on as many as there are (of
            its node, for the hierarchical policy), so an expert gets at most one replica per GPU; more
            only where a GPU has more slots than there are experts. Loads may be less even for it.
            False is DeepSeek's algorithm, which may put two replicas of one expert on one GPU.

    Returns:
        `ExpertPlacement`.

    Raises:
        TypeError: weight is not real numbers, a size is not an int, or spread_replicas is no bool.
        ValueError: negative or non-finite weights, none at all, or sizes that do not divide as they must.

    Example: DeepSeek's own, the first of its two layers.
        >>> load = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]]
        >>> placement = rebalance_experts(load, 16, num_groups=4, num_nodes=2, num_gpus=8)
        >>> placement.physical_to_logical_map.tolist()
        [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]]
        >>> placement.expert_count.tolist()
        [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]]

    Source: the method of deepseek-ai/EPLB (MIT) and, for "deepseek_vec", of SGLang (Apache-2.0); no code
    taken.
    """
    history = _check_weight(weight)
    sizes = (num_replicas, num_groups, num_nodes, num_gpus)
    names = ("num_replicas", "num_groups", "num_nodes", "num_gpus")
    num_replicas, num_groups, num_nodes, num_gpus = (
        checks.check_positive_int(_FUNCTION, name, size, "Pass a count.")
        for name, size in zip(names, sizes, strict=True)
    )
    if not checks.is_one_of(algorithm, get_args(Algorithm)):
        fail(
            _FUNCTION,
            "algorithm",
            f"be one of {', '.join(get_args(Algorithm))}",
            checks.shown(algorithm),
            'Leave it out for "auto".',
        )
    hierarchical = algorithm.endswith("hierarchical") or (
        algorithm == "auto" and num_groups % num_nodes == 0
    )
    blocks = num_nodes if hierarchical else 1
    _check_sizes(history.shape[2], num_replicas, num_groups, blocks, num_gpus)
    if not isinstance(spread_replicas, (bool, np.bool_)):
        got, remedy = checks.describe(spread_replicas), "Pass True or False."
        rule = checks.message(_FUNCTION, "spread_replicas", "be a bool", got, remedy)
        raise TypeError(rule)
    groups = num_groups if hierarchical else 1
    place = _Sizes(num_replicas, groups, blocks, num_gpus, bool(spread_replicas))
    old_gpus = num_gpus
    if previous_num_gpus is not None:
        old_gpus = checks.check_positive_int(
            _FUNCTION, "previous_num_gpus", previous_num_gpus, "Pass the GPUs of previous."
        )
    old = None
    if previous is not None:
        old = _check_previous(previous, history.shape[1:], old_gpus)
    placement = _place(history, place, windowed="vec" in algorithm)
    if old is None:
        return placement
    moved = keep_in_place(
        placement.physical_to_logical_map,
        old,
        num_gpus=num_gpus,
        num_nodes=num_nodes if num_gpus % num_nodes == 0 else 1,
        blocks=blocks,
        old_num_gpus=old_gpus,
    )
    return _renamed(placement, moved)


def _place(history: np.ndarray, sizes: "_Sizes", *, windowed: bool) -> ExpertPlacement:
    """The procedure itself, on loads `[S, L, El]`."""
    num_replicas, num_groups, num_nodes, num_gpus, spread_replicas = sizes
    # Exact for counts, which may add up beyond 2**24, before the one rounding to float32.
    weight = _sum(history, axis=0).astype(np.float32)
    layers, num_logical = weight.shape
    group_size = num_logical // num_groups
    on_node = num_replicas // num_nodes

    # Groups onto nodes. Summed from left to right: a pairwise sum could break ties differently.
    load = weight.reshape(layers, num_groups, group_size)
    node, place = greedy.pack(np.add.accumulate(load, axis=2)[:, :, -1], num_nodes)
    position = node * (num_groups // num_nodes) + place
    groups = np.empty_like(position)
    np.put_along_axis(groups, position, np.broadcast_to(np.arange(num_groups), groups.shape), 1)
    node_major = (groups[:, :, None] * group_size + np.arange(group_size)).reshape(layers, -1)

    # Replicas within each node, each node of each layer a row of its own.
    rows = np.take_along_axis(weight, node_major, axis=1).reshape(layers * num_nodes, -1)
    gpus_of_node = num_gpus // num_nodes
    most = None
    if spread_replicas:
        most = spread.most_replicas(rows.shape[1], on_node, gpus_of_node)
    if windowed:
        steps = np.take_along_axis(history.astype(np.float32), node_major[None], axis=2)
        steps = steps.reshape(history.shape[0], *rows.shape)
        owner, rank, count = greedy.replicate_for_steps(steps, on_node, most)
    else:
        owner, rank, count = greedy.replicate(rows, on_node, most)

    # Replicas onto the GPUs of their node.
    share = np.take_along_axis(rows / count.astype(np.float32), owner, axis=1)
    if spread_replicas:
        gpu = (
            greedy.snake(share, gpus_of_node)[0]
            if windowed
            else spread.pack(share, owner, gpus_of_node)
        )
        spread.separate(share, owner, gpu, gpus_of_node)
        slot = spread.slots_in(gpu, gpus_of_node)
    else:
        gpu, slot = (greedy.snake if windowed else greedy.pack)(share, gpus_of_node)
    physical = (gpu * (num_replicas // num_gpus) + slot).reshape(layers, num_nodes, on_node)
    physical = (physical + np.arange(num_nodes)[:, None] * on_node).reshape(layers, -1)

    owner = owner.reshape(layers, num_nodes, -1)
    owner = owner + np.arange(num_nodes)[:, None] * (num_logical // num_nodes)
    logical = np.take_along_axis(node_major, owner.reshape(layers, -1), axis=1)
    physical_to_logical = np.empty((layers, num_replicas), np.int32)
    np.put_along_axis(physical_to_logical, physical, logical.astype(np.int32), axis=1)
    expert_count = np.empty((layers, num_logical), np.int32)
    np.put_along_axis(expert_count, node_major, count.reshape(layers, -1).astype(np.int32), axis=1)
    widest = int(expert_count.max(initial=1))
    logical_to_physical = np.full((layers, num_logical, widest), -1, np.int32)
    each = np.arange(layers)[:, None]
    logical_to_physical[each, logical, rank.reshape(layers, -1)] = physical
    return ExpertPlacement(physical_to_logical, logical_to_physical, expert_count)


def _sum(values: np.ndarray, axis: int) -> np.ndarray:
    """Sums of real numbers >= 0: exact where int64 holds them, else in float64."""
    count = values.shape[axis]
    if values.dtype.kind != "f" and int(values.max(initial=0)) * count < 2**63:
        return values.sum(axis=axis, dtype=np.int64)
    return values.sum(axis=axis, dtype=np.float64)


def _renamed(placement: ExpertPlacement, moved: np.ndarray) -> ExpertPlacement:
    """The placement with slot p of layer l called `moved[l, p]`."""
    physical = np.empty_like(placement.physical_to_logical_map)
    np.put_along_axis(physical, moved, placement.physical_to_logical_map, axis=1)
    slots = placement.logical_to_physical_map
    each = np.arange(slots.shape[0])[:, None, None]
    renamed = np.where(slots < 0, -1, moved[each, np.maximum(slots, 0)]).astype(np.int32)
    return placement._replace(physical_to_logical_map=physical, logical_to_physical_map=renamed)


# -- how good a placement is ------------------------------------------------------------------------------


def expected_physical_count(weight: Any, physical_to_logical_map: Any) -> np.ndarray:
    """The load of each physical slot when the tokens of an expert spread evenly over its replicas.

    Args:
        weight: `[..., L, El]` real numbers, the load of each expert.
        physical_to_logical_map: `[L, Ep]` integers; -1 where a slot holds nothing, which has no load.

    Returns:
        `[..., L, Ep]` float64: `weight[l, i] / replicas of i` for the expert i in slot p.

    Raises:
        TypeError: weight is not real numbers, or the map not integers.
        ValueError: the layers differ, or the map names an expert that is not there.

    Example:
        >>> expected_physical_count([[6, 2, 4]], [[0, 1, 0, 2]]).tolist()
        [[3.0, 2.0, 3.0, 4.0]]
    """
    function, argument, remedy = (
        "expected_physical_count",
        "physical_to_logical_map",
        "Pass [L, Ep].",
    )
    load = _real(function, "weight", weight, "Pass the load of each expert, [..., L, El].")
    load = load.astype(np.float64)
    slots = maps.as_array(function, argument, physical_to_logical_map, remedy)
    if slots.dtype.kind not in "iu":
        got = checks.describe(slots)
        raise TypeError(checks.message(function, argument, "be integers", got, remedy))
    good = load.ndim >= 2 and slots.ndim == 2 and load.shape[-2] == slots.shape[0]
    if not good or slots.size and not -1 <= int(slots.min()) <= int(slots.max()) < load.shape[-1]:
        rule = "map the slots of each layer of weight to its experts"
        got = f"{checks.describe(slots)} for weight {list(load.shape)}"
        raise ValueError(checks.message(function, argument, rule, got, remedy))
    slots = slots.astype(np.int64)
    each = np.arange(slots.shape[0])[:, None]
    count = np.zeros((load.shape[-2], load.shape[-1] + 1))  # the last: slots that hold nothing
    np.add.at(count, (each, slots), 1)
    expected = load[..., each, np.maximum(slots, 0)] / count[each, slots]
    return np.where(slots < 0, 0.0, expected)


def balancedness(physical_count: Any, num_gpus: int) -> np.ndarray:
    """Mean load of a GPU over the load of the busiest one: 1 is even, 1 / num_gpus all on one.

    `(mean + 1e-5) / (max + 1e-5)` in float32, so exactly 1 where nothing was counted. A mean over layers
    should leave those out: 1 says there that nothing is known, not that the load is even.

    Args:
        physical_count: `[..., Ep]` any real dtype, >= 0 and finite, at least one: tokens per physical slot.
        num_gpus: a divisor of Ep; slot p is on GPU `p // (Ep / num_gpus)`.

    Returns:
        `[...]` float32.

    Raises:
        TypeError: num_gpus is not an int, or the counts are not real numbers.
        ValueError: num_gpus does not divide Ep, there are no counts, or one is negative, NaN or infinite.

    Example:
        >>> balancedness([[2, 2, 2, 2], [8, 0, 0, 0]], num_gpus=4).round(3).tolist()
        [1.0, 0.25]
    """
    function, remedy = "balancedness", "Pass the tokens of each slot, [..., Ep]."
    num_gpus = checks.check_positive_int(function, "num_gpus", num_gpus, "Pass a count.")
    count = _real(function, "physical_count", physical_count, remedy)
    if count.ndim and count.size == 0:
        got, rule = checks.describe(count), "hold at least one count"
        raise ValueError(checks.message(function, "physical_count", rule, got, remedy))
    if count.ndim == 0 or count.shape[-1] % num_gpus:
        got = f"{num_gpus} for counts {list(count.shape)}"
        rule = "divide the last dimension of physical_count"
        raise ValueError(checks.message(function, "num_gpus", rule, got, "Pass [..., Ep]."))
    if not (np.isfinite(count).all() and count.min() >= 0):
        bad = count[~(np.isfinite(count) & (count >= 0))].flat[0]
        rule = "be finite and at least 0"
        raise ValueError(checks.message(function, "physical_count", rule, bad, remedy))
    load = _sum(count.reshape(*count.shape[:-1], num_gpus, count.shape[-1] // num_gpus), axis=-1)
    # float64 where float32 cannot hold the sum itself, of which only the ratio is asked.
    load = load.astype(np.float32 if load.max() < 1e30 else np.float64)
    small = load.dtype.type(1e-5)
    value = (load.mean(axis=-1) + small) / (load.max(axis=-1) + small)
    return np.asarray(value, np.float32)


# -- checks -----------------------------------------------------------------------------------------------


def _real(function: str, argument: str, value: Any, remedy: str) -> np.ndarray:
    """An array of real numbers, of its own dtype.

    Raises:
        TypeError: of another dtype.   ValueError: lists of different lengths.
    """
    array = maps.as_array(function, argument, value, remedy)
    if array.dtype.kind not in "iuf":
        if array.dtype.kind == "V" and array.dtype.names is None:  # ml_dtypes' floats
            try:
                return array.astype(np.float32)
            except (TypeError, ValueError):
                pass
        got = checks.describe(array)
        raise TypeError(checks.message(function, argument, "be real numbers", got, remedy))
    return array


def _check_weight(weight: Any) -> np.ndarray:
    """`[S, L, El]` of its own dtype, with finite float32 sums."""
    remedy = "Pass the tokens per expert, [layers, experts] or [steps, layers, experts]."
    array = _real(_FUNCTION, "weight", weight, remedy)
    if array.ndim not in (2, 3) or 0 in array.shape:
        rule = "have shape [L, El] or [S, L, El], of at least one each"
        fail(_FUNCTION, "weight", rule, list(array.shape), remedy)
    if not array.min() >= 0:
        fail(_FUNCTION, "weight", "be at least 0 everywhere", array.min(), remedy)
    history = array if array.ndim == 3 else array[None]
    with np.errstate(over="ignore"):
        total = history.sum(axis=(0, 2), dtype=np.float64).astype(np.float32)
    if not np.isfinite(total).all():
        fail(_FUNCTION, "weight", "have finite float32 sums", total.max(), "Scale the loads down.")
    return history


def _check_previous(previous: Any, sizes: tuple[int, ...], num_gpus: int) -> np.ndarray:
    """The map `[L, slots]` int64; `sizes` are (L, El)."""
    remedy = "Pass the physical_to_logical_map in force."
    num_layers, num_logical = sizes
    old = maps.as_array(_FUNCTION, "previous", previous, remedy)
    if old.dtype.kind not in "iu":
        got = checks.describe(old)
        raise TypeError(checks.message(_FUNCTION, "previous", "be integers", got, remedy))
    if old.ndim != 2 or len(old) != num_layers or old.shape[1] == 0:
        rule = f"be an integer array [{num_layers}, slots]"
        fail(_FUNCTION, "previous", rule, checks.describe(old), remedy)
    if old.shape[1] % num_gpus:
        got, rule = f"{old.shape[1]} slots", f"have a multiple of its GPUs ({num_gpus}) as slots"
        fail(
            _FUNCTION, "previous", rule, got, "Pass previous_num_gpus where it was for other GPUs."
        )
    if not -1 <= int(old.min()) <= int(old.max()) < num_logical:
        rule = f"hold experts in [0, {num_logical}), or -1"
        fail(_FUNCTION, "previous", rule, f"[{old.min()}, {old.max()}]", remedy)
    return old.astype(np.int64)


def _check_sizes(
    num_logical: int, num_replicas: int, num_groups: int, nodes: int, num_gpus: int
) -> None:
    """Sizes that divide; `nodes` is 1 for the global policy."""
    if num_replicas < num_logical:
        rule = f"be at least the number of experts, {num_logical}"
        fail(_FUNCTION, "num_replicas", rule, num_replicas, "Every expert needs a slot.")
    if num_replicas % num_gpus:
        rule = f"be a multiple of num_gpus ({num_gpus})"
        fail(
            _FUNCTION,
            "num_replicas",
            rule,
            num_replicas,
            "Each GPU holds the same number of slots.",
        )
    if num_logical % num_groups:
        rule = f"divide the number of experts, {num_logical}"
        fail(_FUNCTION, "num_groups", rule, num_groups, "Pass 1 where the model has no groups.")
    if num_groups % nodes:
        rule = f"be a multiple of num_nodes ({nodes})"
        fail(
            _FUNCTION,
            "num_groups",
            rule,
            num_groups,
            'Pass algorithm="deepseek" to ignore the nodes.',
        )
    if num_gpus % nodes:
        rule = f"be a multiple of num_nodes ({nodes})"
        fail(_FUNCTION, "num_gpus", rule, num_gpus, "Each node has the same number of GPUs.")
