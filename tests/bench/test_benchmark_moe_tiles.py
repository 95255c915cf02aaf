"""benchmarks.moe_tiles: no variant waits for itself on the GPU, or needs more memory than there is."""

import pytest

pytest.importorskip("torch")

from benchmarks import moe_tiles  # noqa: E402
from moe_align_jax._core.hopper import MAX_SHARED_BYTES  # noqa: E402
from moe_align_jax._grouped_matmul import launch  # noqa: E402


@pytest.mark.parametrize("model", moe_tiles.MODELS, ids=lambda model: model.name)
def test_variants_can_run(model):
    for tokens in (1, 16, 128, 1024, 8192):
        found = moe_tiles.variants(model, tokens)
        names = [variant.name for variant in found]
        assert names[0] == "usual" and len(set(names)) == len(names) > 1
        for variant in found:
            for tiles in filter(None, (variant.first, variant.second)):
                assert tiles.lag <= tiles.stages - 2, variant.name
                assert tiles.num_ctas % tiles.split == 0
                stage = tiles.bk * (tiles.bm + tiles.bn) * 2
                many = tiles.bm > 96 and tiles.bm % 16 == 0
                rows, slots = (tiles.bm // (1 + many), 1) if tiles.form == "swap" else (64, 2)
                parts = tiles.bn * tiles.bm * 4 if tiles.split > 1 else 0
                used = stage * tiles.stages + 2 * slots * rows * 128 + parts + 1024
                assert used <= MAX_SHARED_BYTES, variant.name


def test_a_variant_is_what_is_lowered_while_it_is_chosen():
    usual = launch.config_for
    variant = moe_tiles.Variant({"split": False}, moe_tiles._GATED._replace(stages=5))
    from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights

    gated = Weights(activation="silu", gated=True)
    first = MatmulProblem("t", "blocks", 8, 7168, 256, 256, "bfloat16", "bfloat16", gated, 1)
    first = first._replace(zero_padding=False)  # as the layer has it
    second = first._replace(k=256, n=512, weights=Weights())
    assert launch.config_for(first).split > 1 and launch.config_for(second).split == 1
    with variant.chosen():
        assert launch.config_for(first) == variant.first
        assert launch.config_for(second, "").split == 1
    assert launch.config_for is usual
