"""benchmarks/grouped_matmul.py: its cases, its check of a result, its ratios. Nothing is timed."""

import argparse

import numpy as np
import pytest

from benchmarks import grouped_matmul as bench

SMALL = bench.Size(40, 32, 16, 4)
MASKED = bench.Size(30, 32, 16, 4, max_rows=16)
OPTIONS = argparse.Namespace(
    **{"only": "", "variants": True, "jax_example": True, "lax": True, "libraries": True},
    **{"deep_gemm": "", "executions": 1, "replays": 1},
)


@pytest.mark.parametrize("size", [SMALL, MASKED], ids=str)
def test_ours_is_right_and_a_wrong_row_is_seen(size):
    inputs = bench.Inputs(size, 2)
    assert inputs.counts.sum() == size.rows and inputs.hit == (inputs.counts > 0).sum()
    makers = [lambda i: bench.ours_masked(i)] if size.max_rows else []
    if not size.max_rows:
        makers = [lambda i: bench.ours_aligned(i, 16), bench.ours_ragged, bench.lax_ragged]
    for make in makers:
        [(call, xs, sampled)] = make(inputs)
        rows = np.asarray(sampled(call(xs[0], inputs.w))).astype(np.float32)
        assert inputs.wrong(rows) == ""
        assert "relative error" in inputs.wrong(np.roll(rows, 1, axis=0))
        assert "relative error" in inputs.wrong(np.full_like(rows, np.nan))


def test_counts_of_bytes_and_operations():
    inputs = bench.Inputs(SMALL, 1)
    assert inputs.flops == 2 * 40 * 32 * 16
    assert inputs.bytes == 2 * (inputs.hit * 32 * 16 + 40 * (32 + 16))


def test_zipf_prefers_the_first_experts():
    counts = np.bincount(bench.SIZES[5].expert_of_row(), minlength=128)
    assert counts[0] > 4 * counts[8] > 8 * counts[127] > 0


def test_every_variant_has_a_provider_and_fits_its_block():
    for size in bench.SIZES:
        names = bench.providers(size, OPTIONS)
        assert any(name.startswith("ours") for name in names)
        for kind, block, tiles in bench.variants(size):
            assert f"ours, {tiles.name}" in names
            assert kind == "masked" or block % tiles.bm == 0


def test_ratios_are_to_the_best_grouped_peer():
    rows = [
        {"case": "c", "provider": "torch.mm, dense", "us": 50.0},
        {"case": "c", "provider": "torch._grouped_mm", "us": 120.0},
        {"case": "c", "provider": "lax.ragged_dot", "us": 900.0},
        {"case": "c", "provider": "ours, ragged_dot", "us": 60.0},
        {"case": "c", "provider": "ours, broken", "reason": "wrong"},
    ]
    [text] = bench.ratios(rows)
    assert "0.500 of torch._grouped_mm" in text and "1.200 of dense" in text
