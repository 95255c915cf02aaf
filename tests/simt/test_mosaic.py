"""What a kernel's body finds ahead of it where Mosaic lowers it for a GPU."""

import jax
import pytest
from jax.experimental.mosaic.gpu import core
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import nvvm

from moe_align_jax._simt import mosaic
from tests.simt.emulated import kernel

ARRIVE, WAIT = "barrier.cluster.arrive.relaxed.aligned;", "barrier.cluster.wait.aligned;"
OUR_ARRIVE, OUR_WAIT = ARRIVE, "barrier.cluster.wait.acquire.aligned;"


def cluster_barriers(mailbox: int) -> list[str]:
    """The halves of barriers of a cluster in a kernel, with our own if it has a mailbox, in order."""
    found = []

    def look(operation):
        if operation.name == "llvm.inline_asm":
            found.append(ir.StringAttr(operation.attributes["asm_string"]).value)
        elif operation.name.startswith("nvvm.cluster."):
            found.append(operation.name)
        return ir.WalkResult.ADVANCE

    def body(t, r):
        if mailbox:
            t.cluster_ready()
        t.store(r.out, t.thread_id(), 1)
        owner = ir.InsertionPoint.current.block.owner
        while owner.operation.name != "builtin.module":
            owner = owner.operation.parent
        owner.operation.walk(look)

    one = kernel(body, outputs={"out": (512,)}, num_ctas=4, cluster=2, mailbox=mailbox)
    jax.jit(lambda: mosaic.launcher(one)()).trace().lower(lowering_platforms=("cuda",))
    return [code for code in found if "cluster" in code and "mbarrier" not in code]


def test_a_kernel_with_a_mailbox_has_our_cluster_barrier_alone():
    """By this release of jax. Where it writes its own otherwise, see the test below."""
    assert cluster_barriers(0) == [ARRIVE, WAIT]
    assert cluster_barriers(256) == [OUR_ARRIVE, OUR_WAIT]


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
    """Half of it was taken out: a wait for an arrival that is not there never ends."""
    for name, other in (("_arrive_relaxed_", arrive), ("_wait_", wait)):
        if other:
            monkeypatch.setattr(core, f"_cluster{name}aligned", other)
    assert cluster_barriers(256) == [*want, OUR_ARRIVE, OUR_WAIT]
