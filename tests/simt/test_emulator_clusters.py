"""Clusters in the emulator: CTAs that send each other mail, and what may go wrong."""

import numpy as np
import pytest

from moe_align_jax._simt.emulator import faults
from tests.simt.emulated import launch


def clustered(body, mailbox=256, **options):
    """Runs `body(t, r, i, cta)` on two clusters of two CTAs of 128 threads."""

    def whole(t, r):
        body(t, r, t.thread_id(), t.cta_id())

    return launch(whole, outputs={"out": (512,)}, num_ctas=4, cluster=2, mailbox=mailbox, **options)


def tell_both(t, r, i, cta):
    """Each thread tells both CTAs of its cluster its number; a CTA adds up what its threads were told."""
    t.cluster_ready()
    for to in range(2):
        t.post((cta & 2) + to, (cta & 1) * 128 + i, cta * 1000 + i)
    box = t.mail()
    t.store(r.out, cta * 128 + i, t.load(box, i) + t.load(box, 128 + i) * 2)


def test_every_cta_gets_what_its_cluster_posts():
    [out] = clustered(tell_both)
    cta, i = np.divmod(np.arange(512), 128)
    first = (cta & 2) * 1000 + i
    assert np.array_equal(out, first + (first + 1000) * 2)


def test_four_words_at_once():
    def body(t, r, i, cta):
        t.cluster_ready()
        with t.if_(i < 64):
            t.post(cta ^ 1, i * 4, i, i + 1, cta, -1)
        box = t.mail()
        t.store(r.out, cta * 128 + i, t.load(box, i * 2 + (i & 1)))

    [out] = clustered(body)
    cta, i = np.divmod(np.arange(512), 128)
    sent, place = np.divmod(i * 2 + (i & 1), 4)
    words = np.stack([sent, sent + 1, cta ^ 1, np.full(512, -1)])
    assert np.array_equal(out, words[place, np.arange(512)])


def test_warps_wait_for_the_cluster_apart():
    def body(t, r, i, cta):
        t.open_mailbox()
        with t.if_(i < 64):
            t.cluster_ready()
            for to in range(2):
                t.post((cta & 2) + to, (cta & 1) * 64 + i, cta * 1000 + i)
            t.store(r.out, cta * 128 + i, 0)
        with t.if_(i >= 64):
            t.cluster_ready(has_first=False)
            box = t.mail()
            t.store(r.out, cta * 128 + i, t.load(box, i - 64) + t.load(box, i) * 2)

    [out] = clustered(body, mailbox=128, opens_mailbox=True)
    cta, i = np.divmod(np.arange(512), 128)
    first = (cta & 2) * 1000 + i - 64
    assert np.array_equal(out, np.where(i < 64, 0, first + (first + 1000) * 2))


def posts(*arguments, ready=True):
    """One word (or more) from a single thread of each CTA."""

    def body(t, r, i, cta):
        if ready:
            t.cluster_ready()
        with t.if_(i.eq(5)):
            t.post(*(argument(i, cta) for argument in arguments))

    return body


def mine(i, cta):
    return cta


@pytest.mark.parametrize(
    ("body", "error", "what"),
    [
        (posts(mine, mine, mine, ready=False), faults.RaceError, "post before cluster_ready"),
        (posts(lambda i, c: c ^ 2, mine, mine), faults.OutOfBounds, "to another cluster"),
        (posts(mine, lambda i, c: i + 251, mine), faults.OutOfBounds, "word 256 of a mailbox"),
        (posts(mine, lambda i, c: i - 6, mine), faults.OutOfBounds, "word -1 of a mailbox"),
        (posts(mine, lambda i, c: i, *[mine] * 4), faults.MisalignedAccess, "4 words"),
        (posts(mine, lambda i, c: i, *[mine] * 2), faults.Undefined, "1 word or 4; got 2"),
        (posts(mine, mine, lambda i, c: c < 2), faults.Undefined, "got a boolean"),
        (posts(lambda i, c: c & 2, mine, mine), faults.RaceError, "ends without mail"),
        (posts(mine, lambda i, c: i * 0, mine), faults.RaceError, "ends without mail"),
    ],
)
def test_misuse_of_a_mailbox_is_reported(body, error, what):
    with pytest.raises(error, match=what):
        clustered(body)


def test_a_word_is_posted_once():
    def again(t, r, i, cta):
        tell_both(t, r, i, cta)
        t.post(cta, i, i)

    def together(t, r, i, cta):
        t.cluster_ready()
        t.post(cta & 2, i, i)

    for body in (again, together):
        with pytest.raises(faults.RaceError, match="posted once"):
            clustered(body)


def test_a_wait_for_a_word_that_nobody_posts():
    with pytest.raises(faults.DivergentBarrier, match="that nobody posts"):
        clustered(tell_both, mailbox=257)


def test_mail_is_only_read():
    def body(t, r, i, cta):
        tell_both(t, r, i, cta)
        t.store(t.mail(), i, 0)

    with pytest.raises(faults.Undefined, match="only read"):
        clustered(body)


@pytest.mark.parametrize("what", ["cluster_ready", "mail"])
def test_some_threads_leave_out_what_all_must_reach(what):
    def body(t, r, i, cta):
        if what == "mail":
            t.cluster_ready()
        with t.if_(i < 100):
            getattr(t, what)()

    with pytest.raises(faults.DivergentBarrier, match=what):
        clustered(body)


def ready_twice(t, i):
    t.cluster_ready()
    with t.if_(i < 32):
        t.cluster_ready()


def ready_in_part(t, i):
    with t.if_(i >= 32):
        t.cluster_ready()


def opened_in_part(t, i):
    with t.if_(i < 32):
        t.open_mailbox()


def opened_twice(t, i):
    t.open_mailbox()
    t.open_mailbox()


def posted_by_another_warp(t, i):
    ready_in_part(t, i)
    with t.if_(i.eq(5)):
        t.post(t.cta_id(), 0, 1)


def fetched_by_another_warp(t, i):
    ready_in_part(t, i)
    with t.if_(i >= 32):
        for to in range(2):
            t.post((t.cta_id() & 2) + to, (t.cta_id() & 1) * 96 + i - 32, 1)
    with t.if_(i < 32):
        t.mail()


@pytest.mark.parametrize(
    ("use", "opens", "error", "what"),
    [
        (ready_twice, False, faults.Undefined, "cluster_ready once"),
        (ready_in_part, False, faults.DivergentBarrier, "ends without cluster_ready"),
        (posted_by_another_warp, False, faults.RaceError, "post before cluster_ready"),
        (fetched_by_another_warp, False, faults.RaceError, "mail before cluster_ready"),
        (lambda t, i: t.cluster_ready(has_first=False), False, faults.Undefined, "has_first"),
        (lambda t, i: t.cluster_ready(), True, faults.Undefined, "before open_mailbox"),
        (lambda t, i: t.open_mailbox(), False, faults.Undefined, "that say so, once"),
        (opened_twice, True, faults.Undefined, "that say so, once"),
        (opened_in_part, True, faults.DivergentBarrier, "open_mailbox is for all threads"),
    ],
)
def test_misuse_of_what_opens_a_mailbox_is_reported(use, opens, error, what):
    def body(t, r, i, cta):
        use(t, i)
        t.store(r.out, cta * 128 + i, i)

    with pytest.raises(error, match=what):
        clustered(body, mailbox=192, opens_mailbox=opens)
