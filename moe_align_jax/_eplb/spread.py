"""Replicas onto GPUs so that no GPU holds two of one expert where it need not. NumPy on the host."""

import numpy as np


def most_replicas(num_experts: int, num_slots: int, num_gpus: int) -> int:
    """How often an expert may be replicated: once per GPU; more only where the slots would stay empty."""
    return num_gpus * -(-num_slots // (num_experts * num_gpus))


def pack(weight: np.ndarray, owner: np.ndarray, num_packs: int) -> np.ndarray:
    """Heaviest first, into the lightest of the packs with room that hold the fewest of its expert.

    Args:
        weight: `[R, n]` float32, the load of each replica.
        owner: `[R, n]` integers, the expert of each.
        num_packs: a divisor of n.

    Returns:
        `[R, n]` int64, the pack of each replica.
    """
    rows, num_items = weight.shape
    capacity = num_items // num_packs
    order = np.argsort(-weight, axis=1, kind="stable")
    each = np.arange(rows)
    load = np.zeros((rows, num_packs), np.float32)
    room = np.full((rows, num_packs), capacity)
    held = np.zeros((rows, int(owner.max(initial=0)) + 1, num_packs), np.int64)
    packs = np.empty((rows, num_items), np.int64)
    for item in order.T:
        expert = owner[each, item]
        copies = np.where(room > 0, held[each, expert], num_items + 1)
        fewest = copies == copies.min(axis=1, keepdims=True)
        chosen = np.where(fewest, load, np.float32(np.inf)).argmin(axis=1)
        packs[each, item] = chosen
        load[each, chosen] += weight[each, item]
        room[each, chosen] -= 1
        held[each, expert, chosen] += 1
    return packs


def separate(weight: np.ndarray, owner: np.ndarray, packs: np.ndarray, num_packs: int) -> None:
    """Exchanges replicas, in place, until the replicas of each expert are spread evenly over the packs.

    Where a pack holds two replicas of an expert more than another, there is always another expert of which
    it holds fewer than the other does, because both hold equally many replicas. Exchanging one of each
    lowers the sum of the squared copies; so this ends. Of the exchanges that are possible for the first
    such expert, the one with the lightest heavier pack is made.

    Args:
        weight, owner: as `pack`.
        packs: `[R, n]` int64, the same number of replicas in each pack.
    """
    for row in range(len(packs)):
        _separate_row(weight[row].astype(np.float64), owner[row], packs[row], num_packs)


def _separate_row(weight: np.ndarray, owner: np.ndarray, packs: np.ndarray, num_packs: int) -> None:
    held = np.zeros((int(owner.max(initial=0)) + 1, num_packs), np.int64)
    np.add.at(held, (owner, packs), 1)
    load = np.bincount(packs, weight, num_packs)
    while True:
        uneven = np.flatnonzero(held.max(axis=1) - held.min(axis=1) > 1)
        if not uneven.size:
            return
        expert = int(uneven[0])
        source = int(held[expert].argmax())
        item = int(np.flatnonzero((owner == expert) & (packs == source))[0])
        targets = held[expert] <= held[expert, source] - 2
        # Replicas in those packs, of experts of which `source` holds fewer than their pack does.
        fewer = held[owner, source] < held[owner, packs]
        others = np.flatnonzero(targets[packs] & fewer)
        change = weight[item] - weight[others]
        heavier = np.maximum(load[source] - change, load[packs[others]] + change)
        other = int(others[heavier.argmin()])
        target = int(packs[other])
        packs[item], packs[other] = target, source
        held[expert, source] -= 1
        held[expert, target] += 1
        held[owner[other], target] -= 1
        held[owner[other], source] += 1
        moved = weight[item] - weight[other]
        load[source] -= moved
        load[target] += moved


def slots_in(packs: np.ndarray, num_packs: int) -> np.ndarray:
    """`[R, n]` int64: the place of each replica in its pack, in the order of the replicas."""
    order = np.argsort(packs, axis=1, kind="stable")
    places = np.empty_like(order)
    within = np.broadcast_to(np.arange(packs.shape[1]) % (packs.shape[1] // num_packs), packs.shape)
    np.put_along_axis(places, order, within, axis=1)
    return places
