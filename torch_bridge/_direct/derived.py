"""Results that the kernels do not write: torch derives them from those that they do write."""

from collections.abc import Mapping

import torch

from torch_bridge._specs import AlignSpec, SglangSpec, Spec


def derive(
    spec: Spec, written: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The results of a spec of which torch derives some, in order.

    Args:
        written: by name, what the kernels wrote.
        given: by name, the caller's own results; derived ones are written there.
    """
    results = dict(written)
    if isinstance(spec, AlignSpec):
        rows = written["row_of_pair"]
        pair = torch.arange(spec.num_pairs, dtype=torch.int32, device=rows.device)
        scatter_idx = given["scatter_idx"] if given else pair.view(-1, 1)
        # A dropped pair's row is -1, of which all bits are set: so are those of `rows >> 31`.
        torch.bitwise_or(pair, rows >> 31, out=scatter_idx.view(-1))
        results["scatter_idx"] = scatter_idx
    elif isinstance(spec, SglangSpec):
        blocks = written["num_tokens_post_padded"][1:]  # the kernels write the first word
        if spec.ignore_invalid_expert:
            blocks.zero_()
        else:
            counts = written["tokens_per_expert"][:1]
            torch.add(counts, spec.block_size - 1, out=blocks)
            blocks.floor_divide_(spec.block_size)
    return tuple([results[name] for name in spec.outputs])
