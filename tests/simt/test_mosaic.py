"""What a kernel's body finds ahead of it where Mosaic lowers it for a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import core
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import nvvm

from moe_align_jax._simt import mosaic
from tests.simt.emulated import kernel

ARRIVE, WAIT = "barrier.cluster.arrive.relaxed.aligned;", "barrier.cluster.wait.aligned;"
OUR_ARRIVE, OUR_WAIT = ARRIVE, "barrier.cluster.wait.acquire.aligned;"
CTA = "gpu.barrier"


def barriers(mailbox: int = 0, cluster: int = 2, batched: bool = False, **options) -> list[str]:
    """Barriers of the CTA and halves of barriers of a cluster in a kernel, with our own, in order."""
    found = []

    def look(operation):
        code = operation.name
        if code == "llvm.inline_asm":
            code = ir.StringAttr(operation.attributes["asm_string"]).value
        if "mbarrier" not in code and ("cluster" in code or "gpu.barrier" in code):
            found.append(code)
        return ir.WalkResult.ADVANCE

    def body(t, r):
        if mailbox:
            if options.get("opens_mailbox"):
                t.open_mailbox()
            t.cluster_ready()
        t.store(r.out, t.thread_id(), t.load(r.x, t.thread_id()))
        owner = ir.InsertionPoint.current.block.owner
        while owner.operation.name != "builtin.module":
            owner = owner.operation.parent
        owner.operation.walk(look)

    arrays = {"inputs": {"x": (512,)}, "outputs": {"out": (512,)}}
    one = kernel(body, **arrays, num_ctas=4, cluster=cluster, mailbox=mailbox, **options)
    call, shape = mosaic.launcher(one), (512,)
    if batched:
        call, shape = jax.vmap(call), (3, 512)
    given = jax.ShapeDtypeStruct(shape, jnp.int32)
    jax.jit(call).trace(given).lower(lowering_platforms=("cuda",))
    return found


def cluster_barriers(mailbox: int) -> list[str]:
    """The halves of barriers of a cluster alone."""
    return [code for code in barriers(mailbox) if code != CTA]


@pytest.mark.parametrize("batched", [False, True])
def test_barriers_that_a_kernel_has_no_need_of_are_taken_out(batched):
    """By this release of jax. Where it writes its own otherwise, see the tests below."""
    theirs, ours = [ARRIVE, WAIT], [OUR_ARRIVE, OUR_WAIT]
    assert barriers(batched=batched) == [*theirs, CTA, CTA]
    assert barriers(256, batched=batched) == [CTA, CTA, *ours]
    assert barriers(256, batched=batched, starts_at_once=True) == ours
    assert barriers(256, batched=batched, starts_at_once=True, opens_mailbox=True) == ours
    assert barriers(batched=batched, starts_at_once=True) == theirs
    assert barriers(cluster=1, batched=batched, starts_at_once=True) == []


def written(code):
    return lambda: mosaic.llvm.inline_asm(
        ir.Type.parse("!llvm.void"), [], code, "", has_side_effects=True
    )


def nothing():
    pass


@pytest.mark.parametrize(
    ("arrive", "wait", "want"),
    [
        (None, written("barrier.cluster.wait;"), [ARRIVE, "barrier.cluster.wait;"]),
        (None, nvvm.cluster_wait, [ARRIVE, "nvvm.cluster.wait"]),
        (nvvm.cluster_arrive_relaxed, None, ["nvvm.cluster.arrive.relaxed", WAIT]),
        (written("fence; " + ARRIVE), None, ["fence; " + ARRIVE, WAIT]),
        (written(ARRIVE + WAIT), nothing, [ARRIVE + WAIT]),
        (written(WAIT), written(ARRIVE), [WAIT, ARRIVE]),
        (nothing, nothing, []),
    ],
)
def test_a_barrier_that_is_written_otherwise_stays_whole(monkeypatch, arrive, wait, want):
    """Were half of it taken out, the wait for an arrival that is not there would never end."""
    for name, other in (("_arrive_relaxed_", arrive), ("_wait_", wait)):
        if other:
            monkeypatch.setattr(core, f"_cluster{name}aligned", other)
    assert cluster_barriers(256) == [*want, OUR_ARRIVE, OUR_WAIT]


@pytest.mark.parametrize("cluster", [1, 2])
def test_barriers_that_may_be_there_for_something_unknown_stay(monkeypatch, cluster):
    """A third one, or the known ones behind something that we do not know."""
    real = core.gpu.barrier
    for more in (real, written("mbarrier.init.shared::cta.b64 [0], 1;")):

        def otherwise(more=more):
            more()
            return real()

        monkeypatch.setattr(core.gpu, "barrier", otherwise)
        got = barriers(256 if cluster > 1 else 0, cluster, starts_at_once=True)
        of_cluster = cluster > 1
        assert got == [
            *[ARRIVE, WAIT] * of_cluster,
            *[CTA] * (4 if more is real else 2),
            *[OUR_ARRIVE, OUR_WAIT] * of_cluster,
        ]
