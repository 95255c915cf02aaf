"""Clusters in the emulator: a CTA that reads another's shared memory, and what may go wrong."""

import numpy as np
import pytest

from moe_align_jax._simt import faults
from tests.emulated import launch


def clustered(body):
    """Runs `body(t, r, i, cta)` on two clusters of two CTAs; `r.s` is shared, a word per thread."""

    def whole(t, r):
        body(t, r, t.thread_id(), t.cta_id())

    return launch(whole, outputs={"out": (512,)}, shared={"s": 128}, num_ctas=4, cluster=2)


def read_my_peer(t, r, i, cta, *, before="cluster_sync", after=True):
    t.store(r.s, i, cta * 1000 + i)
    getattr(t, before)()
    x = t.load_peer(r.s, i ^ 1, cta ^ 1)
    if after:
        t.cluster_arrive()
    t.store(r.out, cta * 128 + i, x)
    if after:
        t.cluster_wait()


def test_peers_read_each_other():
    [out] = clustered(read_my_peer)
    cta, i = np.divmod(np.arange(512), 128)
    assert np.array_equal(out, (cta ^ 1) * 1000 + (i ^ 1))


@pytest.mark.parametrize("before", ["block_sync", "warp_sync"])
def test_a_peer_is_read_only_after_a_cluster_sync(before):
    with pytest.raises(faults.RaceError, match="load by|store by"):
        clustered(lambda *a: read_my_peer(*a, before=before))


def test_a_cta_does_not_end_while_its_peers_read_it():
    with pytest.raises(faults.RaceError, match="the peer may have ended"):
        clustered(lambda *a: read_my_peer(*a, after=False))


def test_what_a_peer_has_read_is_overwritten_only_after_a_cluster_sync():
    def body(t, r, i, cta, sync):
        t.store(r.s, i, i)
        t.cluster_sync()
        x = t.load_peer(r.s, i, cta ^ 1)
        getattr(t, sync)()
        t.store(r.s, i, -1)
        t.cluster_arrive()
        t.store(r.out, cta * 128 + i, x)
        t.cluster_wait()

    clustered(lambda *a: body(*a, "cluster_sync"))
    with pytest.raises(faults.RaceError):
        clustered(lambda *a: body(*a, "block_sync"))


def test_a_read_by_both_ctas_counts_for_both():
    """The owner reads last: the peer's read is still not ordered before the owner's store."""

    def body(t, r, i, cta):
        t.store(r.s, i, i)
        t.cluster_sync()
        x = t.load_peer(r.s, i, cta ^ 1) + t.load(r.s, i)
        t.block_sync()
        t.store(r.s, i, -1)
        t.cluster_arrive()
        t.store(r.out, cta * 128 + i, x)
        t.cluster_wait()

    with pytest.raises(faults.RaceError):
        clustered(body)


@pytest.mark.parametrize(
    ("body", "error", "what"),
    [
        (lambda t, r, i, cta: t.load_peer(r.s, i, cta ^ 2), faults.OutOfBounds, "another cluster"),
        (lambda t, r, i, cta: t.load_peer(r.out, i, cta ^ 1), faults.Undefined, "is for shared"),
        (lambda t, r, i, cta: t.cluster_wait(), faults.DivergentBarrier, "before cluster_arrive"),
        (
            lambda t, r, i, cta: (t.cluster_arrive(), t.load_peer(r.s, i, cta ^ 1)),
            faults.RaceError,
            "after cluster_arrive",
        ),
        (
            lambda t, r, i, cta: (t.cluster_arrive(), t.cluster_sync()),
            faults.DivergentBarrier,
            "cluster_sync after",
        ),
    ],
)
def test_misuse_of_a_cluster_is_reported(body, error, what):
    with pytest.raises(error, match=what):
        clustered(body)


def test_a_cluster_sync_that_one_cta_leaves_out():
    def body(t, r, i, cta):
        with t.if_(cta.ne(3)):
            t.cluster_sync()

    with pytest.raises(faults.DivergentBarrier, match="cluster_sync is reached by 128 of 256"):
        clustered(body)
