"""One product of gathered rows with a given ring: whether it ends, and is right.

python -m benchmarks.ring_probe BK STAGES LAG GATED
"""

import sys

import numpy as np


def main() -> int:
    import jax
    import jax.numpy as jnp

    import moe_align_jax as maj
    from moe_align_jax._grouped_matmul import launch
    from moe_align_jax._grouped_matmul.config import Config
    from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights

    bk, stages, lag, gated = map(int, sys.argv[1:5])
    tokens, top_k, experts, hidden, n = 16, 8, 128, 2048, 768
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, experts)), 1)[:, :top_k].astype(np.int32)
    aligned = maj.moe_align_block_size(ids, block_size=8, num_experts=experts, return_inverse=True)
    x = jax.random.normal(jax.random.key(0), (tokens, hidden), jnp.bfloat16)
    columns = 2 * n if gated else n
    w = jax.random.normal(jax.random.key(1), (experts, columns, hidden), jnp.bfloat16)
    w = w / hidden**0.5
    weights = Weights(True, activation="silu", gated=True) if gated else Weights(True)
    problem = MatmulProblem(
        *("probe", "blocks", aligned.sorted_token_ids.shape[0], hidden, n, experts),
        *("bfloat16", "bfloat16", weights),
        block_size=8,
        num_tokens=tokens,
        top_k=top_k,
        zero_padding=False,
    )
    config = Config("swap", 8, 256, bk, stages, group=0, lag=lag)
    where = (aligned.sorted_token_ids, aligned.expert_ids, aligned.num_tokens_post_padded)
    program = jax.jit(lambda *given: launch.run(problem, *given, config=config))
    compiled = program.lower(x, w, *where).compile()
    print("compiled", config, flush=True)
    rows = np.asarray(aligned.row_of_pair).reshape(tokens, top_k)
    for run in range(3):
        out = np.asarray(compiled(x, w, *where)).astype(np.float32)
        t, k = run, run + 1
        want = np.asarray(w[ids[t, k]]).astype(np.float32) @ np.asarray(x[t]).astype(np.float32)
        if gated:
            want = want[:n] / (1 + np.exp(-want[:n])) * want[n:]
        error = np.linalg.norm(out[rows[t, k]] - want) / np.linalg.norm(want)
        print("ended", run, f"relative error {error:.2e}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
