"""Kernel bodies with one line changed: small alignments through the emulator kill every one.

That the emulator finds what is wrong in real bodies, and that a small suite reaches every line changed.
"""

import numpy as np
import pytest

from moe_align_jax._align.tables import BlockAlignMosaicConfig
from moe_align_jax._simt import emulator
from moe_align_jax.types import AlignProblem, BatchedAlignProblem
from tests import oracle
from tests.simt.mutants import COLLECTIVES, KERNELS, MUTANTS, Mutant, markers, mutated


def pairs(form, num_pairs, num_experts, block_size, *, routing="minus_30", **config):
    ids = oracle.route(
        routing, num_tokens=num_pairs, top_k=1, num_experts=num_experts, dtype="int32", seed=3
    )
    capacity = oracle.capacity(num_pairs, block_size, num_experts, False)
    problem = AlignProblem(num_pairs, num_experts, block_size, capacity, return_inverse=True)
    want = oracle.align(
        ids.ravel(), block_size=block_size, num_experts=num_experts, return_inverse=True
    )
    return problem, BlockAlignMosaicConfig(form=form, **config), ids.ravel(), want


def batch(counts, max_tokens, block_size, **config):
    problem = BatchedAlignProblem(len(counts), max_tokens, block_size)
    want = oracle.align_batched(counts, max_tokens_per_batch=max_tokens, block_size=block_size)
    return problem, BlockAlignMosaicConfig(form="batched", **config), np.array(counts), want


def suite():
    """Problems small enough for all to take about a second, each form with its inner loops running."""
    yield pairs("warp", 29, 10, 3, num_warpgroups=1)
    yield pairs("warp", 32, 40, 32, num_warpgroups=1, num_ctas=3, routing="uniform")
    yield pairs("pairs", 61, 10, 3, num_warpgroups=2, num_ctas=2)
    yield pairs("block", 100, 10, 4, num_warpgroups=1)
    yield pairs("block", 700, 300, 8, num_warpgroups=2, routing="zipf")
    yield pairs("grid", 700, 33, 4, num_warpgroups=2, num_ctas=3, rounds=1)
    yield pairs("grid", 2000, 33, 4, num_warpgroups=1, num_ctas=3, rounds=2)
    yield pairs("grid", 2000, 64, 4, num_warpgroups=2, num_ctas=4, rounds=2, local_sort=True)
    yield pairs(
        "grid", 2000, 70, 4, num_warpgroups=1, num_ctas=4, rounds=4, local_sort=True, cluster=4
    )
    yield pairs("cluster", 900, 300, 4, num_warpgroups=1, num_ctas=4, rounds=2)
    yield pairs("sorted", 300, 1500, 4, num_warpgroups=1)
    yield pairs("sorted", 300, 1500, 3, num_warpgroups=1, num_ctas=8, cluster=4)
    yield pairs("sorted", 400, 20, 6, num_warpgroups=1, num_ctas=4, cluster=2, routing="zipf")
    yield pairs("radix", 300, 1500, 4, num_warpgroups=1, num_ctas=2, rounds=1)
    yield pairs("radix", 511, 700, 2, num_warpgroups=1, num_ctas=1, rounds=1, routing="uniform")
    yield pairs("radix", 64, 2, 4, num_warpgroups=1, num_ctas=1, rounds=1, routing="one")
    yield batch([3, 0, 17, 5, 40, -2] * 30, 20, 4, num_warpgroups=1, num_ctas=2)


def run_suite(kernels):
    """Raises what the emulator reports, or AssertionError for a wrong result."""
    for problem, config, operand, want in suite():
        program = kernels.build(problem, config)
        got = emulator.run(program, [operand.astype(np.int32)])
        for name, have, expect in zip(problem.outputs, got, want, strict=False):
            assert np.array_equal(have, expect), f"{config.form}: {name} is wrong"


def test_bodies_as_they_are_pass():
    with mutated(None) as kernels:
        run_suite(kernels)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant):
    """By what it does wrong: a missing barrier never shows in a lock-step result."""
    with mutated(mutant) as kernels, pytest.raises(mutant.errors):
        run_suite(kernels)


def test_every_marker_in_the_kernels_has_its_mutant():
    assert {(m.module, m.name) for m in MUTANTS} == markers(KERNELS) | markers(COLLECTIVES)


def test_a_mutant_changes_the_line_under_its_marker():
    source = "if x:\n    # mutant: one\n    # mutant: two\n    f(x)  # why\n    f(x)\n"
    changed = "if x:\n    # mutant: one\n    # mutant: two\n    pass\n    f(x)\n"
    assert Mutant("m", "one", "pass").apply(source) == changed
    assert Mutant("m", "two", "pass").apply(source) == changed
    with pytest.raises(AssertionError, match="m: three: m has not one line '# mutant: three'"):
        Mutant("m", "three", "pass").apply(source)


def test_mutants_leave_the_kernels_as_they_were():
    import moe_align_jax._align.kernels as before
    from moe_align_jax._simt import collectives

    with mutated(MUTANTS[0]) as kernels:
        assert kernels is not before
    import moe_align_jax._align.kernels as after
    from moe_align_jax._simt import collectives as collectives_after

    assert after is before and collectives_after is collectives
