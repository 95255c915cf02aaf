"""DeepSeek's two greedy steps, PACK and REPLICATE, over many independent rows at once.

A row is one layer, or one node of one layer. All arithmetic is float32, in the order that one row alone
would take, so that ties fall the same way whatever else is in the batch.
"""

import numpy as np

_F32 = np.float32


def pack(weight: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts n items into packs of equal capacity: heaviest first, into the lightest pack with room.

    Ties: the item with the lowest index first, the pack with the lowest index first. With one item per
    pack nothing is sorted: item i goes to pack i.

    Args:
        weight: `[R, n]` float32, finite, with finite sums.
        num_packs: a divisor of n.

    Returns:
        (pack, slot), `[R, n]` int64 each: where item i went, and its place there.
    """
    rows, num_items = weight.shape
    capacity = num_items // num_packs
    if capacity == 1:
        place = np.broadcast_to(np.arange(num_items), weight.shape)
        return place.copy(), np.zeros(weight.shape, np.int64)
    order = np.argsort(-weight, axis=1, kind="stable")
    # [n, R]: each step below reads one contiguous row.
    heaviest_first = np.take_along_axis(weight, order, axis=1).T.copy()
    load = np.zeros((rows, num_packs), _F32)  # infinite once the pack is full
    filled = np.zeros(rows * num_packs, np.int64)
    chosen = np.empty((num_items, rows), np.int64)
    slots = np.empty((num_items, rows), np.int64)
    first = np.arange(rows) * num_packs
    flat_load = load.reshape(-1)
    for step, item in enumerate(heaviest_first):
        lightest = load.argmin(axis=1)
        at = first + lightest
        slot = filled[at]
        chosen[step], slots[step] = lightest, slot
        filled[at] = slot + 1
        flat_load[at] = np.where(slot + 1 == capacity, _F32(np.inf), flat_load[at] + item)
    packs, places = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(packs, order, chosen.T, axis=1)
    np.put_along_axis(places, order, slots.T, axis=1)
    return packs, places


def snake(weight: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals items to packs heaviest first, in boustrophedon order; arguments and result as `pack`'s."""
    num_items = weight.shape[1]
    if num_items == num_packs:
        return pack(weight, num_packs)
    order = np.argsort(-weight, axis=1, kind="stable")
    lap, step = np.divmod(np.arange(num_items), num_packs)
    turn = np.where(lap % 2 == 0, step, num_packs - 1 - step)
    packs, places = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(packs, order, np.broadcast_to(turn, order.shape), axis=1)
    np.put_along_axis(places, order, np.broadcast_to(lap, order.shape), axis=1)
    return packs, places


def replicate(
    weight: np.ndarray, num_replicas: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives each further replica to the expert whose replicas are loaded most; the first of equals.

    The greedy choice is optimal: no other choice of counts has a smaller max(weight / count).

    Args:
        weight: `[R, n]` float32.
        num_replicas: m >= n.
        most: None, or the most replicas that an expert gets; n * most >= m.

    Returns:
        owner `[R, m]` and rank `[R, m]` int64: replica j is the rank-th one of expert owner[j], the first
        n being the experts themselves; count `[R, n]` int64.
    """
    rows, num_experts = weight.shape
    owner, rank = _originals(rows, num_experts, num_replicas)
    count = np.ones(rows * num_experts, np.int64)
    flat_weight, per_replica = weight.reshape(-1), weight.copy()
    flat_per_replica = per_replica.reshape(-1)
    first = np.arange(rows) * num_experts
    for j in range(num_experts, num_replicas):
        chosen = per_replica.argmax(axis=1)
        at = first + chosen
        owner[:, j], rank[:, j] = chosen, count[at]
        count[at] += 1
        flat_per_replica[at] = flat_weight[at] / count[at].astype(_F32)
        if most is not None:
            flat_per_replica[at[count[at] >= most]] = _F32(-np.inf)
    return owner, rank, count.reshape(rows, num_experts)


def replicate_for_steps(
    history: np.ndarray, num_replicas: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives each further replica where it lowers the sum over steps of the heaviest replica most.

    Equals: the expert whose replicas carry most over all steps, then the first. For one step this is
    `replicate`. Sums over steps are float64, in the order of the steps.

    Args:
        history: `[S, R, n]` float32, the load of each step.
        num_replicas: m >= n.   most: as `replicate`.

    Returns:
        As `replicate`.
    """
    _, rows, num_experts = history.shape
    owner, rank = _originals(rows, num_experts, num_replicas)
    count = np.ones((rows, num_experts), np.int64)
    total = history.sum(axis=0, dtype=np.float64)
    per_replica = history.copy()
    each = np.arange(rows)
    top, highest, second = _top_two(per_replica)
    for j in range(num_experts, num_replicas):
        # A replica more of the heaviest expert of a step leaves the greater of its share and the next.
        share = np.take_along_axis(history, top[..., None], 2)[..., 0]
        share /= (count[each, top] + 1).astype(_F32)
        gain = (highest - np.maximum(share, second)).astype(np.float64)
        at = each * num_experts + top
        gains = np.bincount(at.ravel(), gain.ravel(), rows * num_experts).reshape(rows, -1)
        if most is not None:
            gains[count >= most] = -1.0
        best = gains == gains.max(axis=1, keepdims=True)
        chosen = np.where(best, total / count, -1.0).argmax(axis=1)
        owner[:, j], rank[:, j] = chosen, count[each, chosen]
        count[each, chosen] += 1
        lighter = history[:, each, chosen] / count[each, chosen].astype(_F32)
        stale = (top == chosen) | (per_replica[:, each, chosen] >= second)
        per_replica[:, each, chosen] = lighter
        top[stale], highest[stale], second[stale] = _top_two(per_replica[stale])
    return owner, rank, count


def _originals(rows: int, num_experts: int, num_replicas: int) -> tuple[np.ndarray, np.ndarray]:
    owner = np.empty((rows, num_replicas), np.int64)
    owner[:, :num_experts] = np.arange(num_experts)
    return owner, np.zeros_like(owner)


def _top_two(value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index of the first maximum, the maximum, the maximum of the rest) along the last axis."""
    top = value.argmax(axis=-1)
    highest = np.take_along_axis(value, top[..., None], -1)[..., 0]
    rest = value.copy()
    np.put_along_axis(rest, top[..., None], _F32(-np.inf), -1)
    # A lone expert has no rest: nothing is left but its own share.
    return top, highest, np.maximum(rest.max(axis=-1), _F32(0))
