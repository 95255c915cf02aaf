"""The kernels that move rows: in the emulator and Pallas' interpreter, lowered for CUDA, and on a GPU."""

import functools
import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax._layout import kernels
from moe_align_jax._simt import emulator
from tests.align.test_lowering import MOSAIC, lower, operations
from tests.layout.helpers import assert_row_sums, masked_oracle, routing, row_sum_inputs, tokens
from tests.simt.mutants import LAYOUT, Mutant, markers, mutated

Leaf, MaskedCopy, CopyConfig = kernels.Leaf, kernels.MaskedCopy, kernels.CopyConfig
RowSum, SumConfig = kernels.RowSum, kernels.SumConfig
OUR_CALL = f"custom_call {MOSAIC}"
BY_BYTES = {1: "uint8", 2: "bfloat16", 4: "float32"}


def leaves(*sizes) -> tuple[kernels.Leaf, ...]:
    """Rows of so many bytes, of several dtypes."""
    return tuple(
        Leaf(BY_BYTES[(1, 2, 4)[k % 3] if size % 4 == 0 else 1], size)
        for k, size in enumerate(sizes)
    )


# -- the masked layout, in the emulator ----------------------------------------------------------------


def places(ids, num_experts):
    """Each pair's place among all by expert, -1 for a dropped one; pairs of each expert."""
    flat, place = ids.ravel(), np.full(ids.size, -1, np.int32)
    counts = np.zeros(num_experts, np.int32)
    for expert in range(num_experts):
        pairs = np.flatnonzero(flat == expert)
        place[pairs] = counts.sum() + np.arange(pairs.size)
        counts[expert] = pairs.size
    return place, counts


def emulate_copy(problem, config, ids, seed=0):
    """Runs the kernel and compares all that it wrote with plain loops."""
    masked_copy = importlib.import_module(f"{LAYOUT}.masked_copy")
    rng = np.random.default_rng(seed)
    place, counts = places(ids, problem.num_experts)
    given = [
        rng.integers(0, 256, (problem.num_tokens, leaf.row_bytes)).astype(np.uint8)
        for leaf in problem.leaves
    ]
    operands = [ids.ravel(), place, counts, *(x.reshape(-1).view(np.int32) for x in given)]
    masked_m, row_of_pair, pair_of_row, *rows = emulator.run(
        masked_copy.build(problem, config), operands
    )
    marks = np.arange(problem.num_tokens)[:, None]
    _, *want = masked_oracle(marks, ids, problem.num_experts, problem.rows_per_expert)
    assert masked_m.tolist() == want[0] and counts.tolist() == want[1]
    assert row_of_pair.tolist() == want[2].ravel().tolist()
    assert pair_of_row.tolist() == want[3].ravel().tolist()
    for x, got in zip(given, rows, strict=True):
        boxes = masked_oracle(x, ids, problem.num_experts, problem.rows_per_expert)[0]
        # The emulator's memory starts as zeros: what is not written stays so.
        assert got.view(np.uint8).reshape(boxes.shape).tolist() == boxes.tolist()


COPIES = [  # T, K, e, M, initialize, bytes of rows, config
    (9, 3, 4, 27, False, (48, 12), CopyConfig(1, 9)),
    (9, 3, 4, 5, True, (48, 12), CopyConfig(1, 3)),
    (13, 8, 130, 2, True, (64, 20, 16), CopyConfig(1, 5)),
    (5, 2, 300, 3, False, (7168, 224), CopyConfig(4, 20)),
    (3, 2, 4, 2, True, (2064, 516), CopyConfig(2, 12)),
    (3, 32, 2, 64, True, (4,), CopyConfig(1, 2)),
    (4, 5, 3, 4, False, (), CopyConfig(1, 4)),
    (1, 1, 1, 1, True, (20,), CopyConfig(1, 1)),
]


@pytest.mark.parametrize("case", COPIES, ids=str)
def test_copy_in_the_emulator_equals_loops(case):
    *sizes, row_bytes, config = case
    problem = MaskedCopy(*sizes, leaves(*row_bytes))
    for name in ("with holes", "one expert", "nowhere", "distinct"):
        ids = routing(name, problem.num_tokens, problem.top_k, problem.num_experts)
        emulate_copy(problem, config, ids)


def test_copy_with_thousands_of_experts():
    problem = MaskedCopy(40, 8, 4096, 1, False, leaves(16))
    emulate_copy(problem, CopyConfig(1, 2), routing("distinct", 40, 8, 4096))


def test_copy_takes_every_size_that_it_says():
    """The usual config: rows are covered, and a thread holds few registers."""
    for num_tokens in (1, 32, 512, 5000):
        for sizes in ((), (4,), (7168, 224), (14336,), (1 << 16, 4), (60,) * 8):
            problem = MaskedCopy(num_tokens, 8, 64, 16, True, leaves(*sizes))
            assert kernels.copy_unsupported(problem) is None
            parts, num_ctas = kernels.copy_config(problem)
            held = sum(
                -(-leaf.units // (parts * 128)) * leaf.unit_bytes // 4 for leaf in problem.leaves
            )
            assert 1 <= num_ctas <= 132 * 8 and held <= 32
    assert "experts" in kernels.copy_unsupported(problem._replace(num_experts=5000))
    assert "pairs" in kernels.copy_unsupported(problem._replace(top_k=33))
    assert "int32" in kernels.copy_unsupported(problem._replace(rows_per_expert=1 << 22))
    assert not kernels.movable("float32", 0) and not kernels.movable("int8", 6)
    assert not kernels.movable("complex64", 16)


def _mutant(name: str, new: str, kills: str = "RaceError") -> Mutant:
    return Mutant(f"{LAYOUT}.masked_copy", name, new, kills)


MUTANTS = (
    _mutant("an expert's first place is read before it is there", "pass"),
    _mutant("rows past an expert's room are copied", "kept = kept & (place >= 0)", kills="wrong"),
    _mutant("a row in use is cleared", "with t.if_(row - expert * room >= self.used(expert) - 1):"),
    _mutant("a row ends one unit late", "with t.if_(at <= leaf.units):", kills="wrong"),
    _mutant("every part of a row writes its place", "with t.if_(mine & self.warp.eq(0)):"),
)


def test_every_marker_has_its_mutant():
    assert {(m.module, m.name) for m in MUTANTS} == markers(LAYOUT)


def mutant_suite():
    for *sizes, row_bytes, config in COPIES[1:5]:
        problem = MaskedCopy(*sizes, leaves(*row_bytes))
        ids = routing("with holes", problem.num_tokens, problem.top_k, problem.num_experts)
        emulate_copy(problem, config, ids)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant):
    with mutated(mutant), pytest.raises(mutant.errors):
        mutant_suite()


# -- the weighted sum, by Pallas' interpreter ----------------------------------------------------------


SUMS = [  # T, K, P, H, dtype, out_dtype, weighted, config
    ((3, 4, 9, 1024, "bfloat16", "bfloat16", True), None),
    ((5, 5, 7, 264, "float16", "float32", True), SumConfig(128, 2, 2)),
    ((4, 3, 9, 1444, "float32", "bfloat16", False), None),
    ((1, 1, 1, 136, "bfloat16", "float16", True), None),
]


@pytest.mark.parametrize(("sizes", "config"), SUMS, ids=str)
def test_sum_in_the_interpreter(sizes, config):
    problem = RowSum(*sizes)
    assert kernels.sum_unsupported(problem) is None
    y, rows, weights = row_sum_inputs(problem)
    got = kernels.run_sum(problem, jnp.asarray(y), rows, *weights, config=config, interpret=True)
    assert_row_sums(problem, got, y, rows, weights)


def test_sum_takes_every_size_that_it_says():
    for width in (128, 136, 256, 1152, 1536, 2880, 4096, 7168):
        for dtype in ("bfloat16", "float32"):
            problem = RowSum(300, 8, 1000, width, dtype, "bfloat16", True)
            assert kernels.sum_unsupported(problem) is None
            config = kernels.sum_config(problem)
            values = config.tile // 128
            assert config.tile <= width and values * problem.item_bytes <= 16
            assert config.parts(problem) * config.tile >= width
            assert config.ahead * max(1, values * problem.item_bytes // 4) <= 32
    good = RowSum(300, 8, 1000, 512, "bfloat16", "bfloat16", True)
    for change in (
        {"width": 64},
        {"width": 1028},
        {"dtype": "float64"},
        {"out_dtype": "float64"},
        {"top_k": 65},
        {"num_tokens": 0},
        {"num_rows": 1 << 23},
    ):
        assert kernels.sum_unsupported(good._replace(**change))


# -- lowered for CUDA ----------------------------------------------------------------------------------


def struct(*shape, dtype="float32", **more):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), **more)


def there_and_back(x, ids, weights, **options):
    rows, layout = maj.permute_to_masked(x, ids, num_experts=64, **options)
    return maj.unpermute_from_masked(rows, layout, weights), layout


STRUCTS = struct(512, 1024, dtype="bfloat16"), struct(512, 8, dtype="int32"), struct(512, 8)


def our_calls(lowered, num_experts=64) -> int:
    """Kernels of ours in a program, beside those of the alignment."""
    call = functools.partial(
        maj.moe_align_block_size, block_size=1, num_experts=num_experts, return_inverse=True
    )
    return operations(lowered)[OUR_CALL] - operations(lower(call, STRUCTS[1]))[OUR_CALL]


@pytest.mark.parametrize("initialize", [True, False])
def test_cuda_program_holds_only_kernels(initialize):
    """The alignment's, the copy, the sum."""
    call = functools.partial(there_and_back, initialize=initialize)
    assert our_calls(lowered := lower(call, *STRUCTS)) == 2
    counts = operations(lowered)
    del counts[OUR_CALL]
    views = {"builtin.module", "func.func", "func.return", "func.call", "stablehlo.reshape"}
    assert set(counts) <= views, counts
    assert not operations(lower(call, *STRUCTS, platforms=("cpu",)))[OUR_CALL]


def test_payload_and_scales_take_one_kernel():
    x = {"q": struct(512, 256, dtype="float8_e4m3fn"), "scales": struct(512, 2), "no": None}
    call = functools.partial(maj.permute_to_masked, num_experts=64)
    lowered = lower(call, x, STRUCTS[1])
    assert our_calls(lowered) == 1 and not operations(lowered)["stablehlo.gather"]
    # What the kernel does not take goes by XLA, the others by the kernel.
    lowered = lower(call, {**x, "odd": struct(512, 3, dtype="int8")}, STRUCTS[1])
    assert our_calls(lowered) == 1 and operations(lowered)["stablehlo.gather"] == 1


def test_vmap_and_sizes_out_of_reach_take_xla():
    batch = [struct(3, *s.shape, dtype=s.dtype) for s in STRUCTS]
    lowered = lower(jax.vmap(there_and_back), *batch)
    assert our_calls(lowered) == 0 and operations(lowered)["stablehlo.gather"] > 8
    many = functools.partial(maj.permute_to_masked, num_experts=5000, max_tokens_per_expert=4)
    assert our_calls(lower(many, *STRUCTS[:2]), 5000) == 0


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_lowers_to_kernels(check_vma):
    """Replicated weights; gradients of all."""
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(AxisType.Auto,))
    specs = (P("ep"), P("ep"), P())
    placed = [
        struct(*s.shape, dtype=s.dtype, sharding=NamedSharding(mesh, spec))
        for s, spec in zip(STRUCTS, specs, strict=True)
    ]
    placed[2] = struct(64, 8, sharding=NamedSharding(mesh, P()))
    shards = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, check_vma=check_vma)
    forward = shards(lambda *a: there_and_back(*a)[0], out_specs=P("ep"))
    small = [struct(64, *s.shape[1:], dtype=s.dtype) for s in STRUCTS]
    alone = lower(there_and_back, *small)  # of one shard
    assert operations(lower(forward, *placed))[OUR_CALL] == operations(alone)[OUR_CALL]
    assert our_calls(alone) >= 1

    def loss(x, ids, weights):
        out = there_and_back(x, ids, weights)[0].astype(jnp.float32)
        return jax.lax.psum(jnp.sum(out), "ep")

    gradient = jax.grad(lambda x, w, ids: shards(loss, out_specs=P())(x, ids, w), argnums=(0, 1))
    assert operations(lower(gradient, placed[0], placed[2], placed[1]))[OUR_CALL]


def test_xla_keeps_what_it_divides_over_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    placed = [
        struct(*s.shape, dtype=s.dtype, sharding=NamedSharding(mesh, P(None, "x"))) for s in STRUCTS
    ]
    lowered = lower(there_and_back, *placed)
    assert our_calls(lowered) == 0 and operations(lowered)["stablehlo.gather"]
    manual = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    half = jax.shard_map(
        lambda *a: there_and_back(*a)[0],
        mesh=manual,
        in_specs=P("x"),
        out_specs=P("x"),
        axis_names={"x"},
    )
    placed = [
        struct(*s.shape, dtype=s.dtype, sharding=NamedSharding(manual, P("x"))) for s in STRUCTS
    ]
    assert operations(lower(half, *placed))["stablehlo.gather"]


def test_without_jit_it_is_the_same():
    y = tokens(18, 256).reshape(3, 6, 256)
    _, layout = maj.permute_to_masked(tokens(6, 4), routing("with holes", 6, 2, 3), num_experts=3)
    want = maj.unpermute_from_masked(y, layout)
    with jax.disable_jit():
        np.testing.assert_array_equal(maj.unpermute_from_masked(y, layout), want)


# -- on a GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("initialize", [True, False])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 1), (9, 3, 4, 27), (33, 8, 130, 3), (32, 8, 64, 32), (512, 8, 64, 512)],
    ids=str,
)
def test_masked_layout_on_a_gpu(size, initialize):
    count, top_k, num_experts, room = size
    rng = np.random.default_rng(0)
    width = 7168 if count >= 32 else 48
    x = {
        "q": rng.integers(0, 256, (count, width)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn),
        "scales": tokens(count, 3),
        "half": tokens(count, 9, "float32").astype(ml_dtypes.bfloat16)[:, :6],
        "odd": rng.integers(-128, 128, (count, 3)).astype(np.int8),
    }
    for name in ("with holes", "one expert", "nowhere"):
        ids = routing(name, count, top_k, 4 * num_experts if count == 512 else num_experts)
        call = functools.partial(
            maj.permute_to_masked,
            num_experts=num_experts,
            max_tokens_per_expert=room,
            initialize=initialize,
        )
        rows, layout = jax.jit(call)(x, ids)
        again, _ = call(x, ids)
        marks = np.arange(count)[:, None]
        _, *want = masked_oracle(marks, ids, num_experts, room)
        found = layout.masked_m, layout.tokens_per_expert, layout.row_of_pair, layout.pair_of_row
        for ours, theirs in zip(found, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        used = want[3] < ids.size
        token = want[3][used] // top_k
        for key, given in x.items():
            got = np.asarray(rows[key])
            assert got[used].tobytes() == given[token].tobytes(), key
            assert np.asarray(again[key])[used].tobytes() == given[token].tobytes(), key
            if initialize:
                assert not got[~used].view(np.uint8).any(), key


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 128, "bfloat16", "bfloat16", True),
        (32, 8, 2048, 7168, "bfloat16", "bfloat16", True),
        (512, 8, 4000, 7168, "bfloat16", "float32", True),
        (300, 6, 1000, 2880, "float16", "float16", True),
        (77, 4, 500, 1152, "float32", "float32", False),
        (5000, 2, 900, 256, "bfloat16", "float32", False),
    ],
    ids=str,
)
def test_sum_on_a_gpu(sizes):
    problem = RowSum(*sizes)
    y, rows, weights = row_sum_inputs(problem)
    got = jax.jit(functools.partial(kernels.run_sum, problem))(y, rows, *weights)
    assert_row_sums(problem, got, y, rows, weights)
    again = jax.jit(functools.partial(kernels.run_sum, problem))(y, rows, *weights)
    assert np.asarray(again).tobytes() == np.asarray(got).tobytes()


@pytest.mark.gpu
def test_there_and_back_on_a_gpu_equals_a_cpu():
    """Values, and gradients of the rows and the weights."""
    x, ids = tokens(64, 512), routing("with holes", 64, 4, 9)
    weights, direction = tokens(64, 4, seed=1), tokens(64, 512, seed=2)

    def loss(x, weights):
        rows, layout = maj.permute_to_masked(x, ids, num_experts=9, max_tokens_per_expert=20)
        out = maj.unpermute_from_masked(jnp.tanh(rows), layout, weights)
        return jnp.sum(out * direction), out

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    results = []
    for device in (jax.devices("cpu")[0], jax.devices("cuda")[0]):
        with jax.default_device(device):
            results.append(jax.tree.leaves(jax.jit(step)(x, weights)))
    for theirs, ours in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
