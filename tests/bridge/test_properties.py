"""The sample of the peers' grids that the properties are asserted on is the one that contract.md tells of."""

import math

import pytest

from tests.bridge import stub_vllm, test_sglang_properties, test_vllm_properties


def sampled(module):
    """(axes, cells) of each test that runs on a sample on a GPU."""
    for function in vars(module).values():
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "parametrize" and isinstance(mark.args[0], list):
                axes, cells = mark.args
                yield axes, [cell.values for cell in cells if cell.values[0] == "cuda"]


@pytest.mark.parametrize("module", [test_vllm_properties, test_sglang_properties])
def test_sample_holds_every_level_and_is_as_large_as_the_docs_say(module):
    grids = {tuple(x): x for name, x in vars(module).items() if name.endswith("GRID")}
    whole = sum(math.prod(map(len, grid.values())) for grid in grids.values())
    count = 0
    for axes, cells in sampled(module):
        grid = grids.pop(tuple(axes[1:]))
        levels = [set(column) for column in zip(*cells, strict=True)]
        assert levels == [{"cuda"}, *(set(x) for x in grid.values())], axes
        count += len(cells)
    assert not grids
    text = " ".join((stub_vllm.ROOT / "docs" / "contract.md").read_text().split())
    assert f"{count} of {whole}" in text
