"""A whole low-latency dispatch: tokens to the ranks of their experts, and there into the experts' boxes.

Of a CTA's two warpgroups one sends rows, as `send` does. The other waits for the ids of all that comes
here, and counts: the place of a pair in its expert's box is the number of pairs of the same expert before
it. So the places are known when the rows are here. A CTA copies the rows that the peers of its index have
sent. Every CTA reads all ids: this is for small batches. A rank's ids are sent by a CTA for each receiver
that sends nothing ahead of them: a fence waits for all that its CTA has stored, and rows take long.

D ranks, T tokens per rank, K top_k, R = D * T rows received, n = R * K pairs, e local experts. Rows of few
tokens are cut into parts, each for a CTA.
"""

import functools
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from moe_align_jax._kernels.peer_rows import copying
from moe_align_jax._kernels.peer_rows.problems import GROUP, INT32, Dispatch, Field, most_words
from moe_align_jax._kernels.peer_rows.send import Sender
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Simt

# A thread of the counting warpgroup holds n / 128 ids, and compares each with every pair of a token: about
# a microsecond at 64, while the rows travel. A lane holds a pair of a token.
MAX_PAIRS, MAX_TOP_K = 64 * WARPGROUP, WARP
_WARPS = WARPGROUP // WARP  # that send rows, and that count
_MAX_EXPERTS = 32  # of a CTA: about 100 ns each
# Rows are cut until these CTAs have work: an H100 or H200 has as many SMs.
_ENOUGH_CTAS = 132
# So many rows that came are copied at a time, from four source ranks on: by 64 threads each, of which 448
# words of 16 bytes (7168 columns of e4m3) leave none idle.
_ROWS_AT_A_TIME = 4
_TARGETS_AHEAD = 8
_INT32_MAX = 2**31 - 1


def unsupported(problem: Dispatch) -> str | None:
    """Why there is another way to be taken, or None."""
    if problem.send.top_k > MAX_TOP_K:
        return f"a lane holds a pair of a token, of at most {MAX_TOP_K}"
    if problem.num_pairs > MAX_PAIRS:
        return f"every CTA compares all pairs, at most {MAX_PAIRS}"
    if -(-problem.send.num_local_experts // _num_ctas(problem)) > _MAX_EXPERTS:
        return f"a CTA counts the pairs of at most {_MAX_EXPERTS} experts"
    if most_words(problem) > _INT32_MAX:
        return "it counts words in int32"
    return None


def parts(problem: Dispatch) -> int:
    """Into how many a row is cut: as long as every sending thread has 16 bytes of the first field."""
    send = problem.send
    first = send.fields[0]
    units = [field.words for field in send.fields]
    if send.quantise is not None:
        units = [first.columns // GROUP]
    most = min(_ENOUGH_CTAS // problem.num_tokens, first.words // (4 * WARPGROUP))
    fitting = (k for k in range(most, 1, -1) if all(unit % k == 0 for unit in units))
    return next(fitting, 1)


def _row_ctas(problem: Dispatch) -> int:
    # As many CTAs as of one warpgroup are resident: two take no more registers than there are for one.
    return min(problem.num_tokens * parts(problem), copying.MAX_CTAS - problem.devices.count)


def _num_ctas(problem: Dispatch) -> int:
    return _row_ctas(problem) + problem.devices.count


def build(problem: Dispatch) -> Kernel:
    def body(t: Simt, r: SimpleNamespace) -> None:
        _Dispatcher(t, r, problem).run()

    received = range(len(problem.send.received))
    sparse = {f"{name}{number}" for number in received for name in ("received", "boxes")}
    num_ctas = _num_ctas(problem)
    rounds = -(-problem.num_tokens * parts(problem) // _row_ctas(problem))
    slots = rounds * problem.devices.count * problem.send.top_k
    experts = -(-problem.send.num_local_experts // num_ctas)
    return copying.kernel(
        "moe_dispatch",
        problem,
        body,
        num_warpgroups=2,
        num_ctas=num_ctas,
        shared={"places": _WARPS * slots, "totals": _WARPS * experts},
        partial=frozenset(sparse),
    )


class _Found(NamedTuple):
    """A token of a source rank: lane k has the row in the boxes of its pair k, -1 for none."""

    source: Int
    first_pair: Int
    mine: Int  # whether the lane has a pair
    row: Int


class _Dispatcher:
    def __init__(self, t: Simt, r: SimpleNamespace, problem: Dispatch):
        self.t, self.r, self.problem, self.send = t, r, problem, problem.send
        self.parts = parts(problem)
        self.units = problem.num_tokens * self.parts
        self.row_ctas = _row_ctas(problem)
        self.rounds = -(-self.units // self.row_ctas)
        self.has_rows = t.cta_id() < self.row_ctas
        self.sources = problem.devices.count
        self.slots = self.sources * self.send.top_k  # pairs of a token here, of all source ranks
        self.experts = -(-self.send.num_local_experts // t.num_ctas)  # of a CTA
        self.groups = min(_ROWS_AT_A_TIME, 1 << (self.sources - 1).bit_length())
        self.copying = t.num_threads // self.groups  # threads of a group
        self.thread = t.thread_id()
        self.lane, self.warp = self.thread & (WARP - 1), self.thread // WARP

    def run(self) -> None:
        t = self.t
        t.grid_dependency_wait()
        with t.if_(self.thread < WARPGROUP):
            sender = Sender(t, self.r, self.send, self.thread, self.parts)
            self._for_units(sender.send_row)
            with t.if_(self._posts(self.warp)):
                self._post_weights(self._receiver())
            t.tell_peers()
        with t.if_(self.thread >= WARPGROUP):
            self._count()
        t.block_sync()  # the counts of all warps
        self._lay_out_experts()
        if self.rounds == 1:
            unit = t.select(self.has_rows, t.cta_id(), 0)
            found = self._find(unit)  # nothing, where there are no rows
            self._lay_out(unit, found)
            self._wait_for_rows()
            self._copy(unit, found)
        else:
            self._for_units(lambda unit: self._lay_out(unit, self._find(unit)))
            self._wait_for_rows()
            self._for_units(lambda unit: self._copy(unit, self._find(unit)))

    def _for_units(self, body: Callable[[Int], None]) -> None:
        """Those of my CTA: on every device the same."""
        t = self.t
        if self.rounds == 1:
            with t.if_(self.has_rows):
                body(t.cta_id())
        else:
            first = t.select(self.has_rows, t.cta_id(), self.units)
            for unit in t.for_range(first, self.units, self.row_ctas):
                body(unit)

    # -- ids and weights

    def _receiver(self) -> Int:
        """Of the rank to which my CTA sends ids, negative for none; no two ranks begin with the same one."""
        t = self.t
        number = t.cta_id() - self.row_ctas
        return t.select(number < 0, -1, (t.rank() + number) % self.sources)

    def _posts(self, warp: Int) -> Int:
        """Whether the warp, by its number in its warpgroup, does. One: each has a fence of its own."""
        return (self._receiver() >= 0) & warp.eq(0)

    def _post_ids(self, receiver: Int) -> None:
        """The ids of all my tokens: local ones, -1 for other ranks' experts."""
        self._post("local_ids", ["topk_ids"], receiver)

    def _post_weights(self, receiver: Int) -> None:
        """The weights of all my tokens, 0 for other ranks' experts."""
        self._post("local_weights", ["topk_ids", "weights"], receiver)

    def _post(self, name: str, sources: list[str], receiver: Int) -> None:
        t, count = self.t, self.send.num_local_experts
        num_pairs = self.problem.num_tokens * self.send.top_k
        there = t.remote(getattr(self.r, name), receiver)
        share = copying.pieces(t, [Field(num_pairs, INT32)], self.lane, WARP)
        for batch in copying.batches(share, len(sources)):
            held = [
                [copying.load(t, getattr(self.r, source), piece, t.const(0)) for source in sources]
                for piece in batch
            ]
            for piece, loaded in zip(batch, held, strict=True):
                words = [list(x) if piece.width == 4 else [x] for x in loaded]
                local = [expert - receiver * count for expert in words[0]]
                other = -1 if len(words) == 1 else 0
                chosen = local if len(words) == 1 else words[1]
                given = [
                    t.select(at.below(count), value, other)
                    for at, value in zip(local, chosen, strict=True)
                ]
                with t.if_(piece.inside):
                    value = tuple(given) if piece.width == 4 else given[0]
                    copying.store(t, there, piece, t.rank() * num_pairs, value)

    def _wait_for_rows(self) -> None:
        with self.t.if_(self.warp.eq(0)):
            self.t.wait_for_peers(_WARPS)
        self.t.block_sync()

    def _token(self, unit: Int) -> Int:
        return unit // self.parts if self.parts > 1 else unit

    def _round(self, unit: Int) -> Int:
        if self.rounds == 1:
            return self.t.const(0)
        return (unit - self.t.cta_id()) // self.row_ctas

    # -- the counting warpgroup

    def _count(self) -> None:
        t, problem = self.t, self.problem
        thread = self.thread - WARPGROUP
        warp = thread // WARP
        with t.if_(self._posts(warp)):
            self._post_ids(self._receiver())
            t.tell_everyone(self._receiver())
        t.wait_for_everyone(self.sources)
        # All ids, and where the first of each 16 bytes stands among them.
        everything = [Field(problem.num_pairs, INT32)]
        held: list[tuple[Int, list[Int]]] = []
        for piece in copying.pieces(t, everything, thread, WARPGROUP):
            ids = copying.load(t, self.r.local_ids, piece, t.const(0))
            ids = ids if piece.width == 4 else [ids]
            held.append((piece.first, [t.select(piece.inside, one, -1) for one in ids]))

        def one(unit: Int) -> None:
            places = (warp * self.rounds + self._round(unit)) * self.slots
            self._count_token(self._token(unit), held, places)

        self._for_units(one)
        for number in t.for_range(0, self.experts):
            expert = t.cta_id() + number * t.num_ctas  # past the last: of no pair
            total = self._counted(held, expert, problem.num_pairs)
            with t.if_(self.lane.eq(0)):
                t.store(self.r.totals, warp * self.experts + number, total)

    def _count_token(self, token: Int, held: list[tuple[Int, list[Int]]], places: Int) -> None:
        """What this warp holds of the pairs before each of the token's pairs here."""
        t = self.t
        starts = range(0, self.slots, WARP)
        mine = [self.lane + start < self.slots for start in starts]
        slots = [t.select(there, self.lane + s, 0) for there, s in zip(mine, starts, strict=True)]
        loaded = [t.load(self.r.local_ids, self._pair(token, slot)) for slot in slots]
        for start, there, wanted in zip(starts, mine, loaded, strict=True):
            kept = t.ballot(there & (wanted >= 0))
            for k in t.for_range(0, min(WARP, self.slots - start)):
                with t.if_(((kept >> k) & 1).ne(0)):
                    end = self._pair(token, k + start)
                    count = self._counted(held, t.shfl(wanted, k), end)
                    with t.if_(self.lane.eq(0)):
                        t.store(self.r.places, places + k + start, count)

    def _pair(self, token: Int, slot: Int) -> Int:
        """The number of a pair among all n."""
        source = slot // self.send.top_k
        return (source * self.problem.num_tokens + token) * self.send.top_k + (
            slot - source * self.send.top_k
        )

    def _counted(self, held: list[tuple[Int, list[Int]]], expert: Int, end: Int | int) -> Int:
        """How many of the warp's ids are the expert's and stand before the end."""
        t, total = self.t, self.t.const(0)
        for first, ids in held:
            before = end - first
            for k, one in enumerate(ids):
                total = total + t.select(one.eq(expert) & (before > k), 1, 0)
        return t.warp_sum(total)

    # -- the layout

    def _sum(self, ref: Any, at: Int, stride: int) -> Int:
        """Of what the counting warps have found."""
        found = [self.t.load(ref, at + k * stride) for k in range(_WARPS)]
        return functools.reduce(operator.add, found)

    def _lay_out_experts(self) -> None:
        """How many pairs each of my experts has, and the rows of its box that are not in use."""
        t, r, room = self.t, self.r, self.problem.room
        for number in t.for_range(0, self.experts):
            expert = t.cta_id() + number * t.num_ctas
            with t.if_(expert < self.send.num_local_experts):
                total = self._sum(r.totals, number, self.experts)
                with t.if_(self.thread.eq(0)):
                    t.store(r.tokens_per_expert, expert, total)
                    t.store(r.masked_m, expert, t.select(total < room, total, room))
                for place in t.for_range(total + self.thread, room, t.num_threads):
                    t.store(r.pair_of_row, expert * room + place, self.problem.num_pairs)

    def _find(self, unit: Int) -> list[_Found]:
        """The rows of the source ranks that my group of threads copies."""
        t, top_k, room = self.t, self.send.top_k, self.problem.room
        token, places = self._token(unit), self._round(unit) * self.slots
        found = []
        for start in range(0, self.sources, self.groups):
            source = self.thread // self.copying + start
            first = (source * self.problem.num_tokens + token) * top_k
            mine = self.has_rows & (self.lane < top_k) & (source < self.sources)
            expert = t.load(self.r.local_ids, t.select(mine, first + self.lane, 0))
            kept, slot = mine & (expert >= 0), places + source * top_k + self.lane
            stride = self.rounds * self.slots

            def place(slot=slot, stride=stride) -> Int:
                return self._sum(self.r.places, slot, stride)

            at = t.value_if(kept, place, room)
            row = t.select(at < room, expert * room + at, -1)
            found.append(_Found(source, first, mine, row))
        return found

    def _lay_out(self, unit: Int, found: list[_Found]) -> None:
        t, r = self.t, self.r
        opens = (self.thread & (self.copying - 1)) < WARP
        if self.parts > 1:
            opens = opens & unit.eq(self._token(unit) * self.parts)
        for one in found:
            with t.if_(opens & one.mine):
                t.store(r.row_of_pair, one.first_pair + self.lane, one.row)
                with t.if_(one.row >= 0):
                    t.store(r.pair_of_row, one.row, one.first_pair + self.lane)

    # -- the rows

    def _copy(self, unit: Int, found: list[_Found]) -> None:
        """Reads a row that came once, and writes it once per pair."""
        t = self.t
        fields = [field.part(self.parts) for field in self.send.received]
        part = unit - self._token(unit) * self.parts
        used = [t.ballot(one.row >= 0).ne(0) for one in found]
        units = [one.source * self.units + unit for one in found]
        # In place of a row that nobody asked for, another one is read: no branch stands between two loads.
        other, any_used = units[0], used[0]
        for here, there in zip(units[1:], used[1:], strict=True):
            other, any_used = t.select(there, here, other), any_used | there
        given = [t.select(there, here, other) for here, there in zip(units, used, strict=True)]
        thread = self.thread & (self.copying - 1)
        pieces = list(copying.pieces(t, fields, thread, self.copying))
        share = [(number, piece) for number in range(len(found)) for piece in pieces]
        with t.if_(any_used):
            for start in range(0, len(share), copying.MOST_HELD):
                batch = share[start : start + copying.MOST_HELD]
                held = [
                    copying.load(
                        t,
                        getattr(self.r, f"received{piece.field}"),
                        piece,
                        given[number] * fields[piece.field].words,
                    )
                    for number, piece in batch
                ]
                for number in sorted({number for number, _ in batch}):
                    mine = [(p, v) for (n, p), v in zip(batch, held, strict=True) if n == number]
                    self._store(found[number].row, part, mine, fields)

    def _store(
        self, row: Int, part: Int, held: list[tuple[copying.Piece, Any]], fields: list[Field]
    ) -> None:
        t, top_k = self.t, self.send.top_k
        for start in t.for_range(0, top_k, _TARGETS_AHEAD):
            targets = [t.shfl(row, start + k) for k in range(min(top_k, _TARGETS_AHEAD))]
            for target in targets:
                with t.if_(target >= 0):
                    for piece, value in held:
                        ref = getattr(self.r, f"boxes{piece.field}")
                        at = (target * self.parts + part) * fields[piece.field].words
                        with t.if_(piece.inside):
                            copying.store(t, ref, piece, at, value)
