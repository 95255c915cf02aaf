"""The kernels beside the exchanges of "all_to_all": in the emulator against loops, on devices against XLA."""

import importlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from benchmarks import exchanges
from moe_align_jax import expert_parallel
from moe_align_jax._expert_parallel import packed
from moe_align_jax._expert_parallel.transport import Group, sum_over_ranks
from moe_align_jax._expert_parallel.transports import all_to_all
from moe_align_jax._simt import emulator
from moe_align_jax._simt.language import Program
from tests.expert_parallel.exchanges import Batch, mesh_of, over, split
from tests.simt.mutants import COUNTED_PAIRS, MESSAGES, MISCOUNTED, Mutant, markers, mutated

E4M3, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)


def run(problem, *arrays):
    """The outputs by name; 0 where nothing is written."""
    kernel = importlib.import_module(MESSAGES).build(problem)
    program = Program(inputs=kernel.inputs, kernels=(kernel,), results=tuple(kernel.outputs))
    words = [np.ascontiguousarray(a).reshape(-1).view(np.int32) for a in arrays]
    named = zip(problem.outputs.items(), emulator.run(program, words), strict=True)
    return {n: got.reshape(-1).view(dtype).reshape(shape) for (n, (shape, dtype)), got in named}


def fields_of(message, columns):
    """The fields of rows of a message, by NumPy."""
    rows = columns.reshape(-1, message.words)
    for start, field in zip(message.starts[:-1], message.fields, strict=True):
        words = np.ascontiguousarray(rows[:, start : start + field.words])
        yield words.view(field.dtype).reshape(len(rows), field.columns)


def quantised(x):
    """DeepEP's, by NumPy: e4m3 and scales of 128 columns."""
    groups = x.astype(np.float32).reshape(len(x), -1, 128)
    amax = np.maximum(np.abs(groups).max(-1), np.float32(1e-4))
    codes = np.clip(groups * (np.float32(448) / amax)[..., None], -448, 448)
    return codes.astype(E4M3).reshape(x.shape), amax * np.float32(1 / 448)


def message_of(ranks, tokens, top_k, local, payload):
    kernels = importlib.import_module(MESSAGES)
    fields = tuple(kernels.Field(columns, np.dtype(dtype)) for columns, dtype in payload)
    return kernels.Message(ranks, tokens, top_k, local, fields)


def check_exchange(monkeypatch, sizes, payload, room, most_ctas=1000, quantise=False):
    """Packs the tokens of all ranks and unpacks what would come to each; or puts all tokens into its boxes as
    they are. Every array against loops."""
    kernels = importlib.import_module(MESSAGES)
    monkeypatch.setattr(importlib.import_module(f"{MESSAGES}.problems"), "_MAX_CTAS", most_ctas)
    ranks, tokens, top_k, local = sizes
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, ranks * local + 2, (ranks, tokens, top_k)).astype(np.int32)
    ids[0, 0, 0] = np.iinfo(np.int32).min
    weights = rng.random(ids.shape, np.float32) + 1
    if quantise:
        columns = payload[0][0]
        given = [rng.standard_normal((ranks, tokens, columns), np.float32).astype(BF16)]
        given[0][0, 0, :128] = 0
        sent = [quantised(x) for x in given[0]]
    else:
        given = [
            rng.integers(1, 256, (ranks, tokens, c * np.dtype(d).itemsize), np.uint8).view(d)
            for c, d in payload
        ]
        sent = [[x[rank] for x in given] for rank in range(ranks)]
    message = message_of(*sizes, payload)
    pack = kernels.Pack(message, quantise)
    packed = [
        run(pack, ids[r], weights[r], *(x[r] for x in given))["message"] for r in range(ranks)
    ]
    came = np.concatenate(packed)
    all_pairs = [a.reshape(-1, top_k) for a in (weights, ids)]
    rows = [np.concatenate(parts) for parts in zip(*sent, strict=True)]
    for got, want in zip(fields_of(message, came), (*rows, *all_pairs), strict=True):
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
    for receiver in range(ranks):
        rank = np.array([receiver], np.int32)
        mine = ids.reshape(-1, top_k) - receiver * np.int64(local)
        here = (ids.reshape(-1, top_k) >= 0) & (mine >= 0) & (mine < local)
        want_ids = np.where(here, mine, -1).astype(np.int32)
        want_weights = np.where(here, weights.reshape(-1, top_k), 0)
        boxes = run(kernels.Unpack(message, room), rank, came)
        check_boxes(boxes, want_ids, want_weights, rows, local)
        gathered = kernels.Unpack(message, room, gathered=True, quantise=quantise)
        all_tokens = [a.reshape(-1, a.shape[-1]) for a in (ids, weights, *given)]
        boxes = run(gathered, rank, *all_tokens)
        check_boxes(boxes, want_ids, want_weights, rows, local)


def check_boxes(got, ids, weights, rows, local):
    room = got["pair_of_row"].shape[1]
    counts = np.zeros(local, np.int32)
    row_of_pair = np.full(ids.shape, -1, np.int32)
    pair_of_row = np.full((local, room), ids.size, np.int32)
    boxes = [np.zeros((local, room, x.shape[1]), x.dtype) for x in rows]
    for pair, expert in enumerate(ids.reshape(-1)):
        if expert < 0:
            continue
        if (place := counts[expert]) < room:
            row_of_pair.reshape(-1)[pair] = expert * room + place
            pair_of_row[expert, place] = pair
            for box, x in zip(boxes, rows, strict=True):
                box[expert, place] = x[pair // ids.shape[1]]
        counts[expert] += 1
    want = {"masked_m": np.minimum(counts, room), "tokens_per_expert": counts, "ids": ids}
    want |= {"row_of_pair": row_of_pair, "pair_of_row": pair_of_row, "weights": weights}
    want |= {f"boxes{k}": box for k, box in enumerate(boxes)}
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name].view(np.uint8), array.view(np.uint8), name)


FP8 = ((256, E4M3), (2, np.float32))
CASES = {  # ranks, tokens, top_k, local experts; payload; room
    "quantised": dict(sizes=(2, 5, 4, 3), payload=FP8, room=4, quantise=True),
    "quantised, in parts": dict(
        sizes=(3, 1, 2, 2), payload=((4096, E4M3), (32, np.float32)), room=3, quantise=True
    ),
    "odd lengths": dict(
        sizes=(2, 3, 3, 2), payload=((6, BF16), (20, np.int8), (3, np.float32)), room=9
    ),
    "rows in turns": dict(sizes=(2, 7, 5, 4), payload=((520, BF16),), room=6, most_ctas=3),
    "a row that no thread holds at once": dict(
        sizes=(1, 140, 1, 1), payload=((17 * 128 * 8, BF16),), room=1, most_ctas=2
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_exchange_in_the_emulator_equals_loops(monkeypatch, case):
    check_exchange(monkeypatch, **CASES[case])


def _mutant(module: str, name: str, new: str, kills: str = "RaceError") -> Mutant:
    return Mutant(f"{MESSAGES}.{module}", name, new, kills)


MUTANTS = (
    _mutant("pack", "every part of a row writes its ids", "with t.if_(mine):"),
    _mutant(
        "pack",
        "a weight is an id",
        "t.store(r.message, token * message.words + weights + self.thread, expert)",
        "wrong",
    ),
    _mutant("pack", "a row ends one move late", "with t.if_(piece.inside | piece.inside.eq(0)):", "wrong"),
    _mutant("pack", "a scale is that of another group", "with t.if_(lane.eq(0)):", "wrong"),
    _mutant("unpack", "places are overwritten before all have read them", "pass"),
    _mutant("unpack", "places are read before all warps have counted them", "pass"),
    _mutant("unpack", "totals are read before all warps have counted", "pass"),
    MISCOUNTED,
    _mutant(
        "unpack", "a warp's counts are those of the first warp", "t.store(self.r.places, k, count)"
    ),
    _mutant(
        "unpack",
        "a row past the box's room is written",
        "return t.select(place <= rows_per_expert, expert * rows_per_expert + place, -1)",
        "wrong",
    ),
    _mutant(
        "unpack",
        "an unused row says that it is pair 0's",
        "t.store(r.pair_of_row, expert * rows_per_expert + place, 0)",
        "wrong",
    ),
    _mutant("unpack", "an expert of another rank is kept", "here = found >= 0", "wrong"),
    _mutant("unpack", "the weight of another rank's expert is kept", "return weight", "wrong"),
    _mutant(
        "unpack",
        "every lane of a group writes its scale",
        "with t.if_(self.lane >= 0):",
    ),
)  # fmt: skip


def test_every_marker_has_its_mutant():
    assert {(m.module, m.name) for m in MUTANTS} == markers(MESSAGES) | markers(COUNTED_PAIRS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(monkeypatch, mutant):
    with mutated(mutant), pytest.raises(mutant.errors):
        for case in ("quantised", "quantised, in parts", "odd lengths", "rows in turns"):
            check_exchange(monkeypatch, **CASES[case])


# -- in dispatch -----------------------------------------------------------------------------------------


def exchanged(batch, mesh, **options):
    """All that a dispatch gives, and an expert-weighted combine, over the mesh: rows not in use as zero."""

    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=batch.num_experts, mode="low_latency",
            transport="all_to_all", initialize=False, **options,
        )  # fmt: skip
        used = jnp.arange(got.x.shape[1], dtype=jnp.int32)[None] < got.masked_m[:, None]
        scales = got.scales
        if scales is not None and scales.dtype == jnp.int32:
            scales = jnp.swapaxes(scales, 1, 2)
        rows = [
            jnp.where(used[..., None], r, jnp.zeros((), r.dtype))
            for r in (got.x, scales)
            if r is not None
        ]
        out = maj.combine(rows[0].astype(jnp.bfloat16), got.handle)
        return rows, got.masked_m, got.tokens_per_expert, got.handle.layout, got.handle.in_use, out

    return over(mesh, body)(*batch.args)


def assert_same_bits(ours, theirs):
    as_bytes = lambda x: np.asarray(x).view(np.uint8)  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(as_bytes(a), as_bytes(b)), ours, theirs)


WAYS = {  # through all_to_all: (our kernels beside the exchange, whether they gather what need not be packed)
    "gathered": (True, True),
    "packed": (True, False),
    "by XLA": (False, False),
}


def take(monkeypatch, way):
    kernels, gathers = WAYS[way]
    monkeypatch.setattr(all_to_all, "MESSAGE_KERNELS", kernels)
    monkeypatch.setattr(all_to_all, "GATHERS", gathers)


@pytest.mark.parametrize(
    ("ranks", "payload", "room"),
    [(4, "fp8", 5), (2, "fp8_ue8m0_packed", None), (2, "fp8", None)],
)
def test_dispatch_gives_the_bits_of_the_longer_way(monkeypatch, ranks, payload, room):
    """Between two ranks, the sums too: the short ways give results back by a reduce-scatter."""
    batch = Batch(ranks, 5, 512, 3, 8, "bfloat16", seed=2)
    results = []
    for way in WAYS:
        take(monkeypatch, way)
        options = {"payload": payload, "max_tokens_per_expert": room}
        if way == "by XLA":
            monkeypatch.setattr(all_to_all.AllToAll, "return_rows", in_rank_order)
        results.append(exchanged(batch, mesh_of(ranks), **options))
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[2])


def in_rank_order(self, rows, plan, group, in_use=None):
    """`return_rows` by an exchange and a sum of our own."""
    parts = self._exchange(rows.reshape(group.size, -1, rows.shape[1]), group)
    return sum_over_ranks(parts, None if in_use is None else plan)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_two_ranks_sum_to_the_bits_of_the_rank_order(dtype):
    """A sum in the rows' own dtype rounds once, ours first to float32. Not for what CPUs flush to 0."""
    kind, rng = np.dtype(jnp.dtype(dtype)), np.random.default_rng(0)
    bits = rng.integers(0, 1 << 16, (4 * 512, 64 * kind.itemsize // 2), np.uint16)
    rows = bits.view(kind)
    size = np.abs(rows.astype(np.float32))
    kept = np.isfinite(size) & (size >= np.float32(2.0**-118 if dtype != "float16" else 0))
    rows = np.where(kept, rows, np.zeros((), kind))
    group, transport = Group("ep", 2, 4), all_to_all.AllToAll()

    def both(rows):
        in_order = in_rank_order(transport, rows, None, group)
        return transport.return_rows(rows, None, group), in_order

    text = jax.jit(split(mesh_of(2), both)).lower(rows).as_text()
    assert text.count("stablehlo.reduce_scatter") == 1
    got, want = (np.asarray(a) for a in jax.jit(split(mesh_of(2), both))(rows))
    with np.errstate(over="ignore"):
        first, second = rows.reshape(2, 2, 512, -1).astype(np.float64)
        numpy = (first + second).reshape(got.shape).astype(np.float32).astype(kind)
    assert_same_bits(got, want)
    assert_same_bits(got, numpy)


def test_gradients_are_those_of_the_longer_way(monkeypatch):
    batch = Batch(2, 4, 8, 2, 4, seed=3)

    def body(x, weights, ids):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=4, mode="low_latency",
            transport="all_to_all", initialize=False, num_valid_tokens=3,
        )  # fmt: skip
        used = jnp.arange(got.x.shape[1], dtype=jnp.int32)[None] < got.masked_m[:, None]
        return maj.combine(jnp.sin(jnp.where(used[..., None], got.x, 0)), got.handle)

    results = []
    for way in WAYS:
        take(monkeypatch, way)
        run = split(mesh_of(2), lambda *given: body(*given))
        loss = jax.grad(
            lambda x, w, run=run: jnp.sum(jnp.cos(run(x, w, batch.ids))), argnums=(0, 1)
        )
        results.append(jax.jit(loss)(batch.x, batch.weights))
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[2])


COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter")
PAIRS = {  # ranks, way: kernels of ours, collectives; three gathers are one kernel (tests.no_gpu.exchanges)
    (2, "gathered"): (2, (0, 3, 1)),
    (2, "packed"): (3, (0, 1, 1)),
    (4, "gathered"): (2, (1, 3, 0)),
    (4, "packed"): (3, (1, 1, 0)),
}


@pytest.mark.parametrize(("ranks", "way"), PAIRS)
def test_a_pair_of_dispatch_and_combine_has_few_kernels_and_two_exchanges(monkeypatch, ranks, way):
    """Lowered for GPUs: what else there is adds up over more than two ranks, in one fusion."""
    take(monkeypatch, way)
    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    batch = Batch(ranks, 64, 256, 2, 8, "bfloat16")

    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=8, mode="low_latency", payload="fp8",
            transport="all_to_all",
        )  # fmt: skip
        return maj.combine(got.x.astype(jnp.bfloat16), got.handle)

    step = jax.jit(split(mesh_of(ranks), body)).trace(*batch.args)
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    kernels, collectives = PAIRS[ranks, way]
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == kernels
    found = tuple(len(re.findall(rf"stablehlo\.{name}\b", text)) for name in COLLECTIVES)
    assert found == collectives
    found = set(re.findall(r"stablehlo\.(\w+)", text))
    # One reduction is there, of `handle.in_use`, which nobody reads here: XLA drops it.
    assert len(re.findall(r"stablehlo\.reduce\b", text)) <= 1
    assert not found & {"sort", "scatter", "gather", "concatenate", "while"}, found


@pytest.mark.parametrize(
    ("ranks", "payload", "last"),
    [(2, "fp8", 36), (4, "fp8", 12), (8, "fp8", 5), (2, None, 36)],
)
def test_few_tokens_are_gathered_and_more_are_packed(monkeypatch, ranks, payload, last):
    """By the shapes alone, with DeepSeek-V3's rows: `(ranks - 1) * tokens * 14336` bytes come to a rank."""
    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")

    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=16, mode="low_latency", payload=payload,
            transport="all_to_all", initialize=False, max_low_latency_tokens=256,
        )  # fmt: skip
        return got.masked_m

    for tokens in (1, last, last + 1):
        size = exchanges.Size("low_latency", tokens, plain=payload is None)
        assert exchanges.gathers(size, ranks) == (tokens <= last)
        shapes = [(tokens * ranks, width) for width in (7168, 8, 8)]
        kinds = (jnp.bfloat16, jnp.int32, jnp.float32)
        given = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, kinds, strict=True)]
        step = jax.jit(split(mesh_of(ranks), body)).trace(*given)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
        gathers = len(re.findall(r"stablehlo\.all_gather\b", text))
        assert ("moe_pack" in text, gathers) == ((True, 1) if tokens > last else (False, 3))


@pytest.mark.parametrize(
    ("tokens", "top_k", "filling"),
    [(8, 8, 112), (36, 8, 504), (64, 8, 512), (128, 8, 512), (64, 16, 128), (256, 8, 512)],
)
def test_rows_are_cut_while_a_cta_compares_few_ids(tokens, top_k, filling):
    """Two ranks' rows of 7168 bfloat16, 7 moves a thread: at most four CTAs an SM, of which there are 132.
    64 tokens of 16 experts are 2048 pairs, each compared with the 16 of a row, and those rows stay whole."""
    x = jax.ShapeDtypeStruct((tokens, 7168), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    *_, gathered = packed.problems([x], ids, 2, 128, 2 * tokens, True)
    assert gathered.num_ctas == filling


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 128])
@pytest.mark.parametrize("payload", ["fp8", None])
def test_on_gpus_the_kernels_give_the_bits_of_the_longer_way(monkeypatch, tokens, payload):
    """Twice, over all GPUs; sizes of DeepSeek-V3's layer. The longer way is given what NumPy has quantised:
    XLA divides with an error there, and one code in 10,000 differs."""
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks = jax.device_count()
    mesh = jax.make_mesh((ranks,), ("ep",), axis_types=(AxisType.Auto,))
    batch = Batch(ranks, tokens, 7168, 8, 16 * ranks, "bfloat16", seed=tokens)
    sharding = NamedSharding(mesh, P("ep"))
    given = quantised(batch.x) if payload else batch.x
    batch.x, batch.ids, batch.weights = (jax.device_put(a, sharding) for a in batch.args)
    results = []
    for way in ("gathered", "packed"):
        take(monkeypatch, way)
        results += [exchanged(batch, mesh, payload=payload) for _ in range(2)]
    take(monkeypatch, "by XLA")
    monkeypatch.setattr(all_to_all.AllToAll, "return_rows", in_rank_order)
    batch.x = jax.device_put(given, sharding)
    results.append(exchanged(batch, mesh))
    for result in results[1:]:
        assert_same_bits(results[0], result)
