"""Tokens to the ranks of their experts, quantised on the way if asked."""

from types import SimpleNamespace
from typing import Any, NamedTuple

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._expert_parallel import e4m3, row_words
from moe_align_jax._expert_parallel.nvlink_kernels import copying
from moe_align_jax._expert_parallel.nvlink_kernels.problems import Send
from moe_align_jax._expert_parallel.row_words import Piece
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Simt


def build(problem: Send) -> Kernel:
    """The kernel that every device launches: rows to the ranks of their experts, without boxes."""

    def body(t: Simt, r: SimpleNamespace) -> None:
        Sender(t, r, problem, t.thread_id()).run()

    sparse = frozenset(f"received{number}" for number in range(len(problem.received)))
    return copying.kernel("moe_dispatch_send", problem, body, partial=sparse)


class Tagged(NamedTuple):
    """Where a rank's units, and behind them its weights, are among its tagged words (`PeerDevices`).

    Attributes:
        starts: where each field begins in a unit, and how many words a unit has.
        units: of all ranks.
    """

    starts: tuple[int, ...]
    units: int

    def at(self, unit: Int, field: int) -> Int:
        """The first word of a field of a unit."""
        return unit * self.starts[-1] + self.starts[field]

    @property
    def weights(self) -> int:
        """The first weight."""
        return self.units * self.starts[-1]


class Sender:
    """A warpgroup's sending. With `parts`, its unit is a part of a token's row: `token * parts + part`.

    Without `routing` rows alone are sent. With `tagged` they go to the tagged words of their ranks.
    """

    def __init__(
        self,
        t: Simt,
        r: SimpleNamespace,
        problem: Send,
        thread: Int,
        parts: int = 1,
        tagged: Tagged | None = None,
    ):
        self.tagged = tagged
        self.t, self.r, self.problem, self.thread, self.parts = t, r, problem, thread, parts
        self.fields = [field.part(parts) for field in problem.fields]
        self.ranks = copying.everyone(t, problem.devices.count)
        names = [f"received{number}" for number in range(len(problem.received))]
        if problem.routing:
            names += ["local_ids", "local_weights"]
        self.there = [
            {name: t.remote(getattr(r, name), rank) for name in names} for rank in self.ranks
        ]

    def run(self) -> None:
        """The whole kernel: sends the CTA's tokens, and waits until its index's peers have sent theirs."""
        t, problem = self.t, self.problem
        t.grid_dependency_wait()

        copying.for_tokens(t, problem.num_tokens, self.send_row)
        collectives.device_sync(t)

    def send_row(self, unit: Int) -> None:
        """Stores a unit's row on each rank that has an expert of its token; with routing ids and weights on
        all ranks."""
        t, problem = self.t, self.problem
        token = unit // self.parts if self.parts > 1 else unit
        # All loads first: none waits for another.
        batches = row_words.batches(copying.pieces(self.fields, self.thread, WARPGROUP))
        held = [self._load(batches[0], unit)]
        routes = self._load_routes(token) if problem.routing else []
        ids = [t.load(self.r.topk_ids, token * problem.top_k + k) for k in range(problem.top_k)]
        wanted = [self._wanted(ids, rank) for rank in self.ranks]
        row = t.rank() * (problem.num_tokens * self.parts) + unit
        store = self._copy if problem.quantise is None else self._quantise
        for batch in batches:
            store(batch, held.pop() if held else self._load(batch, unit), row, wanted)
        for route in routes:
            self._store_route(t.rank() * problem.num_tokens + token, *route)

    def _load(self, batch: list[Piece], unit: Int) -> list[Any]:
        """Loads this thread's moves of a unit: a value for each piece of the batch."""
        words = [field.words for field in self.fields]
        return [
            copying.load(self.t, getattr(self.r, f"field{p.field}"), p, unit * words[p.field])
            for p in batch
        ]

    def _wanted(self, ids: list[Int], rank: Int) -> Int:
        """Whether one of the ids is an expert of the rank."""
        count = self.problem.num_local_experts
        first = rank * count
        wanted = (ids[0] - first).below(count)
        for expert in ids[1:]:
            wanted = wanted | (expert - first).below(count)
        return wanted

    def _copy(self, batch: list[Piece], held: list[Any], row: Int, wanted: list[Int]) -> None:
        """Stores the loaded values of a batch to that row of each rank, where it is wanted."""
        t, fields = self.t, self.fields
        for rank, refs, goes in zip(self.ranks, self.there, wanted, strict=True):
            for piece, value in zip(batch, held, strict=True):
                with t.if_(piece.inside & goes):
                    if self.tagged:
                        at = self.tagged.at(row, piece.field) + piece.first
                        words = value if piece.width > 1 else [value]
                        for k in range(0, piece.width, 2):  # two are one access
                            t.put_tagged(rank, at + k, *words[k : k + 2])
                    else:
                        ref = refs[f"received{piece.field}"]
                        row_words.store(t, ref, piece, row * fields[piece.field].words, value)

    def _load_routes(self, token: Int) -> list[tuple[Int, Int, Int, Int]]:
        """(k, whether it is there, expert, weight): a pair of the token for each thread."""
        t, top_k, routes = self.t, self.problem.top_k, []
        for start in range(0, top_k, WARPGROUP):
            k = self.thread + start
            at = token * top_k + t.select(k < top_k, k, 0)
            routes.append((k, k < top_k, t.load(self.r.topk_ids, at), t.load(self.r.weights, at)))
        return routes

    def _store_route(self, row: Int, k: Int, inside: Int, expert: Int, weight: Int) -> None:
        """Each rank gets its own experts' pairs; the others' are marked."""
        t, at, count = self.t, row * self.problem.top_k + k, self.problem.num_local_experts
        with t.if_(inside):
            for rank, refs in zip(self.ranks, self.there, strict=True):
                local = expert - rank * count
                here = local.below(count)
                t.store(refs["local_ids"], at, t.select(here, local, -1))
                t.store(refs["local_weights"], at, t.select(here, weight, 0))

    def _quantise(self, batch: list[Piece], held: list[Any], row: Int, wanted: list[Int]) -> None:
        """16 lanes hold a group of 128 columns, 8 each."""
        t, [field] = self.t, self.fields
        lane = self.thread & (WARP - 1)
        opens = (lane & (GROUP // e4m3.VALUES - 1)).eq(0)
        for piece, words in zip(batch, held, strict=True):
            codes, scale = e4m3.codes(t, words, lane)
            group = piece.first // (GROUP // 2)
            for rank, refs, goes in zip(self.ranks, self.there, wanted, strict=True):
                with t.if_(piece.inside & goes):
                    if self.tagged:
                        t.put_tagged(rank, self.tagged.at(row, 0) + piece.first // 2, *codes)
                        with t.if_(opens):
                            t.put_tagged(rank, self.tagged.at(row, 1) + group, scale)
                    else:
                        at = row * (field.columns // 4) + piece.first // 2
                        t.store2(refs["received0"], at, codes)
                        with t.if_(opens):
                            t.store(
                                refs["received1"], row * (field.columns // GROUP) + group, scale
                            )
