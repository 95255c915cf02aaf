"""The benchmark of the router: what it holds results to, and a run on a CPU."""

import re

import numpy as np
import pytest

from benchmarks import fetch, router
from benchmarks import rows as rows_of
from benchmarks.router import Size
from tests.router import router_oracle


def routed(kind):
    size = Size(9, 64, 6, kind)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(9, 64)).astype(np.float32)
    bias = rng.normal(size=64).astype(np.float32)
    options = dict(size.options)
    if size.biased:
        options["correction_bias"] = bias
    want = router_oracle.route(logits, top_k=6, **options)
    return size, logits, bias, np.array(want.weights), np.array(want.ids)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "grouped"])
def test_a_fault_is_found(kind):
    size, logits, bias, weights, ids = routed(kind)
    assert router.mismatch(size, logits, bias, weights, ids) == ""
    swapped = ids.copy()
    swapped[3, :2] = ids[3, 1::-1]
    assert "token 3" in router.mismatch(size, logits, bias, weights, swapped)
    twice = ids.copy()
    twice[2, 1] = ids[2, 0]
    assert "twice" in router.mismatch(size, logits, bias, weights, twice)
    assert "an id of" in router.mismatch(size, logits, bias, weights, ids - 64)
    assert "weight" in router.mismatch(size, logits, bias, weights * 1.001, ids)


@pytest.mark.parametrize("size", ["5,16,2", "5,64,4,grouped,bfloat16,8"])
def test_a_run_on_a_cpu(tmp_path, capsys, size):
    out = tmp_path / "rows.jsonl"
    assert router.main(["--size", size, "--copies", "1", "--out", str(out)]) == 0
    [row, *others] = rows_of.read([out])
    assert (row["provider"], row["status"], row["metric"]) == ("ours", "ok", "wall_us")
    beside = ["router alone", "the two apart"] if row["block_size"] else []
    assert [r["provider"] for r in others] == beside and all(r["us"] > 0 for r in others)
    assert row["us"] > 0 and row["tokens"] == 5
    assert "5x" in capsys.readouterr().out


def test_sglangs_file_loses_its_imports_of_sglang():
    wheel = fetch.WHEELS["sglang_router"]
    text = (
        "import triton\n\nfrom sglang.kernels.jit.utils import get_arch, is_arch_support_pdl\n"
        "from sglang.kernels.kernel_api_logging import debug_kernel_api\n"
        "from sglang.kernels.ops.moe import moe_route_radix\n\nREST = 1\n"
    )
    left, count = re.subn(*wheel.replace, text)
    scope: dict = {}
    exec(left.replace("import triton", ""), scope)
    assert count == 1 and scope["REST"] == 1
    assert scope["is_arch_support_pdl"]() and not scope["moe_route_radix"].covered(1, 2, 3)
