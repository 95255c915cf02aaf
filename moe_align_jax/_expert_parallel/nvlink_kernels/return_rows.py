"""Rows back to the rank of their token, as they are."""

from types import SimpleNamespace

from moe_align_jax._expert_parallel import row_words
from moe_align_jax._expert_parallel.nvlink_kernels import copying
from moe_align_jax._expert_parallel.nvlink_kernels.problems import ReturnRows
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARPGROUP, Int, Kernel, Simt


def build(problem: ReturnRows) -> Kernel:
    """The kernel that every device launches: rows back to the ranks of their tokens."""
    field, count = problem.field, problem.devices.count

    def body(t: Simt, r: SimpleNamespace) -> None:
        t.grid_dependency_wait()
        ranks = copying.everyone(t, count)
        there = [t.remote(r.parts, rank) for rank in ranks]

        def one(token: Int) -> None:
            target = (t.rank() * problem.num_tokens + token) * field.words
            all_pieces = copying.pieces([field], t.thread_id(), WARPGROUP)
            for batch in row_words.batches(all_pieces, count):
                held = [
                    [
                        copying.load(
                            t, r.rows, p, (rank * problem.num_tokens + token) * field.words
                        )
                        for p in batch
                    ]
                    for rank in ranks
                ]
                for ref, values in zip(there, held, strict=True):
                    for piece, value in zip(batch, values, strict=True):
                        with t.if_(piece.inside):
                            row_words.store(t, ref, piece, target, value)

        copying.for_tokens(t, problem.num_tokens, one)
        collectives.device_sync(t)

    return copying.kernel("moe_combine_return_rows", problem, body)
