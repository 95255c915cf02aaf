"""What orders the CTAs of several devices, and what does not: the emulator finds each that is missing."""

import numpy as np
import pytest

from moe_align_jax._simt import collectives, emulator
from moe_align_jax._simt.emulator import faults
from moe_align_jax._simt.language import WARP, WARPGROUP, Devices, Kernel

DEVICES, CTAS = 2, 3


def run(body, words=CTAS * DEVICES):
    """`out` `[words]` of every device; a cell for each CTA of all devices, in the inbox, too."""
    kernel = Kernel(
        name="k",
        body=body,
        inputs={},
        outputs={"out": (words,), "copy": (CTAS,)},
        shared={"seen": 1},
        num_warpgroups=2,
        num_ctas=CTAS,
        devices=Devices(DEVICES),
        inbox=words,
        partial=frozenset(["out", "copy"]),
    )
    return emulator.run_on_devices(kernel, [[]] * DEVICES)


def my_cell(t):
    return t.rank() * CTAS + t.cta_id()


def store_everywhere(t, r):
    """CTA c of rank s puts `10 s + c + 1` into cell `s * CTAS + c` of everyone, by thread 0."""
    with t.if_(t.thread_id().eq(0)):
        for rank in range(DEVICES):
            t.store(t.remote(r.out, rank), my_cell(t), t.rank() * 10 + t.cta_id() + 1)


def first_warp(t):
    return t.if_(t.thread_id() < WARP)


def read(t, r, cell, thread=0):
    with t.if_(t.thread_id().eq(thread)):
        t.store(r.copy, t.cta_id(), t.load(r.out, cell))


def peers_cell(t):
    """Of the CTA of my index on the other device."""
    return (1 - t.rank()) * CTAS + t.cta_id()


def next_cta(t):
    """The cell of the next CTA of the other device."""
    return (1 - t.rank()) * CTAS + (t.cta_id() + 1) % CTAS


@pytest.mark.parametrize("thread", [0, 31, 100, 255])
def test_peers_read_after_device_sync(thread):
    def body(t, r):
        store_everywhere(t, r)
        collectives.device_sync(t)
        read(t, r, peers_cell(t), thread)

    for rank, (out, copy) in enumerate(run(body)):
        np.testing.assert_array_equal(copy, np.arange(1, 4) + (0 if rank else 10))
        np.testing.assert_array_equal(out, [1, 2, 3, 11, 12, 13])


def test_one_warp_waits_and_a_barrier_passes_it_on():
    def body(t, r):
        store_everywhere(t, r)
        t.device_arrive()
        with t.if_(t.thread_id() >= 7 * WARP):
            t.device_wait()
            read(t, r, peers_cell(t), thread=230)
        t.block_sync()
        read(t, r, peers_cell(t), thread=100)

    for rank, (_, copy) in enumerate(run(body)):
        np.testing.assert_array_equal(copy, np.arange(1, 4) + (0 if rank else 10))


def next_ctas(t, r):
    store_everywhere(t, r)
    collectives.device_sync(t)
    read(t, r, next_cta(t))


def arrived_before_the_store(t, r):
    t.device_arrive()
    store_everywhere(t, r)
    t.device_wait()
    read(t, r, peers_cell(t))


def another_warp_has_waited(t, r):
    store_everywhere(t, r)
    t.device_arrive()
    with first_warp(t):
        t.device_wait()
    read(t, r, peers_cell(t), thread=100)


def nobody_has_waited(t, r):
    store_everywhere(t, r)
    t.device_arrive()
    t.block_sync()
    read(t, r, peers_cell(t))


def overwritten_by_the_next_cta(t, r):
    store_everywhere(t, r)
    collectives.device_sync(t)
    with t.if_(t.thread_id().eq(0)):
        t.store(r.out, next_cta(t), 7)


def a_word_that_was_put_tells_of_nothing(t, r):
    store_everywhere(t, r)
    with t.if_(t.thread_id().eq(0)):
        for rank in range(DEVICES):
            t.put(rank, my_cell(t), t.const(1))
    t.take([(peers_cell(t), 1)])
    read(t, r, peers_cell(t))


@pytest.mark.parametrize(
    "body",
    [
        next_ctas,
        arrived_before_the_store,
        another_warp_has_waited,
        nobody_has_waited,
        overwritten_by_the_next_cta,
        a_word_that_was_put_tells_of_nothing,
    ],
)
def test_a_race_between_devices_is_found(body):
    with pytest.raises((faults.RaceError, faults.UninitialisedRead)):
        run(body)


def test_an_end_before_others_have_stored_is_found():
    def stores_afterwards(t, r):
        collectives.device_sync(t)
        store_everywhere(t, r)

    def waits_for_nobody(t, r):
        store_everywhere(t, r)
        t.device_arrive()

    for body, match in (
        (stores_afterwards, "told nobody of"),
        (waits_for_nobody, "without device_wait"),
        (store_everywhere, "without device_wait"),
    ):
        with pytest.raises(faults.RaceError, match=match):
            run(body)


def test_a_wait_that_would_not_end_is_found():
    def nobody_arrives(t, r):
        t.device_wait()

    def twice(t, r):
        t.device_arrive()
        t.device_arrive()

    def part_of_a_cta(t, r):
        with t.if_(t.thread_id() < WARPGROUP):
            t.device_arrive()

    def part_of_a_warp(t, r):
        t.device_arrive()
        with t.if_(t.thread_id() < 5):
            t.device_wait()

    for body, match in (
        (nobody_arrives, "before device_arrive"),
        (twice, "one device_arrive"),
        (part_of_a_cta, "for all threads"),
        (part_of_a_warp, "5 of 32 threads"),
    ):
        with pytest.raises(faults.DivergentBarrier, match=match):
            run(body)


def put_everywhere(t, value=None, cells=1):
    """CTA c of rank s puts `10 s + c + 1` into word `s * CTAS + c` of everyone, by thread 0."""
    with t.if_(t.thread_id() < cells):
        for rank in range(DEVICES):
            given = t.rank() * 10 + t.cta_id() + 1 if value is None else t.const(value)
            t.put(rank, my_cell(t), given)


def test_words_put_are_taken_by_every_cta():
    def body(t, r):
        put_everywhere(t)
        collectives.device_sync(t)  # for the end, not for the words
        with first_warp(t):
            cells = [(t.const(0) + k, 1) for k in range(CTAS * DEVICES)]
            words = [word for [word] in t.take(cells)]
            four = t.take([(t.const(0), 4)])[0]
            total = sum(words[1:], words[0]) + 100 * (four[3] - words[3])
            with t.if_(t.thread_id().eq(0)):
                t.store(r.copy, t.cta_id(), total)

    for _, copy in run(body):
        np.testing.assert_array_equal(copy, [1 + 2 + 3 + 11 + 12 + 13] * CTAS)


def test_what_is_wrong_with_an_inbox_is_found():
    def untaken(t, r):
        put_everywhere(t)
        collectives.device_sync(t)
        t.take([(my_cell(t) * 0, 1)])

    def never_put(t, r):
        t.take([(my_cell(t), 1)])

    def zero(t, r):
        put_everywhere(t, value=0)

    def by_two_threads(t, r):
        put_everywhere(t, cells=2)

    def again(t, r):
        put_everywhere(t)
        put_everywhere(t)

    def outside(t, r):
        t.put(0, my_cell(t) + CTAS * DEVICES, t.const(1))

    def on_no_device(t, r):
        t.put(DEVICES, my_cell(t), t.const(1))

    def between_fours(t, r):
        put_everywhere(t)
        t.take([(t.const(2), 4)])

    def past_the_end(t, r):
        put_everywhere(t)
        t.take([(t.const(4), 4)])

    for body, error, match in (
        (untaken, faults.RaceError, "before a word that was put was taken"),
        (never_put, faults.DivergentBarrier, "nobody puts"),
        (zero, faults.Undefined, "not 0"),
        (by_two_threads, faults.RaceError, "put once"),
        (again, faults.RaceError, "put once"),
        (outside, faults.OutOfBounds, "word 6 of an inbox"),
        (on_no_device, faults.OutOfBounds, "of an inbox"),
        (between_fours, faults.OutOfBounds, "takes 4 words"),
        (past_the_end, faults.OutOfBounds, "takes 4 words"),
    ):
        with pytest.raises(error, match=match):
            run(body)


def test_a_race_names_the_device():
    with pytest.raises(
        faults.RaceError, match=r"thread 0 of CTA \d of device \d and load by thread"
    ):
        run(next_ctas)
