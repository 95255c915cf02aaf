"""Which tiles the kernel takes for a problem, and whether a launch gathers its rows first. No jax here."""

from moe_align_jax._core.hopper import MAX_SHARED_BYTES, NUM_SMS
from moe_align_jax._grouped_matmul import choose_e4m3_tiles, spread
from moe_align_jax._grouped_matmul.config import (
    Config,
    counts_rows,
    may_be_late,
    may_be_tall,
    no_swap,
    piece_rows,
    tests_rows,
    with_heights,
)
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.tile_rules import (
    DEFAULT_RULES,
    RULES,
    Rules,
    group_of,
    mean_rows,
    num_tiles,
    shared,
)

_LEAST_MEAN, _MOST_MEAN = 128, 270  # rows of a group that two tiles of 144 rows hold
# Gate and up of 256 experts in blocks of 8 rows, of few columns and a long K: see `RULES`.
_EXPERTS_OF_HALVES, _MOST_N_OF_HALVES, _LEAST_K_OF_HALVES = 256, 256, 5_000
_MOST_NARROW = 3 * NUM_SMS  # tiles of 64 columns of gate and up, where each block is one pair
_LEAST_MEAN_OF_FOUND = 64  # rows of a group, of more than a few

# Tiles of several heights ("exact": two of an expert; "even": one), of 128 experts and more found by the CTAs
# themselves in blocks of 144 rows, late, 2026-11-29, medians or means of four turns:
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
# Lists, means of four turns with the launch:
#   32768 rows, 4096 -> 14336, 8 experts: blocks of 192 4966, exact 4942, even 4995; of 176 4985, exact 4949,
#   in groups of 6 4925; of 184 exact 4963
#   131072 rows, 1024 -> 7168, 256 experts: blocks of 128 3068; of 184 exact 2917; of 192 even 2927
# In an earlier run they lost where K is long and experts are many: CTAs that read the same weights drift
# apart where they had tiles of other heights before, and read them from memory again.
#   131072 rows, 7168 -> 1024, 256 experts, blocks of 184: 2688, even 2847, exact 2835
# Listed from the tallest to the lowest they do not ("falling"; all n tiles of each). Medians of four
# turns, the same clock and launch:
#   131072 rows, 7168 -> 1024, 256 experts: blocks of 184 2670, falling 2563; of 192 even in groups of 3 2605,
#   falling 2598. Two CTAs that load x together lost: of 184 2757, falling 2679; of 192 falling 2645
#   the input gradient of the same: blocks of 184 2685, falling 2584; of 192 falling 2622
# Trimmed, medians of four turns: 2583 to 2571, the input gradient 2616 to 2601. In blocks of 192,
# found, in groups of 3, as many as an expert has: 2586 and 2599 even, 2584 and 2600 with an expert's higher
# tiles beginning with another one in each. Of 184 found: 2622 to 2747.
# Dealt out (`cut_list._Body.dealt`), the product alone beside the list as sorted, medians of four turns,
# 2026-11-30:
#   131072 rows, 7168 -> 1024, 256 experts: blocks of 192 2547, 2501, of 184 2527, 2508; Zipf 2731, 2663
#   the input gradient of the same: of 192 2573, 2528, of 184 2578, 2558; Zipf, of 192 2834, 2743
#   to 768 columns, of 192: 1987, 1948; to 1536, of 184: 3915, 3848; 384 experts, of 192: 2737, 2715
#   more than two thirds of the CTAs have one tile more: to 768, of 184, 1967, 1945; to 1536, of 192, 3870,
#   3993; 230400 rows, 4096 -> 1024, of 184, 2530, 2547
# To find the next tile while the ring is full, not behind a tile's loads, lost: the input gradient 2598 to
# 2613, 131072 rows, 1024 -> 7168 that leave padding 2605 to 2739, gate and up 687 to 691.
# Groups of "ragged" rows, by a list of tiles or found in the product, late; one call under jit, device span,
# means of three and four turns, forth and back, 2026-11-29:
#   32768 rows, 2048 -> 1536, 128 experts: listed 144 362 (Zipf 429), found 316 (375; of shuffled experts 352)
#   the same of 12288 and 8192 rows: listed 128 236, 234; found, group 0 208, 202, group 4 207 of the latter
#   65536 rows, 768 -> 2048, 128 experts: listed 128 334, found, group 4 295
#   131072 rows, 4096 -> 1536, 128 experts: listed 128 2255, found, group 0 2133
#   131072 rows, 7168 -> 1024, 256 experts: listed 128 2861, found, group 0 2714, 4 3108
# In another order of groups, a later run: uniform 305 (blocks 308), Zipf 343 (380), rising 352 (378),
# shuffled 339 (353).
# Lost there: three or five stretches of tiles of rows that take turns (uniform 338, Zipf 371; of blocks 346
# and 374 for 318 and 388, five 372 and 387): an expert's tiles run apart, and read its weights again.
# Of 144, dealt by rounds, with a sixth height of 80 rows, 2026-11-30, for in turns without it, means,
# uniform, Zipf, Zipf of shuffled experts:
#   32768 rows, 2048 -> 1536, 128 experts: 314, 357, 352 for 314, 361, 355
#   32768 gathered rows, gate and up, 2048 -> 768: 368, 393, 398 for 369, 405, 404
#   65536 gathered rows, gate and up, 7168 -> 256, 256 experts (not late): 796, 849, 910; without a
#   sixth height 798, 854, 887; in turns 793, 860, 879
# Tiles of several heights, by these figures. Rows less than a block's. Of blocks of 144 rows, columns up to
# which all n tiles of a block follow each other, and K from which on they do without an activation. Rows of
# a block of few experts from which on they are faster; of 184 and 192 rows, from so many experts on, up to
# that K. With a longer K a launch lists them by falling height, from so many experts on; not below so many
# rows times K times N, since between that launch and the product 17 to 27 us passed under jit, at any size.
_LESS_OF_144, _LESS_OF_FEW, _LESS_OF_MANY = (8, 16, 24, 40), (8, 16, 40), (8, 16, 24, 40)
_LESS_OF_DEALT, _LEAST_K_NOT_DEALT = (8, 16, 24, 40, 64), 4096
_NARROW_OF_144, _LEAST_K_IN_TURN = 2048, 2048
_LEAST_OF_HEIGHTS, _MANY_OF_HEIGHTS, _MOST_K_OF_HEIGHTS, _MANY_OF_FALLING = 176, 128, 1024, 256
_LEAST_WORK_OF_LISTS = 1 << 39
_GROUP_OF_184 = 6  # of 128 experts: two of which 512 rows fill three tiles
_GROUP_OF_COPIED = 4  # of gate and up whose rows lie in order, and of blocks of 192 rows
_LEAST_K_NOT_LATE = 4096  # of gate and up of many experts in blocks of 144 rows


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
        return choose_e4m3_tiles.choose(problem, rules, bm)
    deep = problem.weights.gated and problem.weights.transposed and problem.k % 128 == 0
    if bm == 8 and problem.in_order and problem.weights.gated and problem.weights.transposed:
        narrow, least = _narrow(problem), problem.smallest if problem.few_forms else problem
        if num_tiles(least, narrow) <= _MOST_NARROW and problem.k % 64 == 0:
            return _narrow_shared(problem, rules, narrow)
    if bm <= 24 and deep:  # 256 bytes of a row of the weights are read together, not 128
        tiles = Config("swap", bm, 256, 128, 3, group=0, lag=1)
        if _takes_halves(problem, rules):
            return tiles._replace(split=2)
        tiles = shared(problem, rules, tiles)
        if tiles.split <= 2:
            return tiles
    if bm < 64 and problem.weights.gated:  # gate and up of 64 columns for each warpgroup
        return shared(problem, rules, Config("swap", bm, 256, 64, 6 if bm < 32 else 5, group=0))
    if bm < 64:
        return shared(problem, rules, Config("swap", bm, 128, 128, 5 if bm <= 40 else 4, group=0))
    group = group_of(problem, rules)
    if bm not in (64, 128):
        return _cut(problem, _whole(problem, bm, group), rules, lists)
    if bm == 64 or not may_be_tall(problem):
        return Config("n", 64, 256, 64, 4, group=group)
    by_expert = problem.rows == "masked" and group > 0
    late = may_be_late(problem)
    return Config("m", 128, 256, 64, 4, group=group, late=late, by_expert=by_expert)


def tile_rows(problem: MatmulProblem, rules: Rules = DEFAULT_RULES) -> int:
    """bm: the least that a mean expert fits in, with room for one that has more."""
    # The mean of a masked layout is a guess from above already, unless the caller gave it.
    guessed = problem.rows == "masked" and not problem.expected_rows
    least = mean_rows(problem) * (1 if guessed else rules.room)
    choices = [64, 128] if no_swap(problem) else [8, 16, 32, 64, 128]
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
    if not no_swap(problem) and block % 8 == 0 and block <= 64:
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
    if problem.scales or no_swap(problem) or not may_be_tall(problem):
        return False
    most = 184 if _has_vectors(problem, block) else 192
    tanh = problem.weights.activation == "gelu_tanh" and not problem.weights.gated
    most = 128 if tanh and problem.top_k else most  # more spill, beside a copy of rows
    return 64 < block <= most and block % 8 == 0 and block != 128


def _has_vectors(problem: MatmulProblem, bm: int) -> bool:
    """Whether the end of a swapped tile of many rows reads a bias, row weights or ids."""
    ids = tests_rows(problem) and not counts_rows(problem, bm)
    return bool(problem.weights.bias or problem.row_weights or ids)


def _cut(problem: MatmulProblem, tiles: Config, rules: Rules, lists: bool) -> Config:
    """The same tiles, of several heights where these were found to be faster: see above `_LESS_OF_144`."""
    few = problem.num_experts <= rules.few_experts
    if tiles.bm == 144:
        late = tiles.late or problem.rows == "ragged" and may_be_late(problem)
        early = problem.weights.gated and problem.k >= _LEAST_K_NOT_LATE and not few
        more = {"finds": True, "late": late and not early, "trims": not problem.top_k}
        in_turn = problem.weights.gated or problem.k >= _LEAST_K_IN_TURN
        in_turn = in_turn and not few and problem.w_columns <= _NARROW_OF_144
        deals = in_turn and more["late"] and problem.rows == "blocks"
        deals = deals and problem.k < _LEAST_K_NOT_DEALT
        less = _LESS_OF_DEALT if deals else _LESS_OF_144
        found = with_heights(problem, tiles, less, True, **more)
        mixes = found.cuts and problem.rows == "blocks" and not few
        group = 0 if found.heights and in_turn else found.group
        return found._replace(group=group, mixes=mixes, deals=mixes and deals)
    if few:
        plain = not (problem.weights.gated or problem.top_k)
        if tiles.bm < _LEAST_OF_HEIGHTS or not plain:
            return tiles
        return with_heights(problem, tiles, _LESS_OF_FEW, True, finds=True)
    if tiles.bm not in (184, 192) or not problem.consecutive:
        return tiles
    many = problem.num_experts >= _MANY_OF_HEIGHTS
    wanted = problem.weights.gated or problem.k <= _MOST_K_OF_HEIGHTS
    if wanted and problem.num_experts < _MANY_OF_FALLING:
        more = {"finds": True, "trims": not problem.top_k}
        found = with_heights(problem, tiles, _LESS_OF_MANY, True, **more) if many else tiles
        copied = problem.weights.gated and not problem.top_k
        group = _GROUP_OF_COPIED if copied or tiles.bm == 192 else _GROUP_OF_184
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
    found = _cut(problem, _whole(problem, 144, group_of(problem, rules)), rules, False)
    return found if found.cuts else None


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


def _takes_halves(problem: MatmulProblem, rules: Rules) -> bool:
    """Whether two CTAs share each tile of a gathered product of 8 rows: few and long ones leave many SMs idle
    in their last turn."""
    size = problem.num_experts == _EXPERTS_OF_HALVES and problem.n <= _MOST_N_OF_HALVES
    size = size and problem.k >= _LEAST_K_OF_HALVES and problem.k % (2 * 128) == 0
    short = problem.rows == "blocks" and problem.block_size == 8
    return rules.split and bool(problem.top_k) and short and size


def _narrow_shared(problem: MatmulProblem, rules: Rules, narrow: Config) -> Config:
    """Narrow tiles, each of one CTA or two; two in an SM, of the fewest forms, where two share those of one
    token."""
    tiles = shared(problem, rules, narrow)
    if problem.few_forms < 2 or tiles.split > 1:
        return tiles
    least = problem.smallest
    shares = shared(least, rules, _narrow(least)).split > 1
    return _narrow(problem, two_in_an_sm=True) if shares else tiles


def _narrow(problem: MatmulProblem, two_in_an_sm: bool = False) -> Config:
    """Swapped tiles of 64 columns of gate and up, by one warpgroup; 96 KiB of weights are asked for ahead, or
    twice as many where a tile has an SM for itself."""
    tiles = Config("swap", 8, 128, 128 if problem.k % 128 == 0 else 64, 3, group=0, computing=1)
    if two_in_an_sm or NUM_SMS < num_tiles(problem, tiles) <= 2 * NUM_SMS:
        tiles = tiles._replace(num_ctas=2 * NUM_SMS)  # all tiles at once, two of them in an SM
    else:
        tiles = tiles._replace(stages=6)
    return tiles if tiles.bk == 128 else tiles._replace(stages=2 * tiles.stages)


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
    """Whether the weights have so many columns (none: never), and a mean expert more rows than that."""
    pairs = problem.num_tokens * problem.top_k
    many = tile_rows(problem) >= 128 and pairs > rows * problem.num_experts
    many = many and not problem.scales
    return bool(columns and problem.top_k and many and problem.w_columns >= columns)
