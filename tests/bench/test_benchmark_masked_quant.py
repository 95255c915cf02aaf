"""The benchmark of the masked activation: what it holds results to, and a run on a CPU."""

import numpy as np
import pytest

from benchmarks import fetch, masked_quant
from benchmarks import rows as rows_of
from benchmarks.masked_quant import Size
from tests.layout import masked_quant_oracle as oracle


def rows(count=40, width=256):
    import ml_dtypes

    x = np.random.default_rng(0).standard_normal((1, count, 2 * width)).astype(ml_dtypes.bfloat16)
    return x, oracle.expected(x, np.array([count]))


def test_its_numpy_is_the_oracles():
    x, (q, scales) = rows()
    found_q, found = masked_quant.expected_rows(x[0])
    np.testing.assert_array_equal(found_q.view(np.uint8), q[0].view(np.uint8))
    np.testing.assert_array_equal(found, scales[0])


@pytest.mark.parametrize(
    ("where", "change", "text"),
    [
        ("q", lambda q: q, ""),
        ("q", lambda q: q + (np.arange(q.size) == 77).reshape(q.shape) * 2, "code"),
        ("q", lambda q: q ^ (np.arange(q.size) % 100 == 0).reshape(q.shape), "are off by one"),
        ("scales", lambda s: s * 1.02, "a scale is off by 2.00e-02"),
        ("scales", lambda s: s * np.nan, "a scale is off by nan"),
        ("scales", lambda s: s * 1.001, "100.00% of the scales"),
    ],
)
def test_a_fault_is_found(where, change, text):
    _, want = rows()
    want = want[0][0], want[1][0]
    q, scales = want[0].view(np.uint8), want[1]
    q, scales = (change(q).astype(np.uint8), scales) if where == "q" else (q, change(scales))
    found = masked_quant.mismatch(q, scales, want)
    assert bool(found) == bool(text) and text in found


def test_sizes():
    size = Size(4, 100, 256, 90)
    masked_m = size.masked_m()
    assert masked_m.dtype == np.int32 and masked_m.max() <= 100 and masked_m.min() >= 63
    assert size.bytes_moved(np.array([2, 0, 1, 0])) == 3 * (4 * 256 + 256 + 2 * 4)


@pytest.mark.parametrize("kind", ["kernel", "memcpy"])
def test_a_copy_moves_as_many_bytes_as_it_says(monkeypatch, kind):
    torch = pytest.importorskip("torch")
    made = []

    def ones(*shape, device):
        made.append(torch.ones(shape, device=device))
        made[-1][1] = 7
        return made[-1]

    monkeypatch.setattr(torch, "zeros", ones)
    for call in masked_quant.copy_calls(kind, 4096, device="cpu"):
        call()
    assert len(made) > 1
    for pair in made:  # half of them read, half written
        assert pair.nbytes == 4096 and pair[0].nbytes == 2048 and bool((pair == 1).all())


def test_a_run_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert masked_quant.main(["--size", "3,8,256,5", "--copies", "2", "--out", str(out)]) == 0
    [row] = rows_of.read([out])
    assert (row["provider"], row["status"], row["metric"]) == ("ours", "ok", "wall_us")
    assert row["valid_rows"] * (5 * 256 + 8) == row["bytes"] and row["us"] > 0
    assert "3x8x256, 5 rows" in capsys.readouterr().out


def test_sglangs_file_loses_its_imports_of_sglang(tmp_path):
    import re

    wheel = fetch.WHEELS["sglang_masked"]
    text = (
        "import torch\nfrom sglang.srt.environ import envs\n\nif x:\n    from sglang.a import (\n"
    )
    text += "        b,\n    )\n\nimport triton.language as tl\n\nREST = 1\n"
    left, count = re.subn(*wheel.replace, text)
    assert count == 1 and left == "import torch\nimport triton.language as tl\n\nREST = 1\n"
