"""Every example in a docstring, and of the README, gives what it shows."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Imported elsewhere: the bridge needs torch, which its own tests check; cli.py needs no example.
MODULES = sorted(module.name for module in pkgutil.walk_packages(maj.__path__, "moe_align_jax."))
SCOPE = {"jax": jax, "jnp": jnp, "np": np} | {name: getattr(maj, name) for name in maj.__all__}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=SCOPE)
    assert result.failed == 0


@pytest.mark.parametrize(
    "name",
    [n for n in maj.__all__ if inspect.isfunction(getattr(maj, n))],
)
def test_public_function_has_an_example_that_runs(name):
    finder = doctest.DocTestFinder(recurse=False)
    [test] = finder.find(getattr(maj, name), name, globs=dict(SCOPE))
    assert test.examples, f"{name} shows no example"
    assert doctest.DocTestRunner().run(test).failed == 0


def test_docstrings_say_shapes_errors_and_returns():
    for name in maj.__all__:
        value = getattr(maj, name)
        if inspect.isfunction(value):
            text = value.__doc__ or ""
            assert all(part in text for part in ("Args:", "Returns:", "Raises:")), name


def test_readme_examples():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    prompts = [block for block in blocks if ">>>" in block]
    assert prompts
    parser = doctest.DocTestParser()
    for block in prompts:
        test = parser.get_doctest(block, {}, "README.md", "README.md", 0)
        assert test.examples and doctest.DocTestRunner().run(test).failed == 0


def test_readme_names_both_commands_that_ci_runs():
    makefile = (ROOT / "Makefile").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make demo" in README and "make test" in README
    assert re.search(r"^demo:", makefile, re.M) and re.search(r"^test:", makefile, re.M)
    # On a line of its own, also where a failure is kept for the end: `make test || failed=1`.
    assert re.search(r"^make test(?: \|\| \w+=1)?$", ci, re.M)
