"""What choices of tiles share: rules of a GPU kind, with figures, means and clusters. No jax here."""

from typing import NamedTuple

from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem

# CTAs that share a tile: up to how many tiles, and CTAs of the grid. A cluster lies within one group of SMs,
# of which a GPU may have some with 14: not all SMs can be filled with clusters of 4, and still fewer with 8.
_SPLITS = {4: (24, 128), 2: (66, NUM_SMS)}
_LEAST_STEPS = 3  # of k that a CTA takes, where several share a tile


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
#   masked, 15876 rows of 32 x 1024, 7168 -> 4096: group 8 1349, 16 1357, 4 1369; 2026-11-29, four
#   turns: group 8 1381, 4 1387, 11 1370; groups of one expert: 8 1307, 4 1310, 8 and not late 1333
#   masked, 276 rows of 32 x 128, 7168 -> 4096: 16 rows swapped 434, 32 rows 443, 64x256 n 446, 8 rows 583
# A mean expert of 256 in two blocks, 2026-11-29, 32768 rows, 2048 -> 1536, 128 experts:
#   144 rows swapped: late, group 4 315, 8 320; not late, group 0 317, 4 321, 8 327; of "ragged" rows 333, 336
#   96 rows swapped: group 4 352, late 354; 128x256 m, late, group 4 346; of "ragged" rows 360
# Six tiles of 176 rows hold 1024 rows: where experts have 1024, 2048 or 4096, groups of six mostly begin with
# an expert's first tile. In us, means of four turns (three at 4096 tokens), 2026-11-29:
#   Mixtral's layer, 8192 tokens: 192 rows, group 8 8272; 176 rows, group 6 8079, 12 8090
#   Mixtral's layer, 4096 tokens: 176 rows, group 8 3973, 6 3880 (less in two turns)
#   32768 rows, 4096 -> 14336, 8 experts: 192 rows, group 8 4963; 176 rows, group 8 5031, 6 4973
# By rule, not measured: other means, nine to 16 experts in blocks of 176 that a caller asks for.
# The layer at one token, 2026-11-29, by how many CTAs share the k of a tile:
#   DeepSeek-V3 TP8, gate and up, 16 tiles: 1 42.7, 2 34.6, 4 30.3, 8 35.6
#   Qwen3-30B-A3B, gate and up, 48 tiles: 1 33.3, 2 27.2, 4 28.6, 8 41.4
#   Mixtral 8x7B, down, 64 tiles: 1 172.9, 2 165.9, 4 181.6; gate and up, 224 tiles: 2 171.4, 4 205.7
# Gate and up in narrow tiles, 128x128 of one warpgroup, six stages, beside those of 256 columns, in us
# under jit, x read by TMA in all of them; by how many CTAs share the k of a tile:
#   DeepSeek-V3 TP8, 1 token, 32 tiles: 2 17.2, three stages 21.3, 4 of three stages 17.7; wide 17.7
#   2 tokens, 64 tiles: 2 29.7, 1 of three stages 38.6; wide 32.7; 4 tokens, 128: 1 52.4; wide 53.7
#   8 tokens, 256 tiles: 1 of three stages, two CTAs an SM 95.8; wide 96.6; on another card 97.0, of six
#   stages 101.8; wide, x by cp.async 100.0
#   Qwen3-30B-A3B, 1 token, 96 tiles: 1 13.8, 2 of three stages 15.4; wide 15.5
#   2 tokens, 192 tiles: 1 27.2, of three stages 27.2; wide 28.7; 4 tokens, 384: 1 44.9; wide 47.8
#   on another card, wide with x by cp.async: 1 token 1 16.9; wide 15.9; 2 tokens 1 25.1; wide 26.0;
#   4 tokens 1 45.7; wide 47.6
#   Mixtral 8x7B, 1 token, 448 tiles: 1 109.6; wide 106.5; in later runs 1 109.3; wide 114.4
#   GPT-OSS 120B, 1 token, 180 tiles of 64 of k: 12 stages 35.1, 6 and two CTAs an SM 35.1; wide 42.5
#   (wide 32.6 in a run before)
# Wide tiles of blocks of 8 rows, by CTAs of a tile, layers of DeepSeek-V3 TP8, in three processes (at 16
# tokens weights at two places in each), 2026-11-30:
#   12 tokens: 1 234, 234, 240, 2 216, 216, 217; 16 tokens: 1 278, 263, 263, 263, 278, 279, 2 260, 261, 261,
#   261, 261, 262; 24 tokens: 1 382, 2 370, 370, 371; 32 tokens: 1 438, 438, 423, 2 414, 413, 414; in another
#   run: 48 tokens: 1 507, 2 510; 64: 1 583, 2 575; 384 experts, 16, 32 tokens: 1 298, 496, 2 303, 494
#   Qwen3-30B-A3B, 16 tokens, 2026-11-29: 1 182.5, 2 190.3
# Clusters of 4 that fill an SM each lost (22.1 for 18.0): not all of 32 run at once.
# Lost earlier: clusters that also add up a token's pairs in the second product, without a launch
# for the sum (DeepSeek-V3 63.4 for 42.7, Mixtral 167.5 for 165.7, Qwen3 28.4 to 32.3 for 27.2).
# Gate and up of the layer, 64 or 128 of k in a stage, in turns, 2026-11-29:
#   8 rows: Mixtral, 1 token 173.1, 169.2, 16 tokens 647, 637; DeepSeek-V3 TP8, 128 tokens 680, 659, 1 token
#   (four CTAs share a tile) 32.7, 34.0; Qwen3, 1 token 29.8, 28.7; 16 rows: Qwen3, 128 tokens 294, 290
# Layers at the card's power limit, steps after each other, in turns, span and sustained, two runs:
#   Qwen3, 8192 tokens: blocks of 144 1079, 1288 and 1066, 1277; of 184 in groups of 6 1042, 1212 and 1034,
#   1190, of 4 1044, 1217 and 1034, 1205, of 8 1046, 1241; of 192 1067, 1247; of 128 1028, 1216 and 1016, 1208
#   DeepSeek-V3 TP8, 8192, 144: late 1647, 1875 and 1624, 1829; gate and up not late 1625, 1866 and 1592,
#   1782; down not late 1705, 1888; Mixtral, 1024: not late, in both 0.997 of late
#   Rows gathered before the product, of the time within it, span, sustained: Mixtral (28672 columns), 1024
#   tokens 0.909, 0.926; 2048 0.909, 0.903; 512 1.022, 1.006; 256 1.026, 1.014; 32 experts, 5760 columns, mean
#   of 256 0.994, 0.967, of 1024 0.966, 0.939; Qwen3 (1536 columns), 8192 1.06 sustained
# Rows copied by the kernel of spread.py, by the same clocks, 2026-11-30:
#   Qwen3, 8192 tokens (1536 columns): gate and up in groups of 4 1061, 1221 and 1046, 1204, of 6 1064, 1229
#   and 1062, 1230; gathered within it, of 6 1051, 1261, 1048, 1255 and 1034, 1241; tiles of 144, late, 1070,
#   1240, of 192 1084, 1241, of 128 1097, 1272
#   Mixtral, 8192: 8030, 8877 and 8041, 8716; by XLA 8313, 8880, 8180, 8902 and 8228, 8781; blocks of 192 in
#   groups of 11 8041, 8813; two CTAs that share rows, in groups of 12, 8165, 8906
# By rule, not measured: other products of 5000 columns, in place of XLA's gather, and those of fewer columns.
RULES = {"NVIDIA H200": DEFAULT_RULES}


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


def group_of(problem: MatmulProblem, rules: Rules) -> int:
    """`Config.group` for a problem; 0 of narrow weights."""
    if problem.w_columns <= rules.narrow:
        return 0
    if problem.rows == "masked":
        return rules.masked_group
    return rules.few_group if problem.num_experts <= rules.few_experts else rules.many_group


def shared(problem: MatmulProblem, rules: Rules, tiles: Config) -> Config:
    """Swapped tiles, each shared by a cluster where few tiles would leave most SMs without one.

    Of blocks of one row alone, whose tiles have 8: these are what ran on a GPU, and the parts of more rows do
    not all fit in shared memory beside the ring.
    """
    if not rules.split or problem.rows != "blocks" or problem.block_size != 1:
        return tiles
    of_least = problem.few_forms > 1 and tiles.computing > 1
    count = num_tiles(problem.smallest if of_least else problem, tiles)
    steps = -(-problem.k // tiles.bk)
    for split, (most, num_ctas) in _SPLITS.items():
        # The ring of one warpgroup takes all of an SM. Four CTAs are a further form, for very few tiles.
        if split > 2 and (tiles.computing == 1 or problem.few_forms):
            continue
        if count <= most and steps % split == 0 and steps >= _LEAST_STEPS * split:
            return tiles._replace(split=split, num_ctas=num_ctas)
    return tiles


def num_tiles(problem: MatmulProblem, tiles: Config) -> int:
    """Of blocks that are a tile each."""
    columns = tiles.bn // (2 if problem.weights.gated else 1)
    return problem.num_blocks * -(-problem.n // columns)
