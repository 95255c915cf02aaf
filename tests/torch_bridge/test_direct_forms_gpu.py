"""Every entry point of the direct path on every form of the kernels, on a GPU."""

import pytest
import torch

from tests.gpu import direct_forms, sanitize
from torch_bridge import direct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
CASES = list(sanitize.cases())


@pytest.fixture(scope="module")
def forms_loaded():
    direct_forms.load(CASES)


@pytest.mark.parametrize("k", range(len(CASES)), ids=[f"{c[0]}{i}" for i, c in enumerate(CASES)])
def test_gpu_every_entry_of_every_form(k, forms_loaded, monkeypatch):
    """Also buffers larger than the result and a side stream; nothing but what `load` names is compiled."""
    monkeypatch.setattr(direct, "_compile", lambda *a: pytest.fail("compiled"))
    form, size, options = CASES[k]
    if form == "batched":
        direct_forms.run_batched("cuda", *size)
    else:
        direct_forms.run_form("cuda", size, options)
