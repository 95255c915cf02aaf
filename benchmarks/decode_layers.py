"""The layers of the decode step: how tokens meet their experts, and what the experts do.

`benchmarks.decode_step` says what each is, verifies and times them. Everything here is the body of a
shard_map over the axis "ep".

D ranks, T tokens per rank, R = D * T, K top_k, E experts, e = E / D on each rank, H hidden, F size within an
expert, M rows of an expert's box.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import moe_align_jax as maj
from benchmarks import clocks, exchanges
from benchmarks.exchanges import AXIS, Size

# What the experts' rows and weights are, and what travels to them.
FORMATS = {
    "bf16": "bfloat16 rows travel, bfloat16 products",
    "fp8-wire": "e4m3 rows travel and are dequantised, bfloat16 products",
    "fp8": "e4m3 rows travel, e4m3 products",
}


class Model(NamedTuple):
    """Sizes of a layer: H, F, E and K."""

    hidden: int
    ffn: int
    experts: int
    top_k: int


class Weights(NamedTuple):
    """Of a layer, on one rank: `[e, H, 2 F]` and `[e, F, H]` bfloat16; or (e4m3, float32 scales of blocks) of
    `[e, 2 F, H]` and `[e, H, F]`. Gate first."""

    gate_up: Any
    down: Any


class Layer(NamedTuple):
    """A way for tokens to meet their experts.

    Attributes:
        name: the provider.
        run: `(h [T, H], ids, weights, experts' weights, boxes) -> what is added to the tokens [T, H]`.
        bare: whether nothing is communicated: then nothing useful is computed either.
        records: whether `run` gives (what is added, the rows of each of the rank's experts), and the step
            records these as the experts' load.
    """

    name: str
    run: Callable
    bare: bool = False
    records: bool = False


# -- what all of them do ---------------------------------------------------------------------------------


def normalised(x: jax.Array) -> jax.Array:
    """Rows of root mean square 1, bfloat16."""
    x = x.astype(jnp.float32)
    return (x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)


def routed(
    model: Model, x0: jax.Array, x: jax.Array, router: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(ids `[T, K]`, weights) by a softmax over all experts; router `[H, E]` bfloat16.

    Tokens are routed by their first values, so that no rounding of a layer chooses another expert in the next
    one; but not before x is there, as in a model.
    """
    x0 = x0 + clocks.zero_reading(x).astype(x0.dtype)
    logits = jnp.matmul(normalised(x0), router, preferred_element_type=jnp.float32)
    weights, ids = maj.route_topk(logits, top_k=model.top_k, renormalize=True)
    return ids, weights


def expected_m(size: Size, ranks: int) -> int:
    """Rows of a mean expert: that of `Dispatched`, for those too that call no dispatch."""
    return -(-ranks * size.tokens * size.top_k // size.experts)


def masked_experts(
    form: str,
    implementation: str | None,
    rows: Any,
    scales: Any,
    masked_m: jax.Array,
    w: Weights,
    mean: int | None,
) -> jax.Array:
    """`[e, M, H]` to `[e, M, H]` bfloat16: every expert on the rows of its box that are in use.

    Tiles are chosen for experts of `mean` rows.
    """
    options: dict[str, Any] = {"implementation": implementation, "expected_m": mean}
    if form == "fp8":
        options["transpose_rhs"] = True
        # Columns are what the second product's kernel reads by TMA, in whole tiles.
        layout: Any = "column_major" if rows.shape[1] % 128 == 0 else "row_major"
        h = maj.masked_grouped_matmul(
            (rows, scales), w.gate_up, masked_m, scale_layout="row_major", **options
        )
        h = maj.silu_and_mul_masked_quant(h, masked_m, scale_layout=layout)
        return maj.masked_grouped_matmul(h, w.down, masked_m, scale_layout=layout, **options)
    if scales is not None:
        rows = exchanges.dequantised(rows, scales).astype(jnp.bfloat16)
    h = maj.masked_grouped_matmul(rows, w.gate_up, masked_m, activation="silu", **options)
    return maj.masked_grouped_matmul(h, w.down, masked_m, **options)


# -- providers -------------------------------------------------------------------------------------------


def ours(
    size: Size,
    ranks: int,
    form: str,
    implementation: str | None,
    transport: str,
    gathers: bool | None = None,
    records: bool = False,
) -> Layer:
    """dispatch and combine; `gathers` where "all_to_all" is to send otherwise than it does."""
    options = {"transport": transport, "initialize": False}
    exchange = exchanges.ours(size, ranks, f"ours, {transport}", **options)
    if gathers is not None:
        exchange = exchanges.gathering(exchange, gathers=gathers)

    def run(h, ids, weights, w, boxes):
        del boxes
        (rows, scales, masked_m, *_), handle = exchange.out(h, ids, weights)
        y = masked_experts(form, implementation, rows, scales, masked_m, w, expected_m(size, ranks))
        added = exchange.back(y, handle)
        return (added, masked_m) if records else added

    return Layer(exchange.name + ", load recorded" * records, run, records=records)


def plain_boxes(size: Size, ranks: int, form: str, implementation: str | None, kind: str) -> Layer:
    """The same products on boxes that plain collectives and jax.numpy fill."""
    exchange = exchanges.plain_job(size, ranks, kind, "boxes")
    local, rows_of_box = size.experts // ranks, ranks * size.tokens

    def run(h, ids, weights, w, boxes):
        del boxes
        (rows, scales, _, _, counts), handle = exchange.out(h, ids, weights)
        rows, scales = (
            None if x is None else x.reshape(local, rows_of_box, x.shape[-1])
            for x in (rows, scales)
        )
        y = masked_experts(form, implementation, rows, scales, counts, w, expected_m(size, ranks))
        return exchange.back(y.reshape(-1, size.hidden), handle)

    return Layer(f"plain, {kind}, boxes", run)


def plain_sorted(size: Size, ranks: int, form: str, implementation: str | None, kind: str) -> Layer:
    """Rows by expert without gaps, and `ragged_dot`: bfloat16 products alone."""
    exchange = exchanges.plain_job(size, ranks, kind, "sorted")

    def run(h, ids, weights, w, boxes):
        del boxes
        (rows, scales, _, _, counts), handle = exchange.out(h, ids, weights)
        if scales is not None:
            rows = exchanges.dequantised(rows, scales).astype(jnp.bfloat16)
        both = maj.ragged_dot(rows, w.gate_up, counts, implementation=implementation)
        gate, up = jnp.split(both.astype(jnp.float32), 2, axis=1)
        hidden = (jax.nn.silu(gate) * up).astype(jnp.bfloat16)
        return exchange.back(
            maj.ragged_dot(hidden, w.down, counts, implementation=implementation), handle
        )

    assert form != "fp8"
    return Layer(f"plain, {kind}, sorted", run)


def _gathered(size: Size, ranks: int, h: jax.Array, ids: jax.Array, weights: jax.Array):
    """The tokens of all ranks in bfloat16; ids that are local, -1 for those of other ranks; weights."""
    h, ids, weights = (lax.all_gather(x, AXIS, axis=0, tiled=True) for x in (h, ids, weights))
    local = size.experts // ranks
    mine = ids - lax.axis_index(AXIS).astype(jnp.int32) * local
    return h, jnp.where((mine >= 0) & (mine < local), mine, -1), weights


def gathered_boxes(size: Size, ranks: int, form: str, implementation: str | None) -> Layer:
    """All-gathered tokens, each rank its own experts on boxes, psum_scatter."""

    def run(h, ids, weights, w, boxes):
        del boxes
        h, mine, weights = _gathered(size, ranks, h, ids, weights)
        rows = exchanges.quantised(h) if form == "fp8" else (h,)
        boxes, layout = maj.permute_to_masked(
            rows, mine, num_experts=size.experts // ranks, initialize=False
        )
        rows, scales = (*boxes, None)[:2]
        mean = expected_m(size, ranks)
        y = masked_experts(form, implementation, rows, scales, layout.masked_m, w, mean)
        sums = maj.unpermute_from_masked(y, layout, weights)
        return lax.psum_scatter(sums, AXIS, scatter_dimension=0, tiled=True)

    return Layer("gathered tokens, boxes", run)


def gathered_fused(size: Size, ranks: int, form: str, implementation: str | None) -> Layer:
    """All-gathered tokens, `fused_moe` of each rank's experts, psum_scatter: bfloat16 products alone."""

    def run(h, ids, weights, w, boxes):
        del boxes
        h, mine, weights = _gathered(size, ranks, h, ids, weights)
        sums = maj.fused_moe(h, w.gate_up, w.down, weights, mine, implementation=implementation)
        return lax.psum_scatter(sums, AXIS, scatter_dimension=0, tiled=True)

    assert form != "fp8"
    return Layer("gathered tokens, fused_moe", run)


def no_communication(size: Size, ranks: int, form: str, implementation: str | None) -> Layer:
    """Routing, and the same products on boxes that are there: `(rows, scales, masked_m)`."""

    def run(h, ids, weights, w, boxes):
        rows, scales, masked_m = boxes
        # The products wait for the routing, and the next layer for the products.
        masked_m = masked_m + clocks.zero_reading((ids, weights))
        y = masked_experts(form, implementation, rows, scales, masked_m, w, expected_m(size, ranks))
        return jnp.zeros_like(h) + clocks.zero_reading(y).astype(h.dtype)

    return Layer("no communication", run, bare=True)


def every(
    size: Size, ranks: int, form: str, implementation: str | None, platform: str
) -> Iterator[Layer]:
    """The most telling ones first. What differs by our kernels alone is left out where there is no GPU."""
    given = (size, ranks, form, implementation)
    transports = [
        t for t in exchanges.TRANSPORTS if t != "all_gather" and exchanges.runs(t, ranks, platform)
    ]
    yield ours(*given, transports[0])
    yield no_communication(*given)
    yield plain_boxes(*given, "all_to_all")
    yield gathered_boxes(*given)
    if form != "fp8":
        yield gathered_fused(*given)
        yield plain_sorted(*given, "all_to_all")
    yield plain_boxes(*given, "all_gather + psum_scatter")
    for transport in transports[1:]:
        yield ours(*given, transport)
    yield ours(*given, transports[0], records=True)
    if platform == "gpu":
        yield ours(*given, "all_to_all", not exchanges.gathers(size, ranks))
