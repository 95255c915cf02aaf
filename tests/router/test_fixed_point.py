"""Short keys in fixed point, and what one launch does with them: held to NumPy and to the router alone."""

import pathlib
import types

import jax
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._router import fixed_point, fused, kernel, split
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax._router.warp_router import Router
from moe_align_jax._simt import emulator, mosaic
from moe_align_jax.types import AlignProblem
from tests import oracle
from tests.router import router_oracle
from tests.simt.mutants import Mutant, markers

F32 = np.float32


ON_GPU = pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=pytest.mark.gpu)])


def run(program, given, on_gpu=False):
    words = [np.ascontiguousarray(given[name]).ravel() for name in program.inputs]
    if on_gpu:
        found = jax.jit(lambda *operands: mosaic.run(program, operands))(*words)
    else:
        found = emulator.run(program, [x.view(np.int32) for x in words])
    found = [np.asarray(x).view(np.int32) for x in found]
    return dict(zip(program.results, found, strict=True))


def one_launch(problem, block_size, **options):
    """The program, and the alignment's problem."""
    pairs, experts = problem.num_tokens * problem.top_k, problem.num_experts
    capacity = maj.max_num_tokens_padded(pairs, block_size=block_size, num_experts=experts)
    align = AlignProblem(pairs, experts, block_size, capacity, return_inverse=True, **options)
    return fused.build(problem, align, fused.config_for(problem, align)), align


def chosen_by_numpy(logits, top_k):
    greatest = np.finfo(F32).max
    finite = np.clip(np.nan_to_num(logits, nan=-greatest), -greatest, greatest)
    return np.argsort(-finite, axis=1, kind="stable")[:, :top_k].astype(np.int32)


def unusual(num_tokens, num_experts, seed):
    """Tokens of each kind in turns: ties that are exact in fixed point, and others; beyond its range; more of
    the greatest in one lane than it sorts."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((num_tokens, num_experts)).astype(F32)
    one_lane = [e % num_experts for e in (0, 1, 2, 3, 128, 129, 130, 131)]
    kinds = [
        lambda x: x,
        lambda x: np.round(x * 2) / 2,
        lambda x: np.round(x * 2) / 3,
        lambda x: x * F32(1e-6),
        lambda x: np.round(x * 2) * F32(1e-30),
        lambda x: x * F32(1e3),
        lambda x: np.sign(x) * 128 + np.round(x),
        lambda x: x + 9 * np.isin(np.arange(num_experts), one_lane),
        lambda x: x + 9 * (np.arange(num_experts) // 8 == num_experts // 16),
        lambda x: np.where(np.arange(num_experts) % 3 == 1, np.nan, x),
        lambda x: np.where(np.arange(num_experts) % 5 == 2, np.inf, -np.inf),
        lambda x: x * 0,
    ]
    for token in range(num_tokens):
        logits[token] = kinds[(token + seed) % len(kinds)](logits[token])
    return logits


# Tokens, experts, chosen, rows of a block: each edge of the launch's forms, and of a lane's layout.
SIZES = [
    (1, 256, 8, 16),
    (16, 256, 8, 64),
    (17, 512, 8, 16),
    (32, 256, 4, 8),
    (33, 256, 8, 16),
    (33, 8, 8, 128),
    (48, 256, 8, 32),
    (48, 1024, 8, 16),
    (64, 256, 8, 64),
    (64, 256, 8, 128),
    (64, 128, 4, 8),
    (64, 225, 1, 16),
    (40, 32, 32, 24),
    (12, 250, 6, 16),
]


@ON_GPU
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_launch_chooses_as_numpy_does_and_weighs_as_the_router_alone(size, on_gpu):
    num_tokens, num_experts, top_k, block_size = size
    # A softmax over all experts adds them up in another order where lanes hold vectors.
    problem = RouteProblem(num_tokens, num_experts, top_k, renormalize=num_tokens != 48)
    program, _ = one_launch(problem, block_size)
    for seed in (0, 7)[: 1 + (num_tokens < 12)]:
        given = {"logits": unusual(num_tokens, num_experts, seed)}
        got, alone = (run(one, given, on_gpu) for one in (program, kernel.build(problem)))
        ids = chosen_by_numpy(given["logits"], top_k)
        np.testing.assert_array_equal(got["topk_ids"].reshape(num_tokens, top_k), ids)
        np.testing.assert_array_equal(got["topk_weights"], alone["topk_weights"])
        want = oracle.expected(
            ids, block_size=block_size, num_experts=num_experts, return_inverse=True
        )
        for name, x in want._asdict().items():
            np.testing.assert_array_equal(got[name], np.ravel(x), name)


@ON_GPU
@pytest.mark.parametrize("num_tokens", [24, 40])
def test_tokens_that_are_not_real_have_no_expert_in_a_message(num_tokens, on_gpu):
    """Eight ids to a message, which are not inverted then; and a map of labels."""
    problem = RouteProblem(
        num_tokens, 256, 8, renormalize=True, has_token_mask=True, has_num_valid_tokens=True
    )
    assert fixed_point.packs_ids(problem) == (num_tokens > 32)
    assert not fixed_point.inverts_ids(problem)
    program, _ = one_launch(problem, 16, expert_map="label")
    rng = np.random.default_rng(num_tokens)
    mask, count = rng.random(num_tokens) < 0.7, num_tokens - 3
    given = {
        "logits": unusual(num_tokens, 256, 3),
        "token_mask": mask.astype(np.int32),
        "num_valid_tokens": np.array([count], np.int32),
        "expert_map": rng.permutation(256).astype(np.int32) - 100,
    }
    got = run(program, given, on_gpu)
    ids = chosen_by_numpy(given["logits"], 8)
    ids[~(mask & (np.arange(num_tokens) < count))] = -1
    np.testing.assert_array_equal(got["topk_ids"].reshape(ids.shape), ids)
    options = {"block_size": 16, "num_experts": 256, "return_inverse": True}
    want = oracle.expected(ids, expert_map=given["expert_map"], **options)
    for name, x in want._asdict().items():
        np.testing.assert_array_equal(got[name], np.ravel(x), name)


def test_padding_tokens_have_no_expert_in_a_message():
    """Of the bytes that a launch outside jax is given."""
    problem = RouteProblem(40, 256, 8, renormalize=True, has_padding=True)
    assert fixed_point.packs_ids(problem) and not fixed_point.inverts_ids(problem)
    program, _ = one_launch(problem, 16)
    padding = np.arange(40) % 3 == 0
    given = {"logits": unusual(40, 256, 0), "is_padding": padding.astype(np.int8).view(np.int32)}
    got = run(program, given)
    ids = chosen_by_numpy(given["logits"], 8)
    ids[padding] = -1
    np.testing.assert_array_equal(got["topk_ids"].reshape(ids.shape), ids)
    want = oracle.expected(ids, block_size=16, num_experts=256, return_inverse=True)
    for name, x in want._asdict().items():
        np.testing.assert_array_equal(got[name], np.ravel(x), name)


def greatest(*values):
    """256 logits: these at some ids, the others far below them, close to each other and not exact."""
    logits = np.full(256, -9, F32) + np.linspace(0, 1e-4, 256, dtype=F32)
    logits[(np.arange(len(values)) * 37 + 11) % 256] = values
    return logits


EIGHT = (9.0, 8.5, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0)
UNIT = 2.0**-15


def of_one_lane(count, *values):
    """As `greatest`, and so many greater ones in a lane, which holds two vectors of four."""
    logits = greatest(*values)
    logits[[0, 1, 2, 3, 128, 129, 130, 131][-count:]] = np.arange(20, 20 + count)
    return logits


# What decides for a token: its short keys, the logits of the K + 1 greatest, what fixed point leaves of those
# that count, or whole keys.
KEYS, LOGITS, IDS, WHOLE = range(4)

# Logits of a token, and which of these decides.
TOKENS = {
    "no two alike": (greatest(*EIGHT), KEYS),
    "a tie": (greatest(*EIGHT[:-1], 4.0), LOGITS),
    "a tie with the one behind": (greatest(*EIGHT, 3.0), LOGITS),
    "a tie with two behind": (greatest(*EIGHT, 3.0, 3.0), IDS),
    "ties of all": (greatest(9, 9, 8, 8, 7, 7, 6, 6), LOGITS),
    "a tie of three": (greatest(*EIGHT[:-2], 5.0, 5.0), IDS),
    "a tie of three, another is not exact": (greatest(*EIGHT[:4], 8.1, 5.0, 5.0, 5.0), WHOLE),
    "a tie of the least unit": (greatest(*EIGHT[:-1], 3 * UNIT, 3 * UNIT), LOGITS),
    "a unit apart": (greatest(*EIGHT[:-1], 4 + UNIT), KEYS),
    "half a unit apart": (greatest(*EIGHT[:-1], 4 + UNIT / 2), LOGITS),
    "half a unit apart, the greater first": (greatest(9 + UNIT / 2, 9.0, *EIGHT[1:-1]), LOGITS),
    "half a unit apart, with the one behind": (greatest(*EIGHT, 3 + UNIT / 2), LOGITS),
    "half a unit apart, three": (greatest(*EIGHT[:-1], 4 + UNIT / 4, 4 + UNIT / 2), WHOLE),
    "half a unit apart, with two behind": (
        greatest(*EIGHT, 3 + UNIT / 4, 3 + UNIT / 2),
        WHOLE,
    ),
    "a tie of a third": (greatest(*EIGHT[:-1], 1 / 3, 1 / 3), LOGITS),
    "a tie of three thirds": (greatest(*EIGHT[:-2], 1 / 3, 1 / 3, 1 / 3), WHOLE),
    "a tie, another is not exact": (greatest(*EIGHT[:-1], 4.0, 8.1), LOGITS),
    "at the ends of the range": (greatest(128, 128, *EIGHT[:-1]), LOGITS),
    "beyond the range": (greatest(129, 128, *EIGHT[:-1]), LOGITS),
    "one beyond the range": (greatest(129, *EIGHT), KEYS),
    "far beyond the range": (greatest(1e30, 3e38, *EIGHT[:-1]), LOGITS),
    "three beyond the range": (greatest(1e30, 3e38, 129, *EIGHT[:-1]), WHOLE),
    "far below the range": (greatest(*EIGHT[:6]) - 1000, WHOLE),
    "infinite": (greatest(np.inf, np.inf, *EIGHT[:-1]), LOGITS),
    "a NaN": (greatest(*EIGHT, np.nan), KEYS),
    "NaN alone": (np.full(256, np.nan, F32), WHOLE),
    "all alike": (np.full(256, 1.5, F32), WHOLE),  # the first lane has more than it sorts
    "three of one lane": (of_one_lane(3, *EIGHT[:5]), KEYS),
    "four of one lane": (of_one_lane(4, *EIGHT[:4]), LOGITS),
    "four of one lane, and a tie": (of_one_lane(4, 9.0, 8.0, 8.0, 7.0), LOGITS),
    "four of one lane, a tie with the one behind": (of_one_lane(4, *EIGHT[:4], 7.0), WHOLE),
    "five of one lane": (of_one_lane(5, *EIGHT[:3]), WHOLE),
    "five of one lane, which seem to be four": (of_one_lane(5, *EIGHT[:4]), WHOLE),
    "eight of one lane": (of_one_lane(8), WHOLE),
}


@pytest.fixture
def looks(monkeypatch):
    """What has been asked beside short keys."""
    asked = set()

    def watch(owner, name, which):
        method = getattr(owner, name)

        def watched(self, *arguments):
            asked.add(which)
            return method(self, *arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(fixed_point.FixedPointRouter, "_second_look", LOGITS)
    watch(fixed_point.FixedPointRouter, "_inexact_bits", IDS)
    watch(Router, "_take_whole", WHOLE)
    return asked


@pytest.mark.parametrize("name", TOKENS)
def test_whole_keys_decide_only_where_those_in_fixed_point_cannot(looks, name):
    """Nor the logits of the K + 1 greatest, which are looked at first."""
    logits, decides = TOKENS[name]
    program, _ = one_launch(RouteProblem(1, 256, 8, renormalize=True), 16)
    given = {"logits": logits.astype(F32)[None]}
    got = run(program, given)
    np.testing.assert_array_equal(got["topk_ids"], chosen_by_numpy(given["logits"], 8)[0])
    assert looks == {LOGITS, IDS, WHOLE} & set(range(decides + 1))


def neighbours(num_experts, top_k):
    """Tokens whose logits of two or three neighbouring ranks are equal or an ulp apart: at every rank, and
    with either id first; of every two ranks; and of the last two that count, where others are beyond the
    range, infinite or NaN, or all of them beyond it."""
    rng = np.random.default_rng(num_experts + top_k)
    tokens = []

    def token(*groups, step, up=True, change=lambda x: x):
        """`groups`: the first and the number of ranks that are equal or, with `step`, an ulp apart."""
        x = rng.standard_normal(num_experts).astype(F32)
        order = np.argsort(-x)
        for first, number in groups:
            ranks = order[first : first + number]
            value = x[ranks[0]]
            for expert in sorted(ranks, reverse=not up):
                x[expert] = value
                value = np.nextafter(value, F32(np.inf)) if step else value
        tokens.append(change(x).astype(F32))

    def far(x):
        return np.where(np.argsort(np.argsort(-x)) < 2, x + 200, x)

    def infinite(x):
        return np.where(np.argsort(np.argsort(-x)) < 2, np.inf, x)

    def with_nan(x):
        return np.where(np.argsort(np.argsort(-x)) == top_k + 1, np.nan, x)

    for first in range(top_k):
        token((first, 2), step=False)
        token((first, 2), step=True)
        token((first, 2), step=True, up=False)
        if first + 3 <= num_experts:
            token((first, 3), step=True)
            token((first, 3), step=first % 2, up=False)
    every = [(first, 2) for first in range(0, top_k, 2)]
    for up in (False, True):
        token(*every, step=True, up=up)
        for change in (far, infinite, with_nan, lambda x: x * 1000, lambda x: x - 1000):
            token((top_k - 1, 2), step=True, up=up, change=change)
    return np.stack(tokens)


@pytest.mark.parametrize("top_k", [1, 4, 8, 31])
@pytest.mark.parametrize("num_experts", [32, 128, 225, 256, 512])
def test_neighbours_that_agree_are_told_apart_at_every_rank(num_experts, top_k):
    logits = neighbours(num_experts, top_k)
    for start in range(0, len(logits), 64):
        some = logits[start : start + 64]
        problem = RouteProblem(len(some), num_experts, top_k, renormalize=True)
        program, _ = one_launch(problem, 16)
        got, alone = (run(one, {"logits": some}) for one in (program, kernel.build(problem)))
        ids = chosen_by_numpy(some, top_k)
        np.testing.assert_array_equal(got["topk_ids"].reshape(len(some), top_k), ids)
        np.testing.assert_array_equal(got["topk_weights"], alone["topk_weights"])
        want = oracle.expected(ids, block_size=16, num_experts=num_experts, return_inverse=True)
        for name, x in want._asdict().items():
            np.testing.assert_array_equal(got[name], np.ravel(x), name)


def _mutant(name, new):
    return Mutant(fixed_point.__name__, name, new, kills="wrong")


# The second look with one line changed.
MUTANTS = (
    _mutant("equal logits change places", "behind_greater = t.shfl(value, after) >= value"),
    _mutant("of more keys than were looked at none is the greatest", "unclear = count < 0"),
    _mutant("of three that agree the third is the least", "pass"),
    _mutant("no key is missing from a list that was cut", "pass"),
    _mutant("of two that change places the second stays", "source = lane + ((swaps >> lane) & 1)"),
)


def choose_all():
    """Raises what the emulator reports, or AssertionError where NumPy chooses other experts."""
    tokens = np.stack([x.astype(F32) for x, _ in TOKENS.values()])
    for logits, top_k in (
        (tokens, 8),
        (neighbours(256, 8)[:64], 8),
        (neighbours(128, 31)[-64:], 31),
    ):
        problem = RouteProblem(len(logits), logits.shape[1], top_k, renormalize=True)
        program, _ = one_launch(problem, 16)
        got = run(program, {"logits": logits})["topk_ids"].reshape(len(logits), top_k)
        np.testing.assert_array_equal(got, chosen_by_numpy(logits, top_k))


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_second_look_that_is_wrong_chooses_other_experts(monkeypatch, mutant):
    changed = types.ModuleType(fixed_point.__name__)
    source = mutant.apply(pathlib.Path(fixed_point.__file__).read_text())
    exec(compile(source, mutant.name, "exec"), changed.__dict__)
    monkeypatch.setattr(split, "fixed_point", changed)
    with pytest.raises(mutant.errors):
        choose_all()


def test_the_second_look_as_it_is_chooses_right():
    choose_all()


def test_every_marker_in_the_second_look_has_its_mutant():
    assert {(m.module, m.name) for m in MUTANTS} == markers(fixed_point.__name__)


@pytest.mark.parametrize(("num_experts", "unit"), [(225, UNIT), (512, 2 * UNIT), (1024, 4 * UNIT)])
def test_more_bits_of_an_id_leave_a_coarser_unit(monkeypatch, num_experts, unit):
    """And 225 experts, of which some lanes hold fewer than their keys, take no whole keys for it."""
    calls = []
    monkeypatch.setattr(Router, "_take_whole", lambda router, _: calls.append(router))
    program, _ = one_launch(RouteProblem(1, num_experts, 8, renormalize=True), 16)
    logits = np.full((1, num_experts), -9, F32)
    logits[0, 10:90:10] = unit * np.array([9, 8, 8, 6, 5, 5, 4, 3])
    got = run(program, {"logits": logits})
    np.testing.assert_array_equal(got["topk_ids"], chosen_by_numpy(logits, 8)[0])
    assert not calls


@pytest.mark.parametrize("num_experts", [256, 1024])
def test_from_where_on_ties_of_bfloat16_logits_are_exact(looks, num_experts):
    """From 2**-8 on of 256 experts, and of two more bits of an id from four times as much on. Of three, which
    the logits of the K + 1 greatest do not tell."""
    program, _ = one_launch(RouteProblem(1, num_experts, 8, renormalize=True), 16)
    least = num_experts / 256 * 2.0**-8
    for first, needed in ((least, False), (least / 2, True)):
        logits, tie = np.full((1, num_experts), -9, F32), first * (1 + 2.0**-7)
        logits[0, 10:90:10] = [9, 8, 7, 6, 5, tie, tie, tie]
        looks.clear()
        got = run(program, {"logits": logits})
        np.testing.assert_array_equal(got["topk_ids"], chosen_by_numpy(logits, 8)[0])
        assert looks == {LOGITS, IDS} | ({WHOLE} if needed else set())


def test_weights_are_those_of_the_oracle():
    """In float64, to rounding; of its own unusual logits."""
    problem = RouteProblem(36, 256, 8, renormalize=True)
    program, _ = one_launch(problem, 16)
    logits = router_oracle.make_logits(36, 256, "float32", 1)
    got = run(program, {"logits": logits})
    weights = got["topk_weights"].view(F32).reshape(36, 8)
    routed = weights, got["topk_ids"].reshape(36, 8)
    router_oracle.assert_routed(routed, logits, top_k=8, renormalize=True)
