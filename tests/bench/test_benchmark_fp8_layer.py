"""benchmarks.fp8_layer: what it holds results to, and vLLM's rules for e4m3 as it reads them."""

import argparse
import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="the benchmark compares with PyTorch")

from benchmarks import fp8_layer, vllm_moe, vllm_moe_e4m3  # noqa: E402

SIZE = fp8_layer.Size("some experts", 8, 2, 128, 128, 2)


def test_ours_is_held_to_products_of_the_dequantised_operands():
    sets = fp8_layer.make_sets(SIZE)
    of_torch = [tuple(map(fp8_layer.to_torch, pair)) for pair in sets]
    case = fp8_layer.Case(SIZE, 12, sets, of_torch)
    [program] = fp8_layer.compiled([case])
    _, rest = fp8_layer.step_of(case)
    outs = program([case.x + np.nan for _ in range(fp8_layer.LAYERS)], *rest)
    found = [np.asarray(out[case.sample]).astype(np.float32) for out in outs]
    assert case.wrong(lambda layer: found[layer]) == ""
    assert case.wrong(lambda layer: found[layer] * 1.05).startswith("layer 0: difference")
    assert case.wrong(lambda layer: found[fp8_layer.LAYERS - 1 - layer]).startswith("layer 0")
    others = (np.asarray(case.ids) >= SIZE.experts).all(1)  # tokens without an expert here
    assert others.any() and not np.asarray(outs[0])[others].any()


def test_tuned_sizes_are_those_of_e4m3_in_blocks(tmp_path):
    name = "E=8,N=32,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    assert vllm_moe_e4m3.config_name(8, 32, "NVIDIA H200 NVL") == name
    table = {"triton_version": "3", "1": {"BLOCK_SIZE_M": 16}, "64": {"BLOCK_SIZE_M": 64}}
    (tmp_path / vllm_moe.CONFIGS).write_text(json.dumps({name: table}))
    for tokens, block in ((1, 16), (32, 16), (33, 64), (9000, 64)):
        sizes = tokens, 2, 8, 64, 32
        config, source = vllm_moe_e4m3.choose_config(str(tmp_path), *sizes, "NVIDIA H200")
        assert (config["BLOCK_SIZE_M"], source) == (block, name)


def test_weights_come_first_below_64_rows():
    for rows, columns, first in ((16, 128, True), (64, 128, False), (16, 32, False), (8, 64, True)):
        assert vllm_moe_e4m3.swaps({"BLOCK_SIZE_M": rows, "BLOCK_SIZE_N": columns}) == first


def test_steady_steps_come_behind_both_spans(monkeypatch):
    """A span right behind steps at the GPU's power limit is too long."""
    told = []

    class Peer:
        def measure(self, options):
            yield from steps("vllm")

    def steps(name):
        told.append(f"span {name}")
        yield {"clock": "span", "us": 50.0}
        run = lambda: told.append(f"wall {name}")  # noqa: E731
        yield fp8_layer.moe_layer.Wall("graph", run, lambda: None, 1e6, lambda: "")

    monkeypatch.setattr(fp8_layer, "_Theirs", lambda *_: Peer())
    monkeypatch.setattr(fp8_layer, "_ours", lambda *_: steps("ours"))
    monkeypatch.setattr(fp8_layer, "compiled", lambda cases: [None for _ in cases])
    monkeypatch.setattr(fp8_layer.children, "wait_for_turn", lambda: None)
    monkeypatch.setattr(fp8_layer.timing, "read_rate", lambda: 4.0)
    monkeypatch.setattr(fp8_layer.moe_layer, "_COOL_S", 0.0)
    options = argparse.Namespace(tokens=[3], peers="", executions=1, replays=1)
    rows = list(fp8_layer.run_case(SIZE, options))
    assert told[:2] == ["span vllm", "span ours"] and "wall vllm" in told and "wall ours" in told
    found = [(row["provider"], row["clock"], row["status"]) for row in rows]
    assert found[:2] == [("vllm", "span", "ok"), ("fused_moe", "span", "ok")]
    assert sorted(found[2:]) == [("fused_moe", "wall", "ok"), ("vllm", "wall", "ok")]
    monkeypatch.setattr(fp8_layer, "compiled", lambda cases: [ValueError("no") for _ in cases])
    rows = list(fp8_layer.run_case(SIZE, options))
    assert [row["status"] for row in rows if row["provider"] == "fused_moe"] == ["failed"]
    assert {row["clock"] for row in rows if row["provider"] == "vllm"} == {"span", "wall"}
