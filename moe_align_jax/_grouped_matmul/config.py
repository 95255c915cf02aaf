"""Sizes of the kernel, and what it cannot take. Which problem gets which: choose_tiles.py. No jax here."""

from typing import NamedTuple

import numpy as np

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._grouped_matmul.problem import E4M3, MatmulProblem

# What 16 bytes hold of a 16-bit type: rows are read in units of it.
UNIT = 8
MAX_GROUPS = 4096  # that the list of tiles is made of
MAX_BLOCKS = 2048  # that are cut into tiles of several heights: four for each thread that does it
_MOST_FOUND_GROUPS = 256  # of which each lane of a warp has up to eight
_MOST_LAG_OF_FOUND = 2  # tiles of one step each that are told ahead: see `found_cut.SLOTS`
WARP_GROUPS = 32  # of which each lane of a warp has one
E4M3_COLUMNS = 64  # of e4m3 weights that are scaled together: a piece of a tile has one scale


class Config(NamedTuple):
    """Sizes of the kernel. Letters: a tile of the product has bm rows of x and bn columns of the weights.

    Attributes:
        form: how the two compute warpgroups share a tile: "m" (rows halved), "n" (columns halved), or
            "swap" (columns halved, with the weights as wgmma's first operand and x as its second, so that a
            tile may have as few as 8 rows).
        bm, bn: of a tile.
        bk: of k that a stage of the ring in shared memory holds.
        stages: of the ring.
        group: blocks that are done together for each n tile, so that the weights are read from L2; 0: all n
            tiles of a block, then the next block.
        late: a finished tile is stored between the products of the next one.
        lag: with a gather, steps between asking for rows and saying that they are there.
        num_ctas: of the grid.
        computing: warpgroups that multiply. Three share 192 rows, of e4m3.
        split: CTAs of a cluster that share a tile, each with as many steps of k. Swapped tiles only.
        skips: a warpgroup none of whose rows are in use multiplies nothing. Form "m", e4m3. Of "blocks" it
            is the second of two, if its first id, or label, tells that its rows hold no pair: nor are they
            loaded.
        sharing: CTAs of a cluster that load for each other what `shared` says; 0: no cluster. Each warpgroup
            says with one arrival, not one of every thread, that it has read a stage: a cluster of one is for
            that alone.
        early: with `ahead`: a stage is waited for, and the scales of its weights are read, while the product
            of the one before it runs.
        shared: "x": the CTAs have neighbouring n tiles of the same rows; "w": neighbouring tiles of rows and
            the same n tile, whose weights are shared where both belong to one expert. "w" needs `ahead`.
        ahead: the warpgroup that loads reads what the next tile is while the others multiply this one, copies
            the scales of its weights into shared memory, and tells them. Of e4m3 with scales of blocks.
        finds: of the masked layout: each CTA finds its tiles in `masked_m` itself (found_masked.py), in place
            of a launch that makes the list of tiles. With `heights`: the warpgroup that loads finds
            each tile among the blocks around it, and tells the others (found_cut.py).
        paired: the loop over k takes two steps in a turn, where k has an even number of them and the ring an
            even number of stages. Of e4m3.
        by_expert: of the masked layout, by a list, or found by the warpgroup that loads: a group of blocks
            is one expert's, or a part of it, so that its weights are not read again for blocks of a second
            group.
        heights: of "blocks" that are tiles: the blocks of an expert are cut anew (cut_list.py) into tiles
            whose rows are one of these, which fall from bm on. Swapped tiles; late ones have up to 144 rows.
            Of "ragged" rows, found and late: so are those of a group (found_groups.py).
        exact: with `heights`: the pairs of an expert are shared evenly by its tiles, to 8 rows, and each has
            the least height for its share; otherwise all have that of the largest share.
        trims: with `heights`: a tile loads as many rows of x as it has, not as many as the highest. Of masked
            tiles with `skips`: the second warpgroup's rows are not loaded where none of them is in use.
        falling: with `heights` of a list, not `exact`: tiles are taken from the tallest to the lowest, so
            that all CTAs take about as long for a tile, and remain at the same step. Where n tiles divide the
            CTAs, and in no group, they are dealt out (`cut_list._Body.dealt`).
        mixes: of blocks, found: where experts seem to be sorted by their rows, tiles of the third of the
            blocks that has most of the experts run beside those of the other two (`tile_order.mixed`): the
            former wait for weights, the latter for the tensor cores. Groups of "ragged" rows are always
            mixed.
        deals: with `mixes`, of no groups: the tiles of that third are dealt out by rounds of all CTAs
            (`tile_order.dealt`), where n tiles divide the CTAs; else they take turns with the others.
        peeled: the first turn of the loop over k stands ahead of it: sums begin as products, and no registers
            are zeroed. Of e4m3.
        turned: of masked e4m3 tiles of 128 x 192 in clusters that share weights, found: a group's rows are
            cut into pairs of such tiles, 256 rows, and into tiles of 192 rows x 128 columns, two of which
            share rows, so that as a rule fewer than 64 rows are too many (found_turned.py). All of a group's
            tiles are done together, whatever `group` says.
    """

    form: str
    bm: int
    bn: int
    bk: int
    stages: int
    group: int = 4
    late: bool = False
    lag: int = 2
    num_ctas: int = NUM_SMS
    computing: int = 2
    split: int = 1
    skips: bool = False
    sharing: int = 0
    ahead: bool = False
    shared: str = "x"
    early: bool = False
    finds: bool = False
    paired: bool = False
    by_expert: bool = False
    heights: tuple[int, ...] = ()
    exact: bool = False
    trims: bool = False
    falling: bool = False
    mixes: bool = False
    deals: bool = False
    peeled: bool = False
    turned: bool = False

    @property
    def cuts(self) -> bool:
        """Whether CTAs find tiles of several heights themselves."""
        return self.finds and bool(self.heights)

    @property
    def shares_weights(self) -> bool:
        """Whether the CTAs of a cluster load a tile of the weights together, each a part of it."""
        return self.sharing > 1 and self.shared == "w"

    @property
    def name(self) -> str:
        """For tables: `128x256x64s4m-g4-late`."""
        more = "-late" if self.late else ""
        more += f"-w{self.computing}" if self.computing != 2 else ""
        more += f"-k{self.split}" if self.split > 1 else ""
        more += "-skips" if self.skips else ""
        more += f"-c{self.sharing}" if self.sharing else ""
        more += "w" if self.shares_weights else ""
        more += ("-early" if self.early else "-ahead") if self.ahead else ""
        more += "-finds" if self.finds else ""
        more += "-paired" if self.paired else ""
        more += "-experts" if self.by_expert else ""
        if self.heights:
            kind = "-exact" if self.exact else "-falling" if self.falling else "-even"
            more += kind + ".".join(map(str, self.heights[1:]))
        more += "-trims" if self.trims else ""
        more += ("-deals" if self.deals else "-mixes") if self.mixes else ""
        more += "-peeled" if self.peeled else ""
        more += "-turned" if self.turned else ""
        usual = self.num_ctas == NUM_SMS or self.num_ctas < NUM_SMS and self.split > 1
        more += "" if usual else f"-{self.num_ctas}"
        return f"{self.bm}x{self.bn}x{self.bk}s{self.stages}{self.form}-g{self.group}{more}"


def unsupported(problem: MatmulProblem) -> str | None:
    """Why the kernel does not take this problem, or None."""
    sizes = [d for shape, _ in problem.inputs.values() for d in shape]
    if not all(isinstance(size, (int, np.integer)) for size in sizes):
        return "the kernel needs static shapes; export a symbolic shape with 'xla'"
    if problem.scales:
        if problem.k % GROUP or problem.n % E4M3_COLUMNS or not problem.k or not problem.n:
            rule = f"K a multiple of {GROUP} and N one of {E4M3_COLUMNS}"
            return f"the kernel multiplies e4m3 with {rule}; they are {problem.k} and {problem.n}"
        if max(problem.num_rows, problem.num_tokens) * problem.scale_groups > INT32_MAX:
            return "the kernel counts scales of x in int32; these are too many"
    elif problem.dtype not in ("bfloat16", "float16"):
        return f"the kernel multiplies bfloat16, float16 and {E4M3}; x is {problem.dtype}"
    for name, size in (("K", problem.k), ("N", problem.n)):
        if size % UNIT or not size:
            rule = f"{name} must be a positive multiple of 8; it is {size}"
            return f"the kernel reads 16 bytes at a time: {rule}"
    if max(problem.num_rows, problem.num_tokens) * (problem.k // UNIT) > INT32_MAX:
        return "the kernel counts units of 16 bytes of x in int32; these are too many"
    if problem.num_rows >= 1 << 30:
        return f"the kernel takes fewer than 2**30 rows; these are {problem.num_rows}"
    groups = {"masked": problem.num_experts, "ragged": problem.num_groups}.get(problem.rows, 0)
    if groups > MAX_GROUPS:
        return f"the kernel takes at most {MAX_GROUPS} groups of rows; these are {groups}"
    return None


def refused(problem: MatmulProblem, tiles: Config) -> str | None:
    """Why these tiles, given by name, cannot be this problem's, or None. choose_tiles.py chooses none such.

    An ill address stops every later kernel of the process, so that it must not come to that.
    """
    if tiles.form == "swap" and (reason := no_swap(problem)):
        return reason
    if tiles.heights and (reason := _no_heights(problem, tiles)):
        return reason
    if tiles.trims and not tiles.heights and (reason := _no_trims(problem, tiles)):
        return reason
    if tiles.turned and (reason := _no_turns(problem, tiles)):
        return reason
    if tiles.mixes and not (tiles.cuts and problem.rows == "blocks"):
        return "of blocks whose tiles find themselves alone a part is mixed with the others"
    if tiles.deals and (tiles.group or not tiles.mixes):
        return "blocks that are mixed, and not taken in groups, are dealt out by rounds"
    if tiles.finds and not tiles.heights and problem.rows != "masked":
        return "tiles of one height are found in the masked layout alone"
    if tiles.skips and problem.rows == "blocks" and (reason := no_skips(problem, tiles)):
        return reason
    if tiles.paired and tiles.peeled:
        return "two steps ahead of the loop over k would spill registers"
    # By a list, or found: read ahead, by the warpgroup that loads alone.
    ordered = problem.rows == "masked" and tiles.finds == tiles.ahead
    if tiles.by_expert and not (ordered and tiles.group):
        return "groups of one expert's blocks are of the masked layout, listed, or found ahead"
    return None


def with_heights(
    problem: MatmulProblem,
    tiles: Config,
    less: tuple[int, ...],
    exact: bool = False,
    *,
    finds: bool = False,
    late: bool = False,
    trims: bool = False,
    falling: bool = False,
) -> Config:
    """Swapped tiles of the height of a block, and of so many rows less; the same tiles where they cannot be.

    Late tiles wait in as many registers as the highest has.
    """
    heights = tuple(tiles.bm - rows for rows in (0, *less))
    found = tiles._replace(heights=heights, exact=exact, falling=falling)
    found = found._replace(late=late, finds=finds, trims=trims)
    return tiles if _no_heights(problem, found) else found


def _no_heights(problem: MatmulProblem, tiles: Config) -> str | None:
    """Why tiles cannot have `heights`, or None."""
    if problem.rows == "ragged" and (reason := _no_heights_of_groups(problem, tiles)):
        return reason
    of_blocks = problem.rows == "blocks" and problem.block_size == tiles.bm
    if problem.rows != "ragged" and not of_blocks:
        return "tiles of several heights are cut of an expert's blocks, each as high as the highest"
    if problem.whole_blocks or problem.row_labels or problem.top_k and not tiles.finds:
        return (
            "tiles of several heights have ids that tell pairs; listed ones the rows of x in order"
        )
    if problem.num_rows < tiles.bm:
        return "one block at least is cut into tiles of several heights"
    if not tiles.finds and problem.num_blocks > MAX_BLOCKS:
        return f"a list of tiles of several heights is made of {MAX_BLOCKS} blocks at most"
    if problem.scales or problem.row_weights or problem.weights.bias:
        return "tiles of several heights have no scales, row weights or bias"
    if problem.weights.gated and not tiles.finds:
        return "tiles of several heights of gated products are found, not listed"
    most = {"gelu_tanh": 0, "silu": 144}.get(problem.weights.activation or "", tiles.bm)
    if not problem.weights.gated and tiles.bm > most:
        return "tiles of several heights with an exponential of all columns would spill registers"
    if tiles.form != "swap" or tiles.bm <= 96 or not may_be_tall(problem):
        return "tiles of several heights are swapped tiles of more than 96 rows, of whole columns"
    if tiles.split > 1 or tiles.sharing:
        return "tiles of several heights are of one CTA each"
    if tiles.falling and (tiles.exact or tiles.finds):
        return "tiles by falling height come from a list, and all of an expert have one height"
    if tiles.finds and problem.top_k and tiles.lag > _MOST_LAG_OF_FOUND:
        return "gathered tiles that find themselves say within two steps that rows are there"
    if tiles.trims and (problem.top_k or problem.k % 64):
        return "only rows that TMA loads are loaded by a tile's height"
    if tiles.late and (tiles.bm > 144 or not may_be_late(problem)):
        return "of more than 144 rows tiles of several heights are stored at once"
    if tiles.bm <= 144 and tiles.heights[-1] <= piece_rows(tiles.bm) < tiles.bm:
        return "tiles that are stored by halves of a block have more rows than a half"
    first, *rest = tiles.heights
    falls = all(a > b for a, b in zip(tiles.heights, rest, strict=False))
    if first != tiles.bm or not falls or any(h % 8 or h <= 0 for h in tiles.heights):
        return "heights fall from a block's on, by multiples of 8 rows"
    return None


def _no_heights_of_groups(problem: MatmulProblem, tiles: Config) -> str | None:
    """Why tiles of groups cannot have `heights`, or None; see `_no_heights` for what all of them cannot."""
    if not (tiles.finds and tiles.late):
        return "tiles of several heights of groups are found, and stored late"
    if not 0 < problem.num_groups <= _MOST_FOUND_GROUPS:
        return f"tiles of several heights are found of at most {_MOST_FOUND_GROUPS} groups"
    return None


def no_skips(problem: MatmulProblem, tiles: Config) -> str | None:
    """Why no warpgroup of a tile of blocks can be without a pair, or None."""
    if problem.top_k or problem.whole_blocks and not problem.row_labels:
        return "rows are left out that lie in order, and whose ids, or labels, tell padding"
    if not problem.scales or tiles.form != "m" or tiles.computing != 2:
        return "the second of two warpgroups that have rows of their own is left out, of e4m3"
    if tiles.bm != problem.block_size or not tiles.ahead or tiles.sharing:
        return "rows are left out of tiles that are a block, read ahead, of one CTA"
    return None


def _no_trims(problem: MatmulProblem, tiles: Config) -> str | None:
    """Why a tile of one height loads all of its rows, or None."""
    if problem.rows != "masked" or problem.top_k or not tiles.skips or tiles.computing != 2:
        return (
            "of tiles of one height only masked ones of two warpgroups, which may skip, load a half"
        )
    if tiles.sharing > 1 and not tiles.shares_weights:
        return "CTAs that load rows for each other load all of them"
    return None


def _no_turns(problem: MatmulProblem, tiles: Config) -> str | None:
    """Why no tiles can be turned, or None."""
    scales, weights = problem.scales, problem.weights
    if problem.rows != "masked" or problem.num_experts > WARP_GROUPS:
        return f"tiles are turned of the masked layout, of at most {WARP_GROUPS} groups"
    if problem.max_rows % 128 or problem.max_rows < 384:
        return "tiles are turned of groups that have whole tiles, and room for two turned ones"
    if not scales or scales.x != "column_major" or scales.w != "blocks" or scales.packed:
        return "turned tiles have float32 scales, of x by columns"
    if scales.pitch < problem.max_rows or scales.pitch % 4:
        return "turned tiles have scales that TMA loads"
    if not weights.transposed or problem.n % 256 or problem.n < 256:
        return "turned tiles come by twos, of 128 rows of the weights"
    if weights.gated or weights.activation or weights.bias or problem.row_weights:
        return "turned tiles are stored as they are"
    found = tiles.shares_weights and tiles.finds and tiles.ahead and tiles.by_expert
    usual = (tiles.form, tiles.bm, tiles.bn, tiles.computing) == ("m", 128, 192, 2)
    if not (found and usual and tiles.skips) or tiles.early or tiles.peeled or tiles.trims:
        return "tiles of 128 x 192 are turned, in clusters that share weights, and found by units"
    return None


def piece_rows(bm: int) -> int:
    """Rows of a swapped tile that are stored at a time: half of many, which leaves room for a stage."""
    return bm // 2 if bm > 96 and bm % 16 == 0 else bm


def counts_rows(problem: MatmulProblem, bm: int) -> bool:
    """Whether counting a tile's pairs tells which of its rows are zero.

    A block's pairs come first, and a tile has rows of one block.
    """
    return tests_rows(problem) and problem.block_size % bm == 0


def no_swap(problem: MatmulProblem) -> str | None:
    """Why the problem has no swapped tiles, or None. A pair of ids, or of weights, must not begin at an odd
    row."""
    weights = problem.weights
    if problem.out_dtype == "float32":
        return "swapped tiles store 16 bits"
    if problem.rows == "blocks" and problem.block_size % 2 and tests_rows(problem):
        return "swapped tiles load ids in pairs: blocks must have an even number of rows"
    if weights.interleaved and weights.gated and not weights.transposed:
        return "swapped tiles cannot part interleaved columns of untransposed weights"
    return None


def tests_rows(problem: MatmulProblem) -> bool:
    """Whether sorted_token_ids say which rows of the result are zero."""
    zeros = problem.zero_padding and (not problem.top_k or problem.weights.bias)
    return problem.rows == "blocks" and bool(problem.row_weights or zeros)


def unshared(tiles: Config) -> Config:
    """The same tiles, each of one CTA, which shares nothing."""
    # Without a cluster `early` lost: 1827 us for 1501.
    early = tiles.early and tiles.sharing < 2
    tiles = tiles._replace(sharing=0, shared="x", early=early, turned=False)
    return tiles._replace(split=1, num_ctas=NUM_SMS) if tiles.split > 1 else tiles


def may_be_tall(problem: MatmulProblem) -> bool:
    """Whether a warpgroup can have 64 x 256 sums: copies and stores of 16 bytes take registers, and so does
    erf (spills; wgmma is serialised)."""
    whole = problem.n % 64 == 0 and problem.n > 64 and problem.k % 64 == 0
    return whole and problem.weights.activation != "gelu"


def may_be_late(problem: MatmulProblem) -> bool:
    """Whether a finished tile can stay in registers during the next one's products.

    The bias of columns that are parted in registers takes too many beside it.
    """
    weights = problem.weights
    parted = weights.gated and weights.interleaved and not weights.transposed
    spills = parted and weights.bias
    return may_be_tall(problem) and problem.out_dtype != "float32" and not spills
