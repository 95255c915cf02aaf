"""benchmarks.torch_layer on a CPU: what it holds results to, and the rows that it makes."""

import types

import pytest
import torch

import torch_bridge
from benchmarks import torch_layer
from benchmarks.moe_cases import LAYERS, Model

MODEL = Model("small", 6, 2, 64, 32)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Tensors of a CPU; clocks that tell nothing; vLLM's files are not there."""
    monkeypatch.setattr(torch_layer, "_DEVICE", "cpu")
    timed = []

    def host_us(named, **options):
        timed.append(sorted(named))
        return {name: call() and 3.0 or 4.0 for name, call in named.items()}

    monkeypatch.setattr(torch_layer.host, "host_us", host_us)
    monkeypatch.setattr(torch_layer.timing, "capture_torch", lambda calls: [x() for x in calls])
    spans = types.SimpleNamespace(samples_us=[5.0, 7.0, 6.0])
    monkeypatch.setattr(
        torch_layer.timing, "time_torch_graphs", lambda graphs, replays: [spans] * len(graphs)
    )
    monkeypatch.setattr(torch_bridge, "fused_moe", plain_layer)
    return timed


def plain_layer(x, w13, w2, weights, ids, *, transpose_rhs, out, scale=1.0):
    assert transpose_rhs
    for t in range(len(x)):
        total = torch.zeros(x.shape[1])
        for share, expert in zip(weights[t], ids[t].tolist(), strict=True):
            gate, up = (w13[expert].float() @ x[t].float()).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            total += share * (w2[expert].float() @ hidden)
        out[t] = scale * total


def test_rows_of_a_case(machine, tmp_path):
    case = torch_layer.Operands(MODEL, 5, torch_layer.make_sets(MODEL))
    rows = list(torch_layer.rows_of(case, str(tmp_path)))
    failed, *measured = rows
    assert failed["provider"] == "vllm" and failed["status"] == "failed" and failed["reason"]
    assert [(row["metric"], row["us"]) for row in measured] == [("host_us", 4.0), ("graph_us", 6.0)]
    assert {row["case"] for row in rows} == {"small, 5 tokens"} and machine == [["torch_bridge"]]


def test_without_vllms_files_its_class_is_said_to_be_missing(machine, tmp_path):
    case = torch_layer.Operands(MODEL, 5, torch_layer.make_sets(MODEL))
    [row] = torch_layer.class_rows(case, str(tmp_path))
    assert row["status"] == "failed" and "benchmarks.fetch vllm vllm_layer" in row["reason"]


def test_a_wrong_result_is_not_timed(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(
        torch_bridge, "fused_moe", lambda *a, **options: plain_layer(*a, **options, scale=1.02)
    )
    case = torch_layer.Operands(MODEL, 5, torch_layer.make_sets(MODEL))
    first = next(torch_layer.rows_of(case, str(tmp_path)))
    assert first["provider"] == "torch_bridge" and "relative error 2" in first["reason"]


def test_each_call_takes_the_next_weights(machine):
    case = torch_layer.Operands(MODEL, 2, torch_layer.make_sets(MODEL))
    outs = [torch.zeros_like(case.x) for _ in case.sets]
    call = torch_layer.in_turn(torch_layer.ours_of(case, outs))
    for done in range(1, LAYERS + 1):
        call()
        assert [bool(out.any()) for out in outs] == [k < done for k in range(LAYERS)]
    assert not any(case.wrong(k, out) for k, out in enumerate(outs))
    assert case.wrong(0, outs[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told(capsys):
    assert torch_layer.main([]) == 2
    assert "a CUDA device must be there" in capsys.readouterr().out
