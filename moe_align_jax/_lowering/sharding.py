"""How a value is spread over devices: what a shard_map, Explicit mesh axes and XLA make of it."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from moe_align_jax._core import checks


def check_axis(function: str, axis_name: Any, remedy: str) -> int:
    """The devices along the axis, or axes, of the enclosing shard_map that `axis_name` names.

    Raises:
        TypeError: not a name or a tuple of names.
        ValueError: no enclosing shard_map has the axis, or an axis is named twice.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names):
        rule, got = "be the name of a mesh axis, or a tuple of names", checks.describe(axis_name)
        checks.fail(function, "axis_name", rule, got, remedy, TypeError)
    if len(set(names)) < len(names):
        checks.fail(function, "axis_name", "name each axis once", repr(axis_name), remedy)
    try:
        return lax.axis_size(axis_name)
    except (NameError, KeyError):
        rule = "name an axis of the enclosing jax.shard_map"
        checks.fail(function, "axis_name", rule, repr(axis_name), remedy)


def _varying(x: Any) -> frozenset[str]:
    kind = getattr(jax.typeof(x), "mat", None)
    return frozenset() if kind is None else frozenset(kind.varying)


def vary_together(tree: Any, *also: str) -> Any:
    """Under shard_map with check_vma, every leaf varies over the union of all their axes and `also`.

    A primitive needs this of its operands. So does a function with a gradient rule of its own: its cotangents
    vary as its arguments do, and the transpose of the cast then sums those of an argument that was the same
    on all devices.
    """
    leaves, kind = jax.tree.flatten(tree)
    if not leaves or not any(hasattr(jax.typeof(x), "mat") for x in leaves):
        return tree
    if not jax.sharding.get_abstract_mesh().manual_axes:
        also = ()
    axes = [_varying(x) for x in leaves]
    union = frozenset(also).union(*axes)
    cast = [
        lax.pcast(x, tuple(sorted(union - have)), to="varying") if union - have else x
        for x, have in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(kind, cast)


def replicate(x: jax.Array) -> jax.Array:
    """With Explicit mesh axes, gathers a sharded operand: the result is the global one."""
    sharding = jax.typeof(x).sharding
    if all(axes is None for axes in sharding.spec):
        return x
    # With its mesh: an eager call may stand outside jax.set_mesh.
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def explicitly_sharded(*arrays: jax.Array) -> bool:
    """Whether one is sharded over a mesh's Explicit axes."""
    specs = [getattr(getattr(jax.typeof(x), "sharding", None), "spec", ()) for x in arrays]
    return any(axes is not None for spec in specs for axes in spec)


def explicit_parts(x: Any, axis: int) -> int:
    """Over how many devices of Explicit mesh axes a dimension of x is divided; 1 where it is not."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    names = (*getattr(sharding, "spec", ()), *[None] * x.ndim)[axis % x.ndim]
    if sharding is None or names is None:
        return 1
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def divided_by_xla(ctx: Any) -> bool:
    """Whether XLA divides the program of a lowering rule's context over devices by itself."""
    context = ctx.module_context.axis_context
    if (count := getattr(context, "num_devices", None)) is not None:
        return count > 1
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return False
    return any(size > 1 for name, size in mesh.shape.items() if name not in context.manual_axes)


def on_each_shard(call: Callable, operands: Any, dims: Any) -> Any:
    """`call(*operands)` of a vmapped batch, by parts where the batch is split over Explicit mesh axes.

    The primitives' results have no sharding of their own: without this the parts would be gathered first.

    Args:
        call: returns a list of arrays whose first dimension is the batch.
        operands: its arguments.
        dims: the dimension of the batch in each of them, None where it has none.
    """
    types = [(jax.typeof(x).sharding, dim) for x, dim in zip(operands, dims, strict=True)]
    split = {sharding.spec[dim] for sharding, dim in types if dim is not None} - {None}
    if not split:
        return call(*operands)
    [axes] = split
    mesh = next(sharding.mesh for sharding, dim in types if dim is not None)
    names = axes if isinstance(axes, tuple) else (axes,)
    return jax.shard_map(
        lambda *parts: call(*vary_together(parts)),
        mesh=mesh,
        in_specs=tuple(
            PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, axes)
            for _, dim in types
        ),
        out_specs=PartitionSpec(axes),
        axis_names=set(names),
    )(*operands)
