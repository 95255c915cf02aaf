"""Tiles of the kernel: what a GPU kind takes for which size, and what the kernel cannot take. No jax here."""

from typing import NamedTuple

import numpy as np

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._core.hopper import MAX_SHARED_BYTES, NUM_SMS
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._grouped_matmul import spread
from moe_align_jax._grouped_matmul.problem import E4M3, MatmulProblem

# What 16 bytes hold of a 16-bit type: rows are read in units of it.
UNIT = 8
MAX_GROUPS = 4096  # that the list of tiles is made of
MAX_BLOCKS = 2048  # that are cut into tiles of several heights: four for each thread that does it
# CTAs that share a tile: up to how many tiles, and CTAs of the grid. A cluster lies within one group of SMs,
# of which a GPU may have some with 14: not all SMs can be filled with clusters of 4, and still fewer with 8.
_SPLITS = {4: (24, 128), 2: (66, NUM_SMS)}
_LEAST_MEAN, _MOST_MEAN = 128, 270  # rows of a group that two tiles of 144 rows hold
_LEAST_STEPS = 3  # of k that a CTA takes, where several share a tile
# Gate and up of 256 experts in blocks of 8 rows, of few columns and a long K: see `RULES`.
_EXPERTS_OF_HALVES, _MOST_N_OF_HALVES, _LEAST_K_OF_HALVES = 256, 256, 5_000
_MOST_NARROW = 3 * NUM_SMS  # tiles of 64 columns of gate and up, where each block is one pair
_GROUPS_AHEAD = 128  # of K, whose scales of two tiles of weights fit into shared memory
_LEAST_K_OF_WIDE = 1024
_LEAST_K_OF_PAIRED = 2048  # the compiler unrolls 4 turns of two steps, and spills registers
# Of a masked layout up to which CTAs find their tiles. With a launch for the list 6 experts of 20 rows took 8
# to 11 us more under jit, and 1 to 3 more in a CUDA graph; 32 experts 4 to 9 (H200, 2026-11-29). 32 experts
# of 192 rows took as long either way (22:57). Where every warpgroup of a large tile looks, fewer.
_FINDS_EXPERTS, _ALL_FIND_EXPERTS = 32, 8
# Tiles of several heights: see above `RULES`. Rows less than a block's. Of blocks of 144 rows, columns up to
# which all n tiles of a block follow each other, and K from which on they do without an activation. Rows of
# a block of few experts from which on they are faster; of 184 and 192 rows, from so many experts on, up to
# that K. With a longer K a launch lists them by falling height, from so many experts on; not below so many
# rows times K times N, since between that launch and the product 17 to 27 us passed under jit, at any size.
_MOST_FOUND_GROUPS = 256  # of which each lane of a warp has up to eight
_LEAST_MEAN_OF_FOUND = 64  # rows of a group, of more than a few
_MOST_LAG_OF_FOUND = 2  # tiles of one step each that are told ahead: see `found_cut.SLOTS`
_LESS_OF_144, _LESS_OF_FEW, _LESS_OF_MANY = (8, 16, 24, 40), (8, 16, 40), (8, 16, 24, 40)
_NARROW_OF_144, _LEAST_K_IN_TURN = 2048, 2048
_LEAST_OF_HEIGHTS, _MANY_OF_HEIGHTS, _MOST_K_OF_HEIGHTS, _MANY_OF_FALLING = 176, 128, 1024, 256
_LEAST_WORK_OF_LISTS = 1 << 39
_GROUP_OF_184 = 6  # of 128 experts: two of which 512 rows fill three tiles
_GROUP_OF_COPIED = 4  # of gate and up whose rows lie in order
_LEAST_K_NOT_LATE = 4096  # of gate and up of many experts in blocks of 144 rows
_MOST_IDLE = 1.25  # turns of the SMs over those that tiles would fill
# Masked, 6 x 20 rows, us (H200, 2026-11-30, 02:00): 7168 -> 6144, 96 CTAs of three tiles each 68.5, two CTAs
# an SM of narrow tiles 72.8, of as many each 72.4; 4096 -> 4096, 96 of two 29.2, narrow 31.0, 30.9;
# 3072 -> 7168, 112 of three 36.7, 132 CTAs 37.5; 2048 -> 4096 16.5 to 17.5 in all of them.
_MOST_EVEN_TURNS, _LEAST_EVEN_CTAS = 3, 96
_NARROW_ROWS = 32  # of which two CTAs fit into an SM's shared memory
# Means of masked rows, told by the caller, of which a swapped tile holds a third more. In us (H200,
# 2026-11-30, 04:57, 7168 -> 4096), before, swapped, DeepGEMM: 8 groups, 40 rows 62.3, 56 rows 61.1, 64 rows
# 62.3, 72.3; 60 rows 79.8, 80 rows 63.5, 96 rows 65.2, 78.2; 80 rows 83.8, 112 rows 66.8, 128 rows 74.7, 79;
# 100 rows 84.8, 128 rows 74.6, 77.1; 32 groups, 32 rows 246.5, 40 rows 237.1, 48 rows 228.7, 243.2; 60 rows
# 266, 80 rows 236.7, 96 rows 241.6, 261.7; 2048 -> 7168, 8 groups, 60 rows 43.0, 80 rows 36.3, 96 rows 37.6,
# 55.2. Tiles of 256 columns took 0 to 3% longer. The most of these means by groups; more groups, higher means
# and a shorter K were not timed, and have other tiles. Fewer than 8 groups: by rule, not measured.
_LEAST_MEAN_OF_SWAPPED, _MOST_MEAN_OF_SWAPPED, _LEAST_K_OF_SWAPPED = 22, {8: 100, 32: 60}, 2048
_TALL_MEAN = 512
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
            is the second of two, if its first id tells that its rows hold no pair: nor are they loaded.
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
            that all CTAs take about as long for a tile, and remain at the same step.
        mixes: of blocks, found: where experts seem to be sorted by their rows, tiles of the third of the
            blocks that has most of the experts run beside those of the other two (`kernel.mixed`): the former
            wait for weights, the latter for the tensor cores. Groups of "ragged" rows are always mixed.
        peeled: the first turn of the loop over k stands ahead of it: sums begin as products, and no registers
            are zeroed. Of e4m3.
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
    peeled: bool = False

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
        more += "-mixes" if self.mixes else ""
        more += "-peeled" if self.peeled else ""
        usual = self.num_ctas == NUM_SMS or self.num_ctas < NUM_SMS and self.split > 1
        more += "" if usual else f"-{self.num_ctas}"
        return f"{self.bm}x{self.bn}x{self.bk}s{self.stages}{self.form}-g{self.group}{more}"


class Rules(NamedTuple):
    """What was found best on a GPU kind, where more than one choice is right.

    Attributes:
        room: a tile has this many times the rows of a mean expert, so that most experts take one.
        narrow: columns of the weights up to which all n tiles of a block follow each other.
        few_experts: up to so many, `few_group` blocks are done together, else `many_group`.
        few_group, many_group, masked_group: see `Config.group`; the last of the masked layout.
        split: whether clusters share the k of a tile where tiles are few.
        permute_columns, permute_rows: columns of the weights, and rows of a mean expert, from which rows are
            gathered before the product, and not once per n tile within it; no columns: never.
        spread_columns, spread_rows: further columns and rows, where it is known which rows a token's pairs
            have: a kernel of our own copies them then (spread.py). No columns: XLA does.
    """

    room: float = 1.5
    narrow: int = 512
    few_experts: int = 16
    few_group: int = 8
    many_group: int = 4
    masked_group: int = 8
    split: bool = True
    permute_columns: int = 5_000
    permute_rows: int = 200
    spread_columns: int = 1_536
    spread_rows: int = 430


DEFAULT_RULES = Rules()
# By the device kind that jax tells; others take the defaults. Device span under jit, 2026-11-28, in us:
#   32768 rows, 2048 -> 1536, 128 experts: group 4 355, 6 357, 8 360, 16 367
#   32768 rows, 4096 -> 14336, 8 experts: group 8 5026, 16 5042; 256x128 tiles 5248, late 5271
#   8192 rows, 7168 -> 512, 256 experts: 64x256 n 475, 40 rows swapped 482, 64 rows swapped 486
#   64 rows, 7168 -> 4096, 32 experts: 8 rows swapped 334, 16 rows 337
#   masked, 15876 rows of 32 x 1024, 7168 -> 4096: group 8 1349, 16 1357, 4 1369; 2026-11-29, 13:52, four
#   turns: group 8 1381, 4 1387, 11 1370; groups of one expert: 8 1307, 4 1310, 8 and not late 1333
#   masked, 276 rows of 32 x 128, 7168 -> 4096: 16 rows swapped 434, 32 rows 443, 64x256 n 446, 8 rows 583
# A mean expert of 256 in two blocks, 2026-11-29, 32768 rows, 2048 -> 1536, 128 experts:
#   144 rows swapped: late, group 4 315, 8 320; not late, group 0 317, 4 321, 8 327; of "ragged" rows 333, 336
#   96 rows swapped: group 4 352, late 354; 128x256 m, late, group 4 346; of "ragged" rows 360
# Six tiles of 176 rows hold 1024 rows: where experts have 1024, 2048 or 4096, groups of six mostly begin with
# an expert's first tile. In us, means of four turns (three at 4096 tokens), 2026-11-29:
#   Mixtral's layer, 8192 tokens, 17:04: 192 rows, group 8 8272; 176 rows, group 6 8079, 12 8090
#   Mixtral's layer, 4096 tokens, 17:04: 176 rows, group 8 3973, 6 3880 (less in two turns)
#   32768 rows, 4096 -> 14336, 8 experts, 16:31: 192 rows, group 8 4963; 176 rows, group 8 5031, 6 4973
# By rule, not measured: other means, nine to 16 experts in blocks of 176 that a caller asks for.
# The layer at one token, 2026-11-29, by how many CTAs share the k of a tile:
#   DeepSeek-V3 TP8, gate and up, 16 tiles: 1 42.7, 2 34.6, 4 30.3, 8 35.6
#   Qwen3-30B-A3B, gate and up, 48 tiles: 1 33.3, 2 27.2, 4 28.6, 8 41.4
#   Mixtral 8x7B, down, 64 tiles: 1 172.9, 2 165.9, 4 181.6; gate and up, 224 tiles: 2 171.4, 4 205.7
# Gate and up in narrow tiles, 128x128 of one warpgroup, six stages, beside those of 256 columns, 23:00, in us
# under jit, x read by TMA in all of them; by how many CTAs share the k of a tile:
#   DeepSeek-V3 TP8, 1 token, 32 tiles: 2 17.2, three stages 21.3, 4 of three stages 17.7; wide 17.7
#   2 tokens, 64 tiles: 2 29.7, 1 of three stages 38.6; wide 32.7; 4 tokens, 128: 1 52.4; wide 53.7
#   8 tokens, 256 tiles: 1 of three stages, two CTAs an SM 95.8; wide 96.6; 23:20 on another card 97.0, of six
#   stages 101.8; wide, x by cp.async 100.0
#   Qwen3-30B-A3B, 1 token, 96 tiles: 1 13.8, 2 of three stages 15.4; wide 15.5
#   2 tokens, 192 tiles: 1 27.2, of three stages 27.2; wide 28.7; 4 tokens, 384: 1 44.9; wide 47.8; 23:20,
#   wide with x by cp.async: 1 token 1 16.9; wide 15.9; 2 tokens 1 25.1; wide 26.0; 4 tokens 1 45.7; wide 47.6
#   Mixtral 8x7B, 1 token, 448 tiles: 1 109.6; wide 106.5 (22:39), 1 109.3; wide 114.4 (23:20)
#   GPT-OSS 120B, 1 token, 180 tiles of 64 of k: 12 stages 35.1, 6 and two CTAs an SM 35.1; wide 42.5 (23:20;
#   at 23:00 wide 32.6)
# Wide tiles of blocks of 8 rows, by CTAs of a tile, layers of DeepSeek-V3 TP8, in three processes (at 16
# tokens weights at two places in each), 2026-11-30, 01:39:
#   12 tokens: 1 234, 234, 240, 2 216, 216, 217; 16 tokens: 1 278, 263, 263, 263, 278, 279, 2 260, 261, 261,
#   261, 261, 262; 24 tokens: 1 382, 2 370, 370, 371; 32 tokens: 1 438, 438, 423, 2 414, 413, 414; in another,
#   02:13: 48 tokens: 1 507, 2 510; 64: 1 583, 2 575; 384 experts, 16, 32 tokens: 1 298, 496, 2 303, 494
#   Qwen3-30B-A3B, 16 tokens, 2026-11-29, 22:34: 1 182.5, 2 190.3
# Clusters of 4 that fill an SM each lost (22.1 for 18.0, 22:39): not all of 32 run at once.
# Lost earlier: clusters that also add up a token's pairs in the second product, without a launch
# for the sum (DeepSeek-V3 63.4 for 42.7, Mixtral 167.5 for 165.7, Qwen3 28.4 to 32.3 for 27.2).
# Gate and up of the layer, 64 or 128 of k in a stage, in turns, 2026-11-29:
#   8 rows: Mixtral, 1 token 173.1, 169.2, 16 tokens 647, 637; DeepSeek-V3 TP8, 128 tokens 680, 659, 1 token
#   (four CTAs share a tile) 32.7, 34.0; Qwen3, 1 token 29.8, 28.7; 16 rows: Qwen3, 128 tokens 294, 290
# e4m3, 2026-11-29, device span under jit, beside DeepGEMM in a CUDA graph; "w": two CTAs share weights.
#   32768 rows, 7168 -> 4096, 8 experts: 192x128 1445, 128x192 w 1468, without 1501, 128x128 1654; theirs 1360
#   32768 rows, 2048 -> 7168, 8 experts: 192x128 752, 128x192 w 774, without 796, 128x128 863; theirs 717
#   32768 rows, 2048 -> 1536, 128 experts: 128x192 w 229, without 230, 128x128 241, 192x128 254; theirs 226
#   masked 32 x 4096, mean 192, 7168 -> 6144: 128x192 w 554, without 628, 64x256 640, 128x128 656; theirs 555
#   masked 6 x 4096, mean 1024, 7168 -> 6144: 128x192 w 409, without 417, 192x128 421, 128x128 466; theirs 377
# Tiles of several heights ("exact": two of an expert; "even": one), of 128 experts and more found by the CTAs
# themselves in blocks of 144 rows, late, 2026-11-29, 19:53, 20:10 and 20:12, medians or means of four turns:
#   32768 rows, 2048 -> 1536, 128 experts: one height 330; found, group 0 313.1, 4 315.1, 8 316.4; not trimmed
#   316.1; not late 321, trimmed 318.5; even 317; listed 341; a sixth height 315.1; of 176 to 192 359 to 369
#   65536 rows, 768 -> 2048, 128 experts: blocks of 128 311.2; of 144 313.8, found 294.1; of 184 found 305
#   65536 gathered rows, gate and up, 2048 -> 768: 128 721.8; of 144 740, found, group 4 715.4, 0 709.6
#   131072 rows, 1024 -> 7168, 256 experts: 128 2927; of 144 2830, found, group 4 2685, 0 2772, 8 2787; of 184
#   listed 2803
#   131072 rows, 4096 -> 1536, 128 experts: 176 2201; of 144 found, group 0 2136, 4 2202, 8 2249; of 184,
#   group 0, even found 2131, falling 2150
#   262144 rows, 4096 -> 1536: 128 4367; of 144 found, group 0 4227, 4 4331, 8 4458; of 184 even found 4238
#   262144 rows, 1536 -> 4096: 128 4330; of 144 found, group 4 4299, 0 4395, 8 4306; of 184 even found 4325
# Found, or by a launch that lists them, of eight experts, in blocks of 176 rows in groups of 6:
#   32768 rows, 4096 -> 14336: listed 4821, found 4789, even 4851, trimmed 4768 for 4725; of 192 4842, 4824;
#   of 184 found 4839; of 144 late 4903 for 4725
#   8192 rows, 4096 -> 14336: listed 1255, found 1229, even 1214; of 192 1285, 1270; of 184 found 1231
#   Gate and up of gathered rows (Mixtral's layer, 4096 tokens, both found): 4424 for 4162.
# By rule, not measured: products of gathered rows without an activation, 17 to 127 experts.
# Lists, 17:05, means of four turns with the launch:
#   32768 rows, 4096 -> 14336, 8 experts: blocks of 192 4966, exact 4942, even 4995; of 176 4985, exact 4949,
#   in groups of 6 4925; of 184 exact 4963
#   131072 rows, 1024 -> 7168, 256 experts: blocks of 128 3068; of 184 exact 2917; of 192 even 2927
# In an earlier run they lost where K is long and experts are many: CTAs that read the same weights drift
# apart where they had tiles of other heights before, and read them from memory again.
#   131072 rows, 7168 -> 1024, 256 experts, blocks of 184: 2688, even 2847, exact 2835
# Listed from the tallest to the lowest they do not ("falling"; all n tiles of each). 19:44, medians of four
# turns, the same clock and launch:
#   131072 rows, 7168 -> 1024, 256 experts: blocks of 184 2670, falling 2563; of 192 even in groups of 3 2605,
#   falling 2598. Two CTAs that load x together lost: of 184 2757, falling 2679; of 192 falling 2645
#   the input gradient of the same: blocks of 184 2685, falling 2584; of 192 falling 2622
# Trimmed, 22:40, medians of four turns: 2583 to 2571, the input gradient 2616 to 2601. In blocks of 192,
# found, in groups of 3, as many as an expert has: 2586 and 2599 even, 2584 and 2600 with an expert's higher
# tiles beginning with another one in each. Of 184 found: 2622 to 2747.
# To find the next tile while the ring is full, not behind a tile's loads, lost: the input gradient 2598 to
# 2613, 131072 rows, 1024 -> 7168 that leave padding 2605 to 2739, gate and up 687 to 691.
# Groups of "ragged" rows, by a list of tiles or found in the product, late; one call under jit, device span,
# means of three and four turns, forth and back, 2026-11-29, 22:58 and 23:04:
#   32768 rows, 2048 -> 1536, 128 experts: listed 144 362 (Zipf 429), found 316 (375; of shuffled experts 352)
#   the same of 12288 and 8192 rows: listed 128 236, 234; found, group 0 208, 202, group 4 207 of the latter
#   65536 rows, 768 -> 2048, 128 experts: listed 128 334, found, group 4 295
#   131072 rows, 4096 -> 1536, 128 experts: listed 128 2255, found, group 0 2133
#   131072 rows, 7168 -> 1024, 256 experts: listed 128 2861, found, group 0 2714, 4 3108
# In another order of groups, 23:24, a later run: uniform 305 (blocks 308), Zipf 343 (380), rising 352 (378),
# shuffled 339 (353).
# Lost there: three or five stretches of tiles of rows that take turns (uniform 338, Zipf 371; of blocks 346
# and 374 for 318 and 388, five 372 and 387): an expert's tiles run apart, and read its weights again.
# Layers at the card's power limit, steps after each other, in turns, span and sustained, 22:54 and 23:23:
#   Qwen3, 8192 tokens: blocks of 144 1079, 1288 and 1066, 1277; of 184 in groups of 6 1042, 1212 and 1034,
#   1190, of 4 1044, 1217 and 1034, 1205, of 8 1046, 1241; of 192 1067, 1247; of 128 1028, 1216 and 1016, 1208
#   DeepSeek-V3 TP8, 8192, 144: late 1647, 1875 and 1624, 1829; gate and up not late 1625, 1866 and 1592,
#   1782; down not late 1705, 1888; Mixtral, 1024: not late, in both 0.997 of late
#   Rows gathered before the product, of the time within it, span, sustained: Mixtral (28672 columns), 1024
#   tokens 0.909, 0.926; 2048 0.909, 0.903; 512 1.022, 1.006; 256 1.026, 1.014; 32 experts, 5760 columns, mean
#   of 256 0.994, 0.967, of 1024 0.966, 0.939; Qwen3 (1536 columns), 8192 1.06 sustained
# Rows copied by the kernel of spread.py, by the same clocks, 2026-11-30, 01:40, 02:00 and 02:14:
#   Qwen3, 8192 tokens (1536 columns): gate and up in groups of 4 1061, 1221 and 1046, 1204, of 6 1064, 1229
#   and 1062, 1230; gathered within it, of 6 1051, 1261, 1048, 1255 and 1034, 1241; tiles of 144, late, 1070,
#   1240, of 192 1084, 1241, of 128 1097, 1272
#   Mixtral, 8192: 8030, 8877 and 8041, 8716; by XLA 8313, 8880, 8180, 8902 and 8228, 8781; blocks of 192 in
#   groups of 11 8041, 8813; two CTAs that share rows, in groups of 12, 8165, 8906
# By rule, not measured: other products of 5000 columns, in place of XLA's gather, and those of fewer columns.
RULES = {"NVIDIA H200": DEFAULT_RULES}


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
    """Why these tiles, given by name, cannot be this problem's, or None. `config_for` chooses no such tiles.

    An ill address stops every later kernel of the process, so that it must not come to that.
    """
    if tiles.form == "swap" and (reason := _no_swap(problem)):
        return reason
    if tiles.heights and (reason := _no_heights(problem, tiles)):
        return reason
    if tiles.trims and not tiles.heights and (reason := _no_trims(problem, tiles)):
        return reason
    if tiles.mixes and not (tiles.cuts and problem.rows == "blocks"):
        return "of blocks whose tiles find themselves alone a part is mixed with the others"
    if tiles.finds and not tiles.heights and problem.rows != "masked":
        return "tiles of one height are found in the masked layout alone"
    if tiles.skips and problem.rows == "blocks" and (reason := _no_skips(problem, tiles)):
        return reason
    if tiles.paired and tiles.peeled:
        return "two steps ahead of the loop over k would spill registers"
    # By a list, or found: read ahead, by the warpgroup that loads alone.
    ordered = problem.rows == "masked" and tiles.finds == tiles.ahead
    if tiles.by_expert and not (ordered and tiles.group):
        return "groups of one expert's blocks are of the masked layout, listed, or found ahead"
    return None


def _cut(problem: MatmulProblem, tiles: Config, rules: Rules, lists: bool) -> Config:
    """The same tiles, of several heights where these were found to be faster: see above `RULES`."""
    few = problem.num_experts <= rules.few_experts
    if tiles.bm == 144:
        late = tiles.late or problem.rows == "ragged" and may_be_late(problem)
        early = problem.weights.gated and problem.k >= _LEAST_K_NOT_LATE and not few
        more = {"finds": True, "late": late and not early, "trims": not problem.top_k}
        found = with_heights(problem, tiles, _LESS_OF_144, True, **more)
        in_turn = problem.weights.gated or problem.k >= _LEAST_K_IN_TURN
        in_turn = in_turn and not few and problem.w_columns <= _NARROW_OF_144
        mixes = found.cuts and problem.rows == "blocks" and not few
        return found._replace(group=0 if found.heights and in_turn else found.group, mixes=mixes)
    if few:
        plain = not (problem.weights.gated or problem.top_k)
        if tiles.bm < _LEAST_OF_HEIGHTS or not plain:
            return tiles
        return with_heights(problem, tiles, _LESS_OF_FEW, True, finds=True)
    if tiles.bm not in (184, 192) or not problem.consecutive:
        return tiles
    many = problem.num_experts >= _MANY_OF_HEIGHTS
    wanted = problem.weights.gated or problem.k <= _MOST_K_OF_HEIGHTS
    if tiles.bm == 184 and wanted and problem.num_experts < _MANY_OF_FALLING:
        more = {"finds": True, "trims": not problem.top_k}
        found = with_heights(problem, tiles, _LESS_OF_MANY, True, **more) if many else tiles
        copied = problem.weights.gated and not problem.top_k
        group = _GROUP_OF_COPIED if copied else _GROUP_OF_184
        return found._replace(group=group) if found.heights else tiles
    if problem.k <= _MOST_K_OF_HEIGHTS:
        exact, many = tiles.bm == 184, many and not problem.top_k
        return with_heights(problem, tiles, _LESS_OF_MANY, exact, finds=True) if many else tiles
    work = problem.num_rows * problem.k * problem.n
    if not lists or problem.num_experts < _MANY_OF_FALLING or work < _LEAST_WORK_OF_LISTS:
        return tiles
    found = with_heights(problem, tiles, _LESS_OF_MANY, falling=True, trims=True)
    return found._replace(group=0) if found.heights else tiles


def _found_of_groups(problem: MatmulProblem, rules: Rules) -> Config | None:
    """Tiles of "ragged" rows of several heights that find themselves, or None where 128 rows are better."""
    many = problem.num_experts > rules.few_experts and mean_rows(problem) >= _LEAST_MEAN_OF_FOUND
    if problem.rows != "ragged" or not many or not takes_whole(problem, 144):
        return None
    found = _cut(problem, _whole(problem, 144, _group(problem, rules)), rules, False)
    return found if found.cuts else None


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
    if tiles.form != "swap" or tiles.bm <= 96 or not _may_be_tall(problem):
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


def _no_skips(problem: MatmulProblem, tiles: Config) -> str | None:
    """Why no warpgroup of a tile of blocks can be without a pair, or None."""
    if problem.top_k or problem.whole_blocks or problem.row_labels:
        return "rows are left out that lie in order, and whose ids tell pairs"
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


def mean_rows(problem: MatmulProblem) -> float:
    """Rows per expert: what the caller expects, or as many as if all are hit alike."""
    if problem.expected_rows:
        return problem.expected_rows
    if problem.rows == "masked":
        return problem.max_rows / 8  # low-latency layouts are made for the worst case
    if problem.rows == "ragged":
        return problem.num_rows / max(1, problem.num_groups)
    if problem.top_k:
        return problem.num_tokens * problem.top_k / problem.num_experts
    # P = n + min(n, E) (block_size - 1).
    spare = problem.block_size - 1
    pairs = problem.num_rows - problem.num_experts * spare
    if pairs < problem.num_experts:
        pairs = problem.num_rows / problem.block_size
    return max(1.0, pairs / problem.num_experts)


def tile_rows(problem: MatmulProblem, rules: Rules = DEFAULT_RULES) -> int:
    """bm: the least that a mean expert fits in, with room for one that has more."""
    # The mean of a masked layout is a guess from above already, unless the caller gave it.
    guessed = problem.rows == "masked" and not problem.expected_rows
    least = mean_rows(problem) * (1 if guessed else rules.room)
    choices = [64, 128] if _no_swap(problem) else [8, 16, 32, 64, 128]
    wanted = next((bm for bm in choices if bm >= least), choices[-1])
    if problem.rows == "ragged" and _LEAST_MEAN < mean_rows(problem) <= _MOST_MEAN:
        return 144 if takes_whole(problem, 144) else wanted
    if problem.rows != "blocks":
        return wanted
    block = problem.block_size
    if problem.whole_blocks:
        wanted = choices[-1]
    # A block is one expert's: a tile is a part of it, or all of it.
    parts = [bm for bm in choices if block % bm == 0 and bm >= min(wanted, block)]
    if parts:
        return parts[0]
    if not _no_swap(problem) and block % 8 == 0 and block <= 64:
        return block
    for count in (1, 2):
        if block % count == 0 and takes_whole(problem, block // count):
            return block // count
    return next((bm for bm in choices if bm >= min(block, wanted)), choices[-1])


def takes_whole(problem: MatmulProblem, block: int) -> bool:
    """Whether a block of so many rows, which are neither few nor 128, is one swapped tile.

    With 192 rows, and a vector along them or along the columns, registers do not suffice; to count the rows
    that hold a pair takes none (`counts_rows`).
    """
    if problem.scales or _no_swap(problem) or not _may_be_tall(problem):
        return False
    most = 184 if _has_vectors(problem, block) else 192
    tanh = problem.weights.activation == "gelu_tanh" and not problem.weights.gated
    most = 128 if tanh and problem.top_k else most  # more spill, beside a copy of rows
    return 64 < block <= most and block % 8 == 0 and block != 128


def _has_vectors(problem: MatmulProblem, bm: int) -> bool:
    """Whether the end of a swapped tile of many rows reads a bias, row weights or ids."""
    ids = tests_rows(problem) and not counts_rows(problem, bm)
    return bool(problem.weights.bias or problem.row_weights or ids)


def counts_rows(problem: MatmulProblem, bm: int) -> bool:
    """Whether counting a tile's pairs tells which of its rows are zero.

    A block's pairs come first, and a tile has rows of one block.
    """
    return tests_rows(problem) and problem.block_size % bm == 0


def _no_swap(problem: MatmulProblem) -> str | None:
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


def config_for(
    problem: MatmulProblem, gpu_kind: str | None = None, *, lists: bool = True
) -> Config:
    """Tiles for a problem that the kernel takes, on a GPU kind (None: the defaults).

    lists: whether a launch ahead of the product can list its tiles, as those by falling height need it.
    """
    rules = RULES.get(gpu_kind or "", DEFAULT_RULES)
    bm = tile_rows(problem, rules)
    if bm == 128 and (found := _found_of_groups(problem, rules)):
        return found
    if problem.scales:
        tiles = _e4m3_config(problem, rules, bm)
        most = _FINDS_EXPERTS if tiles.ahead or tiles.form == "swap" else _ALL_FIND_EXPERTS
        few = problem.rows == "masked" and problem.num_experts <= most
        return tiles._replace(finds=True) if few else tiles._replace(by_expert=False)
    deep = problem.weights.gated and problem.weights.transposed and problem.k % 128 == 0
    if bm == 8 and problem.in_order and problem.weights.gated and problem.weights.transposed:
        narrow = _narrow(problem)
        if _num_tiles(problem, narrow) <= _MOST_NARROW and problem.k % 64 == 0:
            return _shared(problem, rules, narrow)
    if bm <= 24 and deep:  # 256 bytes of a row of the weights are read together, not 128
        tiles = Config("swap", bm, 256, 128, 3, group=0, lag=1)
        if _takes_halves(problem, rules):
            return tiles._replace(split=2)
        tiles = _shared(problem, rules, tiles)
        if tiles.split <= 2:
            return tiles
    if bm < 64 and problem.weights.gated:  # gate and up of 64 columns for each warpgroup
        return _shared(problem, rules, Config("swap", bm, 256, 64, 6 if bm < 32 else 5, group=0))
    if bm < 64:
        return _shared(problem, rules, Config("swap", bm, 128, 128, 5 if bm <= 40 else 4, group=0))
    group = _group(problem, rules)
    if bm not in (64, 128):
        return _cut(problem, _whole(problem, bm, group), rules, lists)
    if bm == 64 or not _may_be_tall(problem):
        return Config("n", 64, 256, 64, 4, group=group)
    by_expert = problem.rows == "masked" and group > 0
    late = may_be_late(problem)
    return Config("m", 128, 256, 64, 4, group=group, late=late, by_expert=by_expert)


def _whole(problem: MatmulProblem, bm: int, group: int) -> Config:
    """A swapped tile of many rows, with as many stages as fit into shared memory.

    Of tiles of up to 96 rows most experts have a single one: their weights are read once in any order.
    """
    pieces = 2 * piece_rows(bm) * 128
    stages = next(n for n in (4, 3) if _ring_bytes(bm, n) + pieces + 1024 <= MAX_SHARED_BYTES)
    most = 0 if bm <= 96 else 4 if bm <= 144 else 6 if bm == 176 else group
    group = min(group, most)
    # Beside a copy of rows, only half as many results fit into registers.
    fits = not _has_vectors(problem, bm) and (problem.weights.gated or not problem.top_k)
    late = bm == 144 and problem.rows == "blocks" and fits and may_be_late(problem)
    return Config("swap", bm, 256, 64, stages, group=group, late=late, lag=stages - 2)


def _ring_bytes(bm: int, stages: int) -> int:
    """Shared memory of so many stages of bfloat16 tiles, bm rows and 256 columns, 64 deep."""
    return stages * 64 * (bm + 256) * 2


def piece_rows(bm: int) -> int:
    """Rows of a swapped tile that are stored at a time: half of many, which leaves room for a stage."""
    return bm // 2 if bm > 96 and bm % 16 == 0 else bm


def _shared(problem: MatmulProblem, rules: Rules, tiles: Config) -> Config:
    """Swapped tiles, each shared by a cluster where few tiles would leave most SMs without one.

    Of blocks of one row alone, whose tiles have 8: these are what ran on a GPU, and the parts of more rows do
    not all fit in shared memory beside the ring.
    """
    if not rules.split or problem.rows != "blocks" or problem.block_size != 1:
        return tiles
    count, steps = _num_tiles(problem, tiles), -(-problem.k // tiles.bk)
    for split, (most, num_ctas) in _SPLITS.items():
        if split > 2 and tiles.computing == 1:  # whose ring takes all of an SM
            continue
        if count <= most and steps % split == 0 and steps >= _LEAST_STEPS * split:
            return tiles._replace(split=split, num_ctas=num_ctas)
    return tiles


def _takes_halves(problem: MatmulProblem, rules: Rules) -> bool:
    """Whether two CTAs share each tile of a gathered product of 8 rows: few and long ones leave many SMs idle
    in their last turn."""
    size = problem.num_experts == _EXPERTS_OF_HALVES and problem.n <= _MOST_N_OF_HALVES
    size = size and problem.k >= _LEAST_K_OF_HALVES and problem.k % (2 * 128) == 0
    short = problem.rows == "blocks" and problem.block_size == 8
    return rules.split and bool(problem.top_k) and short and size


def _narrow(problem: MatmulProblem) -> Config:
    """Swapped tiles of 64 columns of gate and up, by one warpgroup; 96 KiB of weights are asked for ahead, or
    twice as many where a tile has an SM for itself."""
    tiles = Config("swap", 8, 128, 128 if problem.k % 128 == 0 else 64, 3, group=0, computing=1)
    if NUM_SMS < _num_tiles(problem, tiles) <= 2 * NUM_SMS:
        tiles = tiles._replace(num_ctas=2 * NUM_SMS)  # all tiles at once, two of them in an SM
    else:
        tiles = tiles._replace(stages=6)
    return tiles if tiles.bk == 128 else tiles._replace(stages=2 * tiles.stages)


def _num_tiles(problem: MatmulProblem, tiles: Config) -> int:
    """Of blocks that are a tile each."""
    columns = tiles.bn // (2 if problem.weights.gated else 1)
    return problem.num_blocks * -(-problem.n // columns)


def unshared(tiles: Config) -> Config:
    """The same tiles, each of one CTA, which shares nothing."""
    # Without a cluster `early` lost: 1827 us for 1501.
    tiles = tiles._replace(sharing=0, shared="x", early=tiles.early and tiles.sharing < 2)
    return tiles._replace(split=1, num_ctas=NUM_SMS) if tiles.split > 1 else tiles


def permutes_first(problem: MatmulProblem, gpu_kind: str | None = None) -> bool:
    """Whether rows are gathered by XLA before the product."""
    rules = RULES.get(gpu_kind or "", DEFAULT_RULES)
    return _gathers_first(problem, rules.permute_columns, rules.permute_rows)


def spreads_first(problem: MatmulProblem, gpu_kind: str | None = None) -> bool:
    """Whether the kernel of `spread` copies rows before the product."""
    rules = RULES.get(gpu_kind or "", DEFAULT_RULES)
    if not (problem.inverse and problem.leaves_padding and rules.spread_columns):
        return False
    wanted = _gathers_first(problem, rules.spread_columns, rules.spread_rows)
    wanted = wanted or permutes_first(problem, gpu_kind)
    return wanted and not spread.unsupported(spread.of(problem))


def as_multiplied(problem: MatmulProblem, gpu_kind: str | None = None) -> MatmulProblem:
    """The problem that the product's kernel gets: of rows `[num_rows, k]` where a launch makes them first."""
    first = spreads_first(problem, gpu_kind) or permutes_first(problem, gpu_kind)
    return problem.permuted if first else problem


def _gathers_first(problem: MatmulProblem, columns: int, rows: int) -> bool:
    """Whether the weights have so many columns (none: never), and a mean expert so many rows."""
    pairs = problem.num_tokens * problem.top_k
    many = tile_rows(problem) >= 128 and pairs >= rows * problem.num_experts
    many = many and not problem.scales
    return bool(columns and problem.top_k and many and problem.w_columns >= columns)


def _group(problem: MatmulProblem, rules: Rules) -> int:
    """`Config.group` for a problem; 0 of narrow weights."""
    if problem.w_columns <= rules.narrow:
        return 0
    if problem.rows == "masked":
        return rules.masked_group
    return rules.few_group if problem.num_experts <= rules.few_experts else rules.many_group


def _e4m3_config(problem: MatmulProblem, rules: Rules, bm: int) -> Config:
    """A warpgroup has sums of 64 x 128 at most: each has a second accumulator, of 128 columns of x."""
    if rows := _swapped_rows(problem):
        stages = 6 if rows <= 112 else 5
        return _few_rows(problem, Config("swap", rows, 128, 128, stages, group=0))
    if bm < 64 and problem.weights.gated:
        return _shared(problem, rules, Config("swap", bm, 256, 128, 5 if bm <= 32 else 4, group=0))
    ahead = problem.scale_groups <= _GROUPS_AHEAD
    if bm < 64:
        tiles = Config("swap", bm, 128, 128, 6, group=0)
        return _few_rows(problem, tiles) if ahead and problem.rows == "masked" else tiles
    group = _group(problem, rules)
    if problem.rows == "blocks" and problem.block_size % 192 == 0:
        return Config("m", 192, 128, 128, 4, group=group, computing=3)
    if bm == 64:
        return Config("n", 64, 256, 128, 4, group=group)
    whole = problem.rows == "masked" or problem.rows == "blocks" and problem.block_size == bm
    wide = problem.n >= 192 and problem.k >= _LEAST_K_OF_WIDE
    wide = wide and not problem.weights.gated and not problem.top_k
    if not (ahead and whole and wide):
        return Config("m", 128, 128, 128, 5, group=group, late=may_be_late(problem))
    masked = problem.rows == "masked"
    # Two steps in a turn took 1.6 to 1.8% less (H200, 2026-11-29, 15:49), and of masked tiles of 128 rows 0.7
    # to 2.2% (22:57). Masked tiles of 192 rows lost 1 to 2%; a first turn ahead of their loop took up to 1.2%
    # less (22:57).
    paired = problem.k >= _LEAST_K_OF_PAIRED and problem.k // GROUP % 2 == 0
    if masked and mean_rows(problem) > _TALL_MEAN:
        tall = Config("m", 192, 128, 128, 4, group=8, computing=3, skips=True)
        tall = tall._replace(sharing=2, ahead=True, early=True, peeled=True)
        return tall._replace(by_expert=True)  # where they are found
    tiles = Config("m", 128, 192, 128, 4, group=8, ahead=True, skips=masked)
    # Two tiles of an expert next to each other: as a rule.
    if mean_rows(problem) > (bm if masked else 2 * bm):
        return tiles._replace(group=0, sharing=2, shared="w", early=not masked, paired=paired)
    # 8 groups of 60 rows, 7168 -> 4096: 3.1% less; in clusters, of 32 groups of 192 rows, as much (H200,
    # 2026-11-30, 02:14).
    if masked:
        return tiles._replace(trims=True)
    # Of an expert's last tile, every other one's second half holds no pair: 5.5% less time (H200, 2026-11-29,
    # 20:27; 2.3% in groups of 8). Where one row of tiles fills all SMs, the next one would read the expert's
    # weights from memory again: groups remain (not timed).
    fills = -(-problem.n // tiles.bn) >= NUM_SMS
    skipping = tiles._replace(group=tiles.group if fills else 0, skips=True)
    if problem.rows == "blocks" and not _no_skips(problem, skipping):
        return skipping
    return tiles


def _swapped_rows(problem: MatmulProblem) -> int:
    """Rows of the swapped tiles of masked groups that have some more than a tile of 32; 0: of others."""
    if problem.rows != "masked" or problem.weights.gated or _no_swap(problem):
        return 0
    if problem.k < _LEAST_K_OF_SWAPPED or problem.scale_groups > _GROUPS_AHEAD:
        return 0
    mean, groups = problem.expected_rows, problem.num_experts
    highest = next((m for most, m in _MOST_MEAN_OF_SWAPPED.items() if groups <= most), 0)
    if not _LEAST_MEAN_OF_SWAPPED <= mean <= highest:
        return 0
    most = max(_NARROW_ROWS, -(-problem.max_rows // 8) * 8)
    return min(128, most, -(-4 * mean // 24) * 8)


def _few_rows(problem: MatmulProblem, tiles: Config) -> Config:
    """Swapped tiles of the masked layout.

    Where CTAs would have two or three tiles, or more of over 32 rows, each has as many: fewer CTAs, of which
    none is the last. Where those would be too few, and whole turns of the SMs leave many of them idle, tiles
    have 64 columns and one warpgroup that multiplies, and an SM has two CTAs: one stores while the other
    multiplies.
    """
    tiles = tiles._replace(ahead=True, early=True)
    count = problem.num_experts * -(-problem.n // tiles.bn)
    turns = -(-count // NUM_SMS)
    even = -(-count // turns)
    many = turns > _MOST_EVEN_TURNS and tiles.bm <= _NARROW_ROWS
    if turns > 1 and not many and even >= _LEAST_EVEN_CTAS:
        return tiles._replace(num_ctas=even)
    if turns > 1 and turns * NUM_SMS > _MOST_IDLE * count and tiles.bm <= _NARROW_ROWS:
        return tiles._replace(bn=64, computing=1, stages=8, num_ctas=2 * NUM_SMS)
    return tiles


def _may_be_tall(problem: MatmulProblem) -> bool:
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
    return _may_be_tall(problem) and problem.out_dtype != "float32" and not spills
