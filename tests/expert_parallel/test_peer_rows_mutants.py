"""The kernels between devices with one line changed: the emulator or the oracle finds each."""

import importlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from moe_align_jax._simt.language import Devices
from tests.expert_parallel import test_peer_rows as suite
from tests.simt.mutants import (
    BLOCK_SYNC,
    COUNTED_PAIRS,
    MISCOUNTED,
    NVLINK,
    Mutant,
    markers,
    mutated,
)

PACKAGE = NVLINK


def _mutant(name: str, new: str, kills: str = "RaceError") -> Mutant:
    return Mutant(f"{PACKAGE}.dispatch", name, new, kills)


MUTANTS = (
    _mutant("rows are copied before they are there", "pass"),
    _mutant("what one warp has waited for the others read", "pass"),
    _mutant("places are read before all warps have counted", "pass"),
    _mutant("peers are not told of the rows", BLOCK_SYNC, kills="DivergentBarrier"),
    _mutant(
        "ids of other ranks' experts are not put",
        "t.put(rank, at, t.select(here, local + _FIRST_ID, 0))",
        kills="Undefined",
    ),
    _mutant("every rank puts its ids where rank 0's are", "at = pair"),
    _mutant(
        "weights of others' experts are kept",
        "t.store(t.remote(r.local_weights, rank), at, weight)",
        kills="wrong",
    ),
    MISCOUNTED,
    _mutant("a warp's counts are those of the first warp", "t.store(self.r.totals, number, total)"),
    _mutant(
        "a row past the box's room is written",
        "row = t.select(at <= rows_per_expert, expert * rows_per_expert + at, -1)",
        kills="wrong",
    ),
    _mutant(
        "the first row that is not in use is not cleared",
        "first = (expert * rows_per_expert + used + 1) * field.words",
        kills="UnwrittenOutput",
    ),
    _mutant(
        "what goes through the inbox is taken one too high",
        "expert = wanted - _NO_ID",
        kills="wrong",
    ),
    _mutant(
        "an unused row says that it is pair 0's",
        "t.store(r.pair_of_row, expert * rows_per_expert + place, 0)",
        kills="wrong",
    ),
)


def test_every_marker_has_its_mutant():
    assert {(m.module, m.name) for m in MUTANTS} == markers(PACKAGE) | markers(COUNTED_PAIRS)


def check(monkeypatch) -> None:
    """The dispatch kernel of what is imported now: a CTA per token, boxes too small, and parts of rows."""
    package = importlib.import_module(PACKAGE)
    builders = package._BUILDERS | {package.Dispatch: package.dispatch.build}
    build = lambda problem: builders[type(problem)](problem)  # noqa: E731
    monkeypatch.setattr(suite, "nvlink_kernels", types.SimpleNamespace(build=build))
    rng = np.random.default_rng(3)
    for devices, tokens, top_k, local, room, columns in ((3, 5, 4, 2, 4, 8), (2, 2, 3, 5, 8, 3072)):
        ids = rng.integers(-1, devices * local + 2, (devices, tokens, top_k)).astype(np.int32)
        weights = rng.random((devices, tokens, top_k), np.float32) + 1
        x = (rng.standard_normal((devices, tokens, columns)) + 9).astype(jnp.bfloat16)
        fields = (package.Field(columns, np.dtype(jnp.bfloat16)),)
        send = package.Send(tokens, top_k, fields, Devices(devices), local, True)
        suite.check_dispatch(package.Dispatch(send, room, devices == 2), ids, weights, x)


def test_kernel_that_is_not_changed_passes(monkeypatch):
    with mutated(None):
        check(monkeypatch)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant, monkeypatch):
    with mutated(mutant), pytest.raises(mutant.errors):
        check(monkeypatch)
