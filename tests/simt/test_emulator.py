"""The emulator's arithmetic, warp operations and control flow against plain Python, and what it
refuses (races and barriers: test_emulator_races.py). A defect stands beside the correct kernel.
"""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_align_jax._align.kernels import common
from moe_align_jax._simt import collectives, emulator
from moe_align_jax._simt.emulator import faults
from moe_align_jax._simt.language import LaunchError, check_launch
from tests.simt.emulated import kernel, launch, program

WORD = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 31, 32])
WORDS = st.lists(WORD, min_size=16, max_size=16)
OUT = {"out": (128,)}
ALL_PAIRS = {"out": (256,)}


def wrap(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def u(x: int) -> int:
    return x % 2**32


# -- arithmetic ------------------------------------------------------------------------------------

BINARY = {
    "+": (lambda x, y: x + y, lambda x, y: wrap(x + y)),
    "-": (lambda x, y: x - y, lambda x, y: wrap(x - y)),
    "*": (lambda x, y: x * y, lambda x, y: wrap(x * y)),
    "//": (lambda x, y: x // (y | 1), lambda x, y: wrap(u(x) // u(y | 1))),
    "%": (lambda x, y: x % (y | 1), lambda x, y: wrap(u(x) % u(y | 1))),
    "&": (lambda x, y: x & y, lambda x, y: wrap(u(x) & u(y))),
    "|": (lambda x, y: x | y, lambda x, y: wrap(u(x) | u(y))),
    "^": (lambda x, y: x ^ y, lambda x, y: wrap(u(x) ^ u(y))),
    "<<": (lambda x, y: x << (y & 31), lambda x, y: wrap(u(x) << (y % 32))),
    ">>": (lambda x, y: x >> (y & 31), lambda x, y: wrap(u(x) >> (y % 32))),
    "reversed -": (lambda x, y: 2**31 - 1 - x, lambda x, y: wrap(2**31 - 1 - x)),
    "unsigned constant": (lambda x, y: x & 0xFFFFFFFF, lambda x, y: x),
}
COMPARE = {
    "<": (lambda x, y: x < y, lambda x, y: x < y),
    "<=": (lambda x, y: x <= y, lambda x, y: x <= y),
    ">": (lambda x, y: x > y, lambda x, y: x > y),
    ">=": (lambda x, y: x >= y, lambda x, y: x >= y),
    "eq": (lambda x, y: x.eq(y), lambda x, y: x == y),
    "ne": (lambda x, y: x.ne(y), lambda x, y: x != y),
    "below": (lambda x, y: x.below(y), lambda x, y: u(x) < u(y)),
    "and": (lambda x, y: (x > 0) & (y > 0), lambda x, y: x > 0 and y > 0),
    "or": (lambda x, y: (x > 0) | (y > 0), lambda x, y: x > 0 or y > 0),
}


@pytest.mark.parametrize("name", BINARY)
@settings(max_examples=40, deadline=None)
@given(a=WORDS, b=WORDS)
def test_arithmetic_wraps_and_divides_unsigned(name, a, b):
    ours, plain = BINARY[name]

    def body(t, r):
        i = t.thread_id()
        t.store(r.out, i, ours(t.load(r.a, i >> 4), t.load(r.b, i & 15)))

    [got] = launch(body, a, b, outputs=ALL_PAIRS, num_warpgroups=2)
    assert got.dtype == np.int32
    assert got.tolist() == [plain(x, y) for x in a for y in b]


@pytest.mark.parametrize("name", COMPARE)
@settings(max_examples=40, deadline=None)
@given(a=WORDS, b=WORDS)
def test_comparisons_are_signed_but_below(name, a, b):
    ours, plain = COMPARE[name]

    def body(t, r):
        i = t.thread_id()
        holds = ours(t.load(r.a, i >> 4), t.load(r.b, i & 15))
        t.store(r.out, i, t.select(holds, 1, np.int64(0)))

    [got] = launch(body, a, b, outputs=ALL_PAIRS, num_warpgroups=2)
    assert got.tolist() == [int(plain(x, y)) for x in a for y in b]


@pytest.mark.parametrize(
    "body",
    [
        lambda t, r: t.store(r.out, t.thread_id(), t.const(5) // t.thread_id()),
        lambda t, r: t.store(r.out, t.thread_id(), t.const(5) % t.thread_id()),
        lambda t, r: t.store(r.out, t.thread_id(), t.const(1) << t.thread_id()),
        lambda t, r: t.store(r.out, t.thread_id(), t.const(1) >> t.thread_id()),
        lambda t, r: t.store(r.out, t.thread_id(), (t.thread_id() < 3) + 1),
        lambda t, r: t.store(r.out, t.thread_id(), t.thread_id() < 3),
        lambda t, r: t.store(r.out, t.thread_id(), t.thread_id() + 2**32),
        lambda t, r: t.store(r.out, t.thread_id() < 3, 0),
        lambda t, r: t.store(r.out, (t.thread_id(), 0), 0),
        lambda t, r: t.store(r.a, t.thread_id(), 0),
        lambda t, r: t.atomic_add(r.out, t.thread_id(), 0),
        lambda t, r: list(t.for_range(0, t.thread_id(), 0)),
        lambda t, r: list(t.for_range(2**31 - 10, 2**31 - 1, 16)),
        lambda t, r: t.if_(t.thread_id()).__enter__(),
    ],
)
def test_what_the_machine_does_not_define_is_refused(body):
    with pytest.raises(faults.Undefined, match="kernel|32-bit"):
        launch(body, [0] * 128, outputs=OUT)


def test_a_lane_that_is_not_active_may_divide_by_zero_or_index_anything():
    def body(t, r):
        i = t.thread_id()
        t.store(r.out, i, collectives.value_if(t, i > 0, lambda: t.const(100) // i, 7))
        with t.if_(i < 5):
            t.store(r.out, i + (i & 0), t.load(r.a, i))

    [got] = launch(body, range(5), outputs=OUT)
    assert got.tolist() == [0, 1, 2, 3, 4] + [100 // i for i in range(5, 128)]


# -- warp operations -------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.integers(-3, 3) | WORD, min_size=1, max_size=16), seed=st.integers(0, 99))
def test_warp_operations_equal_plain_python(words, seed):
    rng = np.random.default_rng(seed)
    x, source = rng.choice(words, 256).tolist(), rng.integers(0, 32, 256)
    names = ("shfl", "fixed", "ballot", "sum", "popc", "highest", "up1", "up5", "up31")
    names += ("bit0", "bit5", "bit31", "most", "least")

    def body(t, r):
        i = t.cta_id() * 128 + t.thread_id()
        value = t.load(r.a, i)
        t.store(r.shfl, i, t.shfl(value, t.load(r.b, i)))
        t.store(r.fixed, i, t.shfl(value, 9))
        t.store(r.ballot, i, t.ballot(value > 0))
        t.store(r.sum, i, t.warp_sum(value))
        t.store(r.popc, i, t.popc(value))
        t.store(r.highest, i, t.highest_bit(value))
        for delta in (1, 5, 31):
            t.store(getattr(r, f"up{delta}"), i, t.shfl_up(value, delta))
        for bit in (0, 5, 31):
            t.store(getattr(r, f"bit{bit}"), i, t.same_bit(value, bit))
        t.store(r.most, i, t.warp_max(value))
        t.store(r.least, i, t.warp_min(value))

    got = launch(body, x, source, outputs={name: (256,) for name in names}, num_ctas=2)
    got = [g.tolist() for g in got]
    shfl, fixed, ballot, total, popc, highest, up1, up5, up31, *bits, most, least = got
    for i, value in enumerate(x):
        warp = range(i // 32 * 32, i // 32 * 32 + 32)
        assert shfl[i] == x[warp[source[i]]]
        assert fixed[i] == x[warp[9]]
        assert u(ballot[i]) == sum(1 << k for k, j in enumerate(warp) if x[j] > 0)
        assert u(total[i]) == sum(x[j] for j in warp) & 0xFFFFFFFF
        assert most[i] == max(x[j] for j in warp) and least[i] == min(x[j] for j in warp)
        assert popc[i] == bin(u(value)).count("1")
        assert highest[i] == u(value).bit_length() - 1
        for up, delta in ((up1, 1), (up5, 5), (up31, 31)):
            assert up[i] == (x[i - delta] if i % 32 >= delta else value)
        for same, bit in zip(bits, (0, 5, 31), strict=True):
            alike = [(u(x[j]) ^ u(value)) >> bit & 1 == 0 for j in warp]
            assert u(same[i]) == sum(1 << k for k, yes in enumerate(alike) if yes)


# -- float32 -----------------------------------------------------------------------------------------

FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 3.0, -2.5, 127.0, 1e-30, 3e38, -3e38, 700.0, -200.0]
FLOATS += [float("inf"), float("-inf"), float("nan")]
PAIRS_OF_FLOATS = [(a, b) for a in FLOATS for b in FLOATS][:256]


def on_floats(operation, *columns):
    """What a primitive gives for float32 numbers."""

    def body(t, r):
        i = t.cta_id() * 128 + t.thread_id()
        refs = [getattr(r, "ab"[k]) for k in range(len(columns))]
        given = [t.load(ref, i) for ref in refs]
        t.store(r.out, i, operation(t, *given))

    words = [np.array(column, np.float32).view(np.int32) for column in columns]
    size = len(words[0])
    [got] = launch(body, *words, outputs={"out": (size,)}, num_ctas=size // 128)
    return got.view(np.float32)


def test_the_greater_and_the_lesser_float_leave_nans_out():
    a, b = zip(*PAIRS_OF_FLOATS, strict=True)
    most = on_floats(lambda t, x, y: t.fmax(x, y), a, b)
    least = on_floats(lambda t, x, y: t.fmin(x, y), a, b)
    for x, y, high, low in zip(a, b, most, least, strict=True):
        numbers = [np.float32(v) for v in (x, y) if v == v] or [float("nan")]
        np.testing.assert_array_equal(high, np.float32(max(numbers)))
        np.testing.assert_array_equal(low, np.float32(min(numbers)))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("exp2", lambda x: 2.0 ** min(x, 1000.0) if x == x else x),
        ("reciprocal", lambda x: 1 / x if x else math.copysign(math.inf, x)),
        ("fsqrt", lambda x: math.sqrt(x) if x >= 0 else math.nan),
    ],
)
def test_functions_of_a_float_equal_float64(name, plain):
    """What is subnormal in float32 is 0."""
    given = np.array((FLOATS + [1e-40, -1e-40, -127.5, -126.0]) * 8, np.float32)[:128]
    got = on_floats(lambda t, x: getattr(t, name)(x), given)
    for x, y in zip(given.tolist(), got, strict=True):
        operand = 0.0 if name != "exp2" and abs(x) < 2.0**-126 else x
        operand = math.copysign(operand, x)
        want = np.float64(plain(operand))
        if abs(want) < 2.0**-126:
            want = np.float64(0)
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(y, np.float32(want), rtol=2.0**-22)


def test_float16_of_the_low_half_of_a_word():
    words = np.arange(0, 65_536, 128, dtype=np.int64) * 65_537 + 7
    values = (words % 65_536).astype(np.uint16).view(np.float16)

    def body(t, r):
        i = t.cta_id() * 128 + t.thread_id()
        t.store(r.out, i, t.from_float16(t.load(r.a, i)))

    [got] = launch(
        body, words.astype(np.uint32).view(np.int32), outputs={"out": (512,)}, num_ctas=4
    )
    np.testing.assert_array_equal(got.view(np.float32), values.astype(np.float32))


@pytest.mark.parametrize("num_bins", [1, 2, 5, 8, 200, 256])
def test_a_tally_counts_and_ranks_stably(num_bins):
    """As the kernels count a warp's pairs, -1 among them: with all values of its bits in use, and without."""
    rng = np.random.default_rng(num_bins)
    bins = rng.integers(-1, num_bins, 3 * 128)

    def body(t, r):
        lane, warp = t.thread_id() & 31, t.thread_id() >> 5
        for first in range(0, num_bins * 4, 128):
            with t.if_(t.thread_id() + first < num_bins * 4):
                t.store(r.histogram, t.thread_id() + first, 0)
        t.block_sync()
        for k in range(3):
            at = warp * 96 + (k * 32 + lane)
            got = t.load(r.a, at), warp * num_bins, lane, *common.bin_bits(num_bins)
            bin_, row, lane, *bits = got
            t.store(r.rank, at, collectives.tally(t, r.histogram, row, bin_, lane, *bits))

    [ranks] = launch(body, bins, outputs={"rank": (384,)}, shared={"histogram": num_bins * 4})
    for at, bin_ in enumerate(bins.tolist()):
        if bin_ >= 0:
            assert ranks[at] == bins[at // 96 * 96 : at].tolist().count(bin_), (at, bin_)


def test_warp_operations_in_one_warp_of_a_cta():
    """A warp that is wholly away does not take part."""

    def body(t, r):
        i = t.thread_id()
        t.store(r.out, i, 0)
        with t.if_((i >= 32) & (i < 64)):
            t.store(r.out, i, t.shfl(i, 3) + t.popc(t.ballot(i >= 60)))

    [got] = launch(body, outputs=OUT)
    assert got.tolist() == [0] * 32 + [35 + 4] * 32 + [0] * 64


@pytest.mark.parametrize("lane", [32, -1])
def test_shuffle_from_no_lane_is_out_of_bounds(lane):
    with pytest.raises(faults.OutOfBounds, match="lane"):
        launch(lambda t, r: t.shfl(t.thread_id(), lane))


# -- control flow ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(low=st.integers(-20, 20), high=st.integers(-20, 20), seed=st.integers(0, 99))
@example(low=0, high=0, seed=0)
def test_for_range_with_bounds_per_thread(low, high, seed):
    """Each thread sums its own range, skipping odd numbers, in a cell of its own."""
    rng = np.random.default_rng(seed)
    start, stop = rng.integers(-20, low, 128, endpoint=True), rng.integers(-20, 21, 128) % 20 + high
    step = rng.integers(1, 10, 128)

    def body(t, r):
        i = t.thread_id()
        t.store(r.out, i, 0)
        for k in t.for_range(t.load(r.a, i), t.load(r.b, i), t.load(r.c, i)):
            with t.if_((k & 1).eq(0)):
                t.store(r.out, i, t.load(r.out, i) + k * k)

    [got] = launch(body, start, stop, step, outputs=OUT)
    ranges = zip(start, stop, step, strict=True)
    assert got.tolist() == [sum(k * k for k in range(*x) if k % 2 == 0) for x in ranges]


def test_loop_near_the_int32_limit_ends():
    def body(t, r):
        t.store(r.out, t.thread_id(), 0)
        for k in t.for_range(2**31 - 1 - 128 + t.thread_id(), 2**31 - 1, 1):
            t.store(r.out, t.thread_id(), t.load(r.out, t.thread_id()) + (k >> 30))

    [got] = launch(body, outputs=OUT)
    assert got.tolist() == [128 - i for i in range(128)]


def test_values_while_goes_on_for_some_threads():
    """Each thread halves its number until it is odd, and counts; some do not begin."""
    numbers = np.arange(128, dtype=np.int32) * 8 + 3 * (np.arange(128) % 2)

    def body(t, r):
        i = t.thread_id()
        first = t.load(r.a, i), t.const(0)
        goes_on = lambda values: (values[0] & 1).eq(0) & (values[0] > 0)  # noqa: E731
        number, count = t.values_while(first, goes_on, lambda v: (v[0] >> 1, v[1] + 1))
        t.store(r.out, i, number * 100 + count)

    [got] = launch(body, numbers, outputs=OUT)
    counts = [int(n & -n).bit_length() - 1 if n else 0 for n in numbers]
    assert got.tolist() == [(int(n) >> c) * 100 + c for n, c in zip(numbers, counts, strict=True)]


def test_value_if_computes_under_the_narrowed_mask():
    def body(t, r):
        i = t.thread_id()
        with t.if_(i < 100):
            inner = collectives.value_if(t, i < 50, lambda: t.load(r.a, i), i * 2)
            t.store(r.out, i, inner)
        with t.if_(i >= 100):
            t.store(r.out, i, collectives.value_if(t, i < 0, lambda: t.load(r.a, i + 1000), -1))

    [got] = launch(body, range(1000, 1050), outputs=OUT)
    want = [*range(1000, 1050), *range(100, 200, 2), *[-1] * 28]
    assert got.tolist() == want


def carried(t, r):
    total = t.const(0)
    for k in t.for_range(0, 4):
        total = total + k
    t.store(r.out, t.thread_id(), total)


def carried_within(t, r):
    total = t.const(0)
    for k in t.for_range(0, 4):
        total = total + k  # the second iteration uses the first one's
        t.store(r.out, t.thread_id(), total)


def from_if(t, r):
    with t.if_(t.thread_id() < 200):
        x = t.thread_id() + 1
    t.store(r.out, t.thread_id(), x)


@pytest.mark.parametrize("body", [carried, carried_within, from_if])
def test_a_value_does_not_leave_its_scope(body):
    """MLIR traces a body once, so that this would not mean on the GPU what it says in Python."""
    with pytest.raises(faults.EscapedValue, match="kernel"):
        launch(body, outputs=OUT)


# -- memory ----------------------------------------------------------------------------------------


def test_refs_of_two_dimensions():
    def body(t, r):
        i = t.thread_id()
        t.store(r.out, (i % 64, i // 64), t.load(r.a, (i // 64, i % 64)) * 10)

    a = np.arange(128).reshape(2, 64)
    [got] = launch(body, a, outputs={"out": (64, 2)})
    assert np.array_equal(got, a.T * 10)


def test_shared_memory_is_one_per_cta():
    def body(t, r):
        i = t.thread_id()
        t.store(r.s, i, t.cta_id() * 1000 + i)
        t.block_sync()
        t.store(r.out, t.cta_id() * 128 + i, t.load(r.s, 127 - i))

    [got] = launch(body, outputs={"out": (384,)}, shared={"s": 128}, num_ctas=3)
    assert got.tolist() == [1000 * c + 127 - i for c in range(3) for i in range(128)]


def test_vectors_of_four():
    def body(t, r):
        i = t.thread_id()
        with t.if_(i < 16):
            t.store4(r.s, i * 4, i)
        t.block_sync()
        with t.if_(i < 16):
            t.store4(r.out, i * 4, t.load4(r.s, i * 4))
            t.store4(r.copy, i * 4, t.load4(r.a, i * 4))

    a = np.arange(64) * 3
    out, copy = launch(body, a, outputs={"out": (64,), "copy": (64,)}, shared={"s": 66})
    assert out.tolist() == [i // 4 for i in range(64)] and np.array_equal(copy, a)


def test_atomics_add_up():
    def body(t, r):
        i = t.thread_id()
        t.store(r.s, i, i)
        t.block_sync()
        for k in t.for_range(0, i % 5):
            t.atomic_add(r.s, i % 7, k + 1)
        t.atomic_add(r.s, 3, 2**30)
        t.block_sync()
        t.store(r.out, i, t.load(r.s, i))

    want = list(range(128))
    for i in range(128):
        want[i % 7] += sum(k + 1 for k in range(i % 5))
        want[3] += 2**30
    [got] = launch(body, outputs=OUT, shared={"s": 128})
    assert got.tolist() == [wrap(x) for x in want]


def access(kind, index, guard=lambda t: t.thread_id() >= 0):
    """A kernel of 2 CTAs whose threads touch `index` in one way, where `guard` holds."""

    def body(t, r):
        i = t.thread_id()
        t.store(r.s, i, 0)
        t.block_sync()
        at = index(t)
        with t.if_(guard(t)):
            if kind == "load":
                t.load(r.s, at)
            elif kind == "store":
                t.store(r.s, at, 1)
            elif kind == "atomic":
                t.atomic_add(r.s, at, 1)
            elif kind == "store4":
                t.store4(r.s, at, 1)
            else:
                t.store4(r.s, at, t.load4(r.a, at))

    return lambda: launch(body, np.zeros(1000), shared={"s": 128}, num_ctas=2)


@pytest.mark.parametrize("kind", ["load", "store", "atomic"])
@pytest.mark.parametrize("offset", [1, -1, 2**31 - 200])
def test_out_of_bounds(kind, offset):
    access(kind, lambda t: t.thread_id())()
    access(kind, lambda t: t.thread_id() + offset, lambda t: (t.thread_id() + offset).below(128))()
    with pytest.raises(faults.OutOfBounds, match=r"kernel: thread \d+ of CTA \d .* of s"):
        access(kind, lambda t: t.thread_id() + offset)()


@pytest.mark.parametrize("kind", ["store4", "copy4"])
def test_vectors_out_of_bounds_and_misaligned(kind):
    def first(n):
        return lambda t: t.thread_id() < n

    access(kind, lambda t: t.thread_id() * 4, first(32))()
    with pytest.raises(faults.OutOfBounds, match="thread 32 of CTA 0"):
        access(kind, lambda t: t.thread_id() * 4, first(33))()
    access(kind, lambda t: t.thread_id() * 4, lambda t: t.thread_id() < 32 * (1 - t.cta_id()))()
    with pytest.raises(faults.OutOfBounds, match="thread 32 of CTA 1"):
        access(kind, lambda t: t.thread_id() * 4, lambda t: t.thread_id() < 32 + t.cta_id())()
    with pytest.raises(faults.MisalignedAccess, match="thread 0 .* index 2 "):
        access(kind, lambda t: t.thread_id() * 4 + 2, first(31))()
    with pytest.raises(faults.MisalignedAccess, match="thread 5 "):
        access(kind, lambda t: t.thread_id() * 4 + t.select(t.thread_id().eq(5), 1, 0), first(31))()


def test_vector_past_the_end_by_less_than_its_width():
    def body(t, r):
        with t.if_(t.thread_id().eq(0)):
            t.store4(r.s, 124, 0)

    launch(body, shared={"s": 128})
    with pytest.raises(faults.OutOfBounds, match="124 and the 3 after it"):
        launch(body, shared={"s": 127})


@pytest.mark.parametrize("axis", [0, 1])
def test_out_of_bounds_of_one_axis(axis):
    """(0, 64) is a cell of the flat array, (1, 0), yet out of bounds."""

    def body(t, r):
        i = t.thread_id()
        t.load(r.a, (i // 64 + (axis == 0), i % 64 + (axis == 1)))

    with pytest.raises(faults.OutOfBounds, match=f"axis {axis}"):
        launch(body, np.zeros((2, 64)))


@pytest.mark.parametrize("where", ["shared", "output"])
@pytest.mark.parametrize("how", ["load", "copy4", "atomic"])
def test_uninitialised_read(where, how):
    if (where, how) == ("output", "atomic"):
        with pytest.raises(faults.Undefined, match="global"):
            launch(lambda t, r: t.atomic_add(r.x, 0, 1), outputs={"x": (128,)})
        return

    def body(t, r, written):
        i = t.thread_id()
        with t.if_(i < written):
            t.store(r.x, i, 0)
        t.block_sync()
        if how == "load":
            t.load(r.x, i)
        elif how == "atomic":
            t.atomic_add(r.x, i, 1)
        else:
            with t.if_(i < 32):
                t.store4(r.y, i * 4, t.load4(r.x, i * 4))
        t.block_sync()
        t.store(r.x, i, 0)

    place = {"shared": {"x": 128, "y": 128}} if where == "shared" else {"outputs": {"x": (128,)}}
    if where == "output":
        place["shared"] = {"y": 128}
    launch(lambda t, r: body(t, r, 128), **place)
    with pytest.raises(faults.UninitialisedRead, match=r"thread \d+ of CTA 0 reads x\[127\]"):
        launch(lambda t, r: body(t, r, 127), **place)


def test_zeros_do_not_make_memory_initialised():
    """What decides is whether the cell was written, not what it holds."""
    with pytest.raises(faults.UninitialisedRead):
        launch(lambda t, r: t.load(r.s, t.thread_id()), shared={"s": 128})


def test_unwritten_output():
    def body(t, r, count):
        with t.if_(t.thread_id() < count):
            t.store(r.out, t.thread_id(), 0)

    launch(lambda t, r: body(t, r, 128), outputs=OUT)
    with pytest.raises(faults.UnwrittenOutput, match=r"out\[127\] .*1 of 128"):
        launch(lambda t, r: body(t, r, 127), outputs=OUT)


# -- what the chip refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fits, too_much",
    [
        ({"num_warpgroups": 8}, {"num_warpgroups": 9}),
        ({"shared": {"s": 58_112}}, {"shared": {"s": 58_113}}),
        ({"shared": {"s": 58_105, "u": 1}}, {"shared": {"s": 58_109, "u": 1}}),
        ({"num_ctas": 16, "cluster": 16}, {"num_ctas": 17, "cluster": 17}),
        ({"num_ctas": 32, "cluster": 16}, {"num_ctas": 32, "cluster": 32}),
        ({"num_ctas": 6, "cluster": 3}, {"num_ctas": 7, "cluster": 3}),
        ({"num_ctas": 1}, {"num_ctas": 0}),
    ],
)
def test_launches_that_the_chip_refuses(fits, too_much):
    launch(lambda t, r: None, **fits)
    with pytest.raises(LaunchError, match="^kernel: "):
        launch(lambda t, r: None, **too_much)


def test_batch_along_grid_y():
    one = kernel(lambda t, r: None)
    check_launch(one, batch=65_535)
    with pytest.raises(LaunchError, match="65536"):
        check_launch(one, batch=65_536)
    assert emulator.run(program(one), [], batch=65_535) == []
    with pytest.raises(LaunchError, match="65536"):
        emulator.run(program(one), [], batch=65_536)


# -- programs --------------------------------------------------------------------------------------


def fill(name, size=128):
    return kernel(
        lambda t, r: t.store(getattr(r, name), t.thread_id(), 3), outputs={name: (size,)}, name=name
    )


def test_program_checks_its_buffers():
    def use(t, r):
        t.grid_dependency_wait()
        t.store(r.y, t.thread_id(), t.load(r.x, t.thread_id()))

    good = kernel(use, inputs={"x": (128,)}, outputs={"y": (128,)})
    assert emulator.run(program(fill("x"), good), [])[1].tolist() == [3] * 128
    for kernels, message in [
        ((good,), "input x"),
        ((good, fill("x")), "input x"),
        ((fill("x"), kernel(use, inputs={"x": (64,)}, outputs={"y": (128,)})), "input x"),
        ((fill("x"), fill("x")), "one kernel alone"),
    ]:
        with pytest.raises(faults.EmulatorError, match=message):
            emulator.run(program(*kernels), [])


@pytest.mark.parametrize("array", [np.zeros(3, np.int32), np.zeros(4, np.int64)])
def test_operands_are_int32_of_the_declared_shape(array):
    with pytest.raises(faults.EmulatorError, match=r"a must be int32 \[4\]"):
        emulator.run(program(inputs={"a": (4,)}), [array])


# -- inputs that end within a word -------------------------------------------------------------------


@pytest.mark.parametrize(("width", "tail"), [(1, 1), (1, 3), (2, 2), (2, 4)])
def test_narrow_loads_read_to_the_last_byte_and_no_further(width, tail):
    words = np.arange(1, 33, dtype=np.int32) * -19088743
    count = (4 * 31 + tail) // width
    want = words.view(np.uint8 if width == 1 else np.uint16)[:count].astype(np.int32)

    def body(t, r, beyond=0):
        at = t.thread_id()
        for first in range(0, count + beyond, 128):
            with t.if_(at + first < count + beyond):
                t.store(r.out, at + first, t.load_narrow(r.a, at + first, width))

    options = {"outputs": {"out": (count + 1,)}, "partial": frozenset({"out"})}
    [got] = launch(body, words, tails={"a": tail}, **options)
    np.testing.assert_array_equal(got[:count], want)
    with pytest.raises(faults.OutOfBounds, match=r"byte \d+ of a, which ends before"):
        launch(lambda t, r: body(t, r, 1), words, tails={"a": tail}, **options)


def test_a_word_of_which_a_part_is_there_is_not_loaded():
    def body(t, r):
        with t.if_(t.thread_id() < 8):
            t.store4(r.out, t.thread_id() * 4, t.load4(r.a, t.thread_id() * 4))

    words = np.arange(32, dtype=np.int32)
    [got] = launch(body, words, outputs={"out": (32,)})
    np.testing.assert_array_equal(got, words)
    with pytest.raises(faults.OutOfBounds, match="index 28"):
        launch(body, words, outputs={"out": (32,)}, tails={"a": 2})
