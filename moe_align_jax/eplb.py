"""rebalance_experts: which experts to replicate, and where each replica goes. NumPy on the host.

Runs once in a thousand steps or so, beside the model; all layers at once. Imports no jax.
"""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from moe_align_jax import _checks
from moe_align_jax._eplb import greedy
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
        previous: None, or `[L, Ep]` the physical_to_logical_map in force: GPUs (and nodes, and slots within
            a GPU) are then renamed so that as few experts as possible change GPU. Loads per GPU stay
            what they are without it, up to their order. Needs scipy, which jax brings.

    Returns:
        `ExpertPlacement`.

    Raises:
        TypeError: weight is not real numbers, or a size is not an int.
        ValueError: negative or non-finite weights, or sizes that do not divide as they must.

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
        _checks.check_positive_int(_FUNCTION, name, size, "Pass a count.")
        for name, size in zip(names, sizes, strict=True)
    )
    if algorithm not in get_args(Algorithm):
        _fail("algorithm", f"be one of {', '.join(get_args(Algorithm))}", repr(algorithm), "")
    hierarchical = algorithm.endswith("hierarchical") or (
        algorithm == "auto" and num_groups % num_nodes == 0
    )
    blocks = num_nodes if hierarchical else 1
    _check_sizes(history.shape[2], num_replicas, num_groups, blocks, num_gpus)
    place = _Sizes(num_replicas, num_groups if hierarchical else 1, blocks, num_gpus)
    placement = _place(history, place, windowed="vec" in algorithm)
    if previous is None:
        return placement
    old = _check_previous(previous, history.shape[2], placement.physical_to_logical_map.shape)
    nodes = num_nodes if num_gpus % num_nodes == 0 else 1
    moved = keep_in_place(
        placement.physical_to_logical_map, old, num_gpus=num_gpus, num_nodes=nodes, blocks=blocks
    )
    return _renamed(placement, moved)


def _place(history: np.ndarray, sizes: "_Sizes", *, windowed: bool) -> ExpertPlacement:
    """The procedure itself, on loads `[S, L, El]`."""
    num_replicas, num_groups, num_nodes, num_gpus = sizes
    # Exact for counts, which may add up beyond 2**24, before the one rounding to float32.
    exact = np.float64 if history.dtype.kind == "f" else np.int64
    weight = history.sum(axis=0, dtype=exact).astype(np.float32)
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
    if windowed:
        steps = np.take_along_axis(history.astype(np.float32), node_major[None], axis=2)
        steps = steps.reshape(history.shape[0], *rows.shape)
        owner, rank, count = greedy.replicate_for_steps(steps, on_node)
    else:
        owner, rank, count = greedy.replicate(rows, on_node)

    # Replicas onto the GPUs of their node.
    share = np.take_along_axis(rows / count.astype(np.float32), owner, axis=1)
    gpu, slot = (greedy.snake if windowed else greedy.pack)(share, num_gpus // num_nodes)
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
        weight: `[..., L, El]`, the load of each expert.
        physical_to_logical_map: `[L, Ep]` integers.

    Returns:
        `[..., L, Ep]` float64: `weight[l, i] / replicas of i` for the expert i in slot p.

    Raises:
        ValueError: the layers differ, or the map names an expert that is not there.

    Example:
        >>> expected_physical_count([[6, 2, 4]], [[0, 1, 0, 2]]).tolist()
        [[3.0, 2.0, 3.0, 4.0]]
    """
    function = "expected_physical_count"
    load = np.asarray(weight, np.float64)
    slots = np.asarray(physical_to_logical_map)
    good = load.ndim >= 2 and slots.ndim == 2 and load.shape[-2] == slots.shape[0]
    if not good or slots.size and not 0 <= slots.min() <= slots.max() < load.shape[-1]:
        rule = "map the slots of each layer of weight to its experts"
        got = f"{_checks.describe(slots)} for weight {list(load.shape)}"
        raise ValueError(
            _checks.message(function, "physical_to_logical_map", rule, got, "Pass [L, Ep].")
        )
    each = np.arange(slots.shape[0])[:, None]
    count = np.zeros(load.shape[-2:])
    np.add.at(count, (each, slots), 1)
    return load[..., each, slots] / count[each, slots]


def balancedness(physical_count: Any, num_gpus: int) -> np.ndarray:
    """Mean load of a GPU over the load of the busiest one: 1 is even, 1 / num_gpus all on one.

    `(mean + 1e-5) / (max + 1e-5)` in float32, so exactly 1 where nothing was counted.

    Args:
        physical_count: `[..., Ep]` any real dtype, tokens per physical slot.
        num_gpus: a divisor of Ep; slot p is on GPU `p // (Ep / num_gpus)`.

    Returns:
        `[...]` float32.

    Raises:
        TypeError: num_gpus is not an int.
        ValueError: num_gpus does not divide Ep.

    Example:
        >>> balancedness([[2, 2, 2, 2], [8, 0, 0, 0]], num_gpus=4).round(3).tolist()
        [1.0, 0.25]
    """
    num_gpus = _checks.check_positive_int("balancedness", "num_gpus", num_gpus, "Pass a count.")
    count = np.asarray(physical_count)
    if count.ndim == 0 or count.shape[-1] % num_gpus:
        got = f"{num_gpus} for counts {list(count.shape)}"
        rule = "divide the last dimension of physical_count"
        raise ValueError(_checks.message("balancedness", "num_gpus", rule, got, "Pass [..., Ep]."))
    load = count.reshape(*count.shape[:-1], num_gpus, -1).sum(axis=-1).astype(np.float32)
    small = np.float32(1e-5)
    return (load.mean(axis=-1) + small) / (load.max(axis=-1) + small)


# -- checks -----------------------------------------------------------------------------------------------


def _fail(argument: str, rule: str, got: object, remedy: str) -> None:
    raise ValueError(_checks.message(_FUNCTION, argument, rule, got, remedy).rstrip())


def _check_weight(weight: Any) -> np.ndarray:
    """`[S, L, El]` of its own dtype, with finite float32 sums."""
    remedy = "Pass the tokens per expert, [layers, experts] or [steps, layers, experts]."
    array = np.asarray(weight)
    if array.dtype.name.startswith(("bfloat16", "float8")):  # no float to NumPy
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        got = _checks.describe(array)
        raise TypeError(_checks.message(_FUNCTION, "weight", "be real numbers", got, remedy))
    no_steps = array.ndim == 3 and array.shape[0] == 0
    if array.ndim not in (2, 3) or array.shape[-1] == 0 or no_steps:
        _fail("weight", "have shape [L, El] or [S, L, El]", list(array.shape), remedy)
    if array.size and not array.min() >= 0:
        _fail("weight", "be at least 0 everywhere", array.min(), remedy)
    history = array if array.ndim == 3 else array[None]
    with np.errstate(over="ignore"):
        total = history.sum(axis=(0, 2), dtype=np.float64).astype(np.float32)
    if not np.isfinite(total).all():
        _fail("weight", "have finite float32 sums", total.max(), "Scale the loads down.")
    return history


def _check_previous(previous: Any, num_logical: int, shape: tuple[int, ...]) -> np.ndarray:
    old = np.asarray(previous)
    remedy = "Pass the physical_to_logical_map in force."
    if old.shape != shape or old.dtype.kind not in "iu":
        rule = f"be an integer array {list(shape)}"
        _fail("previous", rule, _checks.describe(old), remedy)
    if old.size and not 0 <= old.min() <= old.max() < num_logical:
        rule = f"hold experts in [0, {num_logical})"
        _fail("previous", rule, f"[{old.min()}, {old.max()}]", remedy)
    return old.astype(np.int64)


def _check_sizes(
    num_logical: int, num_replicas: int, num_groups: int, nodes: int, num_gpus: int
) -> None:
    """Sizes that divide; `nodes` is 1 for the global policy."""
    if num_replicas < num_logical:
        rule = f"be at least the number of experts, {num_logical}"
        _fail("num_replicas", rule, num_replicas, "Every expert needs a slot.")
    if num_replicas % num_gpus:
        rule = f"be a multiple of num_gpus ({num_gpus})"
        _fail("num_replicas", rule, num_replicas, "Each GPU holds the same number of slots.")
    if num_logical % num_groups:
        rule = f"divide the number of experts, {num_logical}"
        _fail("num_groups", rule, num_groups, "Pass 1 where the model has no groups.")
    if num_groups % nodes:
        rule = f"be a multiple of num_nodes ({nodes})"
        _fail("num_groups", rule, num_groups, 'Pass algorithm="deepseek" to ignore the nodes.')
    if num_gpus % nodes:
        rule = f"be a multiple of num_nodes ({nodes})"
        _fail("num_gpus", rule, num_gpus, "Each node has the same number of GPUs.")
