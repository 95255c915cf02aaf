"""plan_expert_moves: where each slot of a new placement gets its expert from. NumPy on the host."""

import enum
from typing import Any, NamedTuple

import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._core.checks import fail
from moe_align_jax._eplb import maps

_FUNCTION = "plan_expert_moves"


class MoveKind(enum.IntEnum):
    """How a slot gets its expert; the cheapest way there is.

    UNCHANGED: the slot holds it already, or shall hold nothing. LOCAL_COPY: another slot of the same GPU
    does. FREE_RIDER: an earlier slot of the same GPU receives it in this plan: copied from there.
    SAME_NODE, OTHER_NODE: received from a GPU of the same node, of another one.
    """

    UNCHANGED = 0
    LOCAL_COPY = 1
    FREE_RIDER = 2
    SAME_NODE = 3
    OTHER_NODE = 4


class ExpertMoves(NamedTuple):
    """A plan of moves: for all layers, slots and weights, `new[l, p] = old[l, source[l, p]]`.

    Attributes:
        kind: `[L, Ep]` int8, a `MoveKind` of each slot of the new placement.
        source: `[L, Ep]` int32, the slot of the OLD placement that the expert is read from; of a free rider,
            the one that the slot it rides with receives from. -1 for a slot that shall hold nothing.
        num_gpus: D; slot p of the new placement is on GPU `p // (Ep / D)`.
        old_num_slots: slots of the old placement; None for Ep.
        old_num_gpus: GPUs of the old placement; None for D.
    """

    kind: np.ndarray
    source: np.ndarray
    num_gpus: int
    old_num_slots: int | None = None
    old_num_gpus: int | None = None

    @property
    def same_size(self) -> bool:
        """Whether both placements have as many slots on as many GPUs: weights can then move in place."""
        same_slots = self.old_num_slots in (None, self.source.shape[1])
        return same_slots and self.old_num_gpus in (None, self.num_gpus)

    def count(self, kind: MoveKind) -> int:
        """Slots of a kind, over all layers."""
        return int((self.kind == kind).sum())

    def layers(self, layer_ids: Any) -> "ExpertMoves":
        """The plan in which only the layers listed move.

        Args:
            layer_ids: ints in [0, L).

        Raises:
            TypeError: they are not ints.
            ValueError: a layer is out of range, or the plan is between placements of different sizes, where
                no layer can stay as it is.
        """
        function = "ExpertMoves.layers"
        chosen = maps.check_layers(function, layer_ids, len(self.kind))
        if not self.same_size:
            got = f"{self.old_num_slots} slots before and {self.source.shape[1]} after"
            rule = "be between placements of the same slots and GPUs"
            fail(function, "the plan", rule, got, "Move all layers.")
        stay = np.arange(self.source.shape[1], dtype=np.int32)
        return self._replace(
            kind=np.where(chosen[:, None], self.kind, np.int8(MoveKind.UNCHANGED)),
            source=np.where(chosen[:, None], self.source, stay),
        )


def plan_expert_moves(
    old: Any, new: Any, *, num_gpus: int, num_nodes: int = 1, old_num_gpus: int | None = None
) -> ExpertMoves:
    """Where each slot of a new placement gets its expert from, by the shortest way.

    GPUs that need an expert from the same node divide the node's holders among them in even, contiguous
    shares; what no GPU of the node holds is divided over all its holders likewise.

    The placements may differ in slots and in GPUs (elastic scaling). GPU g of the one is then GPU g of the
    other, and slot j of GPU g is the same slot of both; nodes are of `num_gpus / num_nodes` GPUs in both, or
    all GPUs are of one node where num_nodes is 1. A GPU that is dead has -1 in all its slots: nothing is
    read from it, and nothing is sent to it.

    Args:
        old: `[L, slots]` integers, the physical_to_logical_map in force; -1 where a slot holds nothing.
        new: `[L, Ep]` integers, the one to come; -1 where a slot shall hold nothing.
        num_gpus: D, a divisor of Ep.
        num_nodes: a divisor of D.
        old_num_gpus: GPUs of `old`, a divisor of its slots; None for D.

    Returns:
        `ExpertMoves`. `update_expert_weights` takes it where both placements have the same sizes.

    Raises:
        TypeError: a map is not integers, or a size is not an int.
        ValueError: shapes or sizes do not fit, or an expert of `new` is nowhere in `old`.

    Example: two GPUs of two slots; expert 1 and 2 change places, and 2 gets a second replica.
        >>> moves = plan_expert_moves([[0, 1, 2, 3]], [[0, 2, 1, 2]], num_gpus=2)
        >>> moves.source.tolist(), [MoveKind(k).name for k in moves.kind[0]]
        ([[0, 2, 1, 2]], ['UNCHANGED', 'SAME_NODE', 'SAME_NODE', 'LOCAL_COPY'])

        GPU 1 of three has died; the experts fit on four slots of two GPUs.
        >>> moves = plan_expert_moves(
        ...     [[0, 1, -1, -1, 2, 0]], [[0, 1, 2, 0]], num_gpus=2, old_num_gpus=3
        ... )
        >>> moves.source.tolist(), [MoveKind(k).name for k in moves.kind[0]]
        ([[0, 1, 4, 0]], ['UNCHANGED', 'UNCHANGED', 'SAME_NODE', 'SAME_NODE'])
    """
    num_gpus = checks.check_positive_int(_FUNCTION, "num_gpus", num_gpus, "Pass a count.")
    num_nodes = checks.check_positive_int(_FUNCTION, "num_nodes", num_nodes, "Pass a count.")
    old_gpus = num_gpus
    if old_num_gpus is not None:
        old_gpus = checks.check_positive_int(
            _FUNCTION, "old_num_gpus", old_num_gpus, "Pass the GPUs of old."
        )
    before, after = _check_map("old", old), _check_map("new", new)
    if len(before) != len(after):
        rule, got = f"have the {len(before)} layers of old", list(after.shape)
        fail(_FUNCTION, "new", rule, got, "Pass [L, Ep].")
    num_slots, old_slots = after.shape[1], before.shape[1]
    if num_slots % num_gpus:
        fail(
            _FUNCTION,
            "num_gpus",
            f"divide the {num_slots} slots",
            num_gpus,
            "Pass the GPUs of the map.",
        )
    if old_slots % old_gpus:
        rule, remedy = f"divide the {old_slots} slots of old", "Pass the GPUs of old."
        fail(_FUNCTION, "old_num_gpus", rule, old_gpus, remedy)
    if num_gpus % num_nodes:
        fail(
            _FUNCTION,
            "num_nodes",
            f"divide num_gpus ({num_gpus})",
            num_nodes,
            "Nodes are of one size.",
        )
    kind = np.zeros(after.shape, np.int8)
    source = np.zeros(after.shape, np.int32)
    for layer in range(len(before)):
        if missing := set(after[layer].tolist()) - {-1} - set(before[layer].tolist()):
            got = f"expert {min(missing)} in layer {layer}"
            fail(
                _FUNCTION,
                "new",
                "hold only experts that old holds",
                got,
                "Its weights are nowhere.",
            )
        _plan_layer(
            before[layer].tolist(),
            after[layer].tolist(),
            (old_slots // old_gpus, num_slots // num_gpus),
            num_gpus // num_nodes if num_nodes > 1 else max(num_gpus, old_gpus),
            kind[layer],
            source[layer],
        )
    return ExpertMoves(kind, source, num_gpus, old_slots, old_gpus)


def _plan_layer(
    old: list[int],
    new: list[int],
    per_gpu: tuple[int, int],
    gpus_per_node: int,
    kind: np.ndarray,
    source: np.ndarray,
) -> None:
    """`per_gpu`: slots of a GPU in `old` and in `new`."""
    before, after = per_gpu
    # holders[expert][gpu]: the first slot of that GPU that holds the expert.
    holders: dict[int, dict[int, int]] = {}
    for slot, expert in enumerate(old):
        if expert >= 0:
            holders.setdefault(expert, {}).setdefault(slot // before, slot)
    # needy[expert][gpu]: the slots of that GPU that wait for it.
    needy: dict[int, dict[int, list[int]]] = {}
    for slot, expert in enumerate(new):
        gpu, place = divmod(slot, after)
        was = gpu * before + place  # the same slot in `old`, if it was there
        if expert < 0:
            kind[slot], source[slot] = MoveKind.UNCHANGED, -1
        elif place < before and was < len(old) and old[was] == expert:
            kind[slot], source[slot] = MoveKind.UNCHANGED, was
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


def _check_map(argument: str, value: Any) -> np.ndarray:
    remedy = "Pass a physical_to_logical_map, [layers, slots]."
    array = maps.as_array(_FUNCTION, argument, value, remedy)
    if array.dtype.kind not in "iu":
        got = checks.describe(array)
        raise TypeError(checks.message(_FUNCTION, argument, "be integers", got, remedy))
    if array.ndim != 2 or 0 in array.shape:
        fail(_FUNCTION, argument, "have shape [L, Ep]", list(array.shape), remedy)
    if array.min() < -1:
        fail(_FUNCTION, argument, "hold experts, or -1", int(array.min()), remedy)
    return array
