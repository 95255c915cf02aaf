"""benchmarks.host on a CPU: what each provider calls, and what a first call reports."""

import contextlib
import json
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import host, vllm_file
from tests import oracle
from tests.bridge import peer_files
from tests.bridge.helpers import assert_triple, ids_of
from torch_bridge import sglang, vllm

E, BLOCK = 16, 8


@pytest.fixture
def peers(monkeypatch):
    """The peers' compiled ops, by the names under which torch finds them: ours, and a note of each call."""
    called = []

    def noted(name, op):
        def call(*arguments):
            called.append(name)
            return op(*arguments)

        return call

    moe = {
        "moe_align_block_size": noted("vllm", vllm.ops_moe_align_block_size),
        "batched_moe_align_block_size": noted("batched", vllm.ops_batched_moe_align_block_size),
    }
    sgl = {"moe_align_block_size": noted("sglang", sglang.ops_moe_align_block_size)}
    monkeypatch.setattr(torch.ops, "_moe_C", types.SimpleNamespace(**moe), raising=False)
    monkeypatch.setattr(torch.ops, "sgl_kernel", types.SimpleNamespace(**sgl), raising=False)
    return called


def test_vllms_file_on_its_op_and_patched(peers):
    path = peer_files.path_of(vllm_file.NAME)
    array, ids = ids_of(torch.int32)
    want = oracle.align(array.ravel(), block_size=BLOCK, num_experts=E)
    with vllm_file.own_and_patched(path) as (own, patched):
        assert_triple(own.moe_align_block_size(ids, BLOCK, E), want)
        assert peers == ["vllm"]
        assert_triple(patched.moe_align_block_size(ids, BLOCK, E), want)
        assert peers == ["vllm"]
    assert "vllm" not in sys.modules


def test_every_provider_runs_and_has_its_peer(peers, monkeypatch, tmp_path):
    """Each result is that of the provider itself, not of the one beside it."""
    array, ids = ids_of(torch.int32, "uniform", num_tokens=40, top_k=8)
    want, results = oracle.align(array.ravel(), block_size=BLOCK, num_experts=E), {}

    def once(calls):
        results.update({name: call() for name, call in calls.items()})
        return dict.fromkeys(results, 3.0)

    def own_and_patched(path):
        module = types.SimpleNamespace(moe_align_block_size=vllm.moe_align_block_size)
        return contextlib.nullcontext((module, module))

    monkeypatch.setattr(host, "host_us", once)
    monkeypatch.setattr(vllm_file, "own_and_patched", own_and_patched)
    (tmp_path / vllm_file.NAME).touch()
    rows = host.host_rows(ids, E, BLOCK, str(tmp_path / "op.so"), "sgl.so")
    assert [row["provider"] for row in rows] == list(results)
    assert all(row["ratio"] == 1 and row["us"] == 3 for row in rows)
    for name, value in results.items():
        if name in ("torch_bridge", "torch_bridge.vllm", "vllm", "vllm's function, patched"):
            assert_triple(tuple(value), want)
        assert (value is None) == (name.endswith("in place") or name == "sglang"), name
    beside = {row["provider"]: row["peer"] for row in rows}
    assert beside["torch_bridge.sglang in place"] == "sglang in place"
    assert beside["torch_bridge.vllm in place"] == "vllm in place"
    assert beside["torch_bridge.vllm, scatter_idx"] == "vllm, scatter_idx"
    assert beside["torch_bridge.vllm batched"] == "vllm batched"
    assert beside["align_blocks, inverse"] == beside["torch.ops"] == "vllm"
    assert beside["vllm's function, patched"] == "vllm's function"
    assert set(beside.values()) <= set(results)


def test_first_call_separates_the_self_test():
    """The seconds that the compiling process answers with, of each program."""
    answer = json.dumps(
        {"programs": [{"seconds": {"compile": 1.5, "self_test": 0.5}}, {"error": "no"}]}
    )
    command = [sys.executable, "-c", f"print({answer!r})", "compile_worker.py"]
    call = f"subprocess.run({command!r}, capture_output=True, text=True)"
    script = host._FIRST_CALL.format(imports="", call=call)
    script = script.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    run = json.loads(done.stdout)
    assert (run["compile_ms"], run["self_test_ms"], run["imports_jax"]) == (3000, 1000, False)
    row = host.first_call_row("ours", [run] * 3)
    assert (row["compile_ms"], row["self_test_ms"], row["processes"]) == (3000, 1000, 3)
    nothing = run | {"compile_ms": 0.0, "self_test_ms": 0.0}
    assert "compile_ms" not in host.first_call_row("ours", [nothing])
