"""Calls that tests share."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from tests import oracle


def as_jax(array: np.ndarray) -> jax.Array:
    """A jax array of the very dtype, 64-bit ones too."""
    wide = array.dtype.itemsize == 8
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        result = jnp.asarray(array)
    assert result.dtype == array.dtype
    return result


def check(ids: Any, *, implementation: str, container: str = "numpy", **options: Any) -> Any:
    """Aligns `ids` eagerly, compares every field with the oracle, and returns the result."""
    given = as_jax(ids) if container == "jax" else ids
    got = maj.moe_align_block_size(given, implementation=implementation, **options)
    oracle.assert_same(got, oracle.expected(ids, **options))
    return got


def torch_on_cpu(monkeypatch: Any, *names: str) -> Any:
    """torch, whose functions of these names (of those that benchmarks call) make on the CPU what is meant
    for the GPU. Skips without it."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for name in names:
        real = getattr(torch, name)
        replaced = lambda *a, real=real, **k: real(*a, **{**k, "device": "cpu"})  # noqa: E731
        monkeypatch.setattr(torch, name, replaced)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator("cpu"))
    return torch


def collect_primitives(jaxpr: Any) -> set[str]:
    """Names of all primitives in a jaxpr, those of inner jaxprs included."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    names |= collect_primitives(inner)
    return names


def unwritable(tmp_path):
    """Folders that cannot be written to: below a file, on the kernel's file system, without the right."""
    (tmp_path / "file").write_text("")
    yield tmp_path / "file" / "profile"
    if sys.platform == "linux":
        yield Path("/proc/profile")
    (tmp_path / "locked").mkdir(mode=0o500)
    if not os.access(tmp_path / "locked", os.W_OK):  # root may write everywhere
        yield tmp_path / "locked"
