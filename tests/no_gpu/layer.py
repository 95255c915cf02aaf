"""Compiles the expert layer's programs for PyTorch without a GPU, and checks the result.

    python -m tests.no_gpu.layer [PART_OF_A_NAME]

As `compile` does for the alignment: nothing spills, and the launch that was read is the one that jaxlib
makes. The TMA descriptors that we encode are argument for argument those that jaxlib's host code encodes.
Exit code 1 otherwise.
"""

import sys
from collections.abc import Iterator
from typing import Any

from tests.no_gpu import ptx, script, worker


def problems() -> Iterator[tuple[str, Any]]:
    """(What it is, the problem): the products of a layer in each size class, every way to load and store."""
    from moe_align_jax._grouped_matmul.direct_problem import DirectMatmul
    from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights
    from moe_align_jax._moe_layer.direct_problem import sum_bucket

    silu: dict[str, Any] = {"activation": "silu", "gated": True}

    def blocks(block, weights, **sizes):
        given = {"num_rows": 8192, "k": 2048, "n": 768, "num_experts": 32, "dtype": "bfloat16"}
        given |= {"out_dtype": "bfloat16", "zero_padding": False} | sizes
        weights = Weights(**weights)
        return DirectMatmul(
            MatmulProblem("test", "blocks", weights=weights, block_size=block, **given)
        )

    gather: dict[str, Any] = {"num_tokens": 1024, "top_k": 8}
    for block in (8, 16, 64, 80, 128, 144, 176):
        left: dict[str, Any] = {"leaves_padding": True, "expected_rows": block}
        yield f"gate and up, {block}", blocks(block, silu | {"transposed": True}, **gather, **left)
        yield f"down, {block}", blocks(block, {"transposed": True}, k=768, n=2048, **left)
    yield "a pair with bias", blocks(64, silu | {"pair": True, "bias": True}, **gather)
    swiglu = {"transposed": True, "interleaved": True, "bias": True, "swiglu_alpha": 1.702}
    yield "gpt-oss", blocks(16, silu | swiglu | {"swiglu_limit": 7.0}, k=2880, n=2880, **gather)
    yield "row weights", blocks(24, {"bias": True}, row_weights=True)
    yield "odd", blocks(16, {}, k=200, n=136)
    yield "one piece", blocks(64, {}, k=64, n=64)
    yield "float16, float32", blocks(64, {}, dtype="float16", out_dtype="float32")
    for most in (256, 250):
        sizes = (8 * most, 2048, 1536, 8, "bfloat16", "bfloat16")
        weights = Weights(transposed=True)
        masked = MatmulProblem("test", "masked", *sizes, weights=weights, max_rows=most)
        yield f"masked {most}", DirectMatmul(masked)
    yield from e4m3_problems()
    for tokens, out in ((1, "bfloat16"), (5000, "float32")):
        yield f"sum, {tokens}", sum_bucket(tokens, 8, 2880, "bfloat16", out)


def e4m3_problems() -> Iterator[tuple[str, Any]]:
    """As DeepGEMM's contiguous and masked layouts have them: each way to load scales."""
    from moe_align_jax._grouped_matmul.choose_tiles import config_for
    from moe_align_jax._grouped_matmul.direct_problem import DirectMatmul
    from moe_align_jax._grouped_matmul.problem import E4M3, MatmulProblem, Scales, Weights

    columns, rows = Scales("column_major", "blocks", pitch=8192), Scales("row_major", "blocks")
    given: dict[str, Any] = {"k": 2048, "n": 768, "num_experts": 32, "dtype": E4M3}
    given |= {"out_dtype": "bfloat16", "weights": Weights(transposed=True), "zero_padding": False}
    for block in (64, 128, 192):
        for what, scales in (("columns", columns), ("packed rows", rows._replace(packed=True))):
            sizes = {"num_rows": 8192 // block * block, "block_size": block, "whole_blocks": True}
            problem = MatmulProblem("test", "blocks", scales=scales, **sizes, **given)
            yield f"e4m3, {block}, {what}", DirectMatmul(problem)
    one_step = given | {"k": 128}
    sizes = {"num_rows": 8192, "block_size": 128, "whole_blocks": True}
    problem = MatmulProblem("test", "blocks", scales=columns, **sizes, **one_step)
    yield "e4m3, one step", DirectMatmul(problem)
    of_most = columns._replace(pitch=2048)
    for most, expected, scales in ((2048, 1024, of_most), (256, 0, of_most), (250, 12, rows)):
        scales = scales if scales is rows else scales._replace(pitch=most)
        sizes = {"num_rows": 32 * most, "max_rows": most, "expected_rows": expected}
        problem = MatmulProblem("test", "masked", scales=scales, **sizes, **given)
        yield f"e4m3, masked {most}", DirectMatmul(problem)
    finds = config_for(problem)._replace(finds=True)
    yield "e4m3, masked, without a list", DirectMatmul(problem, config=finds)
    sizes = {"num_rows": 8192, "block_size": 128, "whole_blocks": True, "row_labels": True}
    problem = MatmulProblem("test", "blocks", scales=columns, **sizes, **given | {"num_experts": 8})
    sizes = {"num_rows": 8192, "block_size": 128}
    halves = MatmulProblem("test", "blocks", scales=columns, **sizes, **given)
    assert config_for(halves).skips
    yield "e4m3, halves left out", DirectMatmul(halves)
    by_labels = halves._replace(whole_blocks=True, row_labels=True)
    assert config_for(by_labels).skips
    yield "e4m3, halves left out by labels", DirectMatmul(by_labels)
    shared = config_for(problem)
    assert shared.shares_weights
    yield "e4m3, shared by clusters", DirectMatmul(problem, config=shared)


def check(plugin: str, runtime: str, part: str = "") -> Iterator[script.Report]:
    checker = worker.Checker(plugin, runtime)
    checker._mode = "direct"
    for what, problem in script.one_in_sample(problems()):
        if part not in what:
            continue
        for kernel in checker.launch._pallas_kernels_of(problem):
            [(text, launch)] = checker.compiler([kernel])
            log = checker.assembled(text)
            used = ptx.usage(log)
            wrong = [*checker._recording_faults(kernel, launch)]
            if (spilled := used.spill_stores + used.spill_loads) or used.stack:
                wrong.append(f"{spilled} bytes spilled, {used.stack} bytes of stack")
            wrong += [line for line in log.splitlines() if "Performance Loss" in line]
            if launch.waits != ("griddepcontrol.wait" in text):
                wrong.append(f"waits: {launch.waits}")
            maps = len(launch.tensor_maps)
            yield f"{used.registers:3} registers, {maps} descriptors  {kernel.name}: {what}", wrong


if __name__ == "__main__":
    sys.exit(script.main("tests.no_gpu.layer", check))
