"""Programs of the expert layer on the direct path: their descriptors, their sizes, their self-tests."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from moe_align_jax._grouped_matmul import cut_list, direct, direct_selftest, reference
from moe_align_jax._grouped_matmul.direct_problem import DirectMatmul
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Scales, Weights
from moe_align_jax._moe_layer.direct_problem import DirectSum, sum_bucket
from moe_align_jax._simt import emulator
from tests.bridge.fake_cuda import FakeCuda
from torch_bridge._direct import compile_worker, driver, host_code
from torch_bridge._moe.calls import Matmul
from torch_bridge._moe.programs import matmul_program
from torch_bridge.deep_gemm import direct as deep_gemm

SILU = {"activation": "silu", "gated": True}


def blocks(block=16, weights=None, **sizes):
    given = {"num_rows": 4096, "k": 128, "n": 192, "num_experts": 5, "dtype": "bfloat16"}
    given |= {"out_dtype": "bfloat16", "weights": Weights(**(weights or {}))} | sizes
    return DirectMatmul(MatmulProblem("test", "blocks", block_size=block, **given))


def e4m3(scales, rows="blocks", **sizes):
    given = {"num_rows": 4096, "k": 384, "n": 192, "num_experts": 5}
    given |= {"block_size": 128, "whole_blocks": True, "zero_padding": False}
    if rows == "masked":
        given |= {"num_rows": 320, "max_rows": 64, "block_size": 0, "whole_blocks": False}
    lie = {"dtype": "float8_e4m3fn", "out_dtype": "bfloat16", "weights": Weights(transposed=True)}
    return DirectMatmul(MatmulProblem("test", rows, scales=scales, **given | lie | sizes))


LISTED = e4m3(Scales("column_major", "blocks", pitch=64), rows="masked")
GATHER = {"num_tokens": 1024, "top_k": 2}
PROGRAMS = {
    "plain": blocks(),
    "gathered": blocks(64, **GATHER),
    "gated": blocks(16, SILU | {"transposed": True}, **GATHER),
    "pair": blocks(64, SILU | {"pair": True}, **GATHER),
    "interleaved": blocks(64, SILU | {"interleaved": True, "bias": True, "transposed": True}),
    "bias": blocks(128, SILU | {"bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702}),
    "parted": blocks(64, SILU | {"interleaved": True, "bias": True}),
    "rows": blocks(24, {"bias": True}, row_weights=True, k=200, n=136),
    "found": blocks(144),
    "masked": DirectMatmul(
        MatmulProblem(
            *("test", "masked", 4 * 64, 128, 64, 4, "bfloat16", "bfloat16"),
            weights=Weights(transposed=True),
            max_rows=64,
        )
    ),
    "sum": sum_bucket(100, 3, 256, "bfloat16", "float32"),
    "e4m3, columns": e4m3(Scales("column_major", "blocks", pitch=4096)),
    "e4m3, packed rows": e4m3(Scales("row_major", "blocks", packed=True), k=640),
    "e4m3, single scales": e4m3(Scales("tensor", "tensor")),
    "e4m3, masked": e4m3(Scales("column_major", "blocks", True, 64), rows="masked"),
    "e4m3, masked, a list of tiles": LISTED._replace(config=LISTED.tiles._replace(finds=False)),
    "e4m3, masked rows": e4m3(Scales("row_major", "blocks"), rows="masked"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_self_test_passes_a_right_program_and_no_wrong_one(name, monkeypatch):
    fake, problem = FakeCuda(), PROGRAMS[name]
    launches, cubins, shapes = fake.compiled(problem)
    machine_driver = driver.Driver(fake)
    arguments = (driver, machine_driver, problem, launches, cubins, shapes)
    compile_worker.compare_with_numpy(*arguments)
    assert not fake._memory  # all of it was freed
    read = driver.Memory.read

    def off(memory, array):
        read(memory, array)
        array.reshape(-1)[0] += 3
        return array

    monkeypatch.setattr(driver.Memory, "read", off)
    with pytest.raises(compile_worker.CompileError, match=r"out\[0, 0\] is"):
        compile_worker.compare_with_numpy(*arguments)


def test_a_problem_comes_through_the_request_as_it_was():
    for problem in PROGRAMS.values():
        fields = json.loads(json.dumps(problem._asdict()))
        if isinstance(problem, DirectSum):
            assert DirectSum(**fields) == problem
        else:
            assert DirectMatmul.from_fields(fields) == problem


def test_expected_values_of_the_self_test_are_those_of_the_reference():
    """Of a program whose trial uses everything that the reference needs."""
    problem = PROGRAMS["bias"]
    [example] = direct_selftest.examples(problem)
    rows = example.sizes["num_rows"]
    exact = problem.problem._replace(num_rows=rows)
    inputs = dict(example.inputs)
    experts = problem.num_experts
    spare = [(0, experts - inputs["w"].shape[0]), (0, 0), (0, 0)]
    inputs["w"] = np.pad(inputs["w"], spare)
    assert inputs["bias"].shape == (experts, 2 * 192 + 2 * 64)  # whole tiles
    bias = inputs["bias"].reshape(experts, 2, -1)[:, :, :192].reshape(experts, -1)
    inputs["sorted_token_ids"] = inputs.get("sorted_token_ids", np.arange(rows, dtype=np.int32))
    given = [jnp.asarray(inputs[name] if name != "bias" else bias) for name in exact.inputs]
    want = np.asarray(reference.grouped_matmul(exact, *given)).astype(np.float32)
    want = want[example.rows][:, example.columns]
    np.testing.assert_allclose(example.expected, want, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("block", [144, 176, 184, 192])
def test_the_self_test_meets_tiles_of_several_heights(block):
    """A run that is cut into tiles of two heights, and a tile of the lowest one."""
    problem = blocks(block, n=256)
    config = problem.tiles
    assert config.finds and config.exact
    [example] = direct_selftest.examples(problem)
    given, rows = example.inputs, example.sizes["num_rows"]
    sizes = rows, block, rows // block, problem.problem.num_experts
    cut = cut_list.CutList(*sizes, 0, config.heights, exact=True)
    names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
    count, _, start, end, pairs, *_ = emulator.run(
        cut_list.build(cut), [given[name] for name in names]
    )
    assert list((end - start)[: count[0]]) == [*config.heights[1:3], config.heights[-1]]
    assert pairs[: count[0]].sum() == len(example.rows)


@pytest.mark.parametrize("name", ["plain", "gathered", "masked"])
def test_rows_of_a_descriptor_are_those_of_the_launch(name):
    """x and the result have as many rows as a launch says; what is gathered has no descriptor."""
    problem = PROGRAMS[name]
    kernel = direct.kernels(problem)[-1]
    wanted = {
        "plain": {"x": "num_rows", "out": "num_rows"},
        "gathered": {"out": "num_rows"},
        "masked": {},
    }
    assert kernel.rows == wanted[name]
    assert list(kernel.inputs)[0] == {"plain": "num_rows", "gathered": "num_pairs"}.get(
        name, "count"
    )


def test_which_dimension_counts_the_rows():
    tiled = host_code.TensorMap("x", 9, (64, 2, 4096), (128, 256), (64, 1, 16), 3)
    assert tiled.with_rows("num_rows", (4096, 128))[-2:] == ("num_rows", 2)
    one_piece = host_code.TensorMap("x", 9, (64, 64), (128,), (64, 16), 3)
    assert one_piece.with_rows("num_rows", (64, 64))[-2:] == ("num_rows", 1)
    with pytest.raises(ValueError, match="0 dimensions"):
        tiled.with_rows("num_rows", (4095, 128))
    eights = host_code.TensorMap("x", 9, (64, 8, 2, 512), (256, 128, 2048), (64, 8, 1, 2), 3)
    with pytest.raises(ValueError, match="0 dimensions"):
        eights.with_rows("num_rows", (4096, 128))


def test_steps_of_a_descriptor_follow_the_pitch_of_the_launch():
    columns = host_code.TensorMap("x_scales", 7, (4096, 3), (16384,), (128, 1), 0)
    sized = columns.with_pitch("scale_pitch", (3, 4096))
    assert sized[-2:] == ("scale_pitch", 0)
    with pytest.raises(ValueError, match="does not have the rows"):
        columns.with_pitch("scale_pitch", (3, 4100))
    fake = FakeCuda()
    one = driver.BoundTensorMap(0, 1, 0, *sized[1:6])
    driver.TensorMaps(driver.Driver(fake), (one,)).address([4096, 260 << 8])
    [(_, _, sizes, strides, box, _)] = fake.described
    assert (sizes, strides[:1], box) == ((260, 3), (1040,), (128, 1))


def test_descriptors_are_encoded_once_for_each_address_and_size():
    fake = FakeCuda()
    one = driver.BoundTensorMap(0, 1, 1, 9, (64, 4096), (128,), (64, 16), 3)
    other = driver.BoundTensorMap(2, -1, 0, 9, (8,), (), (8,), 0)
    maps = driver.TensorMaps(driver.Driver(fake), (one, other))
    first = maps.address([4096, 7 << 8, 8192])
    assert first % 64 == 0 and maps.address([4096, 7 << 8, 8192]) == first
    assert [(x[1], x[2]) for x in fake.described] == [(4096, (64, 7)), (8192, (8,))]
    for values in ([4096, 9 << 8, 8192], [4096, 7 << 8, 16384], [64, 7 << 8, 8192]):
        assert maps.address(values) != first
    assert len(fake.described) == 8 and maps.address([4096, 7 << 8, 8192]) == first
    assert fake.described[2][2] == (64, 9) and fake.described[4][1] == 4096


def test_a_descriptor_that_the_driver_refuses_is_an_error():
    fake = FakeCuda()
    fake.result = 1
    one = driver.BoundTensorMap(0, -1, 0, 9, (64, 4096), (128,), (64, 16), 3)
    with pytest.raises(driver.DriverError, match=r"describing an array of sizes \[64, 4096\]"):
        driver.TensorMaps(driver.Driver(fake), (one,)).address([4096])


def test_kept_descriptors_are_bounded(monkeypatch):
    monkeypatch.setattr(driver, "_MAX_BLOCKS", 3)
    fake = FakeCuda()
    one = driver.BoundTensorMap(0, -1, 0, 9, (64, 4096), (128,), (64, 16), 3)
    maps = driver.TensorMaps(driver.Driver(fake), (one,))
    for k in range(1, 20):
        maps.address([4096 * k])
        assert len(maps._blocks) <= 3
    assert len(fake.described) == 19


def test_one_program_for_each_tile():
    """Few tiles are shared by clusters under jit; launched directly they are not, and one program does."""
    weights = torch.empty(128, 768, 2048, device="meta")
    programs, tiles = set(), set()
    for rows in range(16, 1024, 16):
        call = Matmul(16, 8, Weights(transposed=True), torch.bfloat16, (rows, 768))
        x = torch.empty(max(1, rows // 8), 2048, dtype=torch.bfloat16, device="meta")
        where = torch.empty(rows, dtype=torch.int32, device="meta")
        operands = {"x": x, "w": weights, "sorted_token_ids": where}
        programs.add(matmul_program(call, operands, "NVIDIA H200"))
        given = blocks(128, {"transposed": True}, num_rows=rows * 8, k=7168, n=256, num_experts=64)
        tiles.add(deep_gemm.program_problem(given.problem, "NVIDIA H200"))
    for found in (programs, tiles):
        assert len(found) == len({(one.problem, one.tiles) for one in found}) > 1
