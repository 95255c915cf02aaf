"""torch_bridge.vllm's router ops: what vLLM 0.33's compiled ops gave on an H200, a plain oracle, and errors.

The golden file is that of tests/router/test_vllm_golden.py.
"""

import inspect
import itertools
import pathlib

import ml_dtypes
import numpy as np
import pytest
import torch

from moe_align_jax._router import selftest
from moe_align_jax._router.problem import RouteProblem
from tests.bridge.helpers import assert_format
from tests.router import router_oracle as oracle
from torch_bridge import _plan, _route, vllm
from torch_bridge._direct import problems, store

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "router" / "vllm_golden.npz"))
X, BIAS, PAD = (GOLDEN[f"in.{name}"] for name in ("x", "bias", "pad"))
TOKENS, TABLE, BIAS_VL = (GOLDEN[f"in.{name}"] for name in ("tok", "table", "bvl"))
# vLLM gives rows with an infinity or a NaN the ids 0, 1, ... and weights of 0, or NaN weights.
USUAL = np.isfinite(X).all(axis=1)
TOP_K = 4
OPS = {
    "softmax": vllm.topk_softmax,
    "sigmoid": vllm.topk_sigmoid,
    "softplus": vllm.topk_hash_softplus_sqrt,
}
SCORINGS = {"softmax": "softmax", "sigmoid": "sigmoid", "softplus": "sqrtsoftplus"}


def tensor(array):
    return None if array is None else torch.from_numpy(np.array(array))


def buffers(num_tokens=13, top_k=TOP_K, dtype=torch.int32):
    shape = (num_tokens, top_k)
    weights, order = torch.full(shape, -7.0), torch.full(shape, -7, dtype=torch.int32)
    ids = torch.full(shape, 7, dtype=dtype)
    return weights, ids, order


def numbers(ids):
    """int64, of any of the three dtypes; -1 is -1."""
    ids = ids.view(torch.int32) if ids.dtype == torch.uint32 else ids
    return ids.numpy().astype(np.int64)


def on(device, *tensors):
    """They, on a device."""
    return [x if x is None else x.to(device) for x in tensors]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def check_golden(key, got, usual, *, order=True, rtol=2e-6):
    weights, ids, turn = on("cpu", *got)
    theirs = np.where(GOLDEN[f"{key}.i"] == 2**32 - 1, -1, GOLDEN[f"{key}.i"])
    np.testing.assert_array_equal(numbers(ids)[usual], theirs[usual])
    want = GOLDEN[f"{key}.w"][usual]
    np.testing.assert_allclose(weights.numpy()[usual], want, rtol=rtol)
    if order:
        np.testing.assert_array_equal(turn.numpy(), GOLDEN[f"{key}.t"])


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32"])
@pytest.mark.parametrize("op", OPS)
def test_topk_ops_give_what_vllms_gave(op, dtype, device):
    every = list(itertools.product((False, True), repeat=3))
    # Each costs a compile on a GPU.
    for renormalize, biased, padded in every if device == "cpu" else every[1:6:2]:
        got = on(device, *buffers(dtype=getattr(torch, dtype)))
        options = {} if op == "softmax" else {"routed_scaling_factor": 2.5}
        OPS[op](
            *got,
            tensor(X).to(device),
            renormalize,
            e_score_correction_bias=tensor(BIAS).to(device) if biased else None,
            is_padding=tensor(PAD).to(device) if padded else None,
            **options,
        )
        key = f"{op}-{dtype}-{renormalize}-{biased}-{padded}"
        # The kept weights of padding are vLLM's, too.
        check_golden(key, got, USUAL, rtol=2e-6 if device == "cpu" else 1e-5)


@pytest.mark.parametrize("sizes", [(64, 8, 3, 6), (256, 8, 4, 8), (160, 8, 3, 6), (64, 1, 1, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_topk_gives_what_vllms_gave(sizes, dtype, device):
    num_experts, groups, stay, top_k = sizes
    x, bias = (tensor(GOLDEN[f"gin-{num_experts}-{groups}.{name}"]) for name in "xb")
    usual = x.isfinite().all(dim=1).numpy()
    every = [(0, False), (1, True), (0, True), (1, False)]
    for scoring, renormalize in every if device == "cpu" else every[:2]:
        given = [a.to(device, getattr(torch, dtype)) for a in (x, bias)]
        weights, ids = vllm.grouped_topk(
            given[0], groups, stay, top_k, renormalize, 2.5, given[1], scoring
        )
        assert weights.dtype == torch.float32 and ids.dtype == torch.int32
        key = f"grouped-{num_experts}-{groups}-{stay}-{top_k}-torch.{dtype}"
        got, key = (weights, ids, None), f"{key}-{renormalize}-{scoring}"
        check_golden(key, got, usual, order=False, rtol=1e-5)


@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
def test_the_table_gives_what_vllms_gave(ids_dtype, device):
    for tokens_dtype in ("int32", "int64"):
        got = on(device, *buffers(dtype=getattr(torch, ids_dtype)))
        tokens = tensor(TOKENS.astype(tokens_dtype))
        x, tokens, table = on(device, tensor(X), tokens, tensor(TABLE.astype(ids_dtype)))
        vllm.topk_hash_softplus_sqrt(*got, x, True, 2.5, None, tokens, table)
        for key in [key for key in GOLDEN if key.startswith("hash-torch") and key.endswith(".i")]:
            # Its log(1 + exp(x)) rounds 1 + exp(x); its token_expert_indices are as they were, too.
            check_golden(key[:-2], got, USUAL, rtol=3e-4)
    options = {"scoring": "sqrtsoftplus", "renormalize": True, "scaling_factor": 2.5}
    for token in np.flatnonzero(USUAL):
        want = oracle.weights_of(X[token].tolist(), TABLE[TOKENS[token]].tolist(), options)
        np.testing.assert_allclose(got[0][token].cpu(), want, rtol=2e-6)
    got, padding = on(device, *buffers()), tensor(PAD).to(device)
    vllm.topk_hash_softplus_sqrt(*got, x, True, 2.5, None, tokens, table, padding)
    check_golden("hash-pad", got, USUAL | PAD, rtol=3e-4)


@pytest.mark.parametrize("first", [0, 10, -5])
def test_image_tokens_take_the_other_bias(first, device):
    got = on(device, *buffers())
    x, bias, tokens, bias_vl = on(device, *map(tensor, (X, BIAS, TOKENS, BIAS_VL)))
    vllm.topk_hash_softplus_sqrt(
        *got, x, True, 1.5, bias, tokens, bias_vl=bias_vl, image_sentinel_lo=first
    )
    check_golden(f"vl-{first}-torch.int32", got, USUAL, rtol=1e-5)


def test_image_tokens_are_not_looked_up_and_strange_ones_drop():
    table = TABLE.copy()
    table[6, 1] = 64  # no such expert
    tokens = TOKENS.copy()
    tokens[1:3] = 10, 20  # the first of an image; beyond the table
    got = buffers()
    vllm.topk_hash_softplus_sqrt(
        *got,
        tensor(X),
        True,
        2.5,
        None,
        tensor(tokens),
        tensor(table),
        bias_vl=tensor(BIAS_VL),
        image_sentinel_lo=10,
    )
    ids, weights = got[1].tolist(), got[0].numpy()
    want = oracle.route(
        X, top_k=TOP_K, scoring="sqrtsoftplus", renormalize=True, correction_bias=BIAS_VL,
        scaling_factor=2.5,
    )  # fmt: skip
    for token, number in enumerate(tokens):
        if 10 <= number < 15:
            assert ids[token] == want.ids[token]
            np.testing.assert_allclose(weights[token], want.weights[token], rtol=1e-5)
        elif number < 20 and number != 6:
            assert ids[token] == table[number].tolist()
    assert ids[2] == [-1] * TOP_K and not weights[2].any()
    assert ids[0] == [48, -1, 38, 41] and weights[0, 1] == 0
    np.testing.assert_allclose(weights[0].sum(), 2.5, rtol=1e-6)
    assert (got[2] == -7).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", OPS)
def test_topk_ops_equal_the_oracle(op, dtype):
    """Other sizes, every kind of unusual logits, and each option."""
    np_dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    x = oracle.make_logits(33, 37, np_dtype, seed=5)
    bias = np.random.default_rng(2).normal(size=37).astype(np.float32)
    padding = (np.arange(33) % 5 == 3).astype(np.uint8)
    for k, (renormalize, biased) in enumerate([(True, False), (False, True)]):
        logits = torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype))
        got = buffers(33, 5, torch.int64)
        scale = {} if op == "softmax" else {"routed_scaling_factor": 2.5 - k}
        given = tensor(bias) if biased else None
        mask = tensor(padding) if op == "softplus" else None
        OPS[op](*got, logits, renormalize, e_score_correction_bias=given, is_padding=mask, **scale)
        oracle.assert_routed(
            (got[0].numpy(), got[1].numpy().astype(np.int32)),
            x,
            top_k=5,
            scoring=SCORINGS[op],
            renormalize=renormalize,
            correction_bias=bias if biased else None,
            scaling_factor=scale.get("routed_scaling_factor", 1.0),
            token_mask=None if mask is None else padding == 0,
        )
        order = np.arange(5) * 33 + np.arange(33)[:, None]
        np.testing.assert_array_equal(got[2].numpy(), order)


def test_layouts_and_no_tokens():
    want, got = buffers(), buffers()
    vllm.topk_softmax(*want, tensor(X))
    strided = tensor(X.T.copy()).t()
    bias = tensor(-BIAS)
    vllm.topk_softmax(*got, strided)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    vllm.topk_softmax(*want, tensor(X), False, tensor(BIAS))
    vllm.topk_softmax(*got, tensor(X).requires_grad_(), False, torch._neg_view(bias))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    vllm.topk_softmax(*buffers(0), torch.empty(0, 64))
    none = vllm.grouped_topk(torch.empty(0, 64), 8, 3, 6, True, 2.5, tensor(BIAS), 1)
    assert [tuple(x.shape) for x in none] == [(0, 6), (0, 6)]


# -- the direct path, on a fake machine ------------------------------------------------------------


def on_boundary(array, past=0):
    """The same values in memory that starts on 256 bytes, as torch's allocator gives it on a GPU; or so many
    bytes past them."""
    given = tensor(array) if isinstance(array, np.ndarray) else array
    room = torch.zeros(given.nbytes + 256 + past, dtype=torch.uint8)
    start = -room.data_ptr() % 256 + past
    at = room[start : start + given.nbytes].view(given.dtype).view(given.shape)
    at.copy_(given)
    return at


@pytest.fixture
def launching(fake):
    fake.launches_directly = True
    return fake


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("op", OPS)
def test_direct_launch_gives_the_same(launching, op, dtype, aligned):
    place = on_boundary if aligned else tensor
    got = buffers(dtype=dtype)
    if aligned:
        got = tuple(on_boundary(x) for x in got)
    options = {} if op == "softmax" else {"routed_scaling_factor": 2.5}
    options |= {"e_score_correction_bias": place(BIAS)}
    OPS[op](*got, place(X), True, is_padding=place(PAD), **options)
    assert [name for name, _ in launching.launched] == ["route_topk"]
    name = str(dtype).removeprefix("torch.")
    check_golden(f"{op}-{name}-True-True-True", got, USUAL, rtol=1e-5)
    # Other numbers of tokens take the same program.
    few = tuple(on_boundary(x) for x in buffers(3, dtype=dtype))
    OPS[op](*few, place(X[6:9]), True, is_padding=place(PAD[6:9]), **options)
    assert len(launching.launched) == 2 and len(launching.compiles) == 1
    np.testing.assert_array_equal(numbers(few[1]), numbers(got[1])[6:9])
    np.testing.assert_array_equal(few[0].numpy(), got[0].numpy()[6:9])
    np.testing.assert_array_equal(few[2].numpy(), np.arange(TOP_K) * 3 + np.arange(3)[:, None])


def test_direct_launch_of_groups(launching):
    x, bias = (on_boundary(GOLDEN[f"gin-64-8.{name}"]) for name in "xb")
    usual = x.isfinite().all(dim=1).numpy()
    for scoring in (0, 1):
        weights, ids = vllm.grouped_topk(x, 8, 3, 6, True, 2.5, bias, scoring)
        key = f"grouped-64-8-3-6-torch.float32-True-{scoring}"
        check_golden(key, (weights, ids, None), usual, order=False, rtol=1e-5)
    assert [name for name, _ in launching.launched] == ["route_topk"] * 2


def test_a_call_like_an_earlier_one_is_launched_at_once(launching, monkeypatch):
    """What differs from it is checked as ever, and never launched as if it were the same."""
    got, x, bias = [on_boundary(y) for y in buffers()], on_boundary(X), on_boundary(BIAS)
    vllm.topk_sigmoid(*got, x, True, bias)
    slow = []
    monkeypatch.setattr(_route, "_run", lambda *a, run=_route._run: slow.append(a) or run(*a))
    want = [y.clone() for y in got]
    for y in got:
        y.fill_(3)
    other = on_boundary(np.ascontiguousarray(X[::-1]))
    vllm.topk_sigmoid(*got, x, True, bias)
    assert not slow and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    vllm.topk_sigmoid(*got, other, True, bias)
    assert not slow and len(launching.launched) == 3
    np.testing.assert_array_equal(got[1].numpy(), want[1].numpy()[::-1])
    # Another option, no bias, fewer tokens, another store, memory off the boundary: the ordinary way.
    vllm.topk_sigmoid(*got, x, False, bias)
    vllm.topk_sigmoid(*got, x, True)
    few = [on_boundary(y) for y in buffers(5)]
    vllm.topk_sigmoid(*few, x[:5], True, bias)
    vllm.topk_sigmoid(*(on_boundary(y, past=64) for y in buffers()), x, True, bias)
    assert len(slow) == 4
    for changed in ({"renormalize": 1}, {"routed_scaling_factor": True}, {"is_padding": [0] * 13}):
        named = {"renormalize": True, "e_score_correction_bias": bias, **changed}
        with pytest.raises(TypeError, match="must be"):
            vllm.topk_sigmoid(*got, x, **named)
    with pytest.raises(TypeError, match=r"is_padding must be a bool or uint8 tensor; got int 1\."):
        vllm.topk_sigmoid(*got, x, True, bias, is_padding=1)
    with pytest.raises(ValueError, match="must not overlap"):
        vllm.topk_sigmoid(got[0], got[1], got[1], x, True, bias)
    with pytest.raises(ValueError, match="must be contiguous"):
        vllm.topk_sigmoid(got[0], got[1].t().contiguous().t(), got[2], x, True, bias)
    monkeypatch.setattr(store, "here", store.Store(launching))
    slow.clear()
    vllm.topk_sigmoid(*got, x, True, bias)
    assert len(slow) == 1 and len(launching.compiles) >= 2


def test_a_capture_needs_the_program_loaded(launching):
    launching.capturing = True
    got = buffers()
    with pytest.raises(RuntimeError, match=r"Call torch_bridge\.vllm\.warmup_router") as caught:
        vllm.topk_softmax(*got, tensor(X))
    assert_format(caught.value)
    assert (got[0] == -7).all()


WARMED = {
    "topk_softmax": {"is_padding": True, "correction_bias": True, "ids_dtype": torch.int64},
    "topk_sigmoid": {"routed_scaling_factor": 2.5, "dtype": torch.bfloat16},
    "topk_hash_softplus_sqrt": {"is_padding": True, "renormalize": True},
    "grouped_topk": {"num_expert_group": 8, "topk_group": 3, "renormalize": True},
}


@pytest.mark.parametrize("op", WARMED)
def test_warmup_loads_what_a_capture_needs(launching, op):
    options = WARMED[op]
    sizes = {"num_experts": 64, "topk": 4, "max_tokens": 200, "device": "cpu"}
    assert vllm.warmup_router(op, **sizes, **options) == 3
    # Loaded for device 0; a CPU tensor's is -1.
    programs = store.here.programs
    programs.update({(-1, problem): program for (_, problem), program in programs.items()})
    launching.capturing = True
    bias, renormalize = tensor(BIAS), options.get("renormalize", False)
    scale = {"routed_scaling_factor": options.get("routed_scaling_factor", 1.0)}
    for num_tokens in (1, 64, 65, 200):
        x = torch.randn(num_tokens, 64).to(options.get("dtype", torch.float32))
        if op == "grouped_topk":
            vllm.grouped_topk(x, 8, 3, 4, renormalize, 1.0, bias)
            continue
        got = buffers(num_tokens, 4, options.get("ids_dtype", torch.int32))
        given = dict(scale) if op != "topk_softmax" else {}
        if "correction_bias" in options:
            given["e_score_correction_bias"] = bias
        if "is_padding" in options:
            given["is_padding"] = torch.zeros(num_tokens, dtype=torch.bool)
        getattr(vllm, op)(*got, x, renormalize, **given)
        np.testing.assert_array_equal(np.sort(numbers(got[1])[0]), np.unique(numbers(got[1])[0]))
    assert len(launching.launched) == 4 and len(launching.compiles) == 1


def test_warmup_refuses():
    sizes = {"num_experts": 64, "topk": 4, "max_tokens": 200}
    for kind, argument, changed in (
        (ValueError, "op", {"op": "topk"}),
        (ValueError, "topk", {"topk": 0}),
        (TypeError, "renormalize", {"renormalize": 1}),
        (TypeError, "ids_dtype", {"ids_dtype": torch.int16}),
        (TypeError, "dtype", {"dtype": torch.float64}),
        (NotImplementedError, "device", {"device": "cpu"}),
    ):
        with pytest.raises(kind, match=f"^warmup_router: {argument} must") as caught:
            vllm.warmup_router(**{"op": "topk_softmax", **sizes, **changed})
        assert_format(caught.value)


def test_what_the_kernel_does_not_take_goes_by_jax(launching):
    x = np.random.default_rng(0).normal(size=(3, 1200)).astype(np.float32)
    got = buffers(3, 2)
    with pytest.warns(UserWarning, match="takes up to 1024 experts; got 1200"):
        vllm.topk_softmax(*got, tensor(x))
    assert not launching.launched
    np.testing.assert_array_equal(got[1].numpy(), np.argsort(-x, axis=1)[:, :2])


def test_buckets():
    plain = RouteProblem(1, 256, 8)
    ends = [
        problems.route_bucket(plain._replace(num_tokens=n)).num_tokens for n in (1, 64, 65, 513)
    ]
    assert ends == [64, 64, 128, 1024]
    large = problems.route_bucket(plain._replace(num_tokens=5_000_000))
    assert large.num_tokens == (2**31 - 1) // 256 and large.sized_at_launch


# -- the self-test ---------------------------------------------------------------------------------

SELFTESTED = [
    RouteProblem(64, 64, 6, with_order=True, renormalize=True),
    RouteProblem(64, 40, 3, "bfloat16", "sigmoid", bias_rows=1, has_padding=True, id_words=2),
    RouteProblem(
        64, 64, 4, "float16", "sqrtsoftplus", renormalize=True, num_groups=8, topk_groups=3,
        bias_rows=1, has_padding=True, keeps_weights=True, scaling_factor=2.5,
    ),
    RouteProblem(64, 37, 2, "bfloat16", "none", bias_rows=1, renormalize=False),
]  # fmt: skip


@pytest.mark.parametrize("problem", SELFTESTED)
def test_selftest_takes_the_kernels_results_and_no_others(fake, problem):
    from torch_bridge._direct import compile_worker, driver

    problem = problem._replace(sized_at_launch=True)
    launches, cubins, shapes = fake.compiled(problem)
    compile_worker.compare_with_numpy(driver, fake.driver, problem, launches, cubins, shapes)
    tokens = selftest.num_tokens(problem)
    given, got = selftest.arrays(problem, tokens), selftest.empty(problem, tokens)
    for array in got.values():
        array[...] = 0
    assert selftest.mismatch(problem, given, got)


FAULTS = {
    "a group that is out": lambda ids, weights, order: ids.__setitem__(
        (3, 0), (ids[3, 0] + 32) % 64
    ),
    "two change places": lambda ids, weights, order: ids.__setitem__((5, slice(2)), ids[5, 1::-1]),
    "one comes twice": lambda ids, weights, order: ids.__setitem__((5, 1), ids[5, 0]),
    "padding has an id": lambda ids, weights, order: ids.__setitem__(ids == -1, 0),
    "a weight": lambda ids, weights, order: weights.__setitem__((7, 2), weights[7, 2] * 1.01),
    "the order": lambda ids, weights, order: order.__setitem__((0, 1), 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_selftest_finds_each_fault(fault):
    """In the oracle's results, which it takes."""
    problem = SELFTESTED[2]._replace(dtype="float32", with_order=True)
    given = selftest.arrays(problem, 40)
    logits, padding = given["logits"], given["is_padding"][:40] != 0
    want = oracle.route(
        logits,
        top_k=4,
        scoring="sqrtsoftplus",
        renormalize=True,
        num_groups=8,
        topk_groups=3,
        correction_bias=given["correction_bias"],
        scaling_factor=2.5,
    )
    ids = np.where(padding[:, None], -1, np.array(want.ids))
    weights = np.array(want.weights)
    order = np.arange(4) * 40 + np.arange(40)[:, None]
    names = ("topk_ids", "topk_weights", "token_expert_indices")
    got = dict(zip(names, (ids, weights, order), strict=True))
    assert selftest.mismatch(problem, given, got) == ""
    assert not padding[[3, 5]].any() and padding.any()
    FAULTS[fault](ids, weights, order)
    assert selftest.mismatch(problem, given, got)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "argument", "changed"),
    [
        (TypeError, "gating_output", {"gating_output": torch.zeros(13, 64, dtype=torch.int32)}),
        (ValueError, "gating_output", {"gating_output": torch.zeros(64)}),
        (TypeError, "topk_weights", {"topk_weights": torch.zeros(13, 4, dtype=torch.bfloat16)}),
        (ValueError, "topk_weights", {"topk_weights": torch.zeros(12, 4)}),
        (TypeError, "topk_ids", {"topk_ids": torch.zeros(13, 4, dtype=torch.int16)}),
        (ValueError, "topk_ids", {"topk_ids": torch.zeros(13, 5, dtype=torch.int32)}),
        (ValueError, "topk_ids", {"topk_ids": torch.zeros(4, 13, dtype=torch.int32).t()}),
        (TypeError, "token_expert_indices", {"token_expert_indices": torch.zeros(13, 4)}),
        (TypeError, "renormalize", {"renormalize": 1}),
        (TypeError, "e_score_correction_bias", {"e_score_correction_bias": [0.0] * 64}),
        (ValueError, "e_score_correction_bias", {"e_score_correction_bias": torch.zeros(63)}),
        (TypeError, "is_padding", {"is_padding": torch.zeros(13)}),
        (ValueError, "is_padding", {"is_padding": torch.zeros(12, dtype=torch.bool)}),
        (TypeError, "routed_scaling_factor", {"routed_scaling_factor": "2"}),
        (ValueError, "routed_scaling_factor", {"routed_scaling_factor": float("inf")}),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(kind, argument, changed):
    weights, ids, order = buffers()
    named = {"topk_weights": weights, "topk_ids": ids, "token_expert_indices": order}
    with pytest.raises(kind, match=f"^topk_sigmoid: {argument} must") as caught:
        vllm.topk_sigmoid(**{**named, "gating_output": tensor(X), **changed})
    assert_format(caught.value)
    assert (weights == -7).all() and (ids == 7).all() and (order == -7).all()


def test_overlap_and_missing_tokens_are_refused():
    weights, ids, order = buffers()
    with pytest.raises(
        ValueError, match="^topk_\\w+: token_expert_indices must not overlap topk_ids"
    ):
        vllm.topk_softmax(weights, ids, ids, tensor(X))
    x = torch.zeros(13, 4)
    with pytest.raises(ValueError, match="^topk_\\w+: topk_weights must not overlap gating_output"):
        vllm.topk_softmax(x, ids, order, x)
    for given in ({"hash_indices_table": tensor(TABLE)}, {"bias_vl": tensor(BIAS_VL)}):
        with pytest.raises(ValueError, match=f"input_tokens must come with {next(iter(given))}"):
            vllm.topk_hash_softplus_sqrt(
                weights, ids, order, tensor(X), image_sentinel_lo=1, **given
            )
    with pytest.raises(ValueError, match=r"hash_indices_table must have shape \[vocabulary, 4\]"):
        table = tensor(TABLE[:, :3])
        vllm.topk_hash_softplus_sqrt(
            weights, ids, order, tensor(X), input_tokens=tensor(TOKENS), hash_indices_table=table
        )
    assert (weights == -7).all()


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        ("num_expert_group", {"num_expert_group": 7}),
        ("topk_group", {"topk_group": 9}),
        ("topk", {"topk": 25}),
        ("scoring_func", {"scoring_func": 2}),
        ("bias", {"bias": torch.zeros(8)}),
    ],
)
def test_grouped_topk_refuses(argument, changed):
    named = {"num_expert_group": 8, "topk_group": 3, "topk": 6, "bias": tensor(BIAS)}
    named |= {"renormalize": True, "routed_scaling_factor": 1.0, **changed}
    with pytest.raises(ValueError, match=f"^grouped_topk: {argument} must") as caught:
        vllm.grouped_topk(tensor(X), **named)
    assert_format(caught.value)


def test_signatures_are_vllms():
    """As vllm 0.33's `_custom_ops.py` has them; test_vllm_patch.py reads the file where it is there."""
    assert str(inspect.signature(vllm.topk_sigmoid)).count("routed_scaling_factor: float = 1.0")
    names = list(inspect.signature(vllm.topk_softmax).parameters)
    assert names[3:] == ["gating_output", "renormalize", "e_score_correction_bias", "is_padding"]


def test_under_torch_compile(fresh_dynamo):
    """With sizes that change: vLLM compiles its grouped router so."""

    def layer(x, weights, ids, order, tokens, table):
        vllm.topk_softmax(weights, ids, order, x * 1.0, True)
        grouped = vllm.grouped_topk(x.sigmoid(), 8, 3, 6, True, 2.5, bias, 0)
        by_table = [torch.empty_like(y) for y in (weights, ids, order)]
        vllm.topk_hash_softplus_sqrt(*by_table, x, True, 1.5, None, tokens, table)
        return weights * 2, *grouped, *by_table[:2]

    bias = tensor(BIAS)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (13, 7):
        x, tokens = tensor(X[:size]), tensor(TOKENS[:size])
        want, got = buffers(size), buffers(size)
        results = layer(x, *want, tokens, tensor(TABLE))
        compiled_results = compiled(x, *got, tokens, tensor(TABLE))
        for mine, theirs in zip((*got, *compiled_results), (*want, *results), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0, equal_nan=True)


def test_the_emulator_through_the_bridge():
    with _plan.force_implementation("emulator"):
        got = buffers(dtype=torch.int64)
        vllm.topk_softmax(*got, tensor(X), False, tensor(BIAS), tensor(PAD))
    check_golden("softmax-int64-False-True-True", got, USUAL, rtol=1e-5)
