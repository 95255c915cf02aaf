"""Every entry point of the direct path on every variant of the kernels, on a GPU."""

import pytest
import torch

from tests.gpu import direct_forms, sanitizer_cases
from torch_bridge._direct import store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
CASES = sanitizer_cases.cases()


@pytest.fixture(scope="module")
def loaded():
    direct_forms.load(CASES)


@pytest.mark.parametrize(
    "k", range(len(CASES)), ids=[f"{c.name} {i}".replace(" ", "-") for i, c in enumerate(CASES)]
)
def test_gpu_every_entry_of_every_variant(k, loaded, monkeypatch):
    """Also buffers larger than the result and a side stream; nothing but what `load` names is compiled."""
    monkeypatch.setattr(store.here.machine, "compile", lambda *a: pytest.fail("compiled"))
    direct_forms.run("cuda", CASES[k])
