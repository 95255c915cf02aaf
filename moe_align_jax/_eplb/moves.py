"""plan_expert_moves: where each slot of a new placement gets its expert from. NumPy on the host."""

import enum
from typing import Any, NamedTuple

import numpy as np

from moe_align_jax import _checks

_FUNCTION = "plan_expert_moves"


class MoveKind(enum.IntEnum):
    """How a slot gets its expert; the cheapest way there is.

    UNCHANGED: the slot holds it already. LOCAL_COPY: another slot of the same GPU does. FREE_RIDER: an
    earlier slot of the same GPU receives it in this plan: copied from there. SAME_NODE, OTHER_NODE: received
    from a GPU of the same node, of another one.
    """

    UNCHANGED = 0
    LOCAL_COPY = 1
    FREE_RIDER = 2
    SAME_NODE = 3
    OTHER_NODE = 4


class ExpertMoves(NamedTuple):
    """A plan of moves: for all layers, slots and weights, `new[l, p] = old[l, source[l, p]]`.

    Attributes:
        kind: `[L, Ep]` int8, a `MoveKind` of each slot.
        source: `[L, Ep]` int32, the slot of the OLD placement that the expert is read from; of a free rider,
            the one that the slot it rides with receives from.
        num_gpus: D; slot p is on GPU `p // (Ep / D)`.
    """

    kind: np.ndarray
    source: np.ndarray
    num_gpus: int

    def count(self, kind: MoveKind) -> int:
        """Slots of a kind, over all layers."""
        return int((self.kind == kind).sum())

    def layers(self, layer_ids: Any) -> "ExpertMoves":
        """The plan in which only the layers listed move."""
        chosen = np.zeros(len(self.kind), bool)
        chosen[np.asarray(layer_ids, int)] = True
        stay = np.arange(self.source.shape[1], dtype=np.int32)
        return self._replace(
            kind=np.where(chosen[:, None], self.kind, np.int8(MoveKind.UNCHANGED)),
            source=np.where(chosen[:, None], self.source, stay),
        )


def plan_expert_moves(old: Any, new: Any, *, num_gpus: int, num_nodes: int = 1) -> ExpertMoves:
    """Where each slot of a new placement gets its expert from, by the shortest way.

    GPUs that need an expert from the same node divide the node's holders among them in even, contiguous
    shares; what no GPU of the node holds is divided over all its holders likewise.

    Args:
        old: `[L, Ep]` integers, the physical_to_logical_map in force.
        new: `[L, Ep]` integers, the one to come.
        num_gpus: D, a divisor of Ep.
        num_nodes: a divisor of D.

    Returns:
        `ExpertMoves`.

    Raises:
        TypeError: a map is not integers, or a size is not an int.
        ValueError: shapes or sizes do not fit, or an expert of `new` is nowhere in `old`.

    Example: two GPUs of two slots; expert 1 and 2 change places, and 2 gets a second replica.
        >>> moves = plan_expert_moves([[0, 1, 2, 3]], [[0, 2, 1, 2]], num_gpus=2)
        >>> moves.source.tolist(), [MoveKind(k).name for k in moves.kind[0]]
        ([[0, 2, 1, 2]], ['UNCHANGED', 'SAME_NODE', 'SAME_NODE', 'LOCAL_COPY'])
    """
    num_gpus = _checks.check_positive_int(_FUNCTION, "num_gpus", num_gpus, "Pass a count.")
    num_nodes = _checks.check_positive_int(_FUNCTION, "num_nodes", num_nodes, "Pass a count.")
    before, after = _check_map("old", old), _check_map("new", new)
    if before.shape != after.shape:
        _fail("new", f"have old's shape {list(before.shape)}", list(after.shape), "Pass [L, Ep].")
    num_slots = before.shape[1]
    if num_slots % num_gpus:
        _fail("num_gpus", f"divide the {num_slots} slots", num_gpus, "Pass the GPUs of the map.")
    if num_gpus % num_nodes:
        _fail("num_nodes", f"divide num_gpus ({num_gpus})", num_nodes, "Nodes are of one size.")
    kind = np.zeros(before.shape, np.int8)
    source = np.zeros(before.shape, np.int32)
    for layer in range(len(before)):
        if missing := set(after[layer].tolist()) - set(before[layer].tolist()):
            got = f"expert {min(missing)} in layer {layer}"
            _fail("new", "hold only experts that old holds", got, "Its weights are nowhere.")
        _plan_layer(
            before[layer].tolist(),
            after[layer].tolist(),
            num_slots // num_gpus,
            num_gpus // num_nodes,
            kind[layer],
            source[layer],
        )
    return ExpertMoves(kind, source, num_gpus)


def _plan_layer(
    old: list[int],
    new: list[int],
    per_gpu: int,
    gpus_per_node: int,
    kind: np.ndarray,
    source: np.ndarray,
) -> None:
    # holders[expert][gpu]: the first slot of that GPU that holds the expert.
    holders: dict[int, dict[int, int]] = {}
    for slot, expert in enumerate(old):
        holders.setdefault(expert, {}).setdefault(slot // per_gpu, slot)
    # needy[expert][gpu]: the slots of that GPU that wait for it.
    needy: dict[int, dict[int, list[int]]] = {}
    for slot, expert in enumerate(new):
        gpu = slot // per_gpu
        if old[slot] == expert:
            kind[slot], source[slot] = MoveKind.UNCHANGED, slot
        elif gpu in holders[expert]:
            kind[slot], source[slot] = MoveKind.LOCAL_COPY, holders[expert][gpu]
        else:
            needy.setdefault(expert, {}).setdefault(gpu, []).append(slot)
    for expert, waiting in needy.items():
        by_node: dict[int, list[int]] = {}
        for gpu in holders[expert]:
            by_node.setdefault(gpu // gpus_per_node, []).append(gpu)
        near: dict[int, list[int]] = {}
        far = []
        for gpu in waiting:
            node = gpu // gpus_per_node
            (near.setdefault(node, []) if node in by_node else far).append(gpu)
        served = [(near[node], by_node[node], MoveKind.SAME_NODE) for node in near]
        served.append((far, list(holders[expert]), MoveKind.OTHER_NODE))
        for receivers, senders, way in served:
            for index, gpu in enumerate(receivers):
                sender = senders[index * len(senders) // len(receivers)]
                slots = waiting[gpu]
                source[slots] = holders[expert][sender]
                kind[slots] = MoveKind.FREE_RIDER
                kind[slots[0]] = way


def _fail(argument: str, rule: str, got: object, remedy: str) -> None:
    raise ValueError(_checks.message(_FUNCTION, argument, rule, got, remedy))


def _check_map(argument: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    remedy = "Pass a physical_to_logical_map, [layers, slots]."
    if array.dtype.kind not in "iu":
        got = _checks.describe(array)
        raise TypeError(_checks.message(_FUNCTION, argument, "be integers", got, remedy))
    if array.ndim != 2:
        _fail(argument, "have shape [L, Ep]", list(array.shape), remedy)
    return array
