"""haliax' grouped matrix multiplication: `from moe_align_jax.adapters.haliax import ragged_dot`."""

from typing import Any

import jax

from moe_align_jax import matmul
from moe_align_jax._core import checks

__all__ = ["ragged_dot"]

# The mesh axis that haliax sums over with `ar`: its `ResourceAxis.MODEL`.
_MODEL_AXIS = "model"
_OURS = {"auto": None, "xla": "xla", "mosaic_gpu": "mosaic_gpu", "emulator": "emulator"}


def ragged_dot(
    lhs_: jax.Array,
    rhs_: jax.Array,
    group_sizes_: jax.Array,
    ar: bool = False,
    implementation: str = "auto",
) -> jax.Array:
    """`moe_align_jax.ragged_dot` with the signature of `haliax.nn.ragged_dot`.

    Args:
        lhs_: `[tokens, in]` bfloat16, float16 or float32: the rows, group after group.
        rhs_: `[experts, in, out]` of lhs_' dtype.
        group_sizes_: `[experts]` any integer dtype.
        ar: sum the result over the mesh axis "model", inside `jax.shard_map`. Static.
        implementation: "auto" for the best available, or "xla", "mosaic_gpu", "emulator". haliax' "megablox"
            and "triton" are kernels of its own. Static.

    Returns:
        `[tokens, out]`, of lhs_' dtype. Rows past the sum of `group_sizes_` are zero.

    Raises:
        ValueError: an implementation that is not ours, `ar` without the mesh axis "model", and as
            `moe_align_jax.ragged_dot`.
        TypeError, NotImplementedError: as `moe_align_jax.ragged_dot`.

    Example:
        >>> from moe_align_jax.adapters import haliax
        >>> lhs, rhs = jnp.ones((3, 2)), jnp.stack([jnp.eye(2), 5 * jnp.eye(2)])
        >>> haliax.ragged_dot(lhs, rhs, jnp.array([1, 2])).tolist()
        [[1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]

    Source: the contract of marin-haliax' `haliax.nn.ragged_dot` (Apache-2.0); no code taken.
    """
    function = "adapters.haliax.ragged_dot"
    if not checks.is_one_of(implementation, _OURS):
        rule, got = f"be one of {', '.join(map(repr, _OURS))}", checks.shown(implementation)
        remedy = "haliax' own kernels are called through haliax."
        raise ValueError(checks.message(function, "implementation", rule, got, remedy))
    checks.check_bool(function, "ar", ar)
    if ar:
        try:
            jax.lax.axis_size(_MODEL_AXIS)
        except (NameError, KeyError):
            rule, got = f"be False outside of a jax.shard_map over {_MODEL_AXIS!r}", "True"
            raise ValueError(
                checks.message(function, "ar", rule, got, "It sums over that axis.")
            ) from None
    ours: Any = _OURS[implementation]
    out = matmul.ragged_dot(lhs_, rhs_, group_sizes_, implementation=ours)
    return jax.lax.psum(out, _MODEL_AXIS) if ar else out
