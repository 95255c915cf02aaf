"""A whole low-latency dispatch: tokens to the ranks of their experts, and there into the experts' boxes.

Of a CTA's two warpgroups one sends rows, as `send` does. The other puts ids into everyone's inbox, takes all
that come here, and counts: the place of a pair in its expert's box is the number of pairs of the same
expert before it. An id is its own message: no fence, which would wait for rows, is ahead of it. So the places
are known when the rows are here. A CTA copies the rows that the peers of its index have sent. (Over windows,
rows of few tokens carry their epoch, and are awaited word by word.) Every CTA takes all ids: this is for
small batches.

D ranks, T tokens per rank, K top_k, R = D * T rows received, n = R * K pairs, e local experts. Rows of few
tokens are cut into parts, each for a CTA.
"""

import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._expert_parallel import row_words
from moe_align_jax._expert_parallel.counted_pairs import Held, counted, summed
from moe_align_jax._expert_parallel.nvlink_kernels import copying
from moe_align_jax._expert_parallel.nvlink_kernels.problems import (
    Dispatch,
    most_words,
)
from moe_align_jax._expert_parallel.nvlink_kernels.send import Sender, Tagged
from moe_align_jax._expert_parallel.row_words import INT32, Field, Piece
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Simt

# A thread of the counting warpgroup holds n / 128 ids, and compares each with every pair of a token: about
# a microsecond at 64, while the rows travel. A lane holds a pair of a token.
MAX_PAIRS, MAX_TOP_K = 64 * WARPGROUP, WARP
_WARPS = WARPGROUP // WARP  # that send rows, and that count
_MAX_EXPERTS = 32  # of a CTA: about 100 ns each
# So many rows that came are copied at a time, from four source ranks on: by 64 threads each, of which 448
# words of 16 bytes (7168 columns of e4m3) leave none idle.
_ROWS_AT_A_TIME = 4
_TARGETS_AHEAD = 8
# A word in the inbox is not 0: local id i is sent as i + 2, an expert of another rank as 1.
_FIRST_ID, _NO_ID = 2, 1


def unsupported(problem: Dispatch) -> str | None:
    """Why this kernel cannot run the problem, or None."""
    if problem.send.top_k > MAX_TOP_K:
        return f"a lane holds a pair of a token, of at most {MAX_TOP_K}"
    if problem.num_pairs > MAX_PAIRS:
        return f"every CTA compares all pairs, at most {MAX_PAIRS}"
    if -(-problem.send.num_local_experts // _num_ctas(problem)) > _MAX_EXPERTS:
        return f"a CTA counts the pairs of at most {_MAX_EXPERTS} experts"
    # The loop that clears boxes counts on by what all threads of a CTA store at once.
    if most_words(problem) > INT32_MAX - 2 * WARPGROUP * 4:
        return "it counts words in int32"
    return None


def parts(problem: Dispatch) -> int:
    """Into how many parts a row is cut, so that each SM has some: at most so many that every sending thread
    has 16 bytes of the first field."""
    send = problem.send
    first = send.fields[0]
    units = [field.words for field in send.fields]
    if send.quantise is not None:
        units = [first.columns // GROUP]
    most = min(NUM_SMS // problem.num_tokens, first.words // (4 * WARPGROUP))
    fitting = (k for k in range(most, 1, -1) if all(unit % k == 0 for unit in units))
    return next(fitting, 1)


def _num_ctas(problem: Dispatch) -> int:
    """CTAs of the grid: one for each unit, as far as all are resident."""
    # As many as of one warpgroup are resident: two take no more registers than there are for one.
    return min(problem.num_tokens * parts(problem), copying.MAX_CTAS)


def build(problem: Dispatch) -> Kernel:
    """The kernel that every device launches: rows to their experts' ranks and into the boxes there."""

    def body(t: Simt, r: SimpleNamespace) -> None:
        _Dispatcher(t, r, problem).run()

    sparse = {f"boxes{number}" for number in range(len(problem.send.received))}
    if problem.initialize:
        sparse = set()
    num_ctas = _num_ctas(problem)
    rounds = -(-problem.num_tokens * parts(problem) // num_ctas)
    slots = rounds * problem.devices.count * problem.send.top_k
    experts = -(-problem.send.num_local_experts // num_ctas)
    return copying.kernel(
        "moe_dispatch",
        problem,
        body,
        num_warpgroups=2,
        num_ctas=num_ctas,
        shared={"places": _WARPS * slots, "totals": _WARPS * experts, "wanted": slots},
        partial=frozenset(sparse),
        inbox=problem.num_pairs,
    )


type Places = list[tuple[Int, int]]  # of the inbox: index and width


class _Found(NamedTuple):
    """A token of a source rank: a lane has the local id of a pair and its row in the boxes, -1 for none."""

    source: Int
    first_pair: Int
    mine: Int  # whether the lane has a pair
    expert: Int
    row: Int


class _Dispatcher:
    """What a CTA does. A unit is a token, or a part of its row; a CTA receives the same ones of all ranks."""

    def __init__(self, t: Simt, r: SimpleNamespace, problem: Dispatch):
        self.t, self.r, self.problem, self.send = t, r, problem, problem.send
        self.parts = parts(problem)
        self.units = problem.num_tokens * self.parts
        self.rounds = -(-self.units // t.num_ctas)
        self.sources = problem.devices.count
        self.slots = self.sources * self.send.top_k  # pairs of a token here, of all source ranks
        self.experts = -(-self.send.num_local_experts // t.num_ctas)  # of a CTA
        self.groups = min(_ROWS_AT_A_TIME, 1 << (self.sources - 1).bit_length())
        self.copying = t.num_threads // self.groups  # threads of a group
        self.thread = t.thread_id()
        self.lane, self.warp = self.thread & (WARP - 1), self.thread // WARP
        self.tagged = self._tagged()

    def _tagged(self) -> Tagged | None:
        """Where rows and weights are among the tagged words. None where they travel without tags: the
        machine has too few, or a CTA has several units, of which each would be awaited after the other."""
        lengths = (-(-f.part(self.parts).words // 4) * 4 for f in self.send.received)
        starts = tuple(itertools.accumulate(lengths, initial=0))
        tagged = Tagged(starts, self.sources * self.units)
        fits = tagged.weights + self.problem.num_pairs <= self.t.tagged_words
        return tagged if fits and self.rounds == 1 else None

    def run(self) -> None:
        """Sends the CTA's units, finds the places of what comes for them, and copies it into the boxes."""
        t = self.t
        t.grid_dependency_wait()
        with t.if_(self.thread < WARPGROUP):
            rows = self.send._replace(routing=False)
            sender = Sender(t, self.r, rows, self.thread, self.parts, self.tagged)
            copying.for_tokens(t, self.units, sender.send_row)
        with t.if_(self.warp.eq(_WARPS)):
            copying.for_tokens(t, self.units, self._send_routes)
        if self.tagged:
            t.device_begun()
        else:
            # mutant: peers are not told of the rows
            t.device_arrive()  # one fence: it waits for the rows
        with t.if_(self.thread >= WARPGROUP):
            self._count()
        # mutant: places are read before all warps have counted
        t.block_sync()  # the counts of all warps
        self._lay_out_experts()
        if self.rounds == 1:
            found = self._find(t.cta_id())
            self._lay_out(t.cta_id(), found)
            if not self.tagged:
                self._wait_for_rows()
            self._copy(t.cta_id(), found)
            if self.tagged:
                # Peers have begun this kernel, and read nothing any more of the one before.
                with t.if_(self.warp.eq(0)):
                    t.device_wait()
        else:
            for unit in t.for_range(t.cta_id(), self.units, t.num_ctas):
                self._lay_out(unit, self._find(unit))
            self._wait_for_rows()
            for unit in t.for_range(t.cta_id(), self.units, t.num_ctas):
                self._copy(unit, self._find(unit))

    def _wait_for_rows(self) -> None:
        """Waits until the rows for this CTA's units have come from all devices."""
        with self.t.if_(self.warp.eq(0)):
            # mutant: rows are copied before they are there
            self.t.device_wait()
        # mutant: what one warp has waited for the others read
        self.t.block_sync()

    def _token(self, unit: Int) -> Int:
        """The token of a unit."""
        return unit // self.parts if self.parts > 1 else unit

    def _round(self, unit: Int) -> Int:
        """Which of this CTA's units it is."""
        if self.rounds == 1:
            return self.t.const(0)
        return (unit - self.t.cta_id()) // self.t.num_ctas

    # -- ids and weights

    def _send_routes(self, unit: Int) -> None:
        """A token's ids and weights to everyone, marks in place of those of the others' experts.

        The weights are read when the rows are: nothing needs them before.
        """
        t, r, top_k, count = self.t, self.r, self.send.top_k, self.send.num_local_experts
        token = self._token(unit)
        goes = self.lane < top_k
        pair = token * top_k + t.select(goes, self.lane, 0)
        expert, weight = t.load(r.topk_ids, pair), t.load(r.weights, pair)
        if self.parts > 1:
            goes = goes & unit.eq(token * self.parts)
        with t.if_(goes):
            # mutant: every rank puts its ids where rank 0's are
            at = t.rank() * (self.problem.num_tokens * top_k) + pair
            # A loop at run time: all addresses at once would not leave registers for two CTAs on an SM.
            for k in t.for_range(0, self.sources):
                rank = (t.rank() + k) % self.sources
                local = expert - rank * count
                here = local.below(count)
                # mutant: ids of other ranks' experts are not put
                t.put(rank, at, t.select(here, local + _FIRST_ID, _NO_ID))
                if self.tagged:
                    sent = self.tagged.weights + at
                    t.put_tagged(rank, sent, t.select(here, weight, 0))
                else:
                    # mutant: weights of others' experts are kept
                    t.store(t.remote(r.sent_weights, rank), at, t.select(here, weight, 0))

    # -- the counting warpgroup

    def _count(self) -> None:
        """Counts, of the pairs on all ranks: those before each pair of the CTA's units, and those of its
        experts."""
        t, thread = self.t, self.thread - WARPGROUP
        warp = thread // WARP
        if self.rounds == 1:
            held, wanted = self._take_ids(thread, self._slots(t.cta_id()))
            self._count_token(t.cta_id(), wanted, held, warp)
        else:
            held, _ = self._take_ids(thread, [])
            for unit in t.for_range(t.cta_id(), self.units, t.num_ctas):
                self._count_token(unit, t.take(self._slots(unit)), held, warp)
        for number in t.for_range(0, self.experts):
            expert = t.cta_id() + number * t.num_ctas  # past the last: of no pair
            total = counted(t, held, expert + _FIRST_ID, self.problem.num_pairs)
            with t.if_(self.lane.eq(0)):
                # mutant: a warp's counts are those of the first warp
                t.store(self.r.totals, warp * self.experts + number, total)

    def _take_ids(self, thread: Int, also: Places) -> tuple[Held, list[tuple[Int, ...]]]:
        """The thread's share of all ids; and what else is to be taken, with the first of them."""
        t, held, others = self.t, [], []
        share = copying.pieces([Field(self.problem.num_pairs, INT32)], thread, WARPGROUP)
        # Half as many at a time as fit into registers: each has its address, too, until it has come.
        for batch in row_words.batches(share, 2):
            places = [(t.select(piece.inside, piece.first, 0), piece.width) for piece in batch]
            taken = t.take([*places, *also])
            also, others = [], others + taken[len(batch) :]
            for piece, ids in zip(batch, taken[: len(batch)], strict=True):
                ids = [t.select(piece.inside, one, _NO_ID) for one in ids]
                held.append((piece.first, ids))
        return held, others

    def _slots(self, unit: Int) -> Places:
        """Where the ids of the token's pairs are in the inbox: for each 32 slots, a lane's."""
        t, token = self.t, self._token(unit)
        slots = [self.lane + start for start in range(0, self.slots, WARP)]
        return [(self._pair(token, t.select(k < self.slots, k, 0)), 1) for k in slots]

    def _count_token(
        self,
        unit: Int,
        slots: list[tuple[Int, ...]],
        held: Held,
        warp: Int,
    ) -> None:
        """What this warp holds of the pairs before each of the token's pairs here."""
        t, token = self.t, self._token(unit)
        places = (warp * self.rounds + self._round(unit)) * self.slots
        for start, [wanted] in zip(range(0, self.slots, WARP), slots, strict=True):
            there = self.lane + start < self.slots
            with t.if_(there & warp.eq(0)):
                t.store(self.r.wanted, self._round(unit) * self.slots + self.lane + start, wanted)
            kept = t.ballot(there & (wanted >= _FIRST_ID))
            for k in t.for_range(0, min(WARP, self.slots - start)):
                with t.if_(((kept >> k) & 1).ne(0)):
                    end = self._pair(token, k + start)
                    count = counted(t, held, t.shfl(wanted, k), end)
                    with t.if_(self.lane.eq(0)):
                        t.store(self.r.places, places + k + start, count)

    def _pair(self, token: Int, slot: Int) -> Int:
        """The number of a pair among all n."""
        source = slot // self.send.top_k
        return (source * self.problem.num_tokens + token) * self.send.top_k + (
            slot - source * self.send.top_k
        )

    # -- the layout

    def _lay_out_experts(self) -> None:
        """How many pairs each of my experts has, and the rows of its box that are not in use."""
        t, r, rows_per_expert = self.t, self.r, self.problem.rows_per_expert
        for number in t.for_range(0, self.experts):
            expert = t.cta_id() + number * t.num_ctas
            with t.if_(expert < self.send.num_local_experts):
                total = summed(t, r.totals, number, self.experts, _WARPS)
                with t.if_(self.thread.eq(0)):
                    t.store(r.tokens_per_expert, expert, total)
                    used = t.select(total < rows_per_expert, total, rows_per_expert)
                    t.store(r.masked_m, expert, used)
                for place in t.for_range(total + self.thread, rows_per_expert, t.num_threads):
                    # mutant: an unused row says that it is pair 0's
                    t.store(r.pair_of_row, expert * rows_per_expert + place, self.problem.num_pairs)
                if self.problem.initialize:
                    self._clear(expert, t.select(total < rows_per_expert, total, rows_per_expert))

    def _clear(self, expert: Int, used: Int) -> None:
        """Zeros to the rows of an expert's box from `used` on, while the rows that come are on their way."""
        t, rows_per_expert = self.t, self.problem.rows_per_expert
        for number, field in enumerate(self.send.received):
            width, ref = field.width, getattr(self.r, f"boxes{number}")
            store = t.store4 if width == 4 else t.store
            # mutant: the first row that is not in use is not cleared
            first = (expert * rows_per_expert + used) * field.words
            end = (expert + 1) * rows_per_expert * field.words
            for at in t.for_range(first + self.thread * width, end, t.num_threads * width):
                store(ref, at, 0)

    def _find(self, unit: Int) -> list[_Found]:
        """The rows of the source ranks that my group of threads copies."""
        t, top_k, rows_per_expert = self.t, self.send.top_k, self.problem.rows_per_expert
        token, places = self._token(unit), self._round(unit) * self.slots
        found = []
        for start in range(0, self.sources, self.groups):
            source = self.thread // self.copying + start
            first = (source * self.problem.num_tokens + token) * top_k
            mine = (self.lane < top_k) & (source < self.sources)
            slot = places + source * top_k + self.lane
            wanted = t.load(self.r.wanted, t.select(mine, slot, 0))
            # mutant: what goes through the inbox is taken one too high
            expert = wanted - _FIRST_ID
            kept = mine & (expert >= 0)
            stride = self.rounds * self.slots

            def place(slot=slot, stride=stride) -> Int:
                return summed(self.t, self.r.places, slot, stride, _WARPS)

            at = collectives.value_if(t, kept, place, rows_per_expert)
            # mutant: a row past the box's room is written
            row = t.select(at < rows_per_expert, expert * rows_per_expert + at, -1)
            found.append(_Found(source, first, mine, expert, row))
        return found

    def _opens(self, unit: Int) -> Int:
        """Whether I write what a token has once: in the first part, a warp of each source rank's."""
        opens = (self.thread & (self.copying - 1)) < WARP
        if self.parts > 1:
            opens = opens & unit.eq(self._token(unit) * self.parts)
        return opens

    def _lay_out(self, unit: Int, found: list[_Found]) -> None:
        """Writes ids and places of a unit's pairs, which `_find` found."""
        t, r = self.t, self.r
        opens = self._opens(unit)
        for one in found:
            with t.if_(opens & one.mine):
                t.store(r.local_ids, one.first_pair + self.lane, one.expert)
                t.store(r.row_of_pair, one.first_pair + self.lane, one.row)
                with t.if_(one.row >= 0):
                    t.store(r.pair_of_row, one.row, one.first_pair + self.lane)

    # -- the rows

    def _copy(self, unit: Int, found: list[_Found]) -> None:
        """Reads a row that came once, and writes it once per pair."""
        t = self.t
        opens = self._opens(unit)
        for one in found:
            with t.if_(opens & one.mine):
                pair = one.first_pair + self.lane
                if self.tagged:
                    [[weight]] = t.take_tagged([(pair + self.tagged.weights, 1)])
                else:
                    weight = t.load(self.r.sent_weights, pair)
                t.store(self.r.local_weights, pair, weight)
        fields = [field.part(self.parts) for field in self.send.received]
        part = unit - self._token(unit) * self.parts
        used = [t.ballot(one.row >= 0).ne(0) for one in found]
        units = [one.source * self.units + unit for one in found]
        # In place of a row without a target another one is loaded, so that no branch separates two loads.
        other, any_used = units[0], used[0]
        for here, there in zip(units[1:], used[1:], strict=True):
            other, any_used = t.select(there, here, other), any_used | there
        given = [t.select(there, here, other) for here, there in zip(units, used, strict=True)]
        thread = self.thread & (self.copying - 1)
        pieces = list(copying.pieces(fields, thread, self.copying))
        share = [(number, piece) for number in range(len(found)) for piece in pieces]
        with t.if_(any_used):
            for start in range(0, len(share), row_words.MOST_HELD):
                batch = share[start : start + row_words.MOST_HELD]
                if self.tagged:
                    held = self._take_rows(batch, given)
                else:
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

    def _take_rows(self, batch: list[tuple[int, Piece]], given: list[Int]) -> list[Any]:
        """Waits for the words of a batch, which are tagged; `given`: the units they are of, by number."""
        t, tagged, places = self.t, self.tagged, []
        assert tagged is not None
        for number, piece in batch:
            first = t.select(piece.inside, piece.first, 0)
            places.append((tagged.at(given[number], piece.field) + first, piece.width))
        each: list[Any] = t.take_tagged(places)
        return [x[0] if width == 1 else x for x, (_, width) in zip(each, places, strict=True)]

    def _store(
        self, row: Int, part: Int, held: list[tuple[Piece, Any]], fields: list[Field]
    ) -> None:
        """Stores what this thread has loaded of a row to each of its places in the boxes.

        Args:
            row: lane k's place, -1 for none.
            part: of the row.
            held: moves with their values.
            fields: of a part.
        """
        t, top_k = self.t, self.send.top_k
        for start in t.for_range(0, top_k, _TARGETS_AHEAD):
            targets = [t.shfl(row, start + k) for k in range(min(top_k, _TARGETS_AHEAD))]
            for target in targets:
                with t.if_(target >= 0):
                    for piece, value in held:
                        ref = getattr(self.r, f"boxes{piece.field}")
                        at = (target * self.parts + part) * fields[piece.field].words
                        with t.if_(piece.inside):
                            row_words.store(t, ref, piece, at, value)
