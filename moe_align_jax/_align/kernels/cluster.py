"""One kernel of one cluster: "grid" without its count kernel. The CTAs post their counts to each other, so
that there is one launch, and no histogram in global memory.

Bytes: ids read once, every output written once. Deterministic.
"""

from types import SimpleNamespace

from moe_align_jax._align.kernels import placing
from moe_align_jax._align.tables import BlockAlignMosaicConfig
from moe_align_jax._simt.language import Kernel, Program, Simt
from moe_align_jax.types import AlignProblem


def build(problem: AlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    """The one kernel of this form, of one cluster. Its stores do not depend on `vector`."""
    del vector  # its stores are 4 bytes wide
    partition = placing.partition_of(problem, config)
    local_sort, num_experts = config.local_sort, problem.num_experts

    def body(t: Simt, r: SimpleNamespace) -> None:
        p = placing.Placer(t, r, problem, partition, local_sort=local_sort)
        p.clear_histogram()
        t.grid_dependency_wait()
        t.launch_dependents()
        experts = p.read_tile(p.first_of(0))
        t.block_sync()
        tile = p.rank(p.first_of(0), experts)
        t.block_sync()
        tile = p.count(tile)
        assert tile.counts is not None  # for the type checker
        # mutant: mail is posted before all CTAs run
        t.cluster_ready()
        for e, ok, count in zip(p.mine, p.valid, tile.counts, strict=True):
            with t.if_(ok):
                for to in range(partition.num_ctas):
                    t.post(to, p.cta * num_experts + e, count)
        # mutant: it ends before its mail has come
        box = t.mail()
        safe = [t.select(ok, e, 0) for ok, e in zip(p.valid, p.mine, strict=True)]
        peers = [
            [t.load(box, e + c * num_experts) for c in range(partition.num_ctas)] for e in safe
        ]
        zero, totals, before = t.const(0), [], []
        for ok, counts in zip(p.valid, peers, strict=True):
            totals.append(t.select(ok, sum(counts, zero), 0))
            # mutant: a CTA's own pairs are before it
            mine = [t.select(p.cta > c, count, 0) for c, count in enumerate(counts)]
            before.append(sum(mine, zero))
        starts, in_use = p.scan(totals, before)
        if local_sort:
            tile = p.sort(tile)
        p.scatter(tile, starts)
        p.fill(in_use)

    kernel = Kernel(
        name="moe_align_cluster",
        body=body,
        inputs=problem.inputs,
        outputs=problem.outputs,
        shared=placing.shared_of(partition, local_sort=local_sort),
        num_warpgroups=config.num_warpgroups,
        num_ctas=config.num_ctas,
        cluster=config.num_ctas,
        mailbox=config.num_ctas * num_experts,
    )
    return Program(inputs=problem.inputs, kernels=(kernel,), results=tuple(problem.outputs))
