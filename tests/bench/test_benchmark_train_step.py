"""benchmarks/train_step.py: every library trains the same model from the same weights."""

import argparse
import dataclasses
import io
import sys

import pytest

from benchmarks import train_step as bench
from tests.models import example

example.need("flax", "optax", "orbax.checkpoint", "matplotlib", "rich")


@pytest.fixture(autouse=True)
def its_turn(monkeypatch):
    """What a case that runs in the test's own process reads when it waits for its turn."""
    monkeypatch.setattr("sys.stdin", io.StringIO())


def test_the_same_losses_whoever_multiplies(monkeypatch):
    options = argparse.Namespace(size="small", steps=3)
    monkeypatch.syspath_prepend(str(bench._EXAMPLES))
    import train_moe

    config = dataclasses.replace(train_moe.SIZES["small"][0], layers=1, hidden=16, heads=2, ffn=8)
    monkeypatch.setitem(train_moe.SIZES, "small", (config, 2, 16))
    flags = "--xla_gpu_enable_triton_gemm=false"  # a real one: XLA ends the process at others
    monkeypatch.setenv("XLA_FLAGS", flags)
    with example.settings():
        [ours] = bench.run_case(bench.Experts("ours"), options)
        [theirs] = bench.run_case(bench.Experts("lax.ragged_dot"), options)
    assert ours["status"] == theirs["status"] == "ok", (ours, theirs)
    assert ours["xla_flags"] == flags
    assert ours["us"] > 0 and ours["tokens"] == 32 and len(ours["losses"]) == 3
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
    assert ours["losses"][0] != ours["losses"][-1]
    with example.settings():
        [failed] = bench.run_case(bench.Experts("tokamax triton"), options)
    if "tokamax" not in sys.modules:
        assert failed["status"] == "failed" and "tokamax" in failed["reason"]


def test_ratios_are_to_ours_and_name_other_losses():
    def row(name, us, losses):
        return {"provider": name, "us": us, "losses": losses}

    ours = row("ours", 10.0, [5.0, 4.0])
    rows = [ours, row("a", 15.0, [5.0, 4.001]), row("b", 5.0, [5.0, 4.5]), {"provider": "c"}]
    assert list(bench.compare(rows)) == [
        "a: 1.50 of ours",
        "b: 0.50 of ours, but its losses differ by up to 0.500",
    ]
    assert not list(bench.compare(rows[1:]))
