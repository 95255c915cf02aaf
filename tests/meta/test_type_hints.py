"""typing.get_type_hints of every public name: annotations that a tool can read while the program runs."""

import importlib
import inspect
import typing

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
