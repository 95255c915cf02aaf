"""The expert layer in float64 NumPy, a pair at a time, from the contract alone."""

import numpy as np

from tests.matmul import oracle as matmul_oracle


def experts_of_pairs(topk_ids, num_experts, *, expert_map=None, num_valid_tokens=None):
    """`[T, K]`: the expert of each pair, -1 for a dropped one."""
    found = np.full(np.shape(topk_ids), -1)
    slots = num_experts if expert_map is None else len(expert_map)
    for (t, k), given in np.ndenumerate(np.asarray(topk_ids)):
        if num_valid_tokens is not None and t >= num_valid_tokens:
            continue
        if not 0 <= given < slots:
            continue
        expert = int(given) if expert_map is None else int(expert_map[given])
        if 0 <= expert < num_experts:
            found[t, k] = expert
    return found


def layer(
    x,
    w_gate_up,
    w_down,
    topk_weights,
    topk_ids,
    *,
    activation="silu",
    bias_gate_up=None,
    bias_down=None,
    transpose_rhs=False,
    weights_on_input=False,
    expert_map=None,
    num_valid_tokens=None,
    **options,
):
    """float64 `[T, H]`, and the pairs of each expert."""
    x = np.asarray(x, np.float64)
    pairs = experts_of_pairs(
        topk_ids, len(w_down), expert_map=expert_map, num_valid_tokens=num_valid_tokens
    )
    out = np.zeros(x.shape)
    for (t, k), expert in np.ndenumerate(pairs):
        if expert < 0:
            continue
        share = np.float64(topk_weights[t, k])
        hidden = matmul_oracle.row(
            x[t] * share if weights_on_input else x[t],
            matmul_oracle.of_expert(w_gate_up, expert),
            transpose_rhs=transpose_rhs,
            activation=activation,
            bias=None if bias_gate_up is None else bias_gate_up[expert],
            **options,
        )
        y = matmul_oracle.row(
            hidden,
            w_down[expert],
            transpose_rhs=transpose_rhs,
            bias=None if bias_down is None else bias_down[expert],
        )
        out[t] += y if weights_on_input else share * y
    counts = np.bincount(pairs[pairs >= 0], minlength=len(w_down))
    return out, counts.astype(np.int32)
