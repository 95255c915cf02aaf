"""Compiles the kernels of the grouped matrix multiplication, and of its weights' gradient, without a GPU.

    python -m tests.no_gpu.matmul [PART_OF_A_NAME] [--sample N]

Of every form with every way to load, compute and store: nothing spills, wgmma is never serialised, the ring
fits into shared memory, and a kernel compiles in less than two seconds of CPU time, one of tiles of several
heights in three. Exit code 1 otherwise.
"""

import argparse
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.no_gpu import ptx, script, toolchain, worker

MAX_SECONDS = 2.0
MAX_SECONDS_OF_HEIGHTS = 3.0  # a loop over k for each height
# Kernels that ptxas and the disassembler are given together.
_AT_ONCE = 12


def problems() -> Iterator[tuple[str, Any, Any]]:
    """(What it is, the problem, tiles) of each kernel; names begin with the form."""
    from moe_align_jax._grouped_matmul.choose_tiles import config_for
    from moe_align_jax._grouped_matmul.config import Config, with_heights
    from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights

    m = Config("m", 128, 256, 64, 4, late=True)
    n = Config("n", 64, 256, 64, 4)
    s = Config("swap", 16, 128, 128, 5, group=0)
    wide = Config("swap", 16, 256, 64, 6, group=0)
    silu: dict[str, Any] = {"activation": "silu", "gated": True}
    gather: dict[str, Any] = {"num_tokens": 2048, "top_k": 2}

    def problem(rows="blocks", block=128, weights=None, out="bfloat16", **sizes):
        given = {"num_rows": 4096, "k": 2048, "n": 1536, "num_experts": 8, "dtype": "bfloat16"}
        given |= {"out_dtype": out, "weights": Weights(**(weights or {}))} | sizes
        block_size = block if rows == "blocks" else 0
        return MatmulProblem(function="test", rows=rows, block_size=block_size, **given)

    ragged: dict[str, Any] = {"rows": "ragged", "num_groups": 8}
    masked: dict[str, Any] = {"rows": "masked", "max_rows": 512}
    uneven: dict[str, Any] = {"rows": "masked", "max_rows": 500, "num_rows": 4000}
    odd: dict[str, Any] = {"k": 200, "n": 136, "num_rows": 4093}
    for tiles, block in ((m, 128), (n, 64), (s, 16)):
        gated = wide if tiles is s else tiles
        swapped, tall = tiles is s, tiles is m
        yield "plain", problem(block=block), tiles
        yield "float16", problem(block=block, dtype="float16", out="float16"), tiles
        yield "transposed", problem(block=block, weights={"transposed": True}), tiles
        yield "ragged", problem(**ragged), tiles
        yield "masked", problem(**masked), tiles
        yield "masked, uneven", problem(**uneven), tiles
        if not swapped:
            by_expert = tiles._replace(by_expert=True)
            yield "masked, by expert", problem(**masked), by_expert
            for options in ({}, {"transposed": True, "bias": True}, {"interleaved": True}):
                weights = silu | {"swiglu_limit": 7.0, "swiglu_alpha": 1.702} | options
                yield f"masked, by expert, {weights}", problem(**uneven, weights=weights), by_expert
        yield "partial", problem(block=block * 3 // 4), tiles
        if not tall:  # too many registers
            yield "odd", problem(block=block, **odd), tiles
            yield (
                "odd, transposed",
                problem(block=block, weights={"transposed": True}, **odd),
                tiles,
            )
            yield "odd, gathered", problem(block=block, **gather, **odd), tiles
            yield "odd, ragged", problem(**ragged, **odd), tiles
            yield "tiny", problem(block=block, k=8, n=8, num_rows=37), tiles
        yield "gathered", problem(block=block, **gather), tiles
        for transposed in (False, True):
            for more in ({}, {"pair": True}, {"interleaved": True}):
                if swapped and more.get("interleaved") and not transposed:
                    continue
                weights = silu | more | {"transposed": transposed}
                yield f"gathered, {weights}", problem(block=block, weights=weights, **gather), gated
                weights = weights | {"bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702}
                yield (
                    f"row weights, {weights}",
                    problem(block=block, weights=weights, row_weights=True),
                    gated,
                )
        for activation in ("gelu", "gelu_tanh", "relu2")[tall:]:
            weights = {"activation": activation, "gated": True}
            yield f"{activation}", problem(block=block, weights=weights), gated
        if not tall:
            yield "odd, gated", problem(block=block, weights=silu, **odd), gated
        if not swapped:
            plain = tiles._replace(late=False)
            yield "float32", problem(block=block, out="float32"), plain
            yield "float32, ragged", problem(**ragged, out="float32"), plain
    yield "not late", problem(), m._replace(late=False)
    yield "not late, gathered", problem(**gather), m._replace(late=False)
    yield "tall", problem(block=256), Config("m", 256, 128, 64, 4, late=True)
    yield "tall, not late", problem(block=256), Config("m", 256, 128, 64, 4)
    for bm, stages in ((8, 5), (24, 5), (32, 5), (40, 5), (64, 4)):
        yield f"{bm}", problem(block=bm), s._replace(bm=bm, stages=stages)
        more = wide._replace(bm=bm, stages=6 if bm < 32 else 5)
        yield f"{bm}, gated", problem(block=bm, weights=silu, **gather), more
    yield "pairs", problem(block=1, weights=silu, **gather), wide._replace(bm=8)
    for transposed in (False, True):
        weights = {"transposed": transposed, "bias": True}
        given = problem(block=1, weights=silu | weights, zero_padding=False, **gather)
        yield "k in 4, gated, pairs", given, wide._replace(bm=8, split=4, num_ctas=128)
        yield "k in 2", problem(block=16, weights=weights), s._replace(split=2)
    for bm, stages in ((48, 5), (80, 4), (96, 4)):
        given = problem(block=bm, weights=silu | {"transposed": True}, **gather)
        yield f"{bm}, gated", given, wide._replace(bm=bm, stages=stages)
        yield f"{bm}", problem(block=bm), s._replace(bm=bm, stages=stages - 1)
    for bm, stages in ((144, 4), (176, 3), (192, 3)):
        tiles = Config("swap", bm, 256, 64, stages, group=4, lag=stages - 2)
        yield f"{bm}, ragged", problem(**ragged), tiles
        yield f"{bm}, masked", problem(**masked), tiles
        for transposed in (False, True):
            weights = {"transposed": transposed}
            yield f"{bm}", problem(block=bm, weights=weights), tiles._replace(late=bm == 144)
            weights = silu | weights | {"bias": bm < 192}  # more rows and a bias spill
            yield f"{bm}, gated", problem(block=bm, weights=weights, **gather), tiles
    for bm, transposed, zeros in ((192, False, True), (184, True, False), (176, True, True)):
        given = problem(block=bm, weights={"transposed": transposed}, zero_padding=zeros)
        less = (8, 16, 24, 40) if bm == 184 else (8, 16, 40)
        tiles = Config("swap", bm, 256, 64, 3, lag=1)
        yield f"{bm}, heights", given, with_heights(given, tiles, less, exact=True)
    for transposed, zeros in ((False, False), (False, True), (True, False), (True, True)):
        given = problem(block=144, weights={"transposed": transposed}, zero_padding=zeros)
        for late in (True, False):
            tiles = Config("swap", 144, 256, 64, 4, group=4, lag=2)
            more = {"finds": True, "late": late, "trims": late}
            tiles = with_heights(given, tiles, (8, 16, 24, 40), True, **more)
            yield "144, found heights", given, tiles
    for groups, transposed in ((8, False), (128, True), (256, False), (256, True)):
        weights = {"transposed": transposed}
        given = problem(**ragged | {"num_groups": groups}, weights=weights)
        tiles = Config("swap", 144, 256, 64, 4, group=0 if transposed else 4)
        more = {"finds": True, "late": True, "trims": True}
        tiles = with_heights(given, tiles, (8, 16, 24, 40), True, **more)
        yield f"144, found heights of {groups} groups", given, tiles
    for group, more in ((0, {}), (4, gather)):
        sizes = {"num_experts": 128, "expected_rows": 144, "zero_padding": False, **more}
        given = problem(block=144, **sizes)
        tiles = config_for(given)._replace(group=group, mixes=True, deals=False)
        yield "144, found heights, mixed", given, tiles
    for more in (
        {},
        {"zero_padding": False},
        {"zero_padding": False, **gather, "weights": silu, "n": 768},
    ):
        given = problem(block=144, num_experts=128, expected_rows=144, **more)
        tiles = config_for(given)
        assert tiles.deals
        yield "144, found heights, dealt", given, tiles
    for bm, transposed, zeros in ((192, False, True), (184, True, False), (176, True, True)):
        given = problem(block=bm, weights={"transposed": transposed}, zero_padding=zeros)
        tiles = Config("swap", bm, 256, 64, 3, lag=1)
        tiles = with_heights(given, tiles, (8, 16, 40), bm < 192, finds=True)
        yield f"{bm}, found heights", given, tiles
    alpha = silu | {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
    turns = {"interleaved": True, "transposed": True}
    for more in (
        *(silu | each for each in ({}, {"transposed": True}, turns, {"pair": True})),
        *(alpha | each for each in (turns, {"pair": True, "transposed": True})),
        *({"activation": each, "gated": True} for each in ("gelu_tanh", "relu2", None)),
        *({"activation": each} for each in ("silu", "relu2", None)),
        {"transposed": True},
    ):
        sizes = {"num_experts": 128, "expected_rows": 144, "zero_padding": False, **gather}
        for out in ("bfloat16", "float16"):
            given = problem(block=144, weights=more, out=out, **sizes | {"dtype": out})
            yield f"144, heights by default, {out}, {more}", given, config_for(given)
    given = problem(block=144, weights={"activation": "gelu_tanh"}, zero_padding=False, **gather)
    yield "144, gelu_tanh of all columns", given, config_for(given)
    for bm, late in ((144, True), (144, False), (176, False), (184, False)):
        for more in ({}, {"transposed": True}, {"pair": True}):
            given = problem(block=bm, weights=silu | more, zero_padding=False, **gather)
            stages = 4 if bm == 144 else 3
            tiles = Config("swap", bm, 256, 64, stages, group=4, lag=stages - 2)
            tiles = with_heights(given, tiles, (8, 16, 24), True, finds=True, late=late)
            yield f"{bm}, found heights, gated", given, tiles
    for transposed in (False, True):
        given = problem(block=184, weights={"transposed": transposed}, zero_padding=False)
        tiles = Config("swap", 184, 256, 64, 3, lag=1)
        tiles = with_heights(given, tiles, (8, 16, 24, 40), falling=True, trims=True)
        yield "184, heights, falling", given, tiles
    yield "two of 96", problem(block=192), Config("swap", 96, 256, 64, 4, group=8, late=True)
    tiles = Config("swap", 144, 256, 64, 4, group=4, late=True)
    yield "144, late, masked", problem(**uneven), tiles
    yield "144, late, ragged", problem(**ragged), tiles
    narrow = s._replace(bm=8, bn=128, bk=64, stages=6, computing=1, split=4, num_ctas=128)
    lie = silu | {"transposed": True}
    for bk, stages in ((64, 6), (128, 3)):
        given = problem(block=1, weights=lie, **gather)
        yield (
            f"pairs, {bk} of k, one warpgroup",
            given,
            narrow._replace(bk=bk, stages=stages, lag=1),
        )
    narrow = s._replace(bm=8, bn=64, stages=4, lag=1, computing=1, num_ctas=264)
    more = {"weights": {"transposed": True}, "zero_padding": False}
    yield "pairs, one warpgroup", problem(block=1, **more), narrow
    for bm in (8, 24):
        deep = wide._replace(bm=bm, bk=128, stages=3, lag=1)
        for more in (
            {},
            {"pair": True},
            {"interleaved": True},
            {"bias": True, "swiglu_limit": 7.0},
        ):
            lie = silu | more | {"transposed": True}
            given = problem(block=bm, weights=lie, **gather)
            yield f"128 of k, {lie}", given, deep
            if bm == 8:
                yield f"128 of k in 2, {lie}", given, deep._replace(split=2)
        lie = silu | {"transposed": True}
        yield "128 of k, rows", problem(block=bm, weights=lie, row_weights=True), deep
    given = problem(block=1, weights=silu | {"transposed": True}, **gather)
    deep = wide._replace(bm=8, bk=128, stages=3, lag=1)
    for split, ctas in ((2, 132), (4, 128)):
        yield f"128 of k in {split}", given, deep._replace(split=split, num_ctas=ctas)
    left: dict[str, Any] = {"zero_padding": False, "leaves_padding": True}
    for bm, bk, stages in ((16, 128, 3), (48, 64, 5), (80, 64, 4)):
        given = problem(block=bm, weights=silu | {"transposed": True}, **gather, **left)
        lag = min(2, stages - 2)
        yield f"{bm}, gated, left", given, wide._replace(bm=bm, bk=bk, stages=stages, lag=lag)
        tiles = s._replace(bm=bm, stages=4 if bm < 80 else 3)
        yield f"{bm}, left", problem(block=bm, **left), tiles
    yield from one_token()
    yield from token_sums()
    yield from e4m3_problems()


def one_token() -> Iterator[tuple[str, Any, Any]]:
    """Both products of layers of one token, whose rows are known to be all in use, in their usual tiles."""
    from moe_align_jax._grouped_matmul.choose_tiles import config_for
    from moe_align_jax._grouped_matmul.problem import Weights
    from moe_align_jax._moe_layer.plan import LayerProblem

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


def token_sums() -> Iterator[tuple[str, Any, Any]]:
    """Second products of layers of few tokens, which sum up each token's pairs."""
    from moe_align_jax._grouped_matmul.problem import MatmulProblem, TokenSum, Weights
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


def e4m3_problems() -> Iterator[tuple[str, Any, Any]]:
    """Every way to load scales, and the tiles that sizes of e4m3 operands get."""
    from moe_align_jax._grouped_matmul.choose_tiles import config_for
    from moe_align_jax._grouped_matmul.config import Config
    from moe_align_jax._grouped_matmul.problem import E4M3, MatmulProblem, Scales, Weights

    masked: dict[str, Any] = {"rows": "masked", "max_rows": 512, "num_rows": 4096}
    columns, rows = Scales("column_major", "blocks", pitch=4096), Scales("row_major", "blocks")
    silu: dict[str, Any] = {"activation": "silu", "gated": True}
    gather: dict[str, Any] = {"num_tokens": 2048, "top_k": 2}

    def case(what, block=128, rows="blocks", weights=None, scales=columns, out="bfloat16", **sizes):
        given = {"num_rows": 4096, "k": 2048, "n": 1536, "num_experts": 8} | sizes
        lie = Weights(**({"transposed": True} | (weights or {})))
        given |= {"dtype": E4M3, "out_dtype": out, "weights": lie, "scales": scales}
        size = block if rows == "blocks" else 0
        problem = MatmulProblem(function="test", rows=rows, block_size=size, **given)
        return f"e4m3 {what}", problem, config_for(problem)

    for block in (16, 64, 128, 192):
        yield case(f"{block}", block)
        yield case(f"{block}, silu, gathered", block, weights=silu, scales=rows, **gather)
        more = silu | {"bias": True, "interleaved": True, "swiglu_limit": 7.0}
        yield case(f"{block}, swiglu", block, weights=more, row_weights=True, scales=rows)
    yield case("pair", weights=silu | {"pair": True})
    yield case("packed", scales=columns._replace(packed=True))
    yield case("packed, gathered", 16, scales=rows._replace(packed=True), **gather)
    yield case("float32", out="float32")
    yield case("single scales", scales=Scales("tensor", "tensor"))
    yield case("partial", 100, scales=rows)
    for most in (512, 500):
        sizes = {"rows": "masked", "max_rows": most, "num_rows": 8 * most}
        yield case(f"masked {most}", scales=columns._replace(pitch=most), **sizes)
        yield case(f"masked {most}, rows", scales=rows, weights=silu, **sizes)
    sizes = {"rows": "masked", "max_rows": 64, "num_rows": 512}
    yield case("masked 64", scales=columns._replace(pitch=64), **sizes)
    yield case("masked 64, rows, silu", scales=rows, weights=silu, **sizes)
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
    for more in ({"out": "float32"}, {"weights": {"bias": True}, "row_weights": True}):
        yield case(f"weights shared, {more}", **more, **many_rows)
    for block in (8, 32, 40):
        yield case(f"{block}, silu", block, weights=silu)
    pairs = {"num_rows": 8, "num_tokens": 1, "top_k": 8, "n": 256, "num_experts": 128}
    yield case("pairs, silu", 1, weights=silu, scales=rows, **pairs)
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


def weight_gradients() -> Iterator[tuple[str, Any, Any]]:
    """As `problems`, of weight gradients: each way to load either operand, late and not."""
    from moe_align_jax._grouped_matmul.problem import MatmulProblem, WeightGradient
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
        given = problem(gathered=gathered)
        yield "gradient, whole steps", given, late._replace(short=False)
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


def activation_gradients() -> Iterator[tuple[str, Any, Any]]:
    """As `problems`, of products that end in the derivative of the activation."""
    from moe_align_jax._grouped_matmul.activation_gradient_kernel import TILE
    from moe_align_jax._grouped_matmul.problem import ActivationGradient, MatmulProblem, Weights

    for transposed in (True, False):
        given = {"num_rows": 4096, "k": 2048, "n": 768, "num_experts": 8, "block_size": 128}
        given |= {"num_tokens": 1024, "top_k": 2, "zero_padding": False}
        weights = Weights(transposed=transposed)
        product = MatmulProblem(
            *("test", "blocks"), **given, dtype="bfloat16", out_dtype="bfloat16", weights=weights
        )
        first = Weights(not transposed, activation="silu", gated=True)
        yield f"activation, transposed {transposed}", ActivationGradient(product, first), TILE


def spreads() -> Iterator[tuple[str, Any, Any]]:
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


def lower(problem: Any, config: Any) -> Any:
    """The kernel as `launch` calls it, lowered for a GPU."""
    import jax
    import jax.numpy as jnp

    from moe_align_jax._grouped_matmul import activation_gradient_kernel as ending
    from moe_align_jax._grouped_matmul import (
        kernel,
        launch,
        spread_kernel,
        token_sum_kernel,
        weight_gradient_experts,
        weight_gradient_kernel,
    )
    from moe_align_jax._grouped_matmul.problem import ActivationGradient, TokenSum, WeightGradient
    from moe_align_jax._grouped_matmul.spread import Spread

    if isinstance(problem, Spread):
        structs = [jax.ShapeDtypeStruct((problem.num_tokens * problem.top_k,), jnp.int32)]
        structs.append(jax.ShapeDtypeStruct(problem.grained(problem.num_tokens), problem.dtype))
        call = jax.jit(spread_kernel.build(problem, config))
        return call.trace(*structs).lower(lowering_platforms=("cuda",))

    if isinstance(problem, TokenSum):
        structs = [jax.ShapeDtypeStruct(*each) for each in problem.inputs.values()]
        call = jax.jit(functools.partial(token_sum_kernel.run, problem, tiles=config))
        return call.trace(*structs).lower(lowering_platforms=("cuda",))

    if isinstance(problem, ActivationGradient):
        structs = [jax.ShapeDtypeStruct(*each) for each in problem.inputs.values()]
        given = jax.eval_shape(functools.partial(ending.arguments, problem), *structs)
        call = jax.jit(ending.build(problem, config))
        return call.trace(*given).lower(lowering_platforms=("cuda",))

    if isinstance(problem, WeightGradient):
        structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in problem.inputs.values()]

        first = isinstance(config, PiecesOf)  # of two launches
        tiles = config.tiles if isinstance(config, PiecesOf) else config
        build = weight_gradient_kernel.build_pieces if first else weight_gradient_kernel.build
        call = jax.jit(build(problem, tiles))

        def made(*operands):
            experts, _ = weight_gradient_experts.located(problem, *operands[2:])
            given = functools.partial(
                weight_gradient_kernel.arguments, problem, tiles, interpret=False
            )
            if not tiles.pieces:
                return given(experts, *operands)
            experts, pieces = weight_gradient_experts.cut(experts, tiles.pieces, tiles.bk)
            of_pieces = given(pieces.experts, *operands, more=(pieces.used,))
            if first:
                return of_pieces
            sums = weight_gradient_kernel.build_pieces(problem, tiles)(*of_pieces)
            return given(experts, *operands, more=(pieces.begin, pieces.end), sums=sums)

        given = jax.eval_shape(made, *structs)
        return call.trace(*given).lower(lowering_platforms=("cuda",))

    def arguments(*operands):
        named = dict(zip(problem.inputs, operands, strict=True))
        where = None
        if not config.finds and (config.heights or problem.rows != "blocks"):
            [listing] = launch.list_of(problem, config).kernels
            where = [jnp.zeros(shape, jnp.int32) for shape in listing.outputs.values()]
        return launch.arguments(problem, config, named, where, interpret=False)

    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in problem.inputs.values()]
    given = jax.eval_shape(arguments, *structs)
    return jax.jit(kernel.build(problem, config)).trace(*given).lower(lowering_platforms=("cuda",))


_HGMMA = re.compile(r"[HQ]GMMA\.64x(\d+)x(?:16|32)\S* R(\d+),")
_ROW = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", re.MULTILINE)


def early_reads(sass: str) -> Iterator[str]:
    """Instructions that stand between a wgmma and the wait for all of them, and read or write its sums.

    ptxas put conversions there, of a wait in which paths with and without wgmma met.
    """
    first = last = -1
    for row in _ROW.findall(sass):
        if found := _HGMMA.search(row):
            first = int(found.group(2))
            last = first + int(found.group(1)) // 2
        elif "DEPBAR.LE gsb0, 0x0" in row:
            first = last = -1
        elif any(first <= int(r) < last for r in re.findall(r"\bR(\d+)\b", row)):
            yield row


_MEETING = re.compile(
    r"mbarrier\.try_wait|wgmma\.wait_group|bar(?:rier)?\.sync|mbarrier\.arrive\.shared::cluster"
)


def arrivals_alone(text: str) -> int:
    """Arrivals on a cluster's barrier behind a wait, ahead of which the warpgroup's threads do not meet.

    One thread arrives for its warpgroup: others may not have read yet what the next copy will overwrite.
    Several arrivals in a row are those before the first step, one for each stage.
    """
    found = [x.rpartition(".")[2] for x in _MEETING.findall(text)]
    runs = [(kind, len([*same])) for kind, same in itertools.groupby(found)]
    behind = itertools.pairwise(runs)
    waits = ("try_wait", "wait_group")
    return sum(arrival == ("shared::cluster", 1) and last in waits for (last, _), arrival in behind)


def _disassembled(cubin: Path) -> str:
    ptxas = Path("cuda_sdk_lib/bin/ptxas").resolve()
    beside = ptxas.with_name("cuobjdump")
    tool = str(beside) if beside.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise toolchain.Missing(f"there is no cuobjdump beside {ptxas}, nor on PATH")
    done = subprocess.run([tool, "--dump-sass", str(cubin)], capture_output=True, text=True)
    return done.stdout


_NAME = re.compile(r"\.visible \.entry (\w+)\(")
_ABOUT = re.compile(r"\bkernel(\d+)_of_this_file_")


def in_one_file(texts: Sequence[str]) -> str:
    """PTX of several kernels as one file: names say which kernel it is, lines of the source are left out."""
    whole = []
    for place, text in enumerate(texts):
        text = text.split("\t.section", 1)[0]
        text = re.sub(r"^\s*\.(?:loc|file)\s.*\n", "", text, flags=re.MULTILINE)
        if place:
            text = re.sub(r"^\.(?:version|target|address_size)\s.*\n", "", text, flags=re.MULTILINE)
        [name] = _NAME.findall(text)
        whole.append(re.sub(rf"\b{name}", f"kernel{place}_of_this_file_{name}", text))
    return "\n".join(whole)


def of_each(log: str, count: int) -> list[str]:
    """The lines about each kernel: those that name it, and those that follow."""
    found, place = [""] * count, None
    for line in log.splitlines(keepends=True):
        if named := _ABOUT.search(line):
            place = int(named[1])
        if place is not None:
            found[place] += line
    return found


def _ptxas(texts: Sequence[str]) -> list[tuple[str, str]]:
    """ptxas' account of each kernel, and its machine code.

    All in one file: the disassembler takes longer to start than to read a dozen kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        source.write_text(in_one_file(texts))
        command = ["cuda_sdk_lib/bin/ptxas", "-v", "-arch=sm_90a", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas failed: {done.stderr.strip()}")
        logs = of_each(done.stderr + done.stdout, len(texts))
        return list(zip(logs, of_each(_disassembled(cubin), len(texts)), strict=True))


def _cpu_seconds() -> float:
    """Of this process, whose compiler it is, and of its children."""
    return sum(os.times()[:4])


def faults(
    log: str, sass: str, seconds: float, most: float, multiplies: bool = True
) -> Iterator[str]:
    """What is wrong with a kernel that took so many seconds of CPU time to compile, of `most`."""
    used = ptx.usage(log)
    if (spilled := used.spill_stores + used.spill_loads) or used.stack:
        yield f"{spilled} bytes spilled, {used.stack} bytes of stack"
    if "serialized" in log:
        yield next(line for line in log.splitlines() if "serialized" in line)
    if early := list(early_reads(sass)):
        yield f"{len(early)} times sums are used before the wait for them: {early[0]}"
    if multiplies and not _HGMMA.search(sass):
        yield "no wgmma"
    # CPU time rises, too, where other processes share the cores and their caches: this much at the most.
    if seconds > most * float(os.environ.get("COMPILE_PATIENCE", "1")):
        yield f"compiled in {seconds:.1f} s of CPU time"


def check(plugin: str, runtime: str, *given: str) -> Iterator[script.Report]:
    from moe_align_jax._grouped_matmul.config import may_be_late
    from moe_align_jax._grouped_matmul.problem import MatmulProblem

    parser = argparse.ArgumentParser(prog="tests.no_gpu.matmul")
    parser.add_argument("part", nargs="?", default="", help="compile what has this in its name")
    chosen = parser.parse_args(given)
    checker = worker.Checker(plugin, runtime)
    launch = checker.launch

    def compiled() -> Iterator[tuple[str, float, str]]:
        """(what it is, seconds, PTX, or what the compiler says) of each kernel."""
        every = (*problems(), *weight_gradients(), *activation_gradients(), *spreads())
        for what, problem, config in script.one_in_sample(every):
            if isinstance(problem, MatmulProblem):
                config = config._replace(late=config.late and may_be_late(problem))
            name = f"{config.name}: {what}"
            if chosen.part not in name:
                continue
            module = lower(problem, config).compiler_ir()
            with module.context:
                [found] = launch._custom_call_modules(module.operation)
            begun = _cpu_seconds()
            try:
                dump = checker.compiler.dump([found], [name])
            except launch.CompileError as error:
                yield name, 0.0, str(error)
                continue
            seconds = _cpu_seconds() - begun
            [(text, _)] = launch.read_dump(dump).values()
            yield name, seconds, text

    for some in itertools.batched(compiled(), _AT_ONCE):
        fine = [one for one in some if _NAME.search(one[2])]
        for name, _, error in some:
            if not _NAME.search(error):
                yield name, [error]
        for (name, seconds, text), (log, sass) in zip(
            fine, _ptxas([x for *_, x in fine]), strict=True
        ):
            line = f"{ptx.usage(log).registers:3} registers, {seconds:4.1f} s  {name}"
            most = MAX_SECONDS_OF_HEIGHTS if "heights" in name else MAX_SECONDS
            found = [*faults(log, sass, seconds, most, "Spread" not in name)]
            # Of CTAs that share K, those that have read nothing of the others' arrive as well.
            if "-c2" in name and (alone := arrivals_alone(text)):
                found.append(f"{alone} times a thread arrives for others that it has not met")
            yield line, found


if __name__ == "__main__":
    sys.exit(script.main("tests.no_gpu.matmul", check))
