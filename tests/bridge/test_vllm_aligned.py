"""vLLM's aligned ops for DeepEP and for LoRA: what its compiled ops gave on an H200, plain oracles, errors.

vLLM places the pairs of one expert by atomics, in any order; its results are compared as sets per block of
rows, ours with the oracle exactly.
"""

import pathlib
import re

import numpy as np
import pytest
import torch

from moe_align_jax._align.vllm import kernel as vllm_kernel
from moe_align_jax._align.vllm import problem as vllm_problem
from moe_align_jax._align.vllm.views import Computed, Further
from moe_align_jax._simt.emulator import EmulatorError
from tests import oracle
from tests.bridge.helpers import assert_format
from tests.gpu import direct_vllm
from torch_bridge import _vllm_launch, vllm
from torch_bridge._direct import compile_worker

Received, Adapters = vllm_problem.ReceivedProblem, vllm_problem.AdaptersProblem
GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "router" / "vllm_golden.npz"))
GLOBALIZED = sorted({key.rpartition(".")[0] for key in GOLDEN if key.startswith("glob-")})
LORA = sorted({key.rpartition(".")[0] for key in GOLDEN if key.startswith("lora-")})


def tensor(array):
    return torch.from_numpy(np.array(array))


def unwritten(*shape):
    return torch.full(shape, -7, dtype=torch.int32)


def assert_same_rows(rows, blocks, count, theirs, block_size):
    """Each expert has the same pairs; all else is equal."""
    want_rows, want_blocks, want_count = theirs
    np.testing.assert_array_equal(count, want_count)
    np.testing.assert_array_equal(blocks, want_blocks)
    used = int(want_count[0]) if want_count.size else 0
    np.testing.assert_array_equal(rows[used:], want_rows[used:])
    for expert in set(want_blocks[: used // block_size].tolist()):
        of_expert = np.repeat(want_blocks[: used // block_size] == expert, block_size)
        got, want = (np.sort(x[:used][of_expert]) for x in (rows, want_rows))
        np.testing.assert_array_equal(got, want)


def assert_aligned(ids, rows, blocks, count, block_size, num_experts):
    """Exactly the oracle's alignment, in buffers of just these sizes."""
    want = oracle.align(ids, block_size=block_size, num_experts=num_experts)
    used = want.num_tokens_post_padded[0]
    assert count == used
    assert rows[:used].tolist() == list(want.sorted_token_ids[:used])
    assert (rows[used:] == len(ids)).all()
    labels = list(want.expert_ids[: used // block_size])
    assert blocks.tolist() == labels + [-1] * (len(blocks) - len(labels))


@pytest.fixture
def path(request):
    """The device: on a CPU the op's kernels are launched on a fake GPU, or jax aligns, for torch's ops."""
    if request.param == "gpu":
        yield "cuda"
    elif request.param == "direct":
        fake = request.getfixturevalue("fake")
        fake.launches_directly = True
        yield "cpu"
        # Kernels of the op itself, one call of them and nothing else.
        [[program]] = fake.compiles
        kernels = [kernel.name for kernel, _, _ in fake.kernels]
        assert [name for name, _ in fake.launched] == kernels
        assert type(program).__name__ in ("ReceivedProblem", "AdaptersProblem")
    else:
        yield "cpu"


def on_paths(keys):
    """(key, path) of every golden case on a GPU, real and fake, and of two by jax, each of which compiles."""
    cases = [(key, "direct") for key in keys] + [(key, "jax") for key in keys[1::6][:2]]
    cases += [pytest.param(key, "gpu", marks=pytest.mark.gpu) for key in keys]
    return pytest.mark.parametrize(("key", "path"), cases, indirect=["path"])


@on_paths(GLOBALIZED)
def test_globalize_gives_what_vllms_gave(key, path):
    numbers = re.fullmatch(r"glob-(\d+)-(\d+)-(\d+)-(\d+)-(\d+)-(\d+)-(\d+)-(True|False)", key)
    tokens, top_k, local, first, everyone, block_size, received = map(int, numbers.groups()[:7])
    shapes = [GOLDEN[f"{key}.{name}"].shape for name in ("so", "ex", "nu")]
    if f"{key}.s" in GOLDEN:
        shapes.append((tokens * top_k, 1))
    out = [unwritten(*shape).to(path) for shape in shapes]
    idx = tensor(GOLDEN[f"{key}.inp"]).to(path)
    psum = torch.tensor([0, received // 2, received], dtype=torch.int32, device=path)
    sizes = (first, everyone, local, block_size)
    vllm.fused_globalize_align_block_size(idx, psum, *sizes, *out)
    idx, (rows, blocks, count, *scatter) = idx.cpu(), [x.cpu() for x in out]
    np.testing.assert_array_equal(idx.numpy(), GOLDEN[f"{key}.i"])
    theirs = [GOLDEN[f"{key}.{name}"] for name in ("so", "ex", "nu")]
    assert_same_rows(rows.numpy(), blocks.numpy(), count.numpy(), theirs, block_size)
    for got in scatter:
        np.testing.assert_array_equal(got.numpy(), GOLDEN[f"{key}.s"])
    ids = [
        int(i) if 0 <= i < local and i + first < everyone and pair // top_k < received else -1
        for pair, i in enumerate(GOLDEN[f"{key}.inp"].ravel())
    ]
    want = np.where(np.array(ids) >= 0, np.array(ids) + first, -1)
    np.testing.assert_array_equal(idx.numpy().ravel(), want)
    assert_aligned(ids, rows, blocks, count.item(), block_size, local)


def test_globalize_takes_what_vllms_wraps():
    """An id of 2**32 is no expert, and a group that ends below its first expert has none."""
    idx = torch.tensor([[2**32, 0], [1, -(2**32)]])
    rows, blocks, count = unwritten(8), unwritten(8), unwritten(1)
    psum = torch.tensor([9])
    vllm.fused_globalize_align_block_size(idx, psum, 6, 8, 2, 1, rows, blocks, count)
    assert idx.tolist() == [[-1, 6], [7, -1]] and count.item() == 2
    vllm.fused_globalize_align_block_size(idx, psum, 6, 3, 2, 1, rows, blocks, count)
    assert idx.tolist() == [[-1, -1], [-1, -1]] and count.item() == 0
    none = torch.empty(0, 2, dtype=torch.int64)
    vllm.fused_globalize_align_block_size(none, psum, 6, 8, 2, 1, rows, blocks, count)
    assert count.item() == 0 and (blocks == -1).all()


@on_paths(LORA)
def test_lora_gives_what_vllms_gave(key, path):
    numbers = re.fullmatch(
        r"lora-(\d+)-(\d+)-(\d+)-(\d+)-(\d+)-torch\.int\d+-(True|False)-[01]", key
    )
    _, top_k, experts, block_size, loras = map(int, numbers.groups()[:5])
    given = {name: GOLDEN[f"{key}.{name}"] for name in ("ids", "m", "so", "ex", "nu", "en", "lid")}
    out = [unwritten(*given[name].shape).to(path) for name in ("so", "ex", "nu")]
    local = GOLDEN.get(f"{key}.em")
    vllm.moe_lora_align_block_size(
        tensor(given["ids"]).to(path),
        tensor(given["m"]).to(path),
        experts,
        block_size,
        loras,
        given["so"].shape[1],
        given["ex"].shape[1],
        *out,
        tensor(given["en"]).to(path),
        tensor(given["lid"]).to(path),
        None if local is None else tensor(local).to(path),
    )
    rows, blocks, count = (x.cpu() for x in out)
    for adapter in range(loras):
        mine = rows[adapter].numpy(), blocks[adapter].numpy(), count[adapter : adapter + 1].numpy()
        theirs = [given[name][adapter] for name in ("so", "ex")] + [given["nu"][adapter][None]]
        if not given["en"][adapter]:
            assert all((x == -7).all() for x in (*mine, *theirs))
            continue
        assert_same_rows(*mine, theirs, block_size)
        ids = [
            int(e if local is None else local[e]) if given["m"][pair // top_k] == adapter else -1
            for pair, e in enumerate(given["ids"].ravel())
        ]
        assert_aligned(
            ids, rows[adapter], blocks[adapter], count[adapter].item(), block_size, experts
        )


def self_test(fake, problem):
    """The compiling process's self-test: the kernels, twice, on NumPy's results. Their names are returned."""
    launches, cubins, shapes = fake.compiled(problem)
    kind = compile_worker._beside("driver")
    compile_worker.compare_with_numpy(kind, fake.driver, problem, launches, cubins, shapes)
    return [kernel.name.split("align_")[1] for kernel, _, _ in fake.kernels]


PROGRAMS = [
    (["warp"], Received(32, 32, 16, 512, 4, 2, 3, True)),
    (["block"], Received(512, 32, 16, 1024, 8)),
    (["pairs"], Received(64, 600, 2, 132, 8, 2)),
    (["cluster"], Received(1000, 32, 16, 1512, 8, with_scatter=True)),
    (["grid_count", "grid_place"], Received(8200, 32, 4, 8300, 8, with_scatter=True)),
    (["warp"], Adapters(32, 16, 4, 96, 4, 3, 4, whole_rows=True)),
    (["pairs"], Adapters(64, 600, 2, 132, 8, 2, 3)),
    (["block"], Adapters(512, 64, 16, 1488, 8, 3, 40, 2, has_expert_map=True, whole_rows=True)),
    (["cluster"], Adapters(1024, 64, 16, 2000, 8, 2, 3)),
    (["grid_count", "grid_place"], Adapters(4100, 128, 8, 5000, 4, 2, 3, whole_rows=True)),
]


@pytest.mark.parametrize(("forms", "problem"), PROGRAMS)
def test_every_form_gives_what_numpy_gives(fake, forms, problem):
    assert self_test(fake, problem) == forms


FAULTS = {
    "an adapter that is not in use": (7, "_in_use", lambda t, *rest: t.const(0).eq(0)),
    "rows of another adapter": (7, "Further", lambda ref, start, *rest: Further(ref, 0, *rest)),
    "a local id stays": (
        0,
        "Computed",
        lambda word=None, put=None: Computed(word, put and _nothing),
    ),
}


def _nothing(*arguments):
    del arguments


@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_test_finds_a_fault(fake, monkeypatch, fault):
    number, name, wrong = FAULTS[fault]
    monkeypatch.setattr(vllm_kernel, name, wrong)
    with pytest.raises((compile_worker.CompileError, EmulatorError)):
        self_test(fake, PROGRAMS[number][1])


def lora_arguments(**changed):
    named = {
        "topk_ids": torch.tensor([[1], [0], [3]], dtype=torch.int32),
        "token_lora_mapping": torch.tensor([1, 0, 1]),
        "num_experts": 4,
        "block_size": 2,
        "max_loras": 2,
        "max_num_tokens_padded": 6,
        "max_num_m_blocks": 3,
        "sorted_token_ids": unwritten(2, 6),
        "experts_ids": unwritten(2, 3),
        "num_tokens_post_pad": unwritten(2),
        "adapter_enabled": torch.tensor([True, True, False]),
        "lora_ids": torch.tensor([-1, 0, 1]),
    }
    return {**named, **changed}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint32, torch.uint64])
def test_lora_takes_other_integers_and_unused_adapters(dtype):
    ids = torch.tensor([[1], [0], [3]], dtype=torch.int64).to(dtype)
    named = lora_arguments(topk_ids=ids, lora_ids=torch.tensor([1, 7, -1]))
    vllm.moe_lora_align_block_size(**named)
    assert named["sorted_token_ids"].tolist() == [[-7] * 6, [0, 3, 2, 3, 3, 3]]
    assert named["experts_ids"].tolist() == [[-7] * 3, [1, 3, -1]]
    assert named["num_tokens_post_pad"].tolist() == [-7, 4]


@pytest.mark.parametrize(
    ("kind", "argument", "changed"),
    [
        (TypeError, "topk_ids", {"topk_ids": torch.zeros(3, 1)}),
        (ValueError, "topk_ids", {"topk_ids": torch.zeros(3, dtype=torch.int32)}),
        (ValueError, "max_loras", {"max_loras": 0}),
        (ValueError, "max_num_tokens_padded", {"max_num_tokens_padded": 5}),
        (ValueError, "max_num_m_blocks", {"max_num_m_blocks": 2}),
        (ValueError, "sorted_token_ids", {"sorted_token_ids": unwritten(2, 7)}),
        (TypeError, "experts_ids", {"experts_ids": torch.zeros(2, 3)}),
        (ValueError, "num_tokens_post_pad", {"num_tokens_post_pad": unwritten(3)}),
        (
            ValueError,
            "token_lora_mapping",
            {"token_lora_mapping": torch.zeros(4, dtype=torch.int32)},
        ),
        (ValueError, "adapter_enabled", {"adapter_enabled": torch.ones(1, dtype=torch.int32)}),
        (TypeError, "lora_ids", {"lora_ids": torch.zeros(3)}),
        (ValueError, "expert_map", {"expert_map": torch.zeros(3, dtype=torch.int32)}),
    ],
)
def test_lora_refuses(kind, argument, changed):
    named = lora_arguments(**changed)
    with pytest.raises(kind, match=f"^moe_lora_align_block_size: {argument} must") as caught:
        vllm.moe_lora_align_block_size(**named)
    assert_format(caught.value)
    if "num_tokens_post_pad" not in changed:
        assert (named["num_tokens_post_pad"] == -7).all()


@pytest.mark.parametrize(
    ("kind", "argument", "changed"),
    [
        (TypeError, "topk_idx", {"topk_idx": torch.zeros(2, 2, dtype=torch.int32)}),
        (ValueError, "topk_idx", {"topk_idx": torch.zeros(4, dtype=torch.int64)}),
        (ValueError, "topk_idx", {"topk_idx": torch.zeros(1, 2, dtype=torch.int64).expand(2, 2)}),
        (TypeError, "psum", {"psum": torch.zeros(2)}),
        (ValueError, "psum", {"psum": torch.tensor(3)}),
        (ValueError, "rank_expert_offset", {"rank_expert_offset": -1}),
        (TypeError, "local_num_experts", {"local_num_experts": 2.0}),
        (ValueError, "block_size", {"block_size": 0}),
        (ValueError, "sorted_ids", {"sorted_ids": unwritten(5)}),
        (ValueError, "num_tokens_post_pad", {"num_tokens_post_pad": unwritten(2)}),
        (ValueError, "scatter_idx", {"scatter_idx": unwritten(5)}),
    ],
)
def test_globalize_refuses(kind, argument, changed):
    idx = torch.zeros(2, 2, dtype=torch.int64)
    named = {"topk_idx": idx, "psum": torch.tensor([2]), "rank_expert_offset": 2}
    named |= {"global_num_experts": 4, "local_num_experts": 2, "block_size": 2}
    named |= {"sorted_ids": unwritten(6), "expert_ids": unwritten(3)}
    named |= {"num_tokens_post_pad": unwritten(1), **changed}
    with pytest.raises(kind, match=f"^fused_globalize_align_block_size: {argument} must") as caught:
        vllm.fused_globalize_align_block_size(**named)
    assert_format(caught.value)
    assert not idx.any()


def test_globalize_refuses_overlap():
    shared = torch.zeros(12, dtype=torch.int32)
    idx = shared[:8].view(torch.int64).view(2, 2)
    with pytest.raises(ValueError, match="must not overlap"):
        vllm.fused_globalize_align_block_size(
            idx, torch.tensor([2]), 0, 2, 2, 2, shared[6:], unwritten(3), unwritten(1)
        )
    assert not shared.any()


@pytest.mark.parametrize("direct", [False, True])
def test_under_torch_compile(fresh_dynamo, fake, direct):
    fake.launches_directly = direct

    def globalize(idx, psum, *out):
        vllm.fused_globalize_align_block_size(idx, psum, 4, 8, 4, 2, *out)
        return idx + 1

    def align(named):
        vllm.moe_lora_align_block_size(**named)
        return named["experts_ids"] + 1

    start = torch.tensor([[3, 0], [-1, 2], [1, 4]])
    results = []
    for one in (globalize, torch.compile(globalize, backend="aot_eager", fullgraph=True)):
        idx, out = start.clone(), [unwritten(n) for n in (10, 5, 1)]
        results.append([one(idx, torch.tensor([2]), *out), idx, *out])
    for one in (align, torch.compile(align, backend="aot_eager", fullgraph=True)):
        named = lora_arguments()
        results.append([one(named), *named.values()])
    for want, got in (results[:2], results[2:]):
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))
    assert [type(p).__name__ for [p] in fake.compiles] == (
        ["ReceivedProblem", "AdaptersProblem"] if direct else []
    )


def globalized(fake, idx, psum, blocks_more=0, scatter=False):
    """The ids and buffers of a call with rank 4 of 8 x 4 experts."""
    n = idx.numel()
    out = [unwritten(n + 6), unwritten(-(-(n + 6) // 2) + blocks_more), unwritten(1)]
    out += [unwritten(n)] * scatter
    vllm.fused_globalize_align_block_size(idx, psum, 4, 8, 4, 2, *out)
    return [idx.tolist(), *(x.tolist() for x in out)]


@pytest.mark.parametrize(
    "psum",
    [
        torch.tensor([2], dtype=torch.uint8),
        torch.tensor([-3, 2**40]),
        torch.tensor([5, -(2**40)]),
        torch.tensor([9, 9, 9, -1], dtype=torch.int32),
    ],
)
def test_globalize_directly_is_what_torch_composes(fake, psum):
    """Ids that lie apart and off the boundary, counts of any width, and a buffer that no launch fills."""
    start = torch.tensor([[3, 0], [-1, 2], [1, 4], [2**32, 1], [0, -(2**32)]])
    want = globalized(fake, start.clone(), psum, scatter=True)
    fake.launches_directly = True
    wide = torch.full((5, 7), -9)
    wide[:, 1:3] = start
    assert globalized(fake, wide[:, 1:3], psum, scatter=True) == want
    assert wide[:, 0].tolist() == [-9] * 5 and (wide[:, 3:] == -9).all()
    assert type(fake.compiles[0][0]).__name__ == "ReceivedProblem"
    more = globalized(fake, start.clone(), psum, blocks_more=1)
    assert type(fake.compiles[1][0]).__name__ == "AlignProblem"
    assert more[:2] == want[:2] and more[2] == want[2] + [-1]


@pytest.mark.parametrize(
    "changed",
    [
        {"token_lora_mapping": torch.tensor([2**32 + 1, 0, 1])},
        {"adapter_enabled": torch.tensor([-(2**32), 0, 1])},
        {"lora_ids": torch.tensor([2**32, 1], dtype=torch.uint64)},
        {"expert_map": torch.tensor([1, -1, 0, 2**33])},
        {"max_num_m_blocks": 4, "experts_ids": unwritten(2, 4)},
        {"lora_ids": torch.empty(0, dtype=torch.int32)},
        {"num_experts": 5000, "max_num_tokens_padded": 7, "max_num_m_blocks": 4}
        | {"sorted_token_ids": unwritten(2, 7), "experts_ids": unwritten(2, 4)},
    ],
)
def test_lora_directly_is_what_torch_composes(fake, changed):
    results = []
    for direct in (False, True):
        fake.launches_directly = direct
        named = {k: x.clone() if torch.is_tensor(x) else x for k, x in lora_arguments().items()}
        named |= {k: x.clone() if torch.is_tensor(x) else x for k, x in changed.items()}
        # Off a boundary, so that rows are copied there and back.
        shifted = torch.full((40,), -7, dtype=torch.int32)
        for name, start in (("sorted_token_ids", 1), ("experts_ids", 20)):
            size = named[name].numel()
            named[name] = shifted[start : start + size].view(named[name].shape)
        vllm.moe_lora_align_block_size(**named)
        results.append([shifted.tolist(), named["num_tokens_post_pad"].tolist()])
    assert results[0] == results[1]


def test_the_sanitizers_calls_are_right_and_launch_every_form(fake):
    fake.launches_directly = True
    for step in direct_vllm.STEPS.values():
        step("cpu")
    kernels = {name.split("align_")[1] for name, _ in fake.launched if "align_" in name}
    assert kernels == {"warp", "block", "cluster", "grid_count", "grid_place"}
    assert [name for name, _ in fake.launched].count("route_topk") == len(direct_vllm._ROUTERS)
    kinds = {type(problem).__name__ for [problem] in fake.compiles}
    assert kinds == {"RouteProblem", "ReceivedProblem", "AdaptersProblem"}


def on_boundary(fake, tensor):
    return fake.empty(tuple(tensor.shape), tensor.stride(), tensor.dtype).copy_(tensor)


def test_a_globalize_like_an_earlier_one_is_launched_at_once(fake, monkeypatch):
    fake.launches_directly = True
    start = torch.tensor([[3, 0], [-1, 2], [1, 4]])

    def call(idx=start, psum=2, first=4, more=0, out=None):
        idx, psum = on_boundary(fake, idx), on_boundary(fake, torch.tensor([1, psum]))
        lengths = (10 + 2 * more, 5 + more, 1)
        out = out or [on_boundary(fake, unwritten(n)) for n in lengths]
        vllm.fused_globalize_align_block_size(idx, psum, first, 8, 4, 2, *out)
        return [x.tolist() for x in (idx, *out)]

    want = call(), call(psum=3), call(first=1)
    monkeypatch.setattr(_vllm_launch, "_launch", None)  # what is not known fails
    launched = len(fake.launched)
    assert (call(), call(psum=3), call(first=1)) == want and want[0] != want[1] != want[2]
    assert len(fake.launched) == launched + 3
    for changed in ({"first": 2}, {"more": 1}, {"idx": start[:2]}):
        with pytest.raises(TypeError, match="not callable"):
            call(**changed)
    with pytest.raises(TypeError, match="must be a static Python int"):
        call(first=True)
    shared = on_boundary(fake, unwritten(11))
    with pytest.raises(ValueError, match="overlap"):
        call(out=[shared[:10], on_boundary(fake, unwritten(5)), shared[:1]])


def test_a_lora_call_like_an_earlier_one_is_launched_at_once(fake, monkeypatch):
    fake.launches_directly = True

    def call(**changed):
        named = lora_arguments(**changed)
        for name in ("token_lora_mapping", "adapter_enabled", "lora_ids"):
            named[name] = named[name].to(torch.int32)
        named = {k: on_boundary(fake, x) if torch.is_tensor(x) else x for k, x in named.items()}
        vllm.moe_lora_align_block_size(**named)
        return [
            named[x].tolist() for x in ("sorted_token_ids", "experts_ids", "num_tokens_post_pad")
        ]

    other = {"token_lora_mapping": torch.tensor([0, 0, -1]), "lora_ids": torch.tensor([0, 0, 0])}
    mapped = {"expert_map": torch.tensor([3, -1, 0, 1], dtype=torch.int32)}
    want = call(), call(**other), call(**mapped)
    monkeypatch.setattr(_vllm_launch, "_launch", None)
    assert (call(), call(**other), call(**mapped)) == want and want[0] != want[1] != want[2]
    for changed in ({"num_experts": 5}, {"lora_ids": torch.tensor([1])}):
        with pytest.raises(TypeError, match="not callable"):
            call(**changed)


def test_known_calls_do_not_make_torch_compile_again(fresh_dynamo, fake, monkeypatch):
    """What eager calls are known by is nothing that a compiled graph depends on."""
    from torch._dynamo.testing import CompileCounter

    fake.launches_directly, counter = True, CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def globalize(idx, psum, *out):
        vllm.fused_globalize_align_block_size(idx, psum, 4, 8, 4, 2, *out)
        return idx + 1

    for known in ("one", "another"):
        monkeypatch.setitem(_vllm_launch.calls._calls._known, (known,), None)
        idx, out = torch.tensor([[3, 0], [-1, 2], [1, 4]]), [unwritten(n) for n in (10, 5, 1)]
        globalize(idx, torch.tensor([2]), *out)
        assert idx.tolist() == [[7, 4], [-1, 6], [-1, -1]] and out[2].tolist() == [6]
    assert counter.frame_count == 1
