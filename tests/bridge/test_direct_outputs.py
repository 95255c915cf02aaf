"""The caller's own outputs on the direct path: off a boundary, and larger than the result."""

import pytest
import torch

import torch_bridge
from moe_align_jax._align import tables
from tests import oracle
from tests.bridge.fake_cuda import assert_results, want_of
from tests.bridge.helpers import ids_of, sized
from torch_bridge import _ops, _specs, sglang, vllm
from torch_bridge._direct import problems, store

# -- out= off a boundary, explained -------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [(0, 0, 0), (4, 8, 4), (1, 0, 0), (0, 0, 2), (3, 5, 7)])
def test_explain_says_which_outputs_are_copied(offsets, fake, monkeypatch):
    """And what it says is what happens: each named target is written by torch, the others are not."""
    array, ids = ids_of(torch.int32)
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    out = tuple(
        torch.empty(at + shape[0], dtype=torch.int32)[at:]
        for at, shape in zip(offsets, problem.outputs.values(), strict=True)
    )
    named = [f"out[{i}]" for i, at in enumerate(offsets) if at % 4]
    copies = torch_bridge.explain(ids, 16, 8, out=out).copies
    assert set(copies) == ({"outputs"} if named else set())
    assert [x for x in ("out[0]", "out[1]", "out[2]") if x in str(copies)] == named
    assert not named or "16-byte boundary" in copies["outputs"]
    run, launched = fake._run, []
    monkeypatch.setattr(fake, "_run", lambda *a: (launched.extend(a[-1].values()), run(*a)))
    results = _ops.run(problem, {"topk_ids": ids}, out=out)
    assert_results(problem, results, want_of(problem, array, {}))
    assert all(a is b for a, b in zip(results, out, strict=True))
    assert [x.data_ptr() not in launched for x in out] == [bool(at % 4) for at in offsets]


# -- in place, into larger buffers ---------------------------------------------------------------------

POISON = -5


def into_case(name):
    """(call on ids and buffers, rows that are enough, pairs, block_size, what the rows in use hold)."""
    array, ids = ids_of(torch.int32, "minus_30" if name == "sglang" else "outside", num_tokens=40)
    n = ids.numel()
    if name == "sglang":
        problem = _specs.SglangSpec(n, 16, 8)
        rows = problem.aligned_capacity
        scratch = torch.empty(18, dtype=torch.int32)

        def call(*buffers):
            sglang.ops_moe_align_block_size(ids, 17, 8, *buffers, scratch, False)
    else:
        problem = _specs.AlignSpec(n, 16, 8, ignore_invalid_experts=name != "vllm")
        rows = problem.capacity
        local = None if name == "vllm" else torch.from_numpy(oracle.local_map("second", 16, 0))
        scatter = torch.empty(n, dtype=torch.int32) if name == "scatter" else None

        def call(*buffers):
            vllm.ops_moe_align_block_size(ids, 16, 8, *buffers, local, scatter)

    return call, rows, n


@pytest.fixture
def launches_here(fake):
    """CPU tensors are launched directly."""
    fake.launches_directly = True
    return fake


@pytest.mark.parametrize("more", [0, 1, 7, 8, 300])
@pytest.mark.parametrize("name", ["vllm", "filter", "scatter", "sglang"])
def test_one_launch_fills_larger_buffers(name, more, launches_here, monkeypatch):
    call, least, n = into_case(name)
    want = [torch.full((k,), POISON, dtype=torch.int32) for k in (least, -(-least // 8), 1)]
    launches_here.launches_directly = False  # the way through jax and a second fill
    call(*want)
    launches_here.launches_directly = True
    fills, fill = [], torch.Tensor.fill_
    monkeypatch.setattr(torch.Tensor, "fill_", lambda x, value: fills.append(x) or fill(x, value))
    rows = least + more
    for again in range(2):  # the second call may take the fast path
        held = [torch.empty(k + 4, dtype=torch.int32) for k in (rows, -(-rows // 8), 1)]
        for tensor in held:
            tensor[...] = POISON
        launches_here.launched.clear()
        call(*[x[:-4] for x in held])
        assert len(launches_here.launched) == 1 and not fills, again
        assert held[0][:-4].tolist() == want[0].tolist() + [n] * more
        assert held[1][:-4].tolist() == want[1].tolist() + [-1] * (len(held[1]) - 4 - len(want[1]))
        assert held[2][:1].tolist() == want[2].tolist()
        assert all((x[-4:] == POISON).all() for x in held)


@pytest.mark.parametrize("more_blocks", [-1, 1, 30])
@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_lengths_that_do_not_fit_together_are_filled_after_the_launch(
    name, more_blocks, launches_here
):
    call, least, n = into_case(name)
    rows = least + 8 - least % 8 + 5  # a last, partial block, which may be missing
    blocks = -(-rows // 8) + more_blocks
    buffers = [torch.full((k,), POISON, dtype=torch.int32) for k in (rows, blocks, 1)]
    exact = [torch.full((k,), POISON, dtype=torch.int32) for k in (rows, -(-rows // 8), 1)]
    call(*buffers)
    call(*exact)
    assert torch.equal(buffers[0], exact[0]) and torch.equal(buffers[2], exact[2])
    longer, shorter = sorted((buffers[1], exact[1]), key=len)[::-1]
    assert torch.equal(longer[: len(shorter)], shorter)
    assert (longer[len(shorter) :] == -1).all()


FORMS = [(20, 16, 8), (60, 3000, 8), (500, 16, 8), (2048, 64, 16), (9000, 16, 8), (300, 4500, 4)]
FORMS += [(17_000, 5000, 4)]


def test_those_forms_are_all_there_are():
    configs = [tables.config_for(sized(n, e, b, torch.int32)).form for n, e, b in FORMS]
    assert configs == ["warp", "pairs", "block", "cluster", "grid", "sorted", "radix"]


@pytest.mark.parametrize(("n", "num_experts", "block_size"), FORMS)
def test_every_form_fills_far_more_rows_than_its_bucket_has(n, num_experts, block_size, fake):
    """Or says that it cannot: "radix" has a buffer between its kernels with a word per block."""
    array, ids = ids_of(torch.int32, num_tokens=n, top_k=1, num_experts=num_experts)
    least = _specs.AlignSpec(n, num_experts, block_size)
    want, rows = want_of(least, array, {}), 3 * least.capacity + 5
    problem = _specs.AlignSpec(n, num_experts, block_size, rows=rows)
    assert problem.capacity == rows
    if num_experts == 5000:
        needed = sized(n, num_experts, block_size)
        store.here.prepare(-1, [needed])
        assert rows > store.here.programs[-1, needed].max_capacity
        return
    results = _ops.run(problem, {"topk_ids": ids})
    blocks = -(-rows // block_size) - len(want.expert_ids)
    assert results[0].tolist() == [*want.sorted_token_ids, *[n] * (rows - least.capacity)]
    assert results[1].tolist() == [*want.expert_ids, *[-1] * blocks]
    assert results[2].tolist() == list(want.num_tokens_post_padded)


@pytest.mark.parametrize("more", [0, 2, 9, 40_000])
def test_a_program_of_bounded_rows_is_helped_by_a_second_fill(more, launches_here):
    array, ids = ids_of(torch.int32, num_tokens=100, top_k=170, num_experts=5000)
    n = ids.numel()
    problem = _specs.AlignSpec(n, 5000, 4)
    want, rows = want_of(problem, array, {}), problem.capacity + more
    for _ in range(2):  # the second call may not take the fast path beyond the bound
        buffers = [torch.full((k,), POISON, dtype=torch.int32) for k in (rows, -(-rows // 4), 1)]
        vllm.ops_moe_align_block_size(ids, 5000, 4, *buffers)
        assert buffers[0].tolist() == [*want.sorted_token_ids, *[n] * more]
        filled = len(buffers[1]) - len(want.expert_ids)
        assert buffers[1].tolist() == [*want.expert_ids, *[-1] * filled]
        assert buffers[2].tolist() == list(want.num_tokens_post_padded)


@pytest.mark.parametrize("minus_one", [False, True])
@pytest.mark.parametrize(("num_experts", "block_size"), [(16, 8), (60, 7), (5000, 3), (9000, 1)])
def test_a_program_has_room_for_every_entry_point(num_experts, block_size, minus_one):
    """At the end of each bucket, where its own P is the largest."""
    for end in problems.bucket_ends(40_000, num_experts + minus_one, block_size):
        sizes = (end, num_experts, block_size)
        program = sized(*sizes, minus_one=minus_one)
        assert program.num_pairs == end
        for entry in (
            _specs.AlignSpec(*sizes),
            _specs.AlignSpec(*sizes, pad_sorted_ids=True),
            _specs.SglangSpec(*sizes),
        ):
            assert entry.capacity <= program.capacity
