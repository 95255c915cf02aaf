"""Products whose rows are known to be all in use: they do not read `num_tokens_post_padded`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax import moe_layer
from moe_align_jax._grouped_matmul import direct, kernel, launch
from moe_align_jax._grouped_matmul.choose_tiles import config_for
from moe_align_jax._grouped_matmul.direct_problem import DirectMatmul
from moe_align_jax._grouped_matmul.problem import Weights
from moe_align_jax._grouped_matmul.shape import shape_of
from moe_align_jax._moe_layer.plan import LayerProblem
from tests.matmul.oracle import error
from tests.matmul.test_clusters import GATED, PLAIN, make
from tests.moe_layer.test_moe_layer import make_layer, wanted


def told_of_none(**sizes):
    """(Problem, operands, result) of `make`, of which all rows are in use; the count in memory says none."""
    problem, operands, want = make(**sizes, dropped=True)
    named = dict(zip(problem.inputs, operands, strict=True))
    named["num_tokens_post_padded"] = jnp.zeros(1, jnp.int32)
    return problem._replace(all_rows=True), [*named.values()], want


def test_a_count_that_is_known_is_not_read():
    problem, operands, want = told_of_none(tokens=3, top_k=2, experts=4, k=128, n=64)
    used = ~np.isnan(want[:, 0])
    assert 0 < used.sum() < len(used)  # blocks of no expert, too
    config = PLAIN._replace(num_ctas=2)
    got = launch.run(problem, *operands, config=config, interpret=True)
    assert error(np.asarray(got)[used], want[used]) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(1, 8, 256, 2048, 256), (1, 8, 128, 2048, 768)], ids=str)
def test_a_count_that_is_known_is_not_read_on_a_gpu(sizes, transposed, gated):
    """The usual tiles, which clusters share where they are few; the same bits as with the count read."""
    names = ("tokens", "top_k", "experts", "k", "n")
    given = dict(zip(names, sizes, strict=True)) | {"transposed": transposed, "gated": gated}
    problem, operands, want = told_of_none(**given)
    used = ~np.isnan(want[:, 0])
    run = jax.jit(functools.partial(launch.run, problem, gpu_kind="NVIDIA H200"))
    got = np.asarray(run(*operands))[used]
    assert error(got, want[used]) < 5e-3
    problem, operands, _ = make(**given, dropped=True)
    read = jax.jit(functools.partial(launch.run, problem, gpu_kind="NVIDIA H200"))
    assert np.asarray(read(*operands))[used].tobytes() == got.tobytes()


def in_order(**sizes):
    """(Problem, operands, result) of `make`, of which row r is pair r; the ids in memory are no pairs."""
    problem, operands, want = make(**sizes, dropped=True)
    named = dict(zip(problem.inputs, operands, strict=True))
    named["sorted_token_ids"] = jnp.full_like(named["sorted_token_ids"], -1)
    return problem._replace(all_rows=True, in_order=True), [*named.values()], want


@pytest.mark.parametrize("k", [128, 72])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_rows_in_order_need_no_ids(gated, k):
    """TMA reads the one row of x that is a tile's; with a K that it does not take, ids are read."""
    sizes = {"tokens": 3, "top_k": 2, "experts": 4, "k": k, "n": 64, "gated": gated}
    problem, operands, want = in_order(**sizes)
    config = (GATED if gated else PLAIN)._replace(num_ctas=2)
    if k == 72:
        operands = make(**sizes, dropped=True)[1]
    used = ~np.isnan(want[:, 0])
    assert 0 < used.sum() < len(used)
    got = launch.run(problem, *operands, config=config, interpret=True)
    assert error(np.asarray(got)[used], want[used]) < 5e-3
    assert shape_of(problem, config).reads_ids == (k == 72)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 8, 256, 7168, 256), (1, 8, 128, 2048, 768), (5, 8, 256, 1024, 192), (2, 1, 8, 512, 64)],
    ids=str,
)
def test_rows_in_order_need_no_ids_on_a_gpu(sizes, transposed, gated):
    """The usual tiles; the same bits as where ids are read and rows come by cp.async, in the same tiles."""
    names = ("tokens", "top_k", "experts", "k", "n")
    given = dict(zip(names, sizes, strict=True)) | {"transposed": transposed, "gated": gated}
    problem, operands, want = in_order(**given)
    used = ~np.isnan(want[:, 0])
    tiles = config_for(problem, "NVIDIA H200")
    run = jax.jit(functools.partial(launch.run, problem, config=tiles))
    got = np.asarray(run(*operands))[used]
    assert error(got, want[used]) < 5e-3
    problem, operands, _ = make(**given, dropped=True)
    read = jax.jit(functools.partial(launch.run, problem, config=tiles))
    assert np.asarray(read(*operands))[used].tobytes() == got.tobytes()


def traced(call, operands) -> str:
    """The kernel, without what differs from trace to trace."""
    with jax.enable_x64(False):
        return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(call)(*operands)))


def test_a_launch_that_says_its_rows_reads_the_count():
    """Of a program of torch_bridge the problem's rows are the most that a launch has."""
    problem, *_ = make(4, 2, 40, 256, 128, gated=True)

    def of_launch(all_rows):
        [found] = direct.kernels(DirectMatmul(problem._replace(all_rows=all_rows)))
        return traced(found.call, found.structs)

    def of_jit(all_rows):
        one = problem._replace(all_rows=all_rows)
        named = {name: jnp.zeros(*array) for name, array in one.inputs.items()}
        config = config_for(one)
        operands = launch.arguments(one, config, named, None, interpret=False)
        return traced(kernel.build(one, config), operands)

    assert of_launch(True) == of_launch(False)
    assert of_jit(True) != of_jit(False)


LAYERS = {
    "one token": {"tokens": 1, "experts": 8},
    "ids out of range": {"tokens": 2, "experts": 16, "routing": "dropped"},
    "expert map, valid tokens": {
        **{"tokens": 4, "experts": 4, "experts_of_ids": 32, "routing": "dropped"},
        **{"expert_map": np.array([-1, 2, 0, -1, 3, 1, 9, -5] * 4), "num_valid_tokens": 3},
    },
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_an_alignment_know_their_rows(monkeypatch, name, training):
    """Forward passes of the kernels, where the count in memory says that no row is in use."""
    usual = moe_layer._blocks_of_pairs

    def told_of_none(*args):
        (pair, expert, count), row_of_pair = usual(*args)
        return (pair, expert, jnp.zeros_like(count)), row_of_pair

    monkeypatch.setattr(moe_layer, "_blocks_of_pairs", told_of_none)
    operands, options = make_layer(top_k=2, hidden=72, ffn=64, dtype="bfloat16", **LAYERS[name])
    run = functools.partial(maj.fused_moe, implementation="emulator", **options)
    got = jax.vjp(lambda x: run(x, *operands[1:]), operands[0])[0] if training else run(*operands)
    want, _ = wanted(operands, options)
    assert np.any(want) and error(got, want) < 1e-2


def test_layers_with_an_alignment_read_the_count():
    """How many rows are in use depends on their ids; so of an exported batch of any size."""
    [tokens] = jax.export.symbolic_shape("t")
    for size, block, rows, pairs in (
        (1, 1, 8, True),
        (16, 8, 1024, False),
        (tokens, 64, tokens, False),
    ):
        problem = LayerProblem(
            *(size, 8, 2048, 768, 128, "bfloat16", "bfloat16", Weights(True, activation="silu")),
            *(False, False, block, rows, pairs, False),
        )
        assert (problem.first.all_rows, problem.second.all_rows) == (pairs, pairs)
