"""Loads an example that needs other packages than the library's."""

import contextlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def need(*modules):
    """Skips where a package is missing, but fails in CI, whose `make test` installs all of them."""
    for module in modules:
        if os.environ.get("CI"):
            importlib.import_module(module)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pytest.importorskip(module, reason=f"{module} is not installed")


@contextlib.contextmanager
def settings():
    """jax as its users have it: other packages do without our tests' strict promotion, and warn."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Less optimised programs, which compile in half the time.
            before = jax.config.read("jax_disable_most_optimizations")
            jax.config.update("jax_disable_most_optimizations", True)
            try:
                yield
            finally:
                jax.config.update("jax_disable_most_optimizations", before)


def load(name, *needs):
    """The module examples/{name}.py, with `settings` in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        need(*needs)
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(EXAMPLES))  # as for a script: examples import each other
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(EXAMPLES))
    module.settings = settings
    return module
