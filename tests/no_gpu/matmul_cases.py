"""Which kernels of the grouped products `matmul.py` compiles: (what it is, the problem, tiles) of each.

Every form with every way to load, compute and store; names begin with the form.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from moe_align_jax._grouped_matmul.choose_tiles import config_for
from moe_align_jax._grouped_matmul.config import Config, with_heights
from moe_align_jax._grouped_matmul.problem import (
    E4M3,
    ActivationGradient,
    MatmulProblem,
    Scales,
    TokenSum,
    WeightGradient,
    Weights,
)
from moe_align_jax._moe_layer.plan import LayerProblem

type Cases = Iterator[tuple[str, Any, Any]]

_M = Config("m", 128, 256, 64, 4, late=True)
_N = Config("n", 64, 256, 64, 4)
_S = Config("swap", 16, 128, 128, 5, group=0)
_WIDE = Config("swap", 16, 256, 64, 6, group=0)

_SILU: dict[str, Any] = {"activation": "silu", "gated": True}
_GATHER: dict[str, Any] = {"num_tokens": 2048, "top_k": 2}
_RAGGED: dict[str, Any] = {"rows": "ragged", "num_groups": 8}
_MASKED: dict[str, Any] = {"rows": "masked", "max_rows": 512}
_UNEVEN: dict[str, Any] = {"rows": "masked", "max_rows": 500, "num_rows": 4000}
_ODD: dict[str, Any] = {"k": 200, "n": 136, "num_rows": 4093}


def problems() -> Cases:
    """Products, and those that end in each token's sum."""
    yield from _of_usual_tiles()
    yield from _of_other_tiles()
    yield from _of_heights()
    yield from _of_few_rows()
    yield from one_token()
    yield from token_sums()
    yield from e4m3_problems()


def _problem(
    rows: str = "blocks",
    block: int = 128,
    weights: dict[str, Any] | None = None,
    out: str = "bfloat16",
    **sizes: Any,
) -> MatmulProblem:
    given = {"num_rows": 4096, "k": 2048, "n": 1536, "num_experts": 8, "dtype": "bfloat16"}
    given |= {"out_dtype": out, "weights": Weights(**(weights or {}))} | sizes
    block_size = block if rows == "blocks" else 0
    return MatmulProblem(function="test", rows=rows, block_size=block_size, **given)


def _of_usual_tiles() -> Cases:
    """Every form with every way to load, compute and store."""
    for tiles, block in ((_M, 128), (_N, 64), (_S, 16)):
        gated = _WIDE if tiles is _S else tiles
        swapped, tall = tiles is _S, tiles is _M
        yield "plain", _problem(block=block), tiles
        yield "float16", _problem(block=block, dtype="float16", out="float16"), tiles
        yield "transposed", _problem(block=block, weights={"transposed": True}), tiles
        yield "ragged", _problem(**_RAGGED), tiles
        yield "masked", _problem(**_MASKED), tiles
        yield "masked, uneven", _problem(**_UNEVEN), tiles
        if not swapped:
            by_expert = tiles._replace(by_expert=True)
            yield "masked, by expert", _problem(**_MASKED), by_expert
            for options in ({}, {"transposed": True, "bias": True}, {"interleaved": True}):
                weights = _SILU | {"swiglu_limit": 7.0, "swiglu_alpha": 1.702} | options
                yield (
                    f"masked, by expert, {weights}",
                    _problem(**_UNEVEN, weights=weights),
                    by_expert,
                )
        yield "partial", _problem(block=block * 3 // 4), tiles
        if not tall:  # too many registers
            yield "odd", _problem(block=block, **_ODD), tiles
            yield (
                "odd, transposed",
                _problem(block=block, weights={"transposed": True}, **_ODD),
                tiles,
            )
            yield "odd, gathered", _problem(block=block, **_GATHER, **_ODD), tiles
            yield "odd, ragged", _problem(**_RAGGED, **_ODD), tiles
            yield "tiny", _problem(block=block, k=8, n=8, num_rows=37), tiles
        yield "gathered", _problem(block=block, **_GATHER), tiles
        for transposed in (False, True):
            for more in ({}, {"pair": True}, {"interleaved": True}):
                if swapped and more.get("interleaved") and not transposed:
                    continue
                weights = _SILU | more | {"transposed": transposed}
                yield (
                    f"gathered, {weights}",
                    _problem(block=block, weights=weights, **_GATHER),
                    gated,
                )
                weights = weights | {"bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702}
                yield (
                    f"row weights, {weights}",
                    _problem(block=block, weights=weights, row_weights=True),
                    gated,
                )
        for activation in ("gelu", "gelu_tanh", "relu2")[tall:]:
            weights = {"activation": activation, "gated": True}
            yield f"{activation}", _problem(block=block, weights=weights), gated
        if not tall:
            yield "odd, gated", _problem(block=block, weights=_SILU, **_ODD), gated
        if not swapped:
            plain = tiles._replace(late=False)
            yield "float32", _problem(block=block, out="float32"), plain
            yield "float32, ragged", _problem(**_RAGGED, out="float32"), plain


def _of_other_tiles() -> Cases:
    """Other heights, a k that several CTAs share, and tiles that are not late."""
    yield "not late", _problem(), _M._replace(late=False)
    yield "not late, gathered", _problem(**_GATHER), _M._replace(late=False)
    yield "tall", _problem(block=256), Config("m", 256, 128, 64, 4, late=True)
    yield "tall, not late", _problem(block=256), Config("m", 256, 128, 64, 4)
    for bm, stages in ((8, 5), (24, 5), (32, 5), (40, 5), (64, 4)):
        yield f"{bm}", _problem(block=bm), _S._replace(bm=bm, stages=stages)
        more = _WIDE._replace(bm=bm, stages=6 if bm < 32 else 5)
        yield f"{bm}, gated", _problem(block=bm, weights=_SILU, **_GATHER), more
    yield "pairs", _problem(block=1, weights=_SILU, **_GATHER), _WIDE._replace(bm=8)
    for transposed in (False, True):
        weights = {"transposed": transposed, "bias": True}
        given = _problem(block=1, weights=_SILU | weights, zero_padding=False, **_GATHER)
        yield "k in 4, gated, pairs", given, _WIDE._replace(bm=8, split=4, num_ctas=128)
        yield "k in 2", _problem(block=16, weights=weights), _S._replace(split=2)
    for bm, stages in ((48, 5), (80, 4), (96, 4)):
        given = _problem(block=bm, weights=_SILU | {"transposed": True}, **_GATHER)
        yield f"{bm}, gated", given, _WIDE._replace(bm=bm, stages=stages)
        yield f"{bm}", _problem(block=bm), _S._replace(bm=bm, stages=stages - 1)
    for bm, stages in ((144, 4), (176, 3), (192, 3)):
        tiles = Config("swap", bm, 256, 64, stages, group=4, lag=stages - 2)
        yield f"{bm}, ragged", _problem(**_RAGGED), tiles
        yield f"{bm}, masked", _problem(**_MASKED), tiles
        for transposed in (False, True):
            weights = {"transposed": transposed}
            yield f"{bm}", _problem(block=bm, weights=weights), tiles._replace(late=bm == 144)
            weights = _SILU | weights | {"bias": bm < 192}  # more rows and a bias spill
            yield f"{bm}, gated", _problem(block=bm, weights=weights, **_GATHER), tiles


def _of_heights() -> Cases:
    """Tiles of several heights."""
    for bm, transposed, zeros in ((192, False, True), (184, True, False), (176, True, True)):
        given = _problem(block=bm, weights={"transposed": transposed}, zero_padding=zeros)
        less = (8, 16, 24, 40) if bm == 184 else (8, 16, 40)
        tiles = Config("swap", bm, 256, 64, 3, lag=1)
        yield f"{bm}, heights", given, with_heights(given, tiles, less, exact=True)
    for transposed, zeros in ((False, False), (False, True), (True, False), (True, True)):
        given = _problem(block=144, weights={"transposed": transposed}, zero_padding=zeros)
        for late in (True, False):
            tiles = Config("swap", 144, 256, 64, 4, group=4, lag=2)
            more = {"finds": True, "late": late, "trims": late}
            tiles = with_heights(given, tiles, (8, 16, 24, 40), True, **more)
            yield "144, found heights", given, tiles
    for groups, transposed in ((8, False), (128, True), (256, False), (256, True)):
        weights = {"transposed": transposed}
        given = _problem(**_RAGGED | {"num_groups": groups}, weights=weights)
        tiles = Config("swap", 144, 256, 64, 4, group=0 if transposed else 4)
        more = {"finds": True, "late": True, "trims": True}
        tiles = with_heights(given, tiles, (8, 16, 24, 40), True, **more)
        yield f"144, found heights of {groups} groups", given, tiles
    for group, more in ((0, {}), (4, _GATHER)):
        sizes = {"num_experts": 128, "expected_rows": 144, "zero_padding": False, **more}
        given = _problem(block=144, **sizes)
        tiles = config_for(given)._replace(group=group, mixes=True, deals=False)
        yield "144, found heights, mixed", given, tiles
    for more in (
        {},
        {"zero_padding": False},
        {"zero_padding": False, **_GATHER, "weights": _SILU, "n": 768},
    ):
        given = _problem(block=144, num_experts=128, expected_rows=144, **more)
        tiles = config_for(given)
        assert tiles.deals
        yield "144, found heights, dealt", given, tiles
    for bm, transposed, zeros in ((192, False, True), (184, True, False), (176, True, True)):
        given = _problem(block=bm, weights={"transposed": transposed}, zero_padding=zeros)
        tiles = Config("swap", bm, 256, 64, 3, lag=1)
        tiles = with_heights(given, tiles, (8, 16, 40), bm < 192, finds=True)
        yield f"{bm}, found heights", given, tiles
    alpha = _SILU | {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
    turns = {"interleaved": True, "transposed": True}
    for more in (
        *(_SILU | each for each in ({}, {"transposed": True}, turns, {"pair": True})),
        *(alpha | each for each in (turns, {"pair": True, "transposed": True})),
        *({"activation": each, "gated": True} for each in ("gelu_tanh", "relu2", None)),
        *({"activation": each} for each in ("silu", "relu2", None)),
        {"transposed": True},
    ):
        sizes = {"num_experts": 128, "expected_rows": 144, "zero_padding": False, **_GATHER}
        for out in ("bfloat16", "float16"):
            given = _problem(block=144, weights=more, out=out, **sizes | {"dtype": out})
            yield f"144, heights by default, {out}, {more}", given, config_for(given)
    given = _problem(block=144, weights={"activation": "gelu_tanh"}, zero_padding=False, **_GATHER)
    yield "144, gelu_tanh of all columns", given, config_for(given)
    for bm, late in ((144, True), (144, False), (176, False), (184, False)):
        for more in ({}, {"transposed": True}, {"pair": True}):
            given = _problem(block=bm, weights=_SILU | more, zero_padding=False, **_GATHER)
            stages = 4 if bm == 144 else 3
            tiles = Config("swap", bm, 256, 64, stages, group=4, lag=stages - 2)
            tiles = with_heights(given, tiles, (8, 16, 24), True, finds=True, late=late)
            yield f"{bm}, found heights, gated", given, tiles
    for bm, weights in ((184, {}), (184, {"transposed": True}), (192, {}), (192, _SILU)):
        given = _problem(block=bm, weights=weights, zero_padding=False, **_GATHER)
        tiles = Config("swap", bm, 256, 64, 3, lag=1)
        tiles = with_heights(given, tiles, (8, 16, 24, 40), True, finds=True)
        yield f"{bm}, found heights, gathered, {weights}", given, tiles
    for transposed in (False, True):
        given = _problem(block=184, weights={"transposed": transposed}, zero_padding=False)
        tiles = Config("swap", 184, 256, 64, 3, lag=1)
        tiles = with_heights(given, tiles, (8, 16, 24, 40), falling=True, trims=True)
        yield "184, heights, falling", given, tiles


def _of_few_rows() -> Cases:
    """Late swapped tiles, and tiles for few rows: of one warpgroup, or of many columns of x in a stage."""
    yield "two of 96", _problem(block=192), Config("swap", 96, 256, 64, 4, group=8, late=True)
    tiles = Config("swap", 144, 256, 64, 4, group=4, late=True)
    yield "144, late, masked", _problem(**_UNEVEN), tiles
    yield "144, late, ragged", _problem(**_RAGGED), tiles
    narrow = _S._replace(bm=8, bn=128, bk=64, stages=6, computing=1, split=4, num_ctas=128)
    lie = _SILU | {"transposed": True}
    for bk, stages in ((64, 6), (128, 3)):
        given = _problem(block=1, weights=lie, **_GATHER)
        yield (
            f"pairs, {bk} of k, one warpgroup",
            given,
            narrow._replace(bk=bk, stages=stages, lag=1),
        )
    narrow = _S._replace(bm=8, bn=64, stages=4, lag=1, computing=1, num_ctas=264)
    more = {"weights": {"transposed": True}, "zero_padding": False}
    yield "pairs, one warpgroup", _problem(block=1, **more), narrow
    for bm in (8, 24):
        deep = _WIDE._replace(bm=bm, bk=128, stages=3, lag=1)
        for more in (
            {},
            {"pair": True},
            {"interleaved": True},
            {"bias": True, "swiglu_limit": 7.0},
        ):
            lie = _SILU | more | {"transposed": True}
            given = _problem(block=bm, weights=lie, **_GATHER)
            yield f"128 of k, {lie}", given, deep
            if bm == 8:
                yield f"128 of k in 2, {lie}", given, deep._replace(split=2)
        lie = _SILU | {"transposed": True}
        yield "128 of k, rows", _problem(block=bm, weights=lie, row_weights=True), deep
    given = _problem(block=1, weights=_SILU | {"transposed": True}, **_GATHER)
    deep = _WIDE._replace(bm=8, bk=128, stages=3, lag=1)
    for split, ctas in ((2, 132), (4, 128)):
        yield f"128 of k in {split}", given, deep._replace(split=split, num_ctas=ctas)
    left: dict[str, Any] = {"zero_padding": False, "leaves_padding": True}
    for bm, bk, stages in ((16, 128, 3), (48, 64, 5), (80, 64, 4)):
        given = _problem(block=bm, weights=_SILU | {"transposed": True}, **_GATHER, **left)
        lag = min(2, stages - 2)
        yield f"{bm}, gated, left", given, _WIDE._replace(bm=bm, bk=bk, stages=stages, lag=lag)
        tiles = _S._replace(bm=bm, stages=4 if bm < 80 else 3)
        yield f"{bm}, left", _problem(block=bm, **left), tiles


def one_token() -> Cases:
    """Both products of layers of one token, whose rows are known to be all in use, in their usual tiles."""
    for sizes in ((8, 2048, 768, 128), (8, 7168, 256, 256), (2, 4096, 14336, 8)):
        for transposed in (True, False):
            weights = Weights(transposed, activation="silu", gated=True)
            given = (1, *sizes, "bfloat16", "bfloat16", weights, False, False)
            layer = LayerProblem(*given, 1, sizes[0], True, False)
            for which, product in (("gate and up", layer.first), ("down", layer.second)):
                name = f"one token, {which}, {sizes[3]} experts, transposed {transposed}"
                yield name, product, config_for(product, "NVIDIA H200")
    swiglu = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
    for more in ({"pair": True}, {"interleaved": True}, {"bias": True, **swiglu}):
        for tokens, hidden in ((1, 7168), (4, 7168), (8, 7168), (1, 2880), (8, 2880)):
            weights = Weights(True, activation="silu", gated=True, **more)
            given = (tokens, 8, hidden, 256, 256, "bfloat16", "float16", weights, False, False)
            product = LayerProblem(*given, 1, 8 * tokens, True, False).first
            name = f"few tokens, {tokens}, {hidden}, {more}"
            yield name, product, config_for(product, "NVIDIA H200")
    for top_k, hidden, ffn, experts, transposed, more in (
        (4, 2880, 2880, 128, True, {"interleaved": True, "bias": True, **swiglu}),
        (1, 2048, 2048, 32, True, {}),
        (1, 2048, 2048, 32, False, {}),
    ):
        weights = Weights(transposed, activation="silu", gated=True, **more)
        given = (8, top_k, hidden, ffn, experts, "bfloat16", "bfloat16", weights, bool(more), False)
        layer = LayerProblem(*given, 1, 8 * top_k, True, False, few_forms=2)
        for which, product in (("gate and up", layer.first), ("down", layer.second)):
            name = f"few forms, 8 tokens, {which}, {experts} experts, transposed {transposed}"
            yield name, product, config_for(product, "NVIDIA H200")


def token_sums() -> Cases:
    """Second products of layers of few tokens, which sum up each token's pairs."""
    from moe_align_jax._grouped_matmul.token_sum_config import Tiles, refused

    def problem(tokens, top_k, n, k, experts, transposed=True, bias=False, out="bfloat16"):
        dtype = "float16" if out == "float16" else "bfloat16"
        given = (tokens * top_k, k, n, experts, dtype, dtype, Weights(transposed, bias=bias))
        product = MatmulProblem("test", "blocks", *given, block_size=1, num_pairs=tokens * top_k)
        return TokenSum(product, tokens, top_k, out)

    models = (8, 2048, 768, 128), (8, 7168, 256, 256), (2, 4096, 14336, 8), (6, 2880, 2880, 128)
    for sizes in models:
        for transposed, out in ((True, "bfloat16"), (False, "float16"), (True, "float32")):
            for tokens in (1, 2):
                for tiles in (Tiles(1, 256, 3), Tiles(2, 128, 6), Tiles(4, 384, 2)):
                    bias = sizes[0] == 6
                    given = problem(tokens, *sizes, transposed, bias, out)
                    if not refused(given, tiles):
                        kind = f"transposed {transposed}, {out}"
                        yield f"token sum, {tokens}, {sizes}, {kind}", given, tiles


def e4m3_problems() -> Cases:
    """Every way to load scales, and the tiles that sizes of e4m3 operands get."""
    masked: dict[str, Any] = {"rows": "masked", "max_rows": 512, "num_rows": 4096}
    columns, rows = Scales("column_major", "blocks", pitch=4096), Scales("row_major", "blocks")

    def case(what, block=128, rows="blocks", weights=None, scales=columns, out="bfloat16", **sizes):
        given = {"num_rows": 4096, "k": 2048, "n": 1536, "num_experts": 8} | sizes
        lie = Weights(**({"transposed": True} | (weights or {})))
        given |= {"dtype": E4M3, "out_dtype": out, "weights": lie, "scales": scales}
        size = block if rows == "blocks" else 0
        problem = MatmulProblem(function="test", rows=rows, block_size=size, **given)
        return f"e4m3 {what}", problem, config_for(problem)

    for block in (16, 64, 128, 192):
        yield case(f"{block}", block)
        yield case(f"{block}, silu, gathered", block, weights=_SILU, scales=rows, **_GATHER)
        more = _SILU | {"bias": True, "interleaved": True, "swiglu_limit": 7.0}
        yield case(f"{block}, swiglu", block, weights=more, row_weights=True, scales=rows)
    yield case("pair", weights=_SILU | {"pair": True})
    yield case("packed", scales=columns._replace(packed=True))
    yield case("packed, gathered", 16, scales=rows._replace(packed=True), **_GATHER)
    yield case("float32", out="float32")
    yield case("single scales", scales=Scales("tensor", "tensor"))
    yield case("partial", 100, scales=rows)
    for most in (512, 500):
        sizes = {"rows": "masked", "max_rows": most, "num_rows": 8 * most}
        yield case(f"masked {most}", scales=columns._replace(pitch=most), **sizes)
        yield case(f"masked {most}, rows", scales=rows, weights=_SILU, **sizes)
    sizes = {"rows": "masked", "max_rows": 64, "num_rows": 512}
    yield case("masked 64", scales=columns._replace(pitch=64), **sizes)
    yield case("masked 64, rows, silu", scales=rows, weights=_SILU, **sizes)
    # Many rows of each expert, and a short K: its loops, where unrolled, took more registers than there are.
    for experts, most, k, n in ((2, 768, 1024, 192), (6, 4096, 2048, 4096), (16, 4096, 1024, 4096)):
        sizes = {
            "num_experts": experts,
            "num_rows": experts * most,
            "max_rows": most,
            "k": k,
            "n": n,
        }
        more = {"rows": "masked", "expected_rows": min(most, 1024)}
        yield case("masked, many", scales=columns._replace(pitch=most), **more, **sizes)
    # Tiles of clusters: their loop over k takes two steps in a turn, by default outside the masked layout.
    packed, single = columns._replace(packed=True), Scales("tensor", "tensor")
    many_rows: dict[str, Any] = {"num_rows": 32768, "k": 2048, "n": 7168}
    of_most = many_rows | {"rows": "masked", "max_rows": 4096, "expected_rows": 1024}
    yield case("weights shared, long", **many_rows | {"k": 7168})
    yield case("masked, long", scales=columns, **of_most | {"k": 7168})
    yield case("masked, mean 192", scales=columns, **of_most | {"expected_rows": 192})
    # The decode step of 8 experts of a GPU, 128 rows each.
    yield case(
        "masked, decode", scales=columns, **of_most | {"expected_rows": 128, "num_experts": 8}
    )
    for each in (columns, rows, packed, rows._replace(packed=True), single):
        yield case("weights shared, scales", scales=each, **many_rows)
        yield case("masked, scales", scales=each, **of_most)
    for mean in (192, 1024):
        given = of_most | {"expected_rows": mean}
        name, problem, tiles = case("masked, paired", scales=columns, **given)
        yield name, problem, tiles._replace(by_expert=not tiles.by_expert, group=8)
        if mean == 192:
            yield name, problem, tiles._replace(trims=not tiles.trims)
        yield name, problem, tiles._replace(paired=True, peeled=False)
        yield name, problem, tiles._replace(paired=False, peeled=True)
    for mean in (32, 60, 80, 100):  # swapped tiles of 48 to 128 rows
        for scales in (columns, rows, packed, single):
            given = of_most | {"expected_rows": mean, "num_experts": 8, "k": 7168}
            yield case("masked, swapped", scales=scales, **given)
    for mean in (28, 40, 46, 52, 64, 70, 76, 88):  # and of the heights between
        given = of_most | {"expected_rows": mean, "num_experts": 8, "k": 7168}
        yield case("masked, swapped", scales=columns, **given)
    # Tiles of two shapes, whose loops are two, and a short K, whose loops may be unrolled.
    for k, n, experts in ((7168, 6144, 32), (2048, 4096, 6), (1024, 256, 1)):
        sizes = {"k": k, "n": n, "num_experts": experts, "num_rows": experts * 4096}
        for paired in (False, True):
            given = of_most | sizes | {"expected_rows": 192}
            name, problem, tiles = case("masked, of two shapes", scales=columns, **given)
            tiles = Config("m", 128, 192, 128, 4, group=8, ahead=True, skips=True, sharing=2)
            tiles = tiles._replace(shared="w", finds=True, by_expert=True, turned=True)
            yield name, problem, tiles._replace(paired=paired)
    for more in ({"out": "float32"}, {"weights": {"bias": True}, "row_weights": True}):
        yield case(f"weights shared, {more}", **more, **many_rows)
    for block in (8, 32, 40):
        yield case(f"{block}, silu", block, weights=_SILU)
    pairs = {"num_rows": 8, "num_tokens": 1, "top_k": 8, "n": 256, "num_experts": 128}
    yield case("pairs, silu", 1, weights=_SILU, scales=rows, **pairs)
    tall = Config("m", 192, 128, 128, 4, computing=3, skips=True)
    broad = Config("m", 128, 192, 128, 4, skips=True, sharing=2, ahead=True, shared="w")
    shared = tall._replace(sharing=2, ahead=True)
    swap = Config("swap", 32, 128, 128, 6, group=0, ahead=True, finds=True)
    for few in (swap, swap._replace(bn=64, computing=1, stages=8), broad._replace(finds=True)):
        yield *case("masked, finds", scales=columns._replace(pitch=512), **masked)[:2], few
    many = masked | {"num_rows": 32 * 512, "num_experts": 32}
    yield *case("masked, finds 32", scales=columns._replace(pitch=512), **many)[:2], swap
    for tiles in (Config("m", 128, 128, 128, 5, late=True, skips=True), tall, shared, broad):
        yield *case("skips, masked", scales=columns._replace(pitch=512), **masked)[:2], tiles
    for more in ({}, {"out": "float32"}, {"weights": {"bias": True}, "row_weights": True}):
        for each in (columns, rows, packed, rows._replace(packed=True), single):
            given = more | {"num_rows": 8192, "num_experts": 32}
            name, problem, tiles = case("halves", scales=each, **given)
            assert tiles.skips
            yield name, problem, tiles


def weight_gradients() -> Cases:
    """As `problems`, of weight gradients: each way to load either operand, late and not."""
    from moe_align_jax._grouped_matmul.weight_gradient_tiles import Tiles

    def problem(rows="blocks", gathered=None, out="bfloat16", **sizes):
        given = {"num_rows": 4096, "k": 2048, "n": 1536, "num_experts": 8, "dtype": "bfloat16"}
        given |= {"block_size": 128} if rows == "blocks" else {}
        given |= {"num_tokens": 1024, "top_k": 2} if gathered else {}
        layout = MatmulProblem("test", rows, **given | {"out_dtype": out} | sizes)
        return WeightGradient(layout, gathered)

    late, early = Tiles(short=True), Tiles(short=True, late=False)
    ragged: dict[str, Any] = {"rows": "ragged", "num_groups": 8}
    odd: dict[str, Any] = {"k": 200, "n": 136, "num_rows": 4093}
    for out, tiles in (("bfloat16", late), ("bfloat16", early), ("float32", early)):
        for gathered in (None, "lhs", "rhs"):
            yield (
                f"gradient, {gathered} gathered, {out}",
                problem(gathered=gathered, out=out),
                tiles,
            )
        yield f"gradient, ragged, {out}", problem(out=out, **ragged), tiles
        yield f"gradient, odd, {out}", problem(out=out, gathered="rhs", **odd), tiles
    yield "gradient, masked", problem("masked", max_rows=512), late
    yield "gradient, masked, uneven", problem("masked", max_rows=500, num_rows=4000), late
    yield "gradient, float16", problem(dtype="float16", out="float16"), late
    yield "gradient, tiny", problem(k=8, n=8, num_rows=37, **ragged), late
    yield "gradient, one piece", problem(k=64, n=64), late
    yield "gradient, wide", problem(n=8192), late._replace(group=16, back=True)
    for gathered in (None, "rhs"):
        given, tall = problem(gathered=gathered), late._replace(bm=256, bn=128)
        yield "gradient, whole steps", given, late._replace(short=False)
        yield f"gradient, {gathered} gathered, tall", given, tall
    for gathered, out in ((None, "bfloat16"), ("lhs", "bfloat16"), (None, "float32")):
        given = problem(gathered=gathered, out=out, k=768, n=2048)
        level = late._replace(level=True, late=out == "bfloat16")
        yield f"gradient, level, {gathered} gathered, {out}", given, level
    yield "gradient, level, ragged", problem(k=768, **ragged), late._replace(level=True)
    cut = late._replace(pieces=5)
    for name, given in (
        ("bfloat16", problem()),
        ("rhs gathered", problem(gathered="rhs")),
        ("odd", problem(**odd)),
    ):
        yield f"gradient, {name}, of cut experts", given, cut
        yield f"gradient, {name}, pieces", given, PiecesOf(cut)
    given = problem(out="float32")
    yield "gradient, float32, of cut experts", given, cut._replace(late=False)


class PiecesOf(NamedTuple):
    """The launch that sums the pieces, of a weight gradient's two."""

    tiles: Any

    @property
    def name(self) -> str:
        return self.tiles.name


def activation_gradients() -> Cases:
    """As `problems`, of products that end in the derivative of the activation."""
    from moe_align_jax._grouped_matmul.activation_gradient_kernel import TILE

    for transposed in (True, False):
        given = {"num_rows": 4096, "k": 2048, "n": 768, "num_experts": 8, "block_size": 128}
        given |= {"num_tokens": 1024, "top_k": 2, "zero_padding": False}
        weights = Weights(transposed=transposed)
        product = MatmulProblem(
            *("test", "blocks"), **given, dtype="bfloat16", out_dtype="bfloat16", weights=weights
        )
        first = Weights(not transposed, activation="silu", gated=True)
        yield f"activation, transposed {transposed}", ActivationGradient(product, first), TILE


def spreads() -> Cases:
    """As `problems`, of copies of tokens' rows to those of their pairs."""
    from moe_align_jax._grouped_matmul.spread import Spread, config_for

    for sizes in (
        (8192, 8, 83840, 2048),
        (8192, 2, 17912, 4096),
        (1, 64, 700, 64),
        (99, 4, 900, 2880),
    ):
        for dtype in ("bfloat16", "float16"):
            problem = Spread(*sizes, dtype)
            yield f"{problem}", problem, config_for(problem)
