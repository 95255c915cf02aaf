"""How a lane sorts its keys, and how a warp takes the greatest of them. A key is an int32."""

import functools
from collections.abc import Iterable

from moe_align_jax._router.lanes import MAX_EXPERTS
from moe_align_jax._simt.language import Int, Simt

OUT = -(2**31)  # no key is below it
EIGHT = 8  # keys that a lane sorts together, where an id is in each
_FOUR = 4  # others, with their experts

type KeyOfExpert = tuple[Int, Int]


def greater(t: Simt, a: Int, b: Int) -> Int:
    """The greater of two keys."""
    return t.select(b > a, b, a)


def greatest(t: Simt, keys: Iterable[Int]) -> Int:
    """The greatest of some keys of a lane."""
    return functools.reduce(functools.partial(greater, t), keys)


def lesser(t: Simt, a: Int, b: Int) -> Int:
    """The lesser of two keys."""
    return t.select(b > a, a, b)


def descending(t: Simt, keys: list[Int]) -> list[Int]:
    """Sorted, descending, by Batcher's odd-even merges of a power of two places; where there is no key,
    it counts as the least."""
    size, keys = 1 << (len(keys) - 1).bit_length(), list(keys)
    merged = 1
    while merged < size:
        distance = merged
        while distance >= 1:
            for at in range(distance % merged, size - distance, 2 * distance):
                for a in range(at, at + min(distance, size - at - distance)):
                    b = a + distance
                    if a // (2 * merged) == b // (2 * merged) and b < len(keys):
                        x, y = keys[a], keys[b]
                        keys[a], keys[b] = greater(t, x, y), lesser(t, x, y)
            distance //= 2
        merged *= 2
    return keys


def own(t: Simt, lane: Int, values: list[Int]) -> Int:
    """The k-th in lane k: by a tree of choices by the lane's bits."""
    bit = 1
    while len(values) > 1:
        odd = (lane & bit).ne(0)
        pairs = zip(values[::2], values[1::2], strict=False)
        values = [t.select(odd, b, a) for a, b in pairs] + values[len(values) & ~1 :]
        bit *= 2
    return values[0]


def take(t: Simt, lane: Int, items: list[KeyOfExpert], rounds: int, packed: bool) -> KeyOfExpert:
    """(key, expert) of lane k: the k-th greatest key of the warp, in so many rounds. `packed`: no two are
    equal, and the expert, which stands in the key, is not given."""
    fours = [_sorted(t, items[k : k + _FOUR], packed) for k in range(0, len(items), _FOUR)]
    fours = [four[:rounds] for four in fours]
    value, expert = t.const(0), t.const(0)
    for k in range(rounds):
        head = fours[0][0]
        for four in fours[1:]:
            head = _better(t, head, four[0], packed)
        best = t.warp_max(head[0])
        if packed:
            found = [four[0][0].eq(best) for four in fours]
        else:
            chosen = t.warp_min(t.select(head[0].eq(best), head[1], MAX_EXPERTS))
            found = [four[0][1].eq(chosen) for four in fours]
            expert = chosen if k == 0 else t.select(lane.eq(k), chosen, expert)
        value = best if k == 0 else t.select(lane.eq(k), best, value)
        left = rounds - 1 - k
        fours = [
            _moved_up(t, four, was, left, packed) for four, was in zip(fours, found, strict=True)
        ]
    return value, expert


def _better(t: Simt, a: KeyOfExpert, b: KeyOfExpert, packed: bool) -> KeyOfExpert:
    """The one with the greater key; a, whose expert is the lower one, of equal ones."""
    if packed:
        return greater(t, a[0], b[0]), a[1]
    ahead = b[0] > a[0]
    return t.select(ahead, b[0], a[0]), t.select(ahead, b[1], a[1])


def _sorted(t: Simt, four: list[KeyOfExpert], packed: bool) -> list[KeyOfExpert]:
    """By key, descending, equal ones as they were: neighbours change places, which is stable."""
    four = list(four)
    for turn in range(len(four)):
        for i in range(turn & 1, len(four) - 1, 2):
            (a, x), (b, y) = four[i], four[i + 1]
            if packed:
                four[i], four[i + 1] = (greater(t, a, b), x), (lesser(t, a, b), y)
                continue
            behind = b > a
            four[i] = t.select(behind, b, a), t.select(behind, y, x)
            four[i + 1] = t.select(behind, a, b), t.select(behind, x, y)
    return four


def _moved_up(
    t: Simt, four: list[KeyOfExpert], was_head: Int, left: int, packed: bool
) -> list[KeyOfExpert]:
    """Without its head where that was taken; no longer than the rounds that are left."""
    moved = []
    for i, (key, expert) in enumerate(four[:left]):
        if i + 1 == len(four):
            moved.append((t.select(was_head, OUT, key), expert))
            continue
        after, its = four[i + 1]
        moved.append((t.select(was_head, after, key), expert))
        if not packed:
            moved[-1] = moved[-1][0], t.select(was_head, its, expert)
    return moved
