"""What the forms of the alignment share: reading a pair's expert, naming a block, placing a pair."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, NamedTuple

from moe_align_jax._core.int32 import cdiv
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, Int, Simt
from moe_align_jax.types import HASH_MULTIPLIER, LAUNCH_SIZES, AlignProblem

_MOST_HELD = 8  # words of an expert map in each lane


def thread_ids(t: Simt) -> tuple[Int, Int, Int]:
    """(thread, lane, warp) within the CTA."""
    tid = t.thread_id()
    return tid, tid & (WARP - 1), tid >> 5


class Sizes:
    """n, P and B: ints, or values where the launch gives them."""

    def __init__(self, t: Simt, r: SimpleNamespace, problem: AlignProblem):
        self.num_pairs: Any = problem.num_pairs
        self.capacity: Any = problem.capacity
        self.num_blocks: Any = problem.num_blocks
        self.first_id: Any = 0
        if problem.sized_at_launch:
            self.num_pairs, self.capacity = t.launch_value(r.num_pairs), t.launch_value(r.capacity)
            self.num_blocks = cdiv(self.capacity, problem.block_size)
            self.first_id = t.launch_value(r.first_id)


def launch_sizes(problem: AlignProblem) -> dict[str, tuple[int, ...]]:
    """The inputs through which a launch gives the sizes."""
    return {name: shape for name, shape in problem.inputs.items() if name in LAUNCH_SIZES}


class Slice:
    """The part of an output that one of several CTAs writes. All CTAs compute the whole result, so they do
    not communicate. The part is a multiple of 4 cells, so that its fill can store 16 bytes at a time."""

    def __init__(self, t: Simt, size: Int | int):
        self.t, self.size = t, size
        self.length = cdiv(size, t.num_ctas * 4) * 4
        self.base = t.cta_id() * self.length

    def fill(
        self,
        ref: Any,
        value: Int | int,
        *,
        vector: bool,
        thread: Int | None = None,
        threads: int | None = None,
    ) -> None:
        """By the threads of the CTA, or by `threads` of them, of which I am the `thread`-th."""
        t = self.t
        if thread is None or threads is None:
            thread, threads = t.thread_id(), t.num_threads
        if t.num_ctas == 1:
            collectives.fill(t, ref, value, self.size, thread, threads, vector=vector)
            return
        width = 4 if vector else 1
        whole = self.size // width * width
        for offset in t.for_range(thread * width, self.length, threads * width):
            with t.if_((self.base + offset).below(whole)):
                (t.store4 if vector else t.store)(ref, self.base + offset, value)
        with self.holding(thread + whole, thread < self.size - whole):
            t.store(ref, thread + whole, value)

    def holding(self, index: Int, condition: Int) -> AbstractContextManager[None]:
        """`with slice.holding(i, c):` where c holds and the cell lies in this slice."""
        if self.t.num_ctas == 1:
            return self.t.if_(condition)
        return self.t.if_(condition & (index - self.base).below(self.length))


def fill_slices(
    t: Simt, r: SimpleNamespace, problem: AlignProblem, sizes: Sizes, *, vector: bool
) -> tuple[Slice, Slice, Slice]:
    """This CTA's slices of `sorted_token_ids`, `expert_ids` and `tokens_per_expert`, filled with what they
    hold where no pair is: n, -1 and 0. Without counts the last one is empty."""
    rows, blocks = Slice(t, sizes.capacity), Slice(t, sizes.num_blocks)
    counts = Slice(t, problem.num_experts if problem.return_counts else 0)
    rows.fill(r.sorted_token_ids, sizes.num_pairs, vector=vector)
    blocks.fill(r.expert_ids, -1, vector=vector)
    if problem.return_counts:
        counts.fill(r.tokens_per_expert, 0, vector=vector)
    return rows, blocks, counts


def bin_bits(num_bins: int) -> tuple[int, bool]:
    """(bits of a bin number below `num_bins`, whether every value of that many bits is a bin)."""
    bits = (num_bins - 1).bit_length()
    return bits, num_bins == 1 << bits


def pair_limit(t: Simt, r: SimpleNamespace, problem: AlignProblem) -> Int | None:
    """`num_valid_pairs`, or None if the problem has none."""
    return t.load(r.num_valid_pairs, 0) if problem.has_num_valid_pairs else None


def _replica(t: Simt, r: SimpleNamespace, problem: AlignProblem, pair: Int, expert: Int) -> Int:
    """The physical slot of a pair whose logical expert is in [0, El), as `to_physical_ids` chooses it."""
    layer: Any = 0
    if problem.num_layers:
        layer = t.load(r.layer, 0)
        layer = t.select(layer < 0, 0, layer)
        layer = t.select(layer < problem.num_layers, layer, problem.num_layers - 1)
        expert = layer * problem.num_logical + expert
    if problem.dispatch == "static":
        return t.load(r.static_dispatch_map, expert)
    token = t.load(r.first_token, layer) + pair // problem.top_k
    turn = ((token * HASH_MULTIPLIER) >> 16) * t.load(r.num_replicas, expert) >> 16
    # Clamp: a corrupt replica count must not index out of bounds.
    turn = t.select(turn.below(problem.replica_width), turn, 0)
    return t.load(r.logical_to_physical_map, expert * problem.replica_width + turn)


type ReadMap = Callable[[Int], Int]  # expert_map of an expert within [0, E)


def map_from_lanes(t: Simt, r: SimpleNamespace, problem: AlignProblem) -> ReadMap | None:
    """A reader of a small expert map that the lanes of each warp hold. Its loads do not wait for the ids,
    which saves a trip to L2 in short kernels. None without a map, or if the map is larger."""
    num_experts = problem.num_experts
    if not problem.expert_map or num_experts > _MOST_HELD * WARP:
        return None
    lane = t.thread_id() & (WARP - 1)
    held = []
    for start in range(0, num_experts, WARP):
        at = lane + start
        held.append(t.load(r.expert_map, t.select(at < num_experts, at, 0)))

    def look(expert: Int) -> Int:
        found, group = t.shfl(held[0], expert & (WARP - 1)), expert >> 5
        for k, words in enumerate(held[1:], start=1):
            found = t.select(group.eq(k), t.shfl(words, expert & (WARP - 1)), found)
        return found

    return look


class LoadedId(NamedTuple):
    """A pair's id, loaded but not yet interpreted."""

    pair: Int
    inside: Int
    words: tuple[Int, ...]


def at_most(t: Simt, index: Int, last: Int | int) -> Int:
    """min(a, b), compared unsigned."""
    return t.select(index.below(last), index, last)


def load_id(
    t: Simt, r: SimpleNamespace, problem: AlignProblem, sizes: Sizes, pair: Int
) -> LoadedId:
    """Loads a pair's id without a branch (past the end: the last pair's), so that the loads of several rounds
    overlap. The addresses must not depend on a predicate, or ptxas delays the loads."""
    inside = pair.below(sizes.num_pairs)
    at = at_most(t, pair, sizes.num_pairs - 1) + sizes.first_id
    if problem.id_words == 2:
        words = t.load(r.topk_ids, (at, 0)), t.load(r.topk_ids, (at, 1))
    else:
        words = (t.load(r.topk_ids, at),)
    return LoadedId(pair, inside, words)


def read_expert(
    t: Simt,
    r: SimpleNamespace,
    problem: AlignProblem,
    sizes: Sizes,
    pair: Int,
    limit: Int | None,
) -> Int:
    """The group in which a pair is counted; -1 if the pair is dropped or past the end."""
    return expert_of(t, r, problem, load_id(t, r, problem, sizes, pair), limit)


def expert_of(
    t: Simt,
    r: SimpleNamespace,
    problem: AlignProblem,
    loaded: LoadedId,
    limit: Int | None,
    read_map: ReadMap | None = None,
) -> Int:
    """As `read_expert`. With `read_map` (from `map_from_lanes`) whole warps must call it."""
    num_experts = problem.num_experts
    pair, inside, (expert, *high) = loaded
    if high:
        sign = t.select(expert.eq(-1), -1, 0) if problem.minus_one else 0
        inside = inside & high[0].eq(sign)
    if problem.minus_one:
        expert = expert + 1
    bound: Any = problem.num_logical if problem.dispatch else num_experts
    if problem.num_shared:
        shared = pair % problem.top_k >= problem.top_k - problem.num_shared
        bound = t.select(shared, num_experts, bound)
    kept = inside & expert.below(bound)
    if limit is not None:
        kept = kept & (pair < limit)
    if problem.dispatch:
        logical = t.select(kept, expert, 0)
        if problem.num_shared:
            logical = t.select(shared, 0, logical)  # a slot may lie beyond the tables
        mapped = _replica(t, r, problem, pair, logical)
        expert = t.select(shared, expert, mapped) if problem.num_shared else mapped
        kept = kept & expert.below(num_experts)
    if problem.expert_map == "filter":
        safe = t.select(kept, expert, 0)
        expert = read_map(safe) if read_map else t.load(r.expert_map, safe)
        kept = kept & expert.below(problem.num_mapped)
    return t.select(kept, expert, -1)


def block_label(
    t: Simt,
    r: SimpleNamespace,
    problem: AlignProblem,
    expert: Int,
    read_map: ReadMap | None = None,
) -> Int:
    """The entry of `expert_ids` for a block of `expert` (>= 0)."""
    if problem.minus_one:
        return expert - 1
    if problem.expert_map != "label":
        return expert
    local = read_map(expert) if read_map else t.load(r.expert_map, expert)
    return t.select(local.below(problem.num_experts), local, -1)


def padded(count: Int, block_size: int) -> Int:
    """`count` rounded up to a multiple of the block: the rows that an expert of so many pairs takes."""
    return (count + (block_size - 1)) // block_size * block_size


def name_block(t: Simt, r: SimpleNamespace, problem: AlignProblem, row: Int, expert: Int) -> None:
    """Writes `expert_ids` for the block if `row` is the block's first row. (Experts start at multiples of
    block_size, so each used block has a pair on its first row.)"""
    with t.if_((row % problem.block_size).eq(0)):
        t.store(r.expert_ids, row // problem.block_size, block_label(t, r, problem, expert))


def write_inverse(
    t: Simt,
    r: SimpleNamespace,
    problem: AlignProblem,
    sizes: Sizes,
    pair: Int,
    expert: Int,
    row: Int,
) -> None:
    """`row_of_pair[pair]`, for pairs within the input."""
    if problem.return_inverse:
        with t.if_(pair.below(sizes.num_pairs)):
            t.store(r.row_of_pair, pair, t.select(expert >= 0, row, -1))
