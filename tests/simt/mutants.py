"""Our kernel bodies with one line changed, and how to load them."""

import contextlib
import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass

from moe_align_jax._simt.emulator import faults

COLLECTIVES = "moe_align_jax._simt.collectives"
KERNELS = "moe_align_jax._align.kernels"
LAYOUT = "moe_align_jax._layout.kernels"
NVLINK = "moe_align_jax._expert_parallel.nvlink_kernels"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """In `module`, the first line that reads `old` from the one line `after` on (None: the only one in
    the file) becomes `new`; lines are compared without their indentation."""

    name: str
    module: str
    old: str
    new: str
    after: str | None = None
    kills: str = "RaceError"  # by what: a class of faults.py; "wrong": any, or a wrong result

    @property
    def errors(self) -> type[Exception] | tuple[type[Exception], ...]:
        """What finds it raises."""
        if self.kills == "wrong":
            return AssertionError, faults.EmulatorError
        return getattr(faults, self.kills)

    def apply(self, source: str) -> str:
        lines = source.splitlines()
        bare = [line.strip() for line in lines]
        start = 0
        if self.after is None:
            assert bare.count(self.old) == 1, f"{self.name}: {self.old!r} is not the only such line"
        else:
            assert bare.count(self.after) == 1, f"{self.name}: {self.after!r} occurs not once"
            start = bare.index(self.after)
        at = bare.index(self.old, start)
        indentation = lines[at][: len(lines[at]) - len(bare[at])]
        lines[at] = indentation + self.new
        return "\n".join(lines) + "\n"


def _form(name: str, module: str, old: str, new: str, **more: str) -> Mutant:
    return Mutant(name=name, module=f"{KERNELS}.{module}", old=old, new=new, **more)


def _collective(name: str, old: str, new: str, **more: str) -> Mutant:
    return Mutant(name=name, module=COLLECTIVES, old=old, new=new, **more)


BLOCK_SYNC, WARP_SYNC, WAIT = "t.block_sync()", "t.warp_sync()", "t.grid_dependency_wait()"

MUTANTS = (
    # Barriers and waits removed, weakened, or under a condition.
    _collective(
        "the scan's block barrier is a warp barrier",
        BLOCK_SYNC,
        WARP_SYNC,
        after="t.store(scratch, warp + k * WARP, value)",
    ),
    _collective(
        "no barrier before a warp's histogram is written",
        WARP_SYNC,
        "pass",
        after="before = value_if(t, counted, lambda: t.load(histogram, row + bin_), 0)",
    ),
    _collective(
        "no barrier after a warp's histogram is written",
        WARP_SYNC,
        "pass",
        after="t.store(histogram, row + bin_, before + t.popc(same))",
    ),
    _form(
        "warp: no barrier between the sentinels and the pairs",
        "warp",
        "t.block_sync()  # the sentinels of this CTA's slice are in place",
        "pass",
    ),
    _form(
        "warp: keys are compared before all are there",
        "warp",
        WARP_SYNC,
        "pass",
        after="t.store(r.keys, first + lane, key)",
    ),
    _form(
        "warp: keys are read before they have their places",
        "warp",
        WARP_SYNC,
        "pass",
        after="t.store(r.sorted, first + place, key)",
    ),
    _form(
        "warp: a block's first pair does not count as its opener",
        "warp",
        "block = t.popc(openers & upto) - 1",
        "block = t.popc(openers & collectives.lanes_below(t, lane)) - 1",
        kills="wrong",
    ),
    _form(
        "pairs: the others are read before all are there",
        "pairs",
        BLOCK_SYNC,
        "pass",
        after="counts.fill(r.tokens_per_expert, 0, vector=vector)",
    ),
    _form(
        "pairs: sizes are read before all are there",
        "pairs",
        BLOCK_SYNC,
        WARP_SYNC,
        after="t.store(r.padded, pair, t.select(first, common.padded(same, block_size), 0))",
    ),
    _form(
        "pairs: equal pairs after one's own are before it",
        "pairs",
        "rank = rank + t.select(equal & (j < pair), 1, 0)",
        "rank = rank + t.select(equal & (j <= pair), 1, 0)",
        kills="wrong",
    ),
    _form(
        "block: no barrier after the fills",
        "block",
        BLOCK_SYNC,
        "pass",
        after="rows.fill(r.sorted_token_ids, sizes.num_pairs, vector=vector)",
    ),
    _form(
        "block: the barrier before the column scan is a warp barrier",
        "block",
        BLOCK_SYNC,
        WARP_SYNC,
        after="# 1. Each warp counts its pairs, and ranks them among themselves.",
    ),
    _form(
        "block: no barrier before the starts are read",
        "block",
        BLOCK_SYNC,
        "pass",
        after="t.store(r.num_tokens_post_padded, 0, total)",
    ),
    _form(
        "count: no barrier between the zeros and the atomics",
        "counting",
        BLOCK_SYNC,
        "pass",
        after="collectives.fill(t, r.histogram, 0, layout.stride + 1, tid, threads, vector=True)",
    ),
    _form(
        "count: no barrier between the atomics and the loads",
        "counting",
        BLOCK_SYNC,
        WARP_SYNC,
        after="count(read(tile * layout.tile))",
    ),
    _form("grid: no wait for the count kernel", "grid", WAIT, "pass"),
    _form(
        "grid: two warps wait, not all",
        "grid",
        WAIT,
        "collectives.value_if(t, t.thread_id() < 64, lambda: (t.grid_dependency_wait(), t.const(0))[1], 0)",
    ),
    _form(
        "grid: pairs take their places before all of a tile are counted",
        "grid",
        BLOCK_SYNC,
        WARP_SYNC,
        after="tile = p.rank(p.first_of(0), experts)",
    ),
    _form(
        "grid: the sorted tile is read without a barrier",
        "placing",
        BLOCK_SYNC,
        WARP_SYNC,
        after="t.store(r.delta, self.my_columns[k], start - local)",
    ),
    _form(
        "grid: places are read before they are written",
        "placing",
        BLOCK_SYNC,
        "pass",
        after="counts = [self._spread(tile, k, start) for k, start in enumerate(starts)]",
    ),
    _form(
        "grid: the next tile begins without a barrier",
        "grid",
        BLOCK_SYNC,
        "pass",
        after="t.store(r.start, e, start + count)",
    ),
    _form("count: mail is posted before all CTAs run", "counting", "t.cluster_ready()", "pass"),
    _form(
        "count: a cluster's shares overlap",
        "counting",
        "t.post(first + to, rank * share + (i - to * share), *counts)",
        "t.post(first + to, i - to * share, *counts)",
    ),
    _form(
        "count: the prefix within a cluster is twice as large",
        "counting",
        "running = running + count",
        "running = running + count * 2",
        kills="wrong",
    ),
    _form("cluster: mail is posted before all CTAs run", "cluster", "t.cluster_ready()", "pass"),
    _form(
        "cluster: it ends before its mail has come",
        "cluster",
        "box = t.mail()",
        "box = t._mailbox",
    ),
    _form(
        "cluster: a CTA's own pairs are before it",
        "cluster",
        "mine = [t.select(p.cta > c, count, 0) for c, count in enumerate(counts)]",
        "mine = [t.select(p.cta >= c, count, 0) for c, count in enumerate(counts)]",
        kills="wrong",
    ),
    _form(
        "sorted: pairs are sorted before all are collected",
        "sorted",
        BLOCK_SYNC,
        "pass",
        after="number = s.collect()",
    ),
    _form(
        "sorted: pairs take their places while others are compared with them",
        "sorted",
        "t.block_sync()  # all have read, and the target may be the source",
        "pass",
    ),
    _form(
        "sorted: a pair is below itself",
        "sorted",
        "below = below + t.select(t.load(words, part + k).below(word), 1, 0)",
        "below = below + t.select(word.below(t.load(words, part + k)), 0, 1)",
        kills="wrong",
    ),
    _form(
        "sorted: counts are added up before all have counted",
        "sorted",
        BLOCK_SYNC,
        WARP_SYNC,
        after="t.store(r.ranks, at, rank)",
    ),
    _form(
        "sorted: places are read before they are written",
        "sorted",
        BLOCK_SYNC,
        "pass",
        after="running = running + count",
    ),
    _form(
        "sorted: the next pass begins without a barrier",
        "sorted",
        BLOCK_SYNC,
        "pass",
        after="t.store(target, place, word)",
    ),
    _form(
        "sorted: the warps' last heads are read before they are written",
        "sorted",
        BLOCK_SYNC,
        WARP_SYNC,
        after="t.store(r.heads, warp, last)",
    ),
    _form(
        "sorted: openers are read before all are there",
        "sorted",
        BLOCK_SYNC,
        "pass",
        after="if t.cluster == 1:",
    ),
    _form("sorted: mail is posted before all CTAs run", "sorted", "t.cluster_ready()", "pass"),
    _form(
        "sorted: a CTA of the cluster is told nothing",
        "sorted",
        "with t.if_(self.tid < t.cluster):",
        "with t.if_(self.tid < t.cluster - 1):",
        kills="DivergentBarrier",
    ),
    _form(
        "sorted: a range's own blocks are before it",
        "sorted",
        "return t.shfl(running - theirs, self.rank), t.shfl(running, t.cluster - 1)",
        "return t.shfl(running, self.rank), t.shfl(running, t.cluster - 1)",
        kills="wrong",
    ),
    _form(
        "sorted: what is past the end comes first",
        "sorted",
        "word = t.select(at < number, load_at(at), -1)",
        "word = t.select(at < number, load_at(at), 0)",
        kills="wrong",
    ),
    _form(
        "sorted: a later chunk forgets where its first expert begins",
        "sorted",
        "t.store(r.before, chunk * 2 + 3, start)",
        "t.store(r.before, chunk * 2 + 3, at)",
        kills="wrong",
    ),
    _form(
        "radix: a lane changes the carry while others read it",
        "radix",
        "t.block_sync()  # all threads have read the carry",
        "pass",
    ),
    _form(
        "radix: rows are added before they are zero",
        "radix",
        BLOCK_SYNC,
        "pass",
        after="t.store(r.rows, 0, 0)",
    ),
    _form(
        "radix: the last kernel does not wait",
        "radix",
        WAIT,
        "pass",
        after="me, everyone = t.cta_id() * threads + t.thread_id(), num_ctas * threads",
    ),
    _form(
        "batched: rows are written before the starts are there",
        "batched",
        BLOCK_SYNC,
        "pass",
        after="t.store(r.tokens_per_expert, e, count)",
    ),
    # Arithmetic, masks, kinds of access.
    _collective(
        "the scan adds one lane too few",
        "x = x + t.select(lane >= distance, y, 0)",
        "x = x + t.select(lane > distance, y, 0)",
        kills="wrong",
    ),
    _collective(
        "the sum of the warps before includes one's own",
        "before = t.shfl(running - sums, warp)",
        "before = t.shfl(running, warp)",
        kills="wrong",
    ),
    _collective(
        "a fill begins one cell late",
        "t.store(ref, thread + whole, value)",
        "t.store(ref, thread + whole - 1, value)",
        kills="wrong",
    ),
    _collective(
        "not all lanes are at the barrier",
        WARP_SYNC,
        "value_if(t, counted, lambda: (t.warp_sync(), before)[1], 0)",
        after="before = value_if(t, counted, lambda: t.load(histogram, row + bin_), 0)",
        kills="DivergentBarrier",
    ),
    _form(
        "warp: an expert's first pair follows the expert before",
        "warp",
        "rank = lane - t.highest_bit(heads & upto)",
        "rank = lane - t.highest_bit(heads & (upto >> 1))",
        kills="wrong",
    ),
    _form(
        "count: dropped pairs are counted",
        "counting",
        "t.atomic_add(r.histogram, t.select(bin_ >= 0, bin_, layout.stride), 1)",
        "t.atomic_add(r.histogram, t.select(bin_ >= 0, bin_, 0), 1)",
        kills="wrong",
    ),
    _form(
        "count: a CTA's pairs count twice",
        "counting",
        "mine = my_row > row",
        "mine = my_row >= row",
        kills="wrong",
    ),
    _form(
        "count: sums are stored, not added",
        "counting",
        "(t.atomic_add if self._groups > 1 else t.store)(",
        "t.store(",
    ),
    _form(
        "grid: an expert's padding ends one row early",
        "placing",
        "t.store(r.end, e, start + size)",
        "t.store(r.end, e, start + size - 1)",
        kills="UnwrittenOutput",
    ),
    _form(
        "radix: the search leaves out the last key",
        "radix",
        "inside = probe <= num_keys",
        "inside = probe < num_keys",
        kills="wrong",
    ),
)


@contextlib.contextmanager
def mutated(mutant: Mutant | None) -> Iterator[types.ModuleType]:
    """A fresh import of the kernels with one line changed (None: none); yields the package of the op."""

    def ours(name: str) -> bool:
        return any(
            name == x or name.startswith(x + ".") for x in (COLLECTIVES, KERNELS, LAYOUT, NVLINK)
        )

    import moe_align_jax._align.kernels
    import moe_align_jax._simt.collectives  # noqa: F401

    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    try:
        if mutant is not None:
            spec = importlib.util.find_spec(mutant.module)
            assert spec is not None and spec.origin is not None
            source = mutant.apply(pathlib.Path(spec.origin).read_text())
            module = importlib.util.module_from_spec(spec)
            sys.modules[mutant.module] = module
            exec(compile(source, f"{spec.origin} ({mutant.name})", "exec"), module.__dict__)
            parent, _, child = mutant.module.rpartition(".")
            setattr(importlib.import_module(parent), child, module)
        yield importlib.import_module(KERNELS)
    finally:
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(saved)
        for name, module in saved.items():
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)
