"""What orders the warps of several devices, and what does not: the emulator finds each that is missing."""

import numpy as np
import pytest

from moe_align_jax._simt import emulator, faults
from moe_align_jax._simt.language import WARP, WARPGROUP, Devices, Kernel

DEVICES, CTAS = 2, 3


def run(body, words=CTAS * DEVICES):
    """`out` `[words]` of every device; a cell for each CTA of all devices."""
    kernel = Kernel(
        name="k",
        body=body,
        inputs={},
        outputs={"out": (words,), "copy": (CTAS,)},
        shared={"seen": 1},
        num_warpgroups=2,
        num_ctas=CTAS,
        devices=Devices(DEVICES),
        partial=frozenset(["out", "copy"]),
    )
    return emulator.run_on_devices(kernel, [[]] * DEVICES)


def store_everywhere(t, r, cell=None):
    """CTA c of rank s puts `10 s + c + 1` into cell `s * CTAS + c` of everyone, by thread 0."""
    cell = t.rank() * CTAS + t.cta_id() if cell is None else cell
    with t.if_(t.thread_id().eq(0)):
        for rank in range(DEVICES):
            t.store(t.remote(r.out, rank), cell, t.rank() * 10 + t.cta_id() + 1)


def first_warp(t):
    return t.if_(t.thread_id() < WARP)


def second_warpgroup(t):
    return t.if_(t.thread_id() >= WARPGROUP)


def tell_everyone(t):
    for rank in range(DEVICES):
        t.tell_everyone(rank)


def read(t, r, cell, thread=0):
    with t.if_(t.thread_id().eq(thread)):
        t.store(r.copy, t.cta_id(), t.load(r.out, cell))


def next_cta(t):
    """The cell of the next CTA of the other device."""
    return (1 - t.rank()) * CTAS + (t.cta_id() + 1) % CTAS


def test_everyone_is_told_by_one_warp():
    def body(t, r):
        store_everywhere(t, r)
        with first_warp(t):
            tell_everyone(t)
            t.tell_peers()
            t.wait_for_peers(1)
        with second_warpgroup(t):
            t.wait_for_everyone(CTAS * DEVICES)
        t.block_sync()
        read(t, r, next_cta(t), thread=100)

    got = run(body)
    for rank, (out, copy) in enumerate(got):
        np.testing.assert_array_equal(out, [1, 2, 3, 11, 12, 13])
        np.testing.assert_array_equal(copy, np.roll(out.reshape(2, 3)[1 - rank], -1))


def test_peers_are_told_by_several_warps():
    def body(t, r):
        store_everywhere(t, r)
        t.tell_peers()
        t.wait_for_peers(8)
        read(t, r, (1 - t.rank()) * CTAS + t.cta_id(), thread=100)

    for rank, (_, copy) in enumerate(run(body)):
        np.testing.assert_array_equal(copy, np.arange(1, 4) + (0 if rank else 10))


def peers_only(t, r):
    store_everywhere(t, r)
    t.device_sync()
    read(t, r, next_cta(t))


def told_before_the_store(t, r):
    tell_everyone(t)
    store_everywhere(t, r)
    t.wait_for_everyone(8 * CTAS * DEVICES)
    read(t, r, next_cta(t))


def told_by_another_warp(t, r):
    store_everywhere(t, r)
    with t.if_(t.thread_id() >= 7 * WARP):
        tell_everyone(t)
    t.wait_for_everyone(CTAS * DEVICES)
    read(t, r, next_cta(t))


def another_warpgroup_has_waited(t, r):
    store_everywhere(t, r)
    with first_warp(t):
        tell_everyone(t)
    with second_warpgroup(t):
        t.wait_for_everyone(CTAS * DEVICES)
    read(t, r, next_cta(t))


def nobody_has_waited(t, r):
    store_everywhere(t, r)
    t.tell_peers()
    t.block_sync()
    read(t, r, t.rank() * CTAS + t.cta_id(), thread=100)
    read(t, r, (1 - t.rank()) * CTAS + t.cta_id())


def overwritten_by_the_next_cta(t, r):
    store_everywhere(t, r)
    t.device_sync()
    with t.if_(t.thread_id().eq(0)):
        t.store(r.out, next_cta(t), 7)


def overwritten_after_others_have_read(t, r):
    """All CTAs read a cell that the first one then writes."""
    store_everywhere(t, r)
    tell_everyone(t)
    t.wait_for_everyone(8 * CTAS * DEVICES)
    read(t, r, 0)
    t.block_sync()
    with t.if_(t.cta_id().eq(0) & t.thread_id().eq(0)):
        t.store(r.out, 0, 7)


@pytest.mark.parametrize(
    "body",
    [
        peers_only,
        told_before_the_store,
        told_by_another_warp,
        another_warpgroup_has_waited,
        nobody_has_waited,
        overwritten_by_the_next_cta,
        overwritten_after_others_have_read,
    ],
)
def test_a_race_between_devices_is_found(body):
    with pytest.raises((faults.RaceError, faults.UninitialisedRead)):
        run(body)


def test_an_end_before_others_have_stored_is_found():
    def told_nobody(t, r):
        t.device_sync()
        store_everywhere(t, r)

    def waits_for_peers_alone(t, r):
        store_everywhere(t, r)
        tell_everyone(t)
        t.tell_peers()
        t.wait_for_peers(8)

    for body, match in (
        (told_nobody, "told nobody of"),
        (waits_for_peers_alone, "without wait_for_everyone"),
        (store_everywhere, "without device_sync"),
    ):
        with pytest.raises(faults.RaceError, match=match):
            run(body)


def test_a_wait_that_would_not_end_or_end_early_is_found():
    def fewer(t, r):
        with first_warp(t):
            t.tell_peers()
        t.wait_for_peers(8)

    def more(t, r):
        tell_everyone(t)
        t.wait_for_everyone(CTAS * DEVICES)

    def not_all_ctas(t, r):
        with t.if_(t.cta_id().eq(0)):
            tell_everyone(t)
        t.wait_for_everyone(8 * CTAS * DEVICES)

    def twice(t, r):
        t.tell_peers()
        t.tell_peers()

    def part_of_a_warp(t, r):
        with t.if_(t.thread_id() < 5):
            t.tell_peers()

    for body, match in (
        (fewer, "for 8 warps of each CTA; 1 to 1"),
        (more, "is for 6 warps; 48 have told"),
        (not_all_ctas, "is for 48 warps; 16 have told"),
        (twice, "once"),
        (part_of_a_warp, "5 of 32 threads"),
    ):
        with pytest.raises(faults.DivergentBarrier, match=match):
            run(body)


def test_a_race_names_the_device():
    with pytest.raises(
        faults.RaceError, match=r"thread 0 of CTA \d of device \d and load by thread"
    ):
        run(peers_only)
