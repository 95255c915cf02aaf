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
WINDOW = "moe_align_jax._simt.window"
EMULATED_WINDOWS = "moe_align_jax._simt.emulator.windows"
MESSAGES = "moe_align_jax._expert_parallel.message_kernels"
COUNTED_PAIRS = "moe_align_jax._expert_parallel.counted_pairs"


MARKER = "# mutant: "


@dataclass(frozen=True)
class Mutant:
    """In `module`, the line under the comment `# mutant: NAME` becomes `new`.

    The comment says in the kernel itself what goes wrong without that line as it is. A change of the kernel
    thus needs no change here, unless it renames what `new` names.
    """

    module: str
    name: str
    new: str
    kills: str = "RaceError"  # by what: a class of faults.py; "wrong": any, or a wrong result

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}: {self.name}"

    @property
    def errors(self) -> type[Exception] | tuple[type[Exception], ...]:
        """What finds it raises."""
        if self.kills == "wrong":
            return AssertionError, faults.EmulatorError
        return getattr(faults, self.kills)

    def apply(self, source: str) -> str:
        lines = source.splitlines()
        bare = [line.strip() for line in lines]
        marker = MARKER + self.name
        assert bare.count(marker) == 1, f"{self}: {self.module} has not one line {marker!r}"
        at = bare.index(marker)
        while bare[at].startswith(MARKER):  # several mutants may be of one line
            at += 1
        assert bare[at] != self.new, f"{self} changes nothing"
        lines[at] = lines[at][: len(lines[at]) - len(bare[at])] + self.new
        return "\n".join(lines) + "\n"


def markers(package: str) -> set[tuple[str, str]]:
    """(module, name) of every marker in a package or module."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    path = pathlib.Path(spec.origin)
    files = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    return {
        (package if file == path else f"{package}.{file.stem}", line.strip().removeprefix(MARKER))
        for file in files
        for line in file.read_text().splitlines()
        if line.strip().startswith(MARKER)
    }


def _form(module: str, name: str, new: str, kills: str = "RaceError") -> Mutant:
    return Mutant(f"{KERNELS}.{module}", name, new, kills)


def _collective(name: str, new: str, kills: str = "RaceError") -> Mutant:
    return Mutant(COLLECTIVES, name, new, kills)


# Of both kernels that put rows into experts' boxes; their tests kill it each.
MISCOUNTED = Mutant(
    COUNTED_PAIRS,
    "a pair is counted before itself",
    "total = total + t.select(one.eq(expert) & (before >= k), 1, 0)",
    kills="wrong",
)

BLOCK_SYNC, WARP_SYNC = "t.block_sync()", "t.warp_sync()"

MUTANTS = (
    # Barriers and waits removed, weakened, or under a condition.
    _collective("the scan's block barrier is a warp barrier", WARP_SYNC),
    _collective("no barrier before a warp's histogram is written", "pass"),
    _collective("no barrier after a warp's histogram is written", "pass"),
    _form("warp", "no barrier between the sentinels and the pairs", "pass"),
    _form("warp", "keys are compared before all are there", "pass"),
    _form("warp", "keys are read before they have their places", "pass"),
    _form(
        "warp",
        "a block's first pair does not count as its opener",
        "block = t.popc(openers & collectives.lanes_below(t, lane)) - 1",
        kills="wrong",
    ),
    _form("pairs", "the others are read before all are there", "pass"),
    _form("pairs", "sizes are read before all are there", WARP_SYNC),
    _form(
        "pairs",
        "equal pairs after one's own are before it",
        "rank = rank + t.select(equal & (j <= pair), 1, 0)",
        kills="wrong",
    ),
    _form("block", "no barrier after the fills", "pass"),
    _form("block", "the barrier before the column scan is a warp barrier", WARP_SYNC),
    _form("block", "no barrier before the starts are read", "pass"),
    _form("counting", "no barrier between the zeros and the atomics", "pass"),
    _form("counting", "no barrier between the atomics and the loads", WARP_SYNC),
    _form("grid", "no wait for the count kernel", "pass"),
    _form(
        "grid",
        "two warps wait, not all",
        "collectives.value_if(t, t.thread_id() < 64, lambda: (t.grid_dependency_wait(), t.const(0))[1], 0)",
    ),
    _form("grid", "pairs take their places before all of a tile are counted", WARP_SYNC),
    _form("placing", "the sorted tile is read without a barrier", WARP_SYNC),
    _form("placing", "places are read before they are written", "pass"),
    _form("grid", "the next tile begins without a barrier", "pass"),
    _form("counting", "mail is posted before all CTAs run", "pass"),
    _form("counting", "a cluster's shares overlap", "t.post(first + to, i - to * share, *counts)"),
    _form(
        "counting",
        "the prefix within a cluster is twice as large",
        "running = running + count * 2",
        kills="wrong",
    ),
    _form("cluster", "mail is posted before all CTAs run", "pass"),
    _form("cluster", "it ends before its mail has come", "box = t._mailbox"),
    _form(
        "cluster",
        "a CTA's own pairs are before it",
        "mine = [t.select(p.cta >= c, count, 0) for c, count in enumerate(counts)]",
        kills="wrong",
    ),
    _form("sorted", "pairs are sorted before all are collected", "pass"),
    _form("sorted", "pairs take their places while others are compared with them", "pass"),
    _form(
        "sorted",
        "a pair is below itself",
        "below = below + t.select(word.below(t.load(words, part + k)), 0, 1)",
        kills="wrong",
    ),
    _form("sorted", "counts are added up before all have counted", WARP_SYNC),
    _form("sorted", "places are read before they are written", "pass"),
    _form("sorted", "the next pass begins without a barrier", "pass"),
    _form("sorted", "the warps' last heads are read before they are written", WARP_SYNC),
    _form("sorted", "openers are read before all are there", "pass"),
    _form("sorted", "mail is posted before all CTAs run", "pass"),
    _form(
        "sorted",
        "a CTA of the cluster is told nothing",
        "with t.if_(self.tid < t.cluster - 1):",
        kills="DivergentBarrier",
    ),
    _form(
        "sorted",
        "a range's own blocks are before it",
        "return t.shfl(running, self.rank), t.shfl(running, t.cluster - 1)",
        kills="wrong",
    ),
    _form(
        "sorted",
        "what is past the end comes first",
        "word = t.select(at < number, load_at(at), 0)",
        kills="wrong",
    ),
    _form(
        "sorted",
        "a later chunk forgets where its first expert begins",
        "t.store(r.before, chunk * 2 + 3, at)",
        kills="wrong",
    ),
    _form("radix", "a lane changes the carry while others read it", "pass"),
    _form("radix", "rows are added before they are zero", "pass"),
    _form("radix", "the last kernel does not wait", "pass"),
    _form("batched", "rows are written before the starts are there", "pass"),
    # Arithmetic, masks, kinds of access.
    _collective(
        "the scan adds one lane too few", "x = x + t.select(lane > distance, y, 0)", kills="wrong"
    ),
    _collective(
        "the sum of the warps before includes one's own",
        "before = t.shfl(running, warp)",
        kills="wrong",
    ),
    _collective(
        "a fill begins one cell late", "t.store(ref, thread + whole - 1, value)", kills="wrong"
    ),
    _collective(
        "not all lanes are at the barrier",
        "value_if(t, counted, lambda: (t.warp_sync(), before)[1], 0)",
        kills="DivergentBarrier",
    ),
    _form(
        "warp",
        "an expert's first pair follows the expert before",
        "rank = lane - t.highest_bit(heads & (upto >> 1))",
        kills="wrong",
    ),
    _form(
        "counting",
        "dropped pairs are counted",
        "t.atomic_add(r.histogram, t.select(bin_ >= 0, bin_, 0), 1)",
        kills="wrong",
    ),
    _form("counting", "a CTA's pairs count twice", "mine = my_row >= row", kills="wrong"),
    _form("counting", "sums are stored, not added", "t.store("),
    _form(
        "placing",
        "an expert's padding ends one row early",
        "t.store(r.end, e, start + size - 1)",
        kills="UnwrittenOutput",
    ),
    _form(
        "radix", "the search leaves out the last key", "inside = probe < num_keys", kills="wrong"
    ),
)


@contextlib.contextmanager
def mutated(mutant: Mutant | None) -> Iterator[types.ModuleType]:
    """A fresh import of the kernels with one line changed (None: none); yields the package of the op."""

    def ours(name: str) -> bool:
        every = COLLECTIVES, KERNELS, LAYOUT, NVLINK, MESSAGES, WINDOW, EMULATED_WINDOWS
        every = *every, COUNTED_PAIRS
        return any(name == x or name.startswith(x + ".") for x in every)

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
