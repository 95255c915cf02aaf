"""Inputs and comparisons that the bridge's tests share."""

import itertools
import re

import jax
import numpy as np
import torch

from tests import oracle
from torch_bridge._direct import problems, store

DTYPES = [getattr(torch, name) for name in oracle.ID_DTYPES]
# Whether the run has x64 on (JAX_ENABLE_X64=1): the bridge leaves it as it is.
X64 = jax.config.jax_enable_x64
# The one format of errors: "{function}: {argument} must {rule}; got {what}. {remedy}".
ERROR_FORMAT = re.compile(r"^\w+: .+ must .+; got .+\. .+\.$", re.DOTALL)


def ids_of(dtype: torch.dtype, routing="outside", num_tokens=37, top_k=3, num_experts=16, seed=0):
    """`[num_tokens, top_k]` ids as a NumPy array and as a torch tensor."""
    name = str(dtype).removeprefix("torch.")
    array = oracle.route(
        routing,
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        dtype=name,
        seed=seed,
    )
    return array, torch.from_numpy(array.copy())


def assert_triple(got, want: oracle.Expected) -> None:
    """A plain tuple of three int32 tensors that hold what the oracle says."""
    assert type(got) is tuple and len(got) == 3
    for name, tensor, expect in zip(oracle.Expected._fields[:3], got, want[:3], strict=True):
        assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32, name
        np.testing.assert_array_equal(tensor.cpu().numpy(), np.asarray(expect), err_msg=name)


def assert_format(error: BaseException) -> None:
    assert ERROR_FORMAT.match(str(error)), str(error)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, one element past a 64-byte boundary."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    view = flat[1:].view(tensor.shape)
    view.copy_(tensor)
    assert view.data_ptr() % 64 and view.is_contiguous()
    return view


def sized(num_pairs, num_experts, block_size, dtype=torch.int32, *, minus_one=False, **options):
    """`problems.bucket_problem` of ids of a dtype; num_experts does not count the bucket of id -1."""
    id_words = problems.ID_WORDS.get(dtype, 1)
    experts = num_experts + minus_one
    return problems.bucket_problem(
        num_pairs, experts, block_size, id_words, minus_one=minus_one, **options
    )


def load_programs(
    sizes, options, dtypes=(torch.int64,), *, return_counts=False, return_inverse=False
) -> None:
    """Compiles what calls will need, many at once: one by one, each costs a process.

    `sizes` are (n, num_experts, block_size), `options` those of `align_blocks`, the rest as for
    `problems.bucket_problem`.
    """
    wanted = set()
    device = torch.device("cuda", torch.cuda.current_device())
    tuning = store.here.machine.tuning(device)
    for (n, num_experts, block_size), given in itertools.product(sizes, options):
        use = ""
        if given.get("expert_map") is not None:
            use = problems.map_use(given.get("ignore_invalid_experts", False))
        limit = given.get("num_valid_pairs") is not None
        for dtype in dtypes:
            one = sized(
                n,
                num_experts,
                block_size,
                dtype,
                expert_map=use,
                has_num_valid_pairs=limit,
                return_counts=return_counts,
                return_inverse=return_inverse,
                tuning=tuning,
            )
            wanted.add(one)
    store.here.prepare(torch.cuda.current_device(), sorted(wanted))
