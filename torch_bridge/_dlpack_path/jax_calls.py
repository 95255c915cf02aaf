"""The JAX side: each spec as a call of moe_align_jax. Imported with the first call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax import batched_moe_align_block_size, moe_align_block_size
from torch_bridge._specs import AlignSpec, BatchedSpec, SglangSpec, Spec

_I32 = jnp.int32


def run(
    spec: Spec,
    implementation: str,
    operands: dict[str, jax.Array],
    max_valid_pairs: int | None = None,
) -> list[jax.Array]:
    """The results of `spec.outputs`, in order.

    `operands` holds `topk_ids` `[n]` and, as given, `expert_map` `[E]` and `num_valid_pairs`; or
    `expert_num_tokens` `[E]`. `max_valid_pairs` is num_valid_pairs as a Python int.
    """
    if isinstance(spec, SglangSpec):
        return list(_sglang(operands["topk_ids"], spec=spec, implementation=implementation))
    if isinstance(spec, BatchedSpec):
        aligned = batched_moe_align_block_size(
            operands["expert_num_tokens"],
            max_tokens_per_batch=spec.max_tokens_per_batch,
            block_size=spec.block_size,
            implementation=implementation,  # type: ignore[arg-type]
        )
        return list(aligned[:3])
    if max_valid_pairs is not None:
        operands = operands | {"num_valid_pairs": np.int32(max_valid_pairs)}  # type: ignore[dict-item]
    if spec.with_scatter_idx:
        return list(_vllm_scatter(operands, spec=spec, implementation=implementation))
    aligned = _align(operands, spec, implementation)._asdict()
    return [aligned[name] for name in spec.outputs]


def _align(operands, spec: AlignSpec, implementation: str):
    return moe_align_block_size(
        operands["topk_ids"],
        block_size=spec.block_size,
        num_experts=spec.num_experts,
        expert_map=operands.get("expert_map"),
        ignore_invalid_experts=spec.ignore_invalid_experts,
        pad_sorted_ids=spec.pad_sorted_ids,
        num_valid_pairs=operands.get("num_valid_pairs"),
        return_inverse=spec.with_inverse or spec.with_scatter_idx,
        implementation=implementation,  # type: ignore[arg-type]
    )


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def _vllm_scatter(operands, *, spec: AlignSpec, implementation: str):
    """As `_align`, with `scatter_idx`: a pair's own index, -1 where it is dropped."""
    aligned = _align(operands, spec, implementation)
    pair = lax.iota(_I32, spec.num_pairs)
    scatter = jnp.where(aligned.row_of_pair >= 0, pair, -1)
    results = aligned._asdict() | {"scatter_idx": lax.expand_dims(scatter, (1,))}
    return [results[name] for name in spec.outputs]


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def _sglang(topk_ids: jax.Array, *, spec: SglangSpec, implementation: str):
    """Aligns E + 1 buckets: bucket 0 is id -1, bucket e + 1 is expert e."""
    keep = not spec.ignore_invalid_expert
    buckets = _buckets(topk_ids, spec.num_experts, keep_minus_one=keep)
    aligned = moe_align_block_size(
        buckets,
        block_size=spec.block_size,
        num_experts=spec.num_experts + 1,
        implementation=implementation,  # type: ignore[arg-type]
    )
    # -1 is both "unused" and, less one, the label of bucket 0.
    expert_ids = jnp.maximum(aligned.expert_ids - 1, -1)
    [num_blocks] = spec.outputs["expert_ids"]
    extra_rows = spec.capacity - spec.aligned_capacity
    count = aligned.num_tokens_post_padded
    if spec.with_inactive_blocks:
        inactive = aligned.tokens_per_expert[:1]
        inactive = (inactive + (spec.block_size - 1)) // spec.block_size
        count = jnp.concatenate([count, inactive])
    return (
        jnp.pad(aligned.sorted_token_ids, (0, extra_rows), constant_values=spec.num_pairs),
        jnp.pad(expert_ids, (0, num_blocks - expert_ids.shape[0]), constant_values=-1),
        count,
    )


def _buckets(ids: jax.Array, num_experts: int, *, keep_minus_one: bool) -> jax.Array:
    """`[n]` int32: id + 1, or -1 where the id is dropped. An id is compared in its own dtype."""
    signed = jnp.issubdtype(ids.dtype, jnp.signedinteger)
    if ids.dtype.itemsize == 8:
        # The two words of a 64-bit id: arithmetic on int64 would need x64, which is never set.
        words = lax.bitcast_convert_type(ids, _I32)
        low, high = words[:, 0], words[:, 1]
        minus_one = (low == -1) & (high == -1)
        expert = jnp.where(high == 0, low, -1)
    else:
        wide = ids.dtype.itemsize == 4
        narrow = lax.bitcast_convert_type if wide else lax.convert_element_type
        expert = narrow(ids, _I32)
        minus_one = expert == -1
    bucket = jnp.where((expert >= 0) & (expert < num_experts), expert + 1, -1)
    if signed and keep_minus_one:
        bucket = jnp.where(minus_one, 0, bucket)
    return bucket
