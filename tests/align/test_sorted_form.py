"""The form "sorted" in the emulator, over its own configurations, and what `fit` makes of them."""

import itertools

import numpy as np
import pytest

from moe_align_jax._align import config as _fits
from moe_align_jax._align import kernels
from moe_align_jax._align.config import BlockAlignMosaicConfig
from moe_align_jax._simt import emulator
from moe_align_jax._simt.language import check_launch
from moe_align_jax.types import AlignProblem
from tests import forms, oracle

# Warpgroups, CTAs, cluster: one CTA; copies of all experts; one cluster; clusters that share the rows.
CONFIGS = ((1, 1, 1), (2, 3, 1), (1, 8, 8), (2, 8, 4), (1, 6, 2))
# Ranges of one expert and of more than one CTA can name, many passes and none, blocks that are no
# multiple of 4, of one row, and longer than all pairs of an expert.
SIZES = (
    *(forms.Size(1, 5, 4), forms.Size(127, 9000, 16), forms.Size(300, 1, 3)),
    *(forms.Size(700, 40, 6), forms.Size(1000, 70_000, 8), forms.Size(513, 257, 1)),
    *(forms.Size(600, 300, 128), forms.Size(900, 7, 4)),
)


def sorted_config(wg, ctas, cluster):
    return BlockAlignMosaicConfig(form="sorted", num_warpgroups=wg, num_ctas=ctas, cluster=cluster)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_configuration_equals_the_oracle(size, config):
    """With another routing and other options for each."""
    seed = SIZES.index(size) * len(CONFIGS) + CONFIGS.index(config)
    options = forms.OPTIONS[seed * 7 % len(forms.OPTIONS)]
    problem = forms.problem(size, options, id_words=1 + seed % 2)
    config = _fits.fit(sorted_config(*config), problem)
    assert config.form == "sorted"
    dtype = "int32" if problem.id_words == 1 else "int64"
    ids = oracle.route(
        oracle.ROUTINGS[seed % len(oracle.ROUTINGS)],
        num_tokens=size.num_pairs,
        top_k=1,
        num_experts=size.num_experts,
        dtype=dtype,
        seed=seed,
    ).ravel()
    expert_map = oracle.local_map("any", size.num_experts, seed)
    operands = {
        "topk_ids": ids.view(np.int32),
        "expert_map": expert_map,
        "num_valid_pairs": np.array(size.num_pairs * 2 // 3),
    }
    # A row of a vmapped batch may start at any word: 4-byte stores.
    program = kernels.build(problem, config, batched=seed % 3 == 0)
    arrays = [
        np.asarray(operands[name], np.int32).reshape(shape)
        for name, shape in problem.inputs.items()
    ]
    want = oracle.align(
        ids,
        block_size=size.block_size,
        num_experts=size.num_experts,
        expert_map=expert_map if options["map"] else None,
        ignore_invalid_experts=options["map"] == "filter",
        pad_sorted_ids=options["pad_sorted_ids"],
        num_valid_pairs=size.num_pairs * 2 // 3 if options["num_valid_pairs"] else None,
        return_inverse=options["return_inverse"],
    )
    oracle.assert_same(oracle.Expected(*emulator.run(program, arrays)), want)


@pytest.mark.parametrize("routing", ["one", "zipf", "uniform"])
def test_one_cta_of_a_cluster_may_hold_every_pair(routing):
    """Several rounds of every warp, and several chunks of blocks with an expert across them."""
    n, num_experts = 2500, 40
    ids = oracle.route(
        routing, num_tokens=n, top_k=1, num_experts=num_experts, dtype="int32", seed=5
    ).ravel()
    problem = forms.problem(forms.Size(n, num_experts, 16), forms.OPTIONS[0])
    program = kernels.build(problem, sorted_config(2, 4, 2))
    got = emulator.run(program, [ids])
    want = oracle.align_numpy(ids, block_size=16, num_experts=num_experts)
    oracle.assert_same(oracle.Expected(*got), want)


@pytest.mark.parametrize(
    ("num_pairs", "num_experts", "form", "cluster"),
    [
        (16_384, 9000, "sorted", 1),
        (512, 65_536, "sorted", 1),
        # An expert's place in a CTA's range takes 16 bits, so that more CTAs share them...
        (512, 65_537, "sorted", 2),
        (512, 262_144, "sorted", 4),
        (8192, 524_288, "sorted", 8),
        # ... or it does not fit, or shared memory does not hold the pairs three times.
        (512, 524_289, "radix", 1),
        (512, 2**31 - 1, "radix", 1),
        (16_384, 524_288, "radix", 1),
        (16_385, 9000, "radix", 1),
    ],
)
def test_fit_takes_another_form_for_what_it_cannot_sort(num_pairs, num_experts, form, cluster):
    config = sorted_config(8, 64, 1)
    got = _fits.fit(config, AlignProblem(num_pairs, num_experts, 1, num_pairs))
    assert (got.form, got.cluster) == (form, cluster)


def test_whatever_a_table_says_can_be_launched():
    sizes = itertools.product((1, 33, 1000, 5000, 16_384, 17_000), (1, 300, 9000, 65_535, 300_000))
    configs = itertools.product((1, 2, 8), (1, 5, 64, 256), (1, 2, 8))
    for (n, num_experts), config in itertools.product(sizes, list(configs)):
        problem = AlignProblem(n, num_experts, 16, n * 16)
        fitted = _fits.fit(sorted_config(*config), problem)
        for kernel in kernels.build(problem, fitted).kernels:
            check_launch(kernel)
            assert fitted.form == "radix" or -(-n // kernel.num_threads) <= 16  # in registers


@pytest.mark.parametrize("num_keys", [1, 2, 3, 256, 257, 1152, 8192, 65_535, 65_536])
def test_digits_say_all_of_a_key(num_keys):
    digits = _fits.sorted_digits(num_keys)
    keys = np.arange(num_keys)
    parts = [(keys >> shift & ((1 << bits) - 1)) << shift for shift, bits in digits]
    np.testing.assert_array_equal(sum(parts, np.zeros_like(keys)), keys)
    assert all(1 <= bits <= 8 for _, bits in digits) and len(digits) <= 2
