"""Renames the GPUs, nodes and slots of a new placement so that few experts move. NumPy and scipy."""

import numpy as np


def keep_in_place(
    new: np.ndarray,
    old: np.ndarray,
    *,
    num_gpus: int,
    num_nodes: int,
    blocks: int,
    old_num_gpus: int,
) -> np.ndarray:
    """The slot of the machine to which each slot of a placement is renamed.

    What a GPU holds stays together. GPUs may be renamed within a block, and blocks may be swapped. Of all
    such renamings the result has, in this order: the fewest experts that reach a GPU that did
    not hold them, the fewest of them that come from another node, the most slots that do not change.

    Args:
        new: `[L, Ep]` int32, the physical_to_logical_map of the placement.
        old: `[L, slots]` integers, the one in force; -1 where a slot holds nothing.
        num_gpus: D. num_nodes: nodes of the machine, a divisor of D.
        blocks: a divisor of D; consecutive GPUs of which only the names may be exchanged: the nodes for the
            hierarchical policy, 1 for the global one.
        old_num_gpus: of `old`; GPU g of it is GPU g of `new`, if there is one.

    Returns:
        `[L, Ep]` int64, a permutation of the slots in each layer.
    """
    layers, num_slots = new.shape
    per_gpu = num_slots // num_gpus
    moved = np.empty((layers, num_slots), np.int64)
    held = _per_gpu(old, num_gpus, old_num_gpus)
    kept = _kept(new.reshape(layers, num_gpus, per_gpu), held, num_nodes)
    for layer in range(layers):
        gpu_of = _assign_gpus(kept[layer], blocks)
        fresh = new[layer].reshape(num_gpus, per_gpu).tolist()
        before = held[layer].tolist()
        for pack, gpu in enumerate(gpu_of):
            slots = _slots(fresh[pack], before[gpu])
            start = pack * per_gpu
            moved[layer, start : start + per_gpu] = [gpu * per_gpu + slot for slot in slots]
    return moved


def _per_gpu(old: np.ndarray, num_gpus: int, old_num_gpus: int) -> np.ndarray:
    """`[L, D, slots per GPU]`: what each of the D GPUs holds; -1 for nothing."""
    held = old.reshape(len(old), old_num_gpus, -1)[:, :num_gpus]
    new_gpus = num_gpus - held.shape[1]
    return np.pad(held, ((0, 0), (0, new_gpus), (0, 0)), constant_values=-1)


def _kept(new: np.ndarray, old: np.ndarray, num_nodes: int) -> np.ndarray:
    """`[L, D, D]` float64: what is saved when pack a goes to GPU b, the three aims in one number."""
    layers, num_gpus, per_gpu = new.shape
    num_slots = num_gpus * per_gpu
    num_logical = int(max(new.max(initial=0), old.max(initial=0))) + 1
    where = np.arange(layers)[:, None, None], np.arange(num_gpus)[:, None]

    def copies_of(slots: np.ndarray) -> np.ndarray:
        copies = np.zeros((layers, num_gpus, num_logical + 1), np.float32)
        np.add.at(copies, (*where, slots), 1)  # -1: the last column, which is dropped
        return copies[..., :num_logical]

    wanted, held = copies_of(new), copies_of(old)
    local = _shared(wanted, held)
    by_node = held.reshape(layers, num_nodes, -1, num_logical).max(axis=2)
    near = np.repeat(_shared(wanted, by_node), num_gpus // num_nodes, axis=2)
    # Of a GPU that had more slots, only the first ones are there to stay in.
    stay = copies_of(old[:, :, :per_gpu]) if old.shape[2] > per_gpu else held
    most = int(min(wanted.max(initial=0), stay.max(initial=0)))
    slots = sum((_shared(wanted >= k, stay >= k) for k in range(1, most + 1)), np.zeros_like(local))
    # No sum of one aim over the GPUs reaches 1 of the aim before it.
    unit = float(num_slots + 1)
    return (local * unit + near) * unit + slots


def _shared(wanted: np.ndarray, held: np.ndarray) -> np.ndarray:
    """`[L, A, B]`: experts that are in row a of the one and row b of the other."""
    left, right = ((x > 0).astype(np.float32) for x in (wanted, held))
    return (left @ right.transpose(0, 2, 1)).astype(np.float64)


def _assign_gpus(kept: np.ndarray, blocks: int) -> list[int]:
    """The GPU of each pack that keeps most in all."""
    from scipy.optimize import linear_sum_assignment

    num_gpus = len(kept)
    size = num_gpus // blocks
    tiles = kept.reshape(blocks, size, blocks, size).transpose(0, 2, 1, 3)
    inner = np.empty((blocks, blocks, size), np.int64)
    value = np.empty((blocks, blocks))
    for a in range(blocks):
        for b in range(blocks):
            row, column = linear_sum_assignment(tiles[a, b], maximize=True)
            inner[a, b], value[a, b] = column, tiles[a, b][row, column].sum()
    _, block_of = linear_sum_assignment(value, maximize=True)
    return [int(b * size + g) for a, b in enumerate(block_of) for g in inner[a, b]]


def _slots(fresh: list[int], before: list[int]) -> list[int]:
    """A slot for each expert of a GPU: its own where it had one, the rest in order."""
    slots = [-1] * len(fresh)
    waiting: dict[int, list[int]] = {}
    for index in reversed(range(len(fresh))):
        waiting.setdefault(fresh[index], []).append(index)
    free = []
    for slot in range(len(fresh)):
        expert = before[slot] if slot < len(before) else -1
        if waiting.get(expert):
            slots[waiting[expert].pop()] = slot
        else:
            free.append(slot)
    rest = iter(free)
    return [slot if slot >= 0 else next(rest) for slot in slots]
