"""What a shard_map body can ask about its mesh: axis sizes, the platform, arrays without elements."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_align_jax._lowering.sharding import vary_together


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
