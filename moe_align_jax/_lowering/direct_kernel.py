"""A Pallas kernel that is launched outside XLA, by `torch_bridge`: what is needed to compile it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax

_NONE: Mapping[str, str] = MappingProxyType({})


class DirectKernel(NamedTuple):
    """A kernel to compile.

    Attributes:
        name: of the kernel.
        inputs, outputs: its buffers by name, in order.
        call: the kernel as a function of its inputs.
        structs: shapes and dtypes of these.
        rows: for each buffer of which a launch gives the number of rows, the name of that value.
        pitches: for each whose last axis a launch gives the length of, likewise.
    """

    name: str
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    call: Callable
    structs: list[jax.ShapeDtypeStruct]
    rows: Mapping[str, str] = _NONE
    pitches: Mapping[str, str] = _NONE
