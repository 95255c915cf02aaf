"""Which tiles the kernel takes for products of e4m3. No jax here."""

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._grouped_matmul.config import Config, may_be_late, no_skips, no_swap, refused
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.tile_rules import Rules, group_of, mean_rows, shared

# e4m3, 2026-11-29, device span under jit, beside DeepGEMM in a CUDA graph; "w": two CTAs share weights.
#   32768 rows, 7168 -> 4096, 8 experts: 192x128 1445, 128x192 w 1468, without 1501, 128x128 1654; theirs 1360
#   32768 rows, 2048 -> 7168, 8 experts: 192x128 752, 128x192 w 774, without 796, 128x128 863; theirs 717
#   32768 rows, 2048 -> 1536, 128 experts: 128x192 w 229, without 230, 128x128 241, 192x128 254; theirs 226
#   masked 32 x 4096, mean 192, 7168 -> 6144: 128x192 w 554, without 628, 64x256 640, 128x128 656; theirs 555
#   masked 6 x 4096, mean 1024, 7168 -> 6144: 128x192 w 409, without 417, 192x128 421, 128x128 466; theirs 377

_GROUPS_AHEAD = 128  # of K, whose scales of two tiles of weights fit into shared memory
_LEAST_K_OF_WIDE = 1024
_LEAST_K_OF_PAIRED = 2048  # the compiler unrolls 4 turns of two steps, and spills registers
# Of a masked layout up to which CTAs find their tiles. With a launch for the list 6 experts of 20 rows took 8
# to 11 us more under jit, and 1 to 3 more in a CUDA graph; 32 experts 4 to 9 (H200, 2026-11-29). 32 experts
# of 192 rows took as long either way. Where every warpgroup of a large tile looks, fewer.
_FINDS_EXPERTS, _ALL_FIND_EXPERTS = 32, 8
_MOST_IDLE = 1.25  # turns of the SMs over those that tiles would fill
# Masked, 6 x 20 rows, us (H200, 2026-11-30): 7168 -> 6144, 96 CTAs of three tiles each 68.5, two CTAs
# an SM of narrow tiles 72.8, of as many each 72.4; 4096 -> 4096, 96 of two 29.2, narrow 31.0, 30.9;
# 3072 -> 7168, 112 of three 36.7, 132 CTAs 37.5; 2048 -> 4096 16.5 to 17.5 in all of them.
_MOST_EVEN_TURNS, _LEAST_EVEN_CTAS = 3, 96
_NARROW_ROWS = 32  # of which two CTAs fit into an SM's shared memory
# Means of masked rows, told by the caller, of which a swapped tile holds a third more. In us (H200,
# 2026-11-30, 7168 -> 4096), before, swapped, DeepGEMM: 8 groups, 40 rows 62.3, 56 rows 61.1, 64 rows
# 62.3, 72.3; 60 rows 79.8, 80 rows 63.5, 96 rows 65.2, 78.2; 80 rows 83.8, 112 rows 66.8, 128 rows 74.7, 79;
# 100 rows 84.8, 128 rows 74.6, 77.1; 32 groups, 32 rows 246.5, 40 rows 237.1, 48 rows 228.7, 243.2; 60 rows
# 266, 80 rows 236.7, 96 rows 241.6, 261.7; 2048 -> 7168, 8 groups, 60 rows 43.0, 80 rows 36.3, 96 rows 37.6,
# 55.2. Tiles of 256 columns took 0 to 3% longer. The most of these means by groups; more groups, higher means
# and a shorter K were not timed, and have other tiles. Fewer than 8 groups: by rule, not measured.
_LEAST_MEAN_OF_SWAPPED, _MOST_MEAN_OF_SWAPPED, _LEAST_K_OF_SWAPPED = 22, {8: 100, 32: 60}, 2048
_TALL_MEAN = 512
# Masked, the time of tiles of two shapes over that of the tiles before, by span, of two or three draws of
# rows, 0.7 to 1.3 times the mean (H200, 2026-11-30).
#   32 groups, 192 rows: 7168 -> 6144 0.984, 0.946, 0.946; 3072 -> 7168 0.963, 0.935, 0.933; 4096 -> 4096
#   0.988, 0.983, 0.983; 2048 -> 4096 0.989, 0.985, 0.983
#   7168 -> 6144: 128 rows 0.826, 0.863; 144 rows 0.819, 0.864; 160 rows 0.850, 0.835, 0.813; 224 rows 0.980,
#   0.939, 0.919; 24 groups of 192 rows 0.973, 0.933
# Not where they lost, or may lose by wall clock: 240 rows 0.957, 0.963; 256 rows 0.978, 0.977; 320 rows
# 0.960, 0.966; 16 groups of 192 rows 1.024, 0.956; 8 groups 1.062, 1.026; 6 groups of 1024 rows 1.058,
# 0.992, 1.003.
_TURNED_GROUPS, _TURNED_MEANS = range(24, 33), range(128, 225)


def choose(problem: MatmulProblem, rules: Rules, bm: int) -> Config:
    """Tiles for a problem whose mean expert fits in bm rows. CTAs find those of few masked experts."""
    tiles = _usual(problem, rules, bm)
    most = _FINDS_EXPERTS if tiles.ahead or tiles.form == "swap" else _ALL_FIND_EXPERTS
    few = problem.rows == "masked" and problem.num_experts <= most
    return tiles._replace(finds=True) if few else tiles._replace(by_expert=False)


def _usual(problem: MatmulProblem, rules: Rules, bm: int) -> Config:
    """A warpgroup has sums of 64 x 128 at most: each has a second accumulator, of 128 columns of x."""
    if rows := _swapped_rows(problem):
        stages = 6 if rows <= 112 else 5
        return _few_rows(problem, Config("swap", rows, 128, 128, stages, group=0))
    if bm < 64 and problem.weights.gated:
        return shared(problem, rules, Config("swap", bm, 256, 128, 5 if bm <= 32 else 4, group=0))
    ahead = problem.scale_groups <= _GROUPS_AHEAD
    if bm < 64:
        tiles = Config("swap", bm, 128, 128, 6, group=0)
        return _few_rows(problem, tiles) if ahead and problem.rows == "masked" else tiles
    group = group_of(problem, rules)
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
    # Two steps in a turn took 1.6 to 1.8% less (H200, 2026-11-29), and of masked tiles of 128 rows 0.7
    # to 2.2%. Masked tiles of 192 rows lost 1 to 2%; a first turn ahead of their loop took up to 1.2%
    # less.
    paired = problem.k >= _LEAST_K_OF_PAIRED and problem.k // GROUP % 2 == 0
    if masked and mean_rows(problem) > _TALL_MEAN:
        tall = Config("m", 192, 128, 128, 4, group=8, computing=3, skips=True)
        tall = tall._replace(sharing=2, ahead=True, early=True, peeled=True)
        return tall._replace(by_expert=True)  # where they are found
    tiles = Config("m", 128, 192, 128, 4, group=8, ahead=True, skips=masked)
    if masked and paired and (turned := _turned(problem, tiles)):
        return turned
    # Two tiles of an expert next to each other: as a rule.
    if mean_rows(problem) > (bm if masked else 2 * bm):
        return tiles._replace(group=0, sharing=2, shared="w", early=not masked, paired=paired)
    # 8 groups of 60 rows, 7168 -> 4096: 3.1% less; in clusters, of 32 groups of 192 rows, as much (H200,
    # 2026-11-30).
    if masked:
        return tiles._replace(trims=True)
    # Of an expert's last tile, every other one's second half holds no pair: 5.5% less time (H200, 2026-11-29;
    # 2.3% in groups of 8). Where one row of tiles fills all SMs, the next one would read the expert's
    # weights from memory again: groups remain (not timed).
    fills = -(-problem.n // tiles.bn) >= NUM_SMS
    skipping = tiles._replace(group=tiles.group if fills else 0, skips=True)
    if problem.rows == "blocks" and not no_skips(problem, skipping):
        return skipping
    return tiles


def _turned(problem: MatmulProblem, tiles: Config) -> Config | None:
    """Tiles of two shapes, where they were faster."""
    if problem.num_experts not in _TURNED_GROUPS or problem.expected_rows not in _TURNED_MEANS:
        return None
    more = {"paired": True, "finds": True, "by_expert": True, "turned": True}
    tiles = tiles._replace(sharing=2, shared="w", **more)
    return None if refused(problem, tiles) else tiles


def _swapped_rows(problem: MatmulProblem) -> int:
    """Rows of the swapped tiles of masked groups that have some more than a tile of 32; 0: of others."""
    if problem.rows != "masked" or problem.weights.gated or no_swap(problem):
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
