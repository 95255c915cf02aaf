"""The fast path of calls seen before, on a fake driver: which calls take it, and which do not."""

from typing import Any

import pytest
import torch

from tests.bridge.fake_cuda import assert_results, remember, want_of
from tests.bridge.helpers import ids_of
from torch_bridge import _ops, _specs
from torch_bridge._direct import fast_path


def outputs_of(problem):
    return tuple(torch.full(shape, -7, dtype=torch.int32) for shape in problem.outputs.values())


def attempt(
    ids,
    num_experts,
    block_size,
    pad=False,
    expert_map=None,
    ignore=False,
    topk=None,
    out=None,
    in_place=False,
):
    form = fast_path.IN_PLACE if in_place else 0
    key = (num_experts, block_size, pad, ignore, topk, form)
    return fast_path.attempt(key, ids, expert_map, None, out)


@pytest.fixture
def seen_before(fake):
    """A kept call of 37 x 3 int32 ids, 16 experts, blocks of 8."""
    array, ids = ids_of(torch.int32)
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    remember(fake, problem, {"topk_ids": ids})
    assert len(fast_path._known) == 1
    return ids, want_of(problem, array, {})


@pytest.mark.parametrize("calls", [0, 1, 2], ids=["kept", "recent", "guarded"])
def test_operator_takes_it_too(calls, seen_before, fake, monkeypatch):
    """With a look-up of its own; from the third call on, torch's guards answer. What is unlike the kept call
    goes the ordinary way, whoever answers."""
    ids, want = seen_before
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    operator = torch.ops.moe_align_jax.block_align
    ordinary = []

    def look(*given):
        ordinary.append(given[1])
        return outputs_of(problem)

    monkeypatch.setattr(_ops, "_block_align_cold", look)
    for _ in range(calls):
        operator(ids, 16, 8)
    [kept] = fast_path._known.values()
    assert (kept.matches is not fast_path._matches_nothing) == (calls == 2)
    if calls == 2:
        monkeypatch.setattr(fast_path, "matcher", lambda x: pytest.fail("asked again"))
    elsewhere = torch.nn.functional.pad(ids.flatten(), (1, 0))[1:].view(37, 3)
    others = [ids.flatten(), ids[1:], ids.long(), ids.t().contiguous().t(), torch._neg_view(ids)]
    others += [torch.nn.Parameter(ids, requires_grad=False), ids.to(torch.uint32)]
    for arguments in [*((x, 16, 8) for x in others), (ids, 17, 8), (ids, 16, 4)]:
        fake.launched.clear()
        operator(*arguments)
        assert len(ordinary) == 1 and not fake.launched
        assert ordinary.pop() is arguments[0]
    for given in (ids.clone(), elsewhere):
        assert_results(problem, operator(given, 16, 8), want)
    assert not ordinary
    fake.device = 1
    fake.launched.clear()
    operator(ids, 16, 8)
    assert len(ordinary) == 1 and not fake.launched


def test_operator_in_other_modes_and_shapes(seen_before, fake):
    """A tensor of inference mode is none outside; the recent call is often another than this one."""
    ids, want = seen_before
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    operator = torch.ops.moe_align_jax.block_align
    remember(fake, problem, {"topk_ids": ids.flatten()})
    kept = fast_path._known[ids.shape, ids.dtype, -1, (16, 8, False, False, None, 0)]
    for _ in range(2):
        with torch.inference_mode():
            given = ids.clone()
            for _ in range(3):
                assert_results(problem, operator(given, 16, 8), want)
            assert kept.matches(given) and not kept.matches(ids)
        for x in (ids, ids, ids, given, ids, ids.flatten(), ids, ids.flatten(), given):
            assert_results(problem, operator(x, 16, 8), want)


def test_operator_without_torchs_guards(seen_before, monkeypatch):
    ids, want = seen_before
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    [kept] = fast_path._known.values()
    for missing in (None, lambda *given, **named: 1 / 0):
        monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", missing)
        for _ in range(3):
            results = torch.ops.moe_align_jax.block_align(ids, 16, 8)
            assert_results(problem, results, want)
        assert kept.matches is fast_path._matches_nothing


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("kind", ["nested", "coo", "csr"])
def test_only_dense_tensors_reach_the_operator(kind, seen_before):
    """What `KnownCall.matches` rests on: it may not be asked about a nested tensor."""
    ids, _ = seen_before
    for _ in range(3):
        torch.ops.moe_align_jax.block_align(ids, 16, 8)
    [kept] = fast_path._known.values()
    assert kept.matches is not fast_path._matches_nothing
    make = {
        "nested": lambda: torch.nested.nested_tensor([ids, ids]),
        "coo": ids.to_sparse,
        "csr": ids.to_sparse_csr,
    }
    with pytest.raises(NotImplementedError, match="moe_align_jax::block_align"):
        torch.ops.moe_align_jax.block_align(make[kind](), 16, 8)


def test_shapes_in_turn(seen_before, fake):
    ids, _ = seen_before
    flat = ids.flatten()
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    remember(fake, problem, {"topk_ids": flat})
    half = _specs.AlignSpec(50, 16, 8)
    remember(fake, half, {"topk_ids": flat[:50]})
    for given, one in ((ids, problem), (flat, problem), (flat[:50], half)) * 4:
        want = want_of(one, given.numpy(), {})
        assert_results(one, attempt(given, 16, 8, False), want)
        out = outputs_of(one)
        assert attempt(given, 16, 8, False, out=out) is out
        assert_results(one, out, want)


@pytest.mark.parametrize("filtered", [False, True])
def test_map_and_out(fake, filtered):
    """Each combination again and again, and maps that are unlike it."""
    array, ids = ids_of(torch.int32)
    local = torch.arange(16, dtype=torch.int32) - 3
    operands = {"topk_ids": ids, "expert_map": local}
    problem = _specs.AlignSpec(ids.numel(), 16, 8, ignore_invalid_experts=filtered)
    remember(fake, problem, operands)
    want = want_of(problem, array, {"expert_map": local})
    call = (ids, 16, 8, False)
    for _ in range(4):
        assert_results(problem, attempt(*call, local, filtered), want)
        out = outputs_of(problem)
        assert attempt(*call, local, filtered, out=out) is out
        assert_results(problem, out, want)
        fake.launched.clear()
        shared = torch.zeros(32, dtype=torch.int32)
        others = [local.long(), local[1:], local[None], torch._neg_view(local), local.tolist()]
        others += [shared[::2], local.to_sparse(), torch.nn.Parameter(local, requires_grad=False)]
        for other in others:
            assert attempt(*call, other, filtered) is None
            assert attempt(*call, other, filtered, out=out) is None
        assert attempt(*call, local, not filtered) is None
        over_map = (*out[:2], local[:1])
        assert attempt(*call, local, filtered, out=over_map) is None
        assert not fake.launched


def test_fast_path_gives_the_results(seen_before):
    ids, want = seen_before
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    for given in (ids, ids.clone(), torch.nn.functional.pad(ids.flatten(), (1, 0))[1:].view(37, 3)):
        results = attempt(given, 16, 8, False)
        assert type(results) is tuple
        assert_results(problem, results, want)


def test_fast_path_into_out(seen_before):
    ids, want = seen_before
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    out = tuple(torch.empty(shape, dtype=torch.int32) for shape in problem.outputs.values())
    assert attempt(ids, 16, 8, False, out=out) is out
    assert_results(problem, out, want)


def _others(ids):
    """Calls unlike the one that was kept: each goes the ordinary way."""
    sizes = (_specs.AlignSpec(ids.numel(), 16, 8)).outputs.values()
    fresh = [torch.full(shape, -7, dtype=torch.int32) for shape in sizes]
    wide = torch.full((fresh[0].numel() + 1,), -7, dtype=torch.int32)
    span = torch.full((fresh[0].numel() + ids.numel(),), 3, dtype=torch.int32)
    overlapping = span[: fresh[0].numel()], fresh[1], fresh[2]
    inside = span[fresh[0].numel() - 4 :][: ids.numel()].view(37, 3)
    yield "another shape", (ids.flatten(), 16, 8, False), {}
    yield "another size", (ids[1:], 16, 8, False), {}
    yield "another dtype", (ids.long(), 16, 8, False), {}
    yield "a subclass", (torch.nn.Parameter(ids, requires_grad=False), 16, 8, False), {}
    yield "no tensor", (ids.numpy(), 16, 8, False), {}
    yield "nested", (torch.nested.nested_tensor([ids, ids]), 16, 8, False), {}
    yield "sparse", (ids.to_sparse(), 16, 8, False), {}
    yield "strided", (ids.t().contiguous().t(), 16, 8, False), {}
    yield "negated", (torch._neg_view(ids), 16, 8, False), {}
    yield "more experts", (ids, 17, 8, False), {}
    yield "other blocks", (ids, 16, 4, False), {}
    yield "float experts", (ids, 16.0, 8, False), {}
    yield "bool blocks", (ids, 16, True, False), {}
    yield "padded", (ids, 16, 8, True), {}
    yield "int for a flag", (ids, 16, 8, 0), {}
    yield "topk", (ids, 16, 8, False), {"topk": 3}
    yield "map", (ids, 16, 8, False), {"expert_map": torch.arange(16, dtype=torch.int32)}
    yield "two outs", (ids, 16, 8, False), {"out": fresh[:2]}
    yield "int64 out", (ids, 16, 8, False), {"out": (fresh[0].long(), *fresh[1:])}
    yield "short out", (ids, 16, 8, False), {"out": (fresh[0][1:], *fresh[1:])}
    yield "2-D out", (ids, 16, 8, False), {"out": (*fresh[:2], fresh[2][None])}
    yield "out off 16 bytes", (ids, 16, 8, False), {"out": (wide[1:], *fresh[1:])}
    negated = torch._neg_view(-fresh[0])
    yield "negated out", (ids, 16, 8, False), {"out": (negated, *fresh[1:])}
    yield "sparse out", (ids, 16, 8, False), {"out": (fresh[0].to_sparse(), *fresh[1:])}
    yield "same out twice", (ids, 16, 8, False), {"out": (fresh[0], fresh[1], fresh[0][:1])}
    yield "out over ids", (inside, 16, 8, False), {"out": overlapping}


CASES = [
    *("another shape", "another size", "another dtype", "a subclass", "no tensor", "nested"),
    *("sparse", "strided", "negated", "more experts", "other blocks", "float experts"),
    *("bool blocks", "padded", "int for a flag", "topk", "map", "two outs", "int64 out"),
    *(
        "short out",
        "2-D out",
        "out off 16 bytes",
        "negated out",
        "sparse out",
        "same out twice",
        "out over ids",
    ),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_fast_path_leaves_other_calls_alone(case, seen_before, fake):
    ids, _ = seen_before
    others = {name: (arguments, options) for name, arguments, options in _others(ids)}
    assert list(others) == CASES
    arguments, options = others[case]
    fake.launched.clear()
    assert attempt(*arguments, **options) is None
    assert not fake.launched
    out: Any = options.get("out", ())
    for tensor in out:
        tensor = tensor.to_dense()
        assert tensor.tolist() in ([-7] * tensor.numel(), [[-7]], [3] * tensor.numel())


@pytest.mark.parametrize("transform", ["vmap", "functionalize", "grad"])
def test_fast_path_is_closed_inside_transforms(transform):
    """There a tensor is of the plain type, and its pointer is 0 or an error."""
    seen = []

    def look(x):
        seen.append((type(x), fast_path.open_to_all()))
        return x.sum()

    assert fast_path.open_to_all()
    getattr(torch.func, transform)(look)(torch.ones(3))
    assert seen == [(torch.Tensor, False)]
    assert fast_path.open_to_all()


def test_fast_path_is_closed_to_modes_that_watch_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    with TorchDispatchMode():
        assert not fast_path.open_to_all()


def test_fast_path_only_on_the_current_device(seen_before, fake):
    ids, _ = seen_before
    fake.device = 1
    assert attempt(ids, 16, 8, False) is None


def test_fast_path_is_kept_for_calls_with_a_loaded_program(fake):
    """And with ids, map and bound that the kernels read where they lie."""
    _, ids = ids_of(torch.int32)
    n = ids.numel()
    plain, sglang = _specs.AlignSpec(n, 16, 8), _specs.SglangSpec(n, 16, 8)
    others = [
        (_specs.AlignSpec(0, 16, 8), {"topk_ids": ids[:0]}),
        (plain, {"topk_ids": ids.to(torch.uint8)}),
        (plain, {"topk_ids": ids, "num_valid_pairs": torch.tensor(3)}),
        (plain, {"topk_ids": ids, "expert_map": torch.arange(16)}),
        (plain, {"topk_ids": torch.nn.Parameter(ids, requires_grad=False)}),
        (sglang, {"topk_ids": ids.to(torch.uint32)}),
        (_specs.BatchedSpec(3, 16, 8), {"expert_num_tokens": ids[0].long()}),
    ]
    for index, (problem, operands) in enumerate(others):
        remember(fake, problem, operands)
        assert not fast_path._known, index
    _ops.run(plain, {"topk_ids": ids}, max_valid_pairs=3)
    assert not fast_path._known
    fake.compile = lambda index, wanted: ["no compiler here"] * len(wanted)
    with pytest.warns(UserWarning, match="no compiler here"):
        remember(fake, _specs.AlignSpec(n, 17, 8), {"topk_ids": ids})
    assert not fast_path._known
    del fake.compile
    kept = [
        (plain, {"topk_ids": ids}),
        (plain, {"topk_ids": ids.to(torch.uint32)}),
        (sglang, {"topk_ids": ids}),
        (_specs.BatchedSpec(3, 16, 8), {"expert_num_tokens": ids[0]}),
    ]
    for index, (problem, operands) in enumerate(kept, 1):
        remember(fake, problem, operands)
        assert len(fast_path._known) == index


def test_fast_path_is_bounded(fake, monkeypatch):
    monkeypatch.setattr(fast_path, "_MAX_KNOWN", 8)
    for n in range(17, 33):
        ids = torch.zeros(n, dtype=torch.int32)
        remember(fake, _specs.AlignSpec(n, 16, 8), {"topk_ids": ids})
        assert 1 <= len(fast_path._known) <= 8


def test_fast_path_fills_the_buffers_of_the_in_place_form(fake):
    """Their rows are the capacity; buffers whose lengths do not fit together go the ordinary way."""
    array, ids = ids_of(torch.int32)
    n, problem = ids.numel(), _specs.AlignSpec(ids.numel(), 16, 8)
    want, rows = want_of(problem, array, {}), problem.capacity + 100
    remember(fake, problem, {"topk_ids": ids}, rows=rows)
    out = tuple(torch.full((k,), -7, dtype=torch.int32) for k in (rows, -(-rows // 8), 1))
    longer = (out[0], torch.full((len(out[1]) + 1,), -7, dtype=torch.int32), out[2])
    assert attempt(ids, 16, 8, False, out=out) is None  # another capacity
    assert attempt(ids, 16, 8, False, out=longer, in_place=True) is None
    assert (torch.cat(longer) == -7).all() and not fake.launched
    assert attempt(ids, 16, 8, False, out=out, in_place=True) is out
    assert out[0].tolist() == list(want.sorted_token_ids) + [n] * 100
    blocks = list(want.expert_ids)
    assert out[1].tolist() == blocks + [-1] * (len(out[1]) - len(blocks))
    assert out[2].tolist() == list(want.num_tokens_post_padded)
