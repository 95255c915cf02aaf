"""Tokens to the ranks of their experts, quantised on the way if asked."""

from types import SimpleNamespace

from moe_align_jax._kernels.peer_rows import copying
from moe_align_jax._kernels.peer_rows.problems import GROUP, Send
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Simt

# DeepEP's and DeepGEMM's floor of a group's greatest value, the greatest e4m3, and its inverse: float32 bits.
_FLOOR, _MOST, _INVERSE = 0x38D1B717, 0x43E00000, 0x3B124925
_LOW, _MAGNITUDE = 0xFFFF, 0x7FFF
_VALUES = 8  # bfloat16 of a 16-byte word


def build(problem: Send) -> Kernel:
    def body(t: Simt, r: SimpleNamespace) -> None:
        _Sender(t, r, problem).run()

    sparse = frozenset(f"received{number}" for number in range(len(problem.received)))
    return copying.kernel("moe_dispatch_send", problem, body, partial=sparse)


class _Sender:
    def __init__(self, t: Simt, r: SimpleNamespace, problem: Send):
        self.t, self.r, self.problem = t, r, problem
        self.thread = t.thread_id()

    def run(self) -> None:
        t, problem = self.t, self.problem
        t.grid_dependency_wait()
        self.ranks = copying.everyone(t, problem.devices.count)
        self.there = [
            {name: t.remote(getattr(self.r, name), rank) for name in problem.outputs}
            for rank in self.ranks
        ]
        copying.for_tokens(t, problem.num_tokens, self._one)
        t.device_sync()

    def _one(self, token: Int) -> None:
        t, problem = self.t, self.problem
        ids = [t.load(self.r.topk_ids, token * problem.top_k + k) for k in range(problem.top_k)]
        wanted = []
        for rank in self.ranks:
            first, any_here = rank * problem.num_local_experts, None
            for expert in ids:
                here = (expert - first).below(problem.num_local_experts)
                any_here = here if any_here is None else any_here | here
            wanted.append(any_here)
        row = t.rank() * problem.num_tokens + token
        if problem.quantise is None:
            self._copy(token, row, wanted)
        else:
            self._quantise(token, row, wanted)
        if problem.routing:
            self._route(token, row)

    def _copy(self, token: Int, row: Int, wanted: list[Int]) -> None:
        t, fields = self.t, self.problem.fields
        for batch in copying.batches(copying.pieces(t, fields, self.thread, WARPGROUP)):
            held = [
                copying.load(
                    t, getattr(self.r, f"field{p.field}"), p, token * fields[p.field].words
                )
                for p in batch
            ]
            for refs, goes in zip(self.there, wanted, strict=True):
                for piece, value in zip(batch, held, strict=True):
                    with t.if_(piece.inside & goes):
                        ref = refs[f"received{piece.field}"]
                        copying.store(t, ref, piece, row * fields[piece.field].words, value)

    def _route(self, token: Int, row: Int) -> None:
        """Each rank gets its own experts' pairs; the others' are marked."""
        t, top_k, count = self.t, self.problem.top_k, self.problem.num_local_experts
        for start in range(0, top_k, WARPGROUP):
            k = self.thread + start
            with t.if_(k < top_k):
                expert = t.load(self.r.topk_ids, token * top_k + k)
                weight = t.load(self.r.weights, token * top_k + k)
                for rank, refs in zip(self.ranks, self.there, strict=True):
                    local = expert - rank * count
                    here = local.below(count)
                    t.store(refs["local_ids"], row * top_k + k, t.select(here, local, -1))
                    t.store(refs["local_weights"], row * top_k + k, t.select(here, weight, 0))

    def _quantise(self, token: Int, row: Int, wanted: list[Int]) -> None:
        """16 lanes hold a group of 128 columns, 8 each."""
        t, [field] = self.t, self.problem.fields
        lane = self.thread & (WARP - 1)
        for batch in copying.batches(copying.pieces(t, [field], self.thread, WARPGROUP)):
            held = [copying.load(t, self.r.field0, p, token * field.words) for p in batch]
            for piece, words in zip(batch, held, strict=True):
                codes, scale = self._codes(words, lane)
                group = piece.first // (GROUP // 2)
                opens = (lane & (GROUP // _VALUES - 1)).eq(0)
                for refs, goes in zip(self.there, wanted, strict=True):
                    with t.if_(piece.inside & goes):
                        at = row * (field.columns // 4) + piece.first // 2
                        t.store2(refs["received0"], at, codes)
                        with t.if_(opens):
                            at = row * (field.columns // GROUP) + group
                            t.store(refs["received1"], at, scale)

    def _codes(self, words: tuple[Int, ...], lane: Int) -> tuple[tuple[Int, ...], Int]:
        """e4m3 codes of 8 bfloat16, in two words, and the scale of their group.

        Magnitudes of bfloat16 order as their bits do. NaN is above all, so its group becomes NaN.
        """
        t = self.t
        halves = [half for word in words for half in (word & _LOW, word >> 16)]
        most = halves[0] & _MAGNITUDE
        for half in halves[1:]:
            most = self._max(most, half & _MAGNITUDE)
        for distance in (8, 4, 2, 1):
            most = self._max(most, t.shfl(most, lane ^ distance))
        most = self._max(most << 16, t.const(_FLOOR))
        factor = t.fdiv(t.const(_MOST), most)
        values = [t.fmul(half << 16, factor) for half in halves]
        codes = [
            t.e4m3_pair(values[i], values[i + 1])
            | (t.e4m3_pair(values[i + 2], values[i + 3]) << 16)
            for i in (0, 4)
        ]
        return tuple(codes), t.fmul(most, t.const(_INVERSE))

    def _max(self, a: Int, b: Int) -> Int:
        return self.t.select(a < b, b, a)
