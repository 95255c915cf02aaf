"""typing.get_type_hints of every public name: annotations that a tool can read while the program runs."""

import ast
import importlib
import inspect
import pathlib
import typing

import jax
import numpy as np
import pytest

import moe_align_jax as maj

BRIDGE = ("torch_bridge", "torch_bridge.vllm", "torch_bridge.sglang")


def callables(module):
    """(name, function) of a module's public functions, and of the public methods of its public classes."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for name in names:
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and value.__module__.startswith(("moe_align_jax", "torch_bri")):
            yield name, value
            for member, function in inspect.getmembers(value):
                function = getattr(function, "fget", None) or function
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and not member.startswith("_"):
                    yield f"{name}.{member}", function


OURS = dict(callables(maj))


@pytest.mark.parametrize("name", OURS)
def test_type_hints_of_the_library(name):
    hints = typing.get_type_hints(OURS[name])
    for argument, hint in hints.items():
        assert not isinstance(hint, (str, typing.ForwardRef)), argument


def test_the_library_has_public_functions_and_methods():
    assert {"moe_align_block_size", "ExpertLocation.from_map"} <= OURS.keys()
    location = typing.get_type_hints(maj.moe_align_block_size)["expert_location"]
    assert maj.ExpertLocation in typing.get_args(location)


@pytest.mark.parametrize("module", BRIDGE)
def test_type_hints_of_the_bridge(module):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    found = dict(callables(importlib.import_module(module)))
    assert "moe_align_block_size" in found
    for name, function in found.items():
        try:
            hints = typing.get_type_hints(function)
        except NameError as error:
            pytest.fail(f"{module}.{name}: {error}")
        assert not any(isinstance(hint, (str, typing.ForwardRef)) for hint in hints.values()), name


# -- types for users: what a type checker sees without running anything ------------------------------

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["moe_align_jax", "torch_bridge"])
def test_packages_say_that_they_have_types(package):
    assert (ROOT / package / "py.typed").read_bytes() == b""


def names_for_type_checkers(source: str) -> dict[str, str]:
    """Name -> module of the `from moe_align_jax.MODULE import NAME` under TYPE_CHECKING."""
    [block] = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module, ast.unparse(node)
        for alias in node.names:
            # Only the form `import x as x` exports a name from a package with py.typed.
            assert alias.asname == alias.name, f"{alias.name} must be imported as itself"
            found[alias.name] = node.module.removeprefix("moe_align_jax.")
    return found


def test_type_checkers_see_the_names_that_are_resolved_lazily():
    assert (
        names_for_type_checkers((ROOT / "moe_align_jax/__init__.py").read_text()) == maj._MODULE_OF
    )


def test_an_unknown_name_is_an_error_to_a_type_checker():
    """A `__getattr__` that a type checker sees would make every name one of type Any."""
    tree = ast.parse((ROOT / "moe_align_jax/__init__.py").read_text())
    seen = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert "__dir__" in seen and "__getattr__" not in seen
    with pytest.raises(AttributeError, match="moe_align_block_sizes"):
        maj.moe_align_block_sizes  # noqa: B018


def test_no_signature_takes_just_anything():
    """The parameters of the alignment by type: an editor shows these."""
    hints = typing.get_type_hints(maj.moe_align_block_size)
    assert hints["topk_ids"] == jax.Array | np.ndarray and hints["block_size"] is int
    assert hints["return"] is maj.AlignedBlocks
