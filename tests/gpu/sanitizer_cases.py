"""What the sanitizers run, and the way through jit: each call's result is compared with the oracle.

Of the alignment every variant of the kernels (forms.Variant), at the smallest size that has it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from moe_align_jax._align import tables
from moe_align_jax._align.config import BlockAlignMosaicConfig, fit
from tests import forms, oracle
from tests.layout import helpers, masked_quant_oracle
from tests.router import router_oracle

# racecheck takes minutes over a sort of more in shared memory.
MOST_RACECHECK_PAIRS = 20_000


class Case(NamedTuple):
    """A call of the alignment.

    Attributes:
        name: of the variant, as tables show it; "batched" for `batched_moe_align_block_size`.
        size: one of `forms.SIZES`, or of `forms.BATCHED_SIZES`.
        options: one of `forms.OPTIONS`.
        config: in place of the tuning table's, before `fit`.
    """

    name: str
    size: Any
    options: dict[str, Any]
    config: BlockAlignMosaicConfig | None = None


def cases(tool: str = "") -> list[Case]:
    """Each variant of `forms.SIZES` plain and with all options, but for what `tool` takes too long over."""
    smallest: dict[forms.Variant, forms.Size] = {}
    for size in sorted(forms.SIZES, key=lambda size: (size.num_experts == 1, size.num_pairs)):
        smallest.setdefault(size.variant, size)
    found = [
        Case(str(variant), size, options)
        for variant, size in smallest.items()
        if tool != "racecheck" or size.num_pairs <= MOST_RACECHECK_PAIRS
        for options in (forms.OPTIONS[0], forms.OPTIONS[-1])
    ]
    return [*found, Case("batched", forms.BATCHED_SIZES[2], {})]


_Config = BlockAlignMosaicConfig
# Variants that the default table has at large sizes, or that a table of another GPU could have.
_SMALL: tuple[tuple[forms.Size, BlockAlignMosaicConfig], ...] = (
    (
        forms.Size(9001, 100, 32),
        _Config(form="grid", num_warpgroups=1, num_ctas=16, rounds=2, local_sort=True, cluster=8),
    ),
    (forms.Size(9002, 300, 16), _Config(form="grid", num_warpgroups=1, num_ctas=16, rounds=2)),
    (
        forms.Size(1901, 100, 16),
        _Config(form="cluster", num_warpgroups=1, num_ctas=8, rounds=2, local_sort=True),
    ),
    (forms.Size(9003, 5000, 8), _Config(form="radix", num_warpgroups=2, num_ctas=8, rounds=2)),
    (
        forms.Size(9004, 5000, 8),
        _Config(form="radix", num_warpgroups=2, num_ctas=8, rounds=2, cluster=8),
    ),
)


def small_cases() -> list[Case]:
    """Large sizes' variants at small ones, by a config of their own."""
    found = []
    for size, config in _SMALL:
        fitted = fit(config, forms.problem(size, forms.OPTIONS[0]))
        name = f"{forms.variant_of(size, fitted)}, small"
        found += [Case(name, size, o, config) for o in (forms.OPTIONS[0], forms.OPTIONS[-1])]
    return found


# -- the alignment through jit -------------------------------------------------------------------------


def align(case: Case, implementation: str = "mosaic_gpu") -> None:
    import jax

    import moe_align_jax as maj

    if case.name == "batched":
        num_experts, max_tokens, block_size = case.size
        counts = np.random.default_rng(0).integers(0, max_tokens + 1, num_experts)
        sizes = {"max_tokens_per_batch": max_tokens, "block_size": block_size}
        got = maj.batched_moe_align_block_size(counts, implementation=implementation, **sizes)
        want = oracle.align_batched(counts.tolist(), **sizes)
        oracle.assert_same(jax.block_until_ready(got), want)
        return
    size, options = case.size, case.options
    ids = forms.ids_of(size)
    given = {
        "block_size": size.block_size,
        "num_experts": size.num_experts,
        "expert_map": oracle.local_map("second", size.num_experts, 0) if options["map"] else None,
        "ignore_invalid_experts": options["map"] == "filter",
        "num_valid_pairs": size.num_pairs // 2 if options["num_valid_pairs"] else None,
        "return_inverse": options["return_inverse"],
        "pad_sorted_ids": options["pad_sorted_ids"],
    }
    chosen = tables.config_for
    if case.config is not None:
        chosen = functools.partial(fit, case.config)
    with mock.patch.object(tables, "config_for", chosen):  # asked when the call is lowered
        got = maj.moe_align_block_size(ids, implementation=implementation, **given)
    oracle.assert_same(jax.block_until_ready(got), oracle.expected(ids, **given))


# -- the other kernels through jit -----------------------------------------------------------------------


def masked_quant(implementation: str = "mosaic_gpu") -> None:
    """Every scale format; all rows, and some: only rows in use are fetched, as others hold anything."""
    import jax
    import jax.numpy as jnp

    import moe_align_jax as maj

    @functools.partial(jax.jit, static_argnums=2)
    def fetch(array, at, rows_last):
        return array[at[0], :, at[1]] if rows_last else array[at]

    rng = np.random.default_rng(0)
    for (experts, rows, width), options in (
        ((3, 5, 384), {}),
        ((3, 5, 512), {"scale_format": "ue8m0"}),
        ((2, 8, 1024), {"scale_format": "ue8m0_packed"}),
        ((2, 7, 768), {"scale_layout": "column_major", "swiglu_alpha": 1.7, "swiglu_limit": 7.0}),
        ((8, 3, 7168), {"swiglu_limit": 0.7}),
    ):
        x = rng.standard_normal((experts, rows, 2 * width), np.float32).astype(jnp.bfloat16)
        math = {k: v for k, v in options.items() if k != "scale_layout"}
        for counts in (np.full(experts, rows, np.int32), np.arange(experts, dtype=np.int32)):
            q, scales = maj.silu_and_mul_masked_quant(
                x, counts, implementation=implementation, **options
            )
            want_q, want_scales = masked_quant_oracle.expected(x, counts, **math)
            at = np.nonzero(np.arange(rows) < counts[:, None])
            packed = scales.dtype == jnp.int32
            got_q, got_scales = np.zeros_like(want_q), np.zeros_like(want_scales)
            got_q[at] = fetch(q, at, False)
            found = np.asarray(fetch(scales, at, packed or "scale_layout" in options))
            got_scales[at] = masked_quant_oracle.unpack(found.T[None])[0] if packed else found
            masked_quant_oracle.assert_close(got_q, got_scales, want_q, want_scales, counts)


def permute() -> None:
    """The copy into the masked layout, rows of several widths at once and rows that end past their room."""
    import jax
    import ml_dtypes

    import moe_align_jax as maj

    for count, top_k, num_experts, room, width in ((9, 3, 4, 27, 48), (33, 8, 130, 3, 7168)):
        rng = np.random.default_rng(0)
        x = {
            "q": rng.integers(0, 256, (count, width)).astype(np.uint8),
            "scales": helpers.tokens(count, 3),
            "half": helpers.tokens(count, 6).astype(ml_dtypes.bfloat16),
        }
        ids = helpers.routing("with holes", count, top_k, num_experts)
        sizes = {"num_experts": num_experts, "max_tokens_per_expert": room, "initialize": True}
        rows, layout = jax.jit(functools.partial(maj.permute_to_masked, **sizes))(x, ids)
        for name, given in x.items():
            want, *places = helpers.masked_oracle(given, ids, num_experts, room)
            assert np.asarray(rows[name]).tobytes() == want.tobytes(), name
        found = layout.masked_m, layout.tokens_per_expert, layout.row_of_pair, layout.pair_of_row
        for ours, theirs in zip(found, places, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def row_sums() -> list[Any]:
    from moe_align_jax._layout import kernels

    return [
        kernels.RowSum(1, 1, 1, 128, "bfloat16", "bfloat16", True),
        kernels.RowSum(9, 8, 64, 7168, "bfloat16", "float32", True),
        kernels.RowSum(33, 6, 100, 2880, "float16", "float16", True),
        kernels.RowSum(7, 4, 50, 1152, "float32", "float32", False),
    ]


def weighted_sum(widest: int = 8192) -> None:
    """Several dtypes and widths up to the widest; rows that nobody asks for are NaN."""
    import jax

    from moe_align_jax._layout import kernels

    for problem in row_sums():
        if problem.width > widest:
            continue
        given = helpers.row_sum_inputs(problem)
        y, rows, weights = given
        got = jax.jit(functools.partial(kernels.run_sum, problem))(y, rows, *weights)
        helpers.assert_row_sums(problem, got, *given)


def router(implementation: str = "mosaic_gpu") -> None:
    """The router alone, and in one launch with the alignment: each layout of the experts, each option."""
    import moe_align_jax as maj

    for tokens, experts, dtype, options in (
        (5, 37, "bfloat16", {"top_k": 5}),
        (9, 256, "float32", {"top_k": 8, "renormalize": True}),
        (64, 160, "float16", {"top_k": 6, "num_groups": 8, "topk_groups": 3}),
        (33, 256, "float32", {"top_k": 8, "scoring": "sigmoid", "num_groups": 8, "topk_groups": 4}),
        (16, 384, "float32", {"top_k": 6, "scoring": "sqrtsoftplus", "renormalize": True}),
        (1, 1024, "float32", {"top_k": 32, "softmax_after_topk": True}),
    ):
        logits = router_oracle.make_logits(tokens, experts, dtype, seed=tokens)
        rng = np.random.default_rng(0)
        if options.get("scoring"):
            options["correction_bias"] = rng.normal(size=experts).astype(np.float32)
        options["implementation"] = implementation
        options |= {"token_mask": rng.random(tokens) < 0.8, "num_valid_tokens": max(1, tokens - 1)}
        call = functools.partial(maj.route_and_align, block_size=8)
        *found, aligned = call(logits, **options)
        alone = maj.route_topk(logits, **options)
        del options["implementation"]
        router_oracle.assert_routed(alone, logits, **options)
        router_oracle.assert_routed(found, logits, **options)
        want = oracle.expected(
            np.asarray(alone[1]), block_size=8, num_experts=experts, return_inverse=True
        )
        oracle.assert_same(aligned, want)


def matmul(implementation: str = "mosaic_gpu") -> None:
    """A tile of each form, with rows by TMA and by cp.async, whole and cut short; the lists of tiles."""
    import jax
    import jax.numpy as jnp

    import moe_align_jax as maj
    from tests.matmul.oracle import error
    from tests.matmul.test_matmul import make_case, normal

    def compare(call: Callable[..., Any], *operands: Any, used: Any) -> None:
        got = call(*operands, implementation=implementation)
        with jax.default_device(jax.devices("cpu")[0]):  # not XLA's own kernels under the tool
            want = call(*jax.tree.map(np.asarray, operands), implementation="xla")
        found = error(np.asarray(got)[used], np.asarray(want, np.float64)[used])
        assert found < 5e-3, found

    for sizes, options in (
        ((150, 2, 2, 128, 192, 128), {"activation": "silu", "bias": True}),
        ((150, 2, 2, 128, 192, 100), {"gather": False}),
        ((90, 1, 2, 128, 192, 64), {"activation": "silu", "transpose_rhs": True}),
        ((90, 1, 2, 128, 192, 144), {"activation": "silu", "transpose_rhs": True}),
        ((30, 2, 3, 200, 136, 16), {"row_weights": True, "bias": True}),
        ((9, 3, 40, 128, 192, 1), {"activation": "silu"}),
    ):
        operands, given = make_case(*sizes, **options)
        used = np.arange(operands[2].sorted_token_ids.shape[0])
        used = used < int(operands[2].num_tokens_post_padded[0])
        compare(functools.partial(maj.grouped_matmul, **given), *operands, used=used)
    rng = np.random.default_rng(0)
    for rows, k, n in ((150, 128, 192), (40, 200, 136)):
        lhs, rhs = normal(rng, (rows, k), "bfloat16"), normal(rng, (3, k, n), "bfloat16", k**-0.5)
        counts = np.array([rows // 2, 0, 7], np.int32)
        compare(maj.ragged_dot, lhs, rhs, counts, used=slice(None))
        rows_of = jnp.stack([lhs, lhs, lhs])
        used = np.arange(rows) < counts[:, None]
        compare(maj.masked_grouped_matmul, rows_of, rhs, counts, used=used)


def matmul_clusters() -> None:
    """Tiles of which each CTA of a cluster has a part of k."""
    from tests.matmul import test_clusters

    for name in ("k in 8, transposed True, gated", "k in 2, transposed False, many"):
        sizes, config = test_clusters.SHARED[name]
        test_clusters.check(test_clusters.make(**sizes), config, interpret=False)


def matmul_heights(interpret: bool = False) -> None:
    """Tiles of several heights: found and listed, late and not; of padding that is cleared beside them."""
    import jax
    import ml_dtypes

    from moe_align_jax._grouped_matmul import config, launch
    from tests.matmul import test_heights as cases

    found = {"finds": True, "trims": True}
    for block, exact, more in (
        (144, True, found | {"late": True}),
        (144, True, found),
        (192, False, found),
        (184, False, {"falling": True}),
    ):
        given = [(e, block if p == 144 else p) for e, p in cases.FOUND]
        where = cases.made(block, 4, given)
        problem = cases.problem_of(where, block, 4, 320, 128)
        stages = 4 if block == 144 else 3
        usual = config.Config("swap", block, 256, 64, stages, group=2, num_ctas=2)
        if "falling" in more:  # eight tiles, dealt out to three CTAs
            usual = usual._replace(group=0, num_ctas=3)
        tiles = config.with_heights(problem, usual, cases.HEIGHTS, exact, **more)
        assert tiles.heights
        rng = np.random.default_rng(0)
        x = rng.normal(size=(problem.num_rows, 320)).astype(ml_dtypes.bfloat16)
        w = rng.normal(size=(4, 320, 128)).astype(ml_dtypes.bfloat16)
        used = int(where.used[0])  # the kernel writes no others
        call = functools.partial(launch.run, problem, config=tiles, interpret=interpret)
        out = jax.jit(lambda *given, call=call, used=used: call(*given)[:used])(x, w, *where[:3])
        out = np.asarray(out).astype(np.float64)
        expert = np.repeat(where.experts, block)
        want = np.zeros_like(out)
        for row in np.flatnonzero(where.held[:used]):
            want[row] = x[row].astype(np.float64) @ w[expert[row]].astype(np.float64)
        np.testing.assert_allclose(out, want, rtol=2e-2, atol=2e-1)


def copied_rows(interpret: bool = False) -> None:
    """Tokens' rows to those of their pairs; of one each, so that there is no row without a pair."""
    from tests.matmul import test_spread as cases

    more = {"config": cases.SMALL} if interpret else {}
    cases.check(80, 1, 5, 192, 1, interpret=interpret, **more)


def token_sums() -> None:
    """Second products that sum up each token's pairs, one after the other and several together."""
    from tests.moe_layer import test_token_sum

    for name in ("columns end in a tile", "bias", "two of three pairs", "four of six pairs"):
        sizes, tiles = test_token_sum.CASES[name]
        test_token_sum.check(test_token_sum.make(**sizes), tiles, interpret=False)


# Tiles that share rows, or weights, within a cluster, cut short, and without rows; scales every way. Each is
# the first form of `test_fp8.on_a_gpu` whose name begins so.
E4M3 = (
    "rows, gathered, 16x",
    "columns, 128x",
    "rows, 192x",
    "sharing, columns, 128x192x128s4m-g4-c2w",
    "sharing, rows, 192x",
    "masked 512, columns, 128x192x128s4m-g4-skips-c2w",
    "masked 512, packed, 192x128x128s4m-g4-w3-skips-c2",
    "masked 200, columns, 16x128x128s6swap-g0-finds",
    "masked 500, columns, 128x192x128s4m-g2-skips-c2w-early-finds-experts",
    "masked 500, packed, 192x128x128s4m-g2-w3-skips-c2-early-finds-experts-peeled",
    "masked 512, columns, 128x192x128s4m-g4-skips-ahead-finds-trims",
    "masked 512, of two shapes, 128x192x128s4m-g8-skips-c2w-ahead-finds-paired",
    "masked 200, columns, 80x128x128s6swap-g0-early-finds",
    "masked 200, columns, 128x128x128s5swap-g0-early-finds",
)
_E4M3_CTAS = 8  # each of which has several tiles; the tools' time grows with CTAs


def e4m3_case(form: str) -> tuple[Callable[..., Any], Any]:
    """What makes one of E4M3, and its tiles: the first case of `test_fp8` whose name begins so."""
    from tests.matmul import test_fp8

    return next((make, config) for name, make, config in test_fp8.ON_A_GPU if name.startswith(form))


def matmul_e4m3(form: str) -> None:
    """One of E4M3."""
    import pytest

    from tests.matmul import test_fp8

    make, config = e4m3_case(form)
    with pytest.MonkeyPatch.context() as patch:
        problem, operands = make(patch)
    config = config._replace(num_ctas=_E4M3_CTAS)
    test_fp8.check_form(problem, operands, config, interpret=False)


def casts() -> None:
    """Tiles of a row, the last of which overlaps another, and of rows, of which some hold no row in use."""
    import jax.numpy as jnp

    import moe_align_jax as maj
    from tests.layout import test_quantization as cases

    for (count, k), layout in (((5, 1152), "row_major"), ((40, 384), "column_major")):
        x = cases.rows(jnp.bfloat16, 40, max(k, 512))[:count, :k]
        want, want_scales = cases.oracle_rowwise(x, 1e-4, False, False)
        q, scales = maj.quantize_rowwise(x, scale_layout=layout)
        np.testing.assert_array_equal(cases.bytes_of(q), cases.bytes_of(want))
        scales = np.asarray(scales)
        found = scales[:, :count].T if layout == "column_major" else scales
        np.testing.assert_array_equal(found, want_scales)


def weight_gradients(interpret: bool = False) -> None:
    """Rows of both operands by TMA and by cp.async, stored late and not; experts that are cut into pieces."""
    import jax
    import jax.numpy as jnp

    from moe_align_jax._grouped_matmul import reference
    from moe_align_jax._grouped_matmul import weight_gradient_kernel as kernel
    from moe_align_jax._grouped_matmul.weight_gradient_tiles import Tiles, tiles_for
    from tests.matmul import test_weight_gradient as cases

    cpu = jax.devices("cpu")[0]
    # wgmma takes 64 rows of a stage; Pallas' interpreter copies rows one by one, and takes any number.
    cut, tokens = (Tiles(bk=16, pieces=3), 140) if interpret else (Tiles(pieces=3), 600)
    with jax.default_device(cpu):  # not XLA's own kernels under the tool
        every = (
            (None, cases.ragged([0, 20, 70], 95, 24, 24, out="float32")),
            (None, cases.blocks(70, 2, 2, 128, 320, 64, gathered=None, routing="dropped")),
            (None, cases.blocks(9, 2, 2, 64, 320, 64, gathered="lhs", routing="dropped")),
            (cut, cases.blocks(tokens, 2, 2, 128, 256, 64, gathered="rhs", routing="hot")),
            (Tiles(level=True, bk=cut.bk), cases.ragged([9, 400, *range(8)], 450, 24, 24)),
            (
                Tiles(bm=256, bn=128, lag=1, short=True),
                cases.blocks(40, 2, 3, 320, 192, 16, gathered="rhs", routing="dropped"),
            ),
        )
        every = [
            (tiles, problem, [np.asarray(x) for x in given]) for tiles, (problem, given) in every
        ]
        wanted = [reference.weight_gradient(p, *map(jnp.asarray, given)) for _, p, given in every]
    for (tiles, problem, given), want in zip(every, wanted, strict=True):
        # Few CTAs: the tools' time grows with them.
        tiles = (tiles or tiles_for(problem))._replace(num_ctas=4)
        call = jax.jit(functools.partial(kernel.run, problem, tiles=tiles, interpret=interpret))
        found, want = np.asarray(call(*given), np.float64), np.asarray(want, np.float64)
        error = np.linalg.norm(found - want) / np.linalg.norm(want)
        assert error < 5e-3, error


def activation_gradient(interpret: bool = False) -> None:
    """The product that ends in the derivative of the activation, and the kernel that follows a product."""
    import jax

    from tests.moe_layer import test_activation_gradient as cases

    def made(*sizes: int, **options: Any) -> tuple[Any, list[np.ndarray]]:
        with jax.default_device(jax.devices("cpu")[0]):  # not XLA's own kernels under the tool
            problem, operands = cases.make_case(*sizes, **options)
            return problem, [np.asarray(x) for x in operands]

    for transposed in (False, True):
        cases.check(*made(12, 2, 2, 64, 256, transposed=transposed), interpret=interpret)
    for ffn in (384, 1024, 1536):
        cases.check_rows(*made(12, 2, 2, 64, ffn, block=16), interpret=interpret)


def expert_layer(implementation: str = "mosaic_gpu") -> None:
    """Pairs without an alignment, and blocks."""
    from tests.moe_layer.test_moe_layer import check, make_layer

    for tokens, experts, top_k in ((1, 40, 3), (50, 4, 2)):
        given = make_layer(tokens, top_k, experts, 128, 192, dtype="bfloat16", routing="dropped")
        check(*given, implementation, "bfloat16")


# -- dispatch and combine over several GPUs --------------------------------------------------------------

PEERS = (
    ("normal", None, "nvlink"),
    ("normal", "fp8", "nvlink"),
    ("low_latency", None, "nvlink"),
    ("low_latency", "fp8", "nvlink"),
    ("low_latency", None, "nvlink_window"),
    ("low_latency", "fp8", "nvlink_window"),
    ("low_latency", "fp8", "all_to_all"),
)


def peers(mode: str, payload: str | None, transport: str) -> None:
    """A layer over all GPUs, twice."""
    import jax
    from jax.sharding import AxisType

    from tests.expert_parallel.test_nvlink_gpu import Tokens

    devices = jax.devices("gpu")
    if len(devices) < 2:
        raise RuntimeError(f"the peers' kernels need two GPUs; got {len(devices)}")
    axes = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((1, len(devices)), ("dp", "ep"), axes, devices=devices)
    given = Tokens(mesh, 20, 3, seed=0)
    options = {"mode": mode, "payload": payload, "transport": transport}
    body, want = given.layer(**options, max_low_latency_tokens=64), given.expected()
    room = (0.08 if payload else 0.02) * np.abs(want).max()
    for _ in range(2):
        got = np.asarray(given.run(body)).astype(np.float32)
        np.testing.assert_allclose(got, want, atol=room)


# -- all of a path -------------------------------------------------------------------------------------

# initcheck does not see what TMA stores: it reported the results of these, whose values are right, when they
# were copied to the host, and of "heights" just as many rows as TMA stores (2026-11-30).
_STORED_BY_TMA = ("matmul, heights", "weight gradients", "activation gradient")
# racecheck does not follow a meeting of a warpgroup, behind which one thread speaks for all: racecheck.cu
# shows it. Here that thread tells a cluster's barrier, and scales come by cp.async, whose stores racecheck
# sees. The same tiles without clusters are looked at.
_TOLD_BY_ONE = ("matmul, e4m3, sharing, rows, 192x",)
_NOT_WITH = {"initcheck": _STORED_BY_TMA, "racecheck": _TOLD_BY_ONE}


def runs(path: str, tool: str = "") -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, what to run) of each step of the path "jit" or "peers"."""
    if path == "peers":
        for mode, payload, transport in PEERS:
            name = f"{mode} {payload or ''}".strip() + f" {transport}"
            yield name, functools.partial(peers, mode, payload, transport)
        return
    for name, run in _under_jit(tool):
        if name not in _NOT_WITH.get(tool, ()):
            yield name, run


def _under_jit(tool: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for case in (*cases(tool), *small_cases()):
        yield case.name, functools.partial(align, case)
    yield "masked_quant", masked_quant
    yield "permute", permute
    yield "weighted_sum", weighted_sum
    yield "router", router
    yield "matmul", matmul
    yield "matmul, clusters", matmul_clusters
    yield "matmul, heights", matmul_heights
    yield "matmul, copied rows", copied_rows
    yield "matmul, sums of tokens", token_sums
    for form in E4M3:  # a step each: racecheck takes long over all of them
        yield f"matmul, e4m3, {form}", functools.partial(matmul_e4m3, form)
    yield "casts to e4m3", casts
    yield "weight gradients", weight_gradients
    yield "activation gradient", activation_gradient
    yield "expert layer", expert_layer


def names(path: str) -> list[str]:
    """Of the path's steps, each once."""
    if path == "direct":
        from tests.gpu import direct_vllm  # imports torch

        found = [*(case.name for case in cases()), *direct_vllm.STEPS]
    else:
        found = [name for name, _ in runs(path)]
    return list(dict.fromkeys(found))
