"""What a shard_map body can ask about its mesh: axis sizes, the platform, arrays without elements."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._core import checks
from moe_align_jax._lowering.sharding import vary_together

AxisName = str | tuple[str, ...]


def check_axis_size(function: str, axis_name: Any) -> int:
    """D, the devices along `axis_name`.

    Raises:
        TypeError: not a name or a tuple of names.   ValueError: no enclosing shard_map has the axis.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    remedy = 'Call it inside jax.shard_map over that axis, for example axis_name="ep".'
    if not names or not all(isinstance(name, str) for name in names):
        rule, got = "be the name of a mesh axis, or a tuple of names", checks.describe(axis_name)
        raise TypeError(checks.message(function, "axis_name", rule, got, remedy))
    try:
        return lax.axis_size(axis_name)
    except (NameError, KeyError):
        rule, got = "name an axis of the enclosing shard_map", repr(axis_name)
        raise ValueError(checks.message(function, "axis_name", rule, got, remedy)) from None


def mesh_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh's devices where it has any, else of jax's default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def manual(mesh: jax.sharding.Mesh) -> jax.sharding.AbstractMesh:
    """What a shard_map body over all axes of the mesh sees of it."""
    kinds = dict.fromkeys(mesh.axis_names, jax.sharding.AxisType.Manual)
    return mesh.abstract_mesh.update_axis_types(kinds)


def nothing_like(tree: Any, *also: str) -> Any:
    """Arrays as those of `tree`, which have no elements; they vary as with `vary_together`.

    They do not depend on `tree`. XLA folds arrays without elements to constants, and its partitioner refuses
    a shard_map's body whose arguments are all such and whose results are not.
    """
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    return vary_together((empty, tree), *also)[0]
