"""What Python would misread in a kernel body is refused, by the emulator and by the lowering for GPUs.

Beside each trap stands the same body as the language means it: it passes on both.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_align_jax._simt import collectives, emulator, mosaic
from moe_align_jax._simt.language import BodyError, Program
from tests.simt.emulated import kernel

N = 128


def emulate(body) -> list[int]:
    one = kernel(body, inputs={"a": (N,)}, outputs={"out": (N,)})
    program = Program(inputs=one.inputs, kernels=(one,), results=("out",))
    [out] = emulator.run(program, [np.arange(N, dtype=np.int32)])
    return out.tolist()


def lower(body) -> str:
    one = kernel(body, inputs={"a": (N,)}, outputs={"out": (N,)})
    struct = jax.ShapeDtypeStruct((N,), jnp.int32)
    traced = jax.jit(mosaic.launcher(one)).trace(struct)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


BACKENDS = pytest.mark.parametrize("backend", [emulate, lower])


def rest(t, r):
    """Every output is written, whatever came before."""
    t.store(r.out, t.thread_id(), t.thread_id())


# -- a value is no Python value ------------------------------------------------------------------


def equals_static(t, r):
    if t.thread_id() == 0:
        t.store(r.out, 0, 5)


def differs_static(t, r):
    if t.thread_id() != 0:
        t.store(r.out, 0, 5)


def equals_reversed(t, r):
    if 0 == t.thread_id():  # noqa: SIM300
        t.store(r.out, 0, 5)


def equals_value(t, r):
    t.select(t.load(r.a, 0) == t.load(r.a, 1), 1, 2)


def among(t, r):
    if t.thread_id() in (1, 2):
        t.store(r.out, 0, 5)


def less(t, r):
    if t.thread_id() < 3:
        t.store(r.out, 0, 5)


def both(t, r):
    i = t.thread_id()
    with t.if_((i > 2) and (i < 5)):
        t.store(r.out, i, 5)


def either(t, r):
    i = t.thread_id()
    with t.if_((i < 2) or (i > 5)):
        t.store(r.out, i, 5)


def negated(t, r):
    t.store(r.out, 0, 1 if not t.thread_id() < 2 else 0)


def chained(t, r):
    with t.if_(2 < t.thread_id() < 5):
        t.store(r.out, 0, 5)


def repeated(t, r):
    x = t.load(r.a, 0)
    while x > 0:
        x = x - 1


def smaller(t, r):
    t.store(r.out, 0, min(t.thread_id(), 5))


def keyed(t, r):
    t.store(r.out, 0, {t.thread_id(): 5}[t.thread_id()])


TRUTHS = [less, both, either, negated, chained, repeated, smaller]
EQUALITIES = [equals_static, equals_reversed, equals_value, among]


@BACKENDS
@pytest.mark.parametrize("body", TRUTHS)
def test_a_truth_value_is_refused_and_the_error_names_if_and_the_operators(backend, body):
    with pytest.raises(BodyError, match=r"a truth value .*`with t\.if_\(c\):`.*`&` and `\|`"):
        backend(body)


@BACKENDS
@pytest.mark.parametrize("body", EQUALITIES)
def test_equality_is_refused_and_the_error_names_eq(backend, body):
    with pytest.raises(BodyError, match=r"`==` .* Write `x\.eq\(y\)`"):
        backend(body)


@BACKENDS
def test_inequality_is_refused_and_the_error_names_ne(backend):
    with pytest.raises(BodyError, match=r"`!=` .* Write `x\.ne\(y\)`"):
        backend(differs_static)


@BACKENDS
def test_a_hash_is_refused(backend):
    with pytest.raises(BodyError, match="a hash .*`x.eq"):
        backend(keyed)


def test_a_body_error_is_a_type_error():
    """As jax raises one for the truth of a traced value."""
    assert issubclass(BodyError, TypeError)


def as_meant(t, r):
    i = t.thread_id()
    t.store(r.out, i, t.select((i > 2) & (i < 5) | i.eq(0), 1, 0))


def test_the_operators_of_the_language_give_what_was_meant():
    assert emulate(as_meant) == [int(2 < i < 5 or i == 0) for i in range(N)]
    assert "mosaic_gpu" in lower(as_meant)


# -- jumps out of a body -------------------------------------------------------------------------


def returns_from_if(t, r):
    i = t.thread_id()
    with t.if_(i < 3):
        t.store(r.out, i, 5)
        return
    rest(t, r)


def returns_from_if_in_a_static_branch(t, r):
    i = t.thread_id()
    with t.if_(i < 3):
        for k in range(2):
            if k == 1:
                try:
                    t.store(r.out, i, 5)
                finally:
                    return  # noqa: B012
    rest(t, r)


def returns_a_value_from_if(t, r):
    def first(ref):
        with t.if_(t.thread_id() < 3):
            return t.load(ref, t.thread_id())

    first(r.a)
    rest(t, r)


def returns_from_two_ifs(t, r):
    with t.if_(t.thread_id() < 3), t.if_(t.thread_id() < 2):
        return
    rest(t, r)


def returns_from_if_over_lines(t, r):
    with t.if_(
        (t.thread_id() < 3)
        & (t.thread_id() > 1),
    ):  # fmt: skip
        return
    rest(t, r)


def breaks_from_if(t, r):
    for k in range(4):
        with t.if_(t.thread_id() < k):
            break
    rest(t, r)


def continues_from_if(t, r):
    for k in range(4):
        with t.if_(t.thread_id() < k):
            continue
        t.load(r.a, k)
    rest(t, r)


def continues_a_run_time_loop_from_if(t, r):
    for k in t.for_range(0, 4):
        with t.if_(t.thread_id() < k):
            continue
    rest(t, r)


@BACKENDS
@pytest.mark.parametrize(
    "body",
    [
        *(returns_from_if, returns_from_if_in_a_static_branch, returns_a_value_from_if),
        *(returns_from_two_ifs, returns_from_if_over_lines),
        *(breaks_from_if, continues_from_if, continues_a_run_time_loop_from_if),
    ],
)
def test_a_jump_out_of_an_if_is_refused_with_its_line(backend, body):
    word = body.__name__.split("_")[0].removesuffix("s")
    with pytest.raises(BodyError, match=rf"t\.if_ must .* `{word}` .*test_language_traps\.py:\d+"):
        backend(body)


def breaks_from_loop(t, r):
    for k in t.for_range(0, 4):
        t.load(r.a, k)
        break
    rest(t, r)


def breaks_from_loop_in_a_static_branch(t, r):
    for k in t.for_range(0, t.load(r.a, 3)):
        if t.num_threads == N:
            break
        t.load(r.a, k)
    rest(t, r)


def returns_from_loop(t, r):
    for k in t.for_range(0, 4):
        t.load(r.a, k)
        return
    rest(t, r)


@BACKENDS
@pytest.mark.parametrize(
    "body", [breaks_from_loop, breaks_from_loop_in_a_static_branch, returns_from_loop]
)
def test_a_jump_out_of_a_loop_is_refused_with_its_line(backend, body):
    word = body.__name__.split("_")[0].removesuffix("s")
    with pytest.raises(BodyError, match=rf"t\.for_range must .* `{word}` .*traps\.py:\d+"):
        backend(body)


# Where the loop's head does not stand in the text of who left it, the loop itself tells.


def breaks_from_strided(t, r):
    for k in collectives.strided(t, t.thread_id() & 3, 64, 4):
        t.load(r.a, k)
        break
    rest(t, r)


def breaks_from_strided_near_the_limit(t, r):
    for _ in collectives.strided(t, t.thread_id() & 3, 2**31 - 1, 2**29):
        break
    rest(t, r)


def breaks_from_a_named_loop(t, r):
    loop = t.for_range(0, 4)
    for k in loop:
        t.load(r.a, k)
        break
    rest(t, r)


def takes_the_first(t, r):
    next(t.for_range(0, 4))
    rest(t, r)


def zips(t, r):
    for k, _ in zip([0, 1], t.for_range(0, 9), strict=False):
        t.load(r.a, k)
        t.load(r.a, 1)
    rest(t, r)


@BACKENDS
@pytest.mark.parametrize(
    "body",
    [
        *(breaks_from_strided, breaks_from_strided_near_the_limit),
        *(breaks_from_a_named_loop, takes_the_first),
    ],
)
def test_a_loop_that_is_left_otherwise_is_noticed(backend, body):
    with pytest.raises(BodyError, match=r"t\.for_range must run to the end of its body"):
        backend(body)


def test_a_body_without_text_is_noticed_where_it_leaves_a_loop():
    scope: dict = {}
    exec(
        "def body(t, r):\n for k in t.for_range(0, 4):\n  break\n t.store(r.out, t.thread_id(), 1)",
        scope,
    )
    for backend in (emulate, lower):
        with pytest.raises(BodyError, match=r"t\.for_range must run to the end"):
            backend(scope["body"])


# -- what is no trap -----------------------------------------------------------------------------


def allowed(t, r):
    """Loops and functions inside of a body may jump among themselves."""
    i = t.thread_id()
    t.store(r.out, i, i)
    with t.if_(i < 64):

        def chosen():
            return t.load(r.a, i)

        for k in range(8):
            if k == 2:
                continue
            if k == 3:
                break
        t.store(r.out, i, collectives.value_if(t, i < 32, lambda: chosen() + 1, 7))
        for k in t.for_range(0, 2):
            for step in range(3):
                if step == 1:
                    break
                t.store(r.out, i, t.load(r.out, i) + k)
            if t.num_threads != N:
                continue
            t.store(r.out, i, t.load(r.out, i) + 10)


def test_jumps_within_a_body_are_allowed():
    want = [i + 22 if i < 32 else 28 if i < 64 else i for i in range(N)]
    assert emulate(allowed) == want
    assert "mosaic_gpu" in lower(allowed)


@BACKENDS
def test_an_error_of_the_body_itself_is_not_taken_for_a_jump(backend):
    def body(t, r):
        for k in t.for_range(0, 4):
            with t.if_(k > 1):
                raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        backend(body)
