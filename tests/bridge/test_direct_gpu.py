"""The direct path on a GPU: no copy, no jax, no compile after warmup, threads, fork, errors, fallback.

CUDA graphs and torch's compiler are in test_direct_graphs_gpu.py; what holds on both paths, in test_gpu.py.
"""

import itertools
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch

import torch_bridge
from tests import oracle
from tests.bridge.helpers import assert_format, assert_triple, ids_of, load_programs
from tests.gpu import soak
from tests.gpu.graphs import capture
from torch_bridge._direct import fast_path, store
from torch_bridge._direct.machine import Machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def _run(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- where ids and results lie -----------------------------------------------------------------------


def _allocations(call):
    """What a call returns, and how many tensors it took from torch's allocator."""
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    result = call()
    return result, torch.cuda.memory_stats()["allocation.all.allocated"] - before


@pytest.mark.parametrize("entry", ["first call", "call seen before", "operator"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_gpu_view_at_any_element_is_read_where_it_lies(dtype, entry):
    """Beyond a 256-byte line of int32 ids; each takes the memory of its results and no more."""
    array, ids = ids_of(dtype, num_tokens=29)
    want = oracle.align(array.ravel(), block_size=8, num_experts=16)
    buffer = torch.full((128 + ids.numel(),), 3, dtype=dtype, device="cuda")
    buffer = buffer[-buffer.data_ptr() % 256 // dtype.itemsize :]
    calls = {
        "first call": lambda x: torch_bridge.moe_align_block_size(x, 16, 8, path="direct"),
        "call seen before": lambda x: torch_bridge.moe_align_block_size(x, 16, 8),
        "operator": lambda x: tuple(torch.ops.moe_align_jax.block_align(x, 16, 8)),
    }
    call_it = calls[entry]
    call_it(ids.cuda())  # loads, and is remembered
    for offset in range(71):
        view = buffer[offset : offset + ids.numel()].view(ids.shape)
        view.copy_(ids)
        assert torch_bridge.explain(view, 16, 8, path="direct").copies == {}
        got, taken = _allocations(lambda v=view: call_it(v))
        assert_triple(got, want)
        assert taken == 3, f"element offset {offset}"
        view.fill_(3)


def test_gpu_copies_a_strided_view_once():
    """The counter of the test above sees a copy."""
    array, ids = ids_of(torch.int64, num_tokens=29)
    want = oracle.align(array.ravel(), block_size=8, num_experts=16)
    torch_bridge.moe_align_block_size(ids.cuda(), 16, 8, path="direct")
    view = ids.cuda().t().contiguous().t()
    assert set(torch_bridge.explain(view, 16, 8, path="direct").copies) == {"topk_ids"}
    got, taken = _allocations(lambda: torch_bridge.moe_align_block_size(view, 16, 8, path="direct"))
    assert_triple(got, want)
    assert taken == 4


@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("num_tokens", [1, 29, 1500, 9000])
def test_gpu_out_at_any_alignment(num_tokens, offset):
    """Results of the exact sizes, with nothing written beside them."""
    array, ids = ids_of(torch.int64, num_tokens=num_tokens)
    want = oracle.align_numpy(array, block_size=8, num_experts=16)
    sizes = [len(x) for x in want[:3]]
    held = [torch.full((offset + size + 70,), -7, dtype=torch.int32).cuda() for size in sizes]
    out = tuple(x[offset : offset + size] for x, size in zip(held, sizes, strict=True))
    for _ in range(3):  # the second call may take the short way
        for tensor in held:
            tensor.fill_(-7)
        got = torch_bridge.moe_align_block_size(ids.cuda(), 16, 8, out=out, path="auto")
        assert all(a is b for a, b in zip(got, out, strict=True))
        assert_triple(got, want)
        for tensor, size in zip(held, sizes, strict=True):
            assert (tensor[:offset] == -7).all() and (tensor[offset + size :] == -7).all()


# -- the same as through jax -------------------------------------------------------------------------

SIZES = [
    (1, 1, 1),
    (8, 64, 4),
    (9, 64, 4),
    (33, 5000, 4),
    (700, 5000, 4),
    (512, 60, 16),
    (2049, 8, 7),
]
SIZES += [(8192, 64, 128), (70_000, 256, 64), (600_000, 64, 16)]
# Every fifth of all: each value of each option, and most pairs of them.
CHOICES = list(
    itertools.product(
        (None, "label", "filter"), (None, "int", "tensor"), (False, True), (False, True)
    )
)[::5]


@pytest.mark.parametrize(("n", "num_experts", "block_size"), SIZES)
def test_gpu_both_paths_give_the_same_bits(n, num_experts, block_size):
    """All options, both id widths, a view off any boundary."""
    given = [
        {
            "expert_map": use,
            "ignore_invalid_experts": use == "filter",
            "num_valid_pairs": limit,
        }
        for use, limit, _, _ in CHOICES
    ]
    for inverse in (False, True):
        load_programs(
            [(n, num_experts, block_size)],
            given,
            (torch.int32, torch.int64),
            return_counts=True,
            return_inverse=inverse,
        )
    for index, (use, limit, pad, inverse) in enumerate(CHOICES):
        dtype = (torch.int64, torch.int32)[index % 2]
        array, ids = ids_of(dtype, "outside", n, 1, num_experts, seed=index)
        ids = torch.nn.functional.pad(ids.flatten(), (3, 0)).cuda()[3:]
        options = {"pad_sorted_ids": pad, "return_inverse": inverse, "block_size": block_size}
        options |= {"num_experts": num_experts, "ignore_invalid_experts": use == "filter"}
        if use:
            options["expert_map"] = torch.from_numpy(oracle.local_map("any", num_experts, 1)).cuda()
        if limit:
            options["num_valid_pairs"] = n // 2 if limit == "int" else torch.tensor(n // 2).cuda()
        one, other = (
            torch_bridge.align_blocks(ids, path=p, **options) for p in ("direct", "dlpack")
        )
        for name, a, b in zip(one._fields, one, other, strict=True):
            if a is None or b is None:
                assert a is b, name
                continue
            assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b), (name, options)


# -- warmup and compiles ----------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "most"), [(64, 2300), (4500, 90)])
def test_gpu_no_size_compiles_after_warmup(num_experts, most, monkeypatch):
    """Every number of pairs from 1 to the most, both dtypes, all right."""
    torch_bridge.warmup(num_experts=num_experts, block_size=16, max_tokens=most)
    monkeypatch.setattr(store.here.machine, "compile", lambda *a: pytest.fail("compiled"))
    programs = set(store.here.programs)
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    for dtype in (torch.int32, torch.int64):
        ids = soak.random_ids(most, num_experts, dtype, "cuda", 0)
        for n in range(1, most + 1):
            got = torch_bridge.moe_align_block_size(ids[:n], num_experts, 16, path="direct")
            soak.count_wrong(got, soak.align_torch(ids[:n], num_experts, 16), wrong)
    assert wrong.item() == 0
    assert set(store.here.programs) == programs


def test_gpu_warmup_with_every_option_is_enough(monkeypatch):
    sizes = {"num_experts": 12, "block_size": 8}
    local, count = torch.arange(12).cuda(), torch.tensor(11).cuda()
    _, ids = ids_of(torch.int64, num_tokens=5, num_experts=12)
    ids = ids.cuda()
    cases = []
    chosen = [(None, None, False), (False, None, True), (True, count, False), (None, 11, True)]
    for use, limit, counts in [*chosen, (True, 11, True), (False, count, False)]:
        given = {"ignore_invalid_experts": bool(use), "num_valid_pairs": limit}
        given["expert_map"] = None if use is None else local
        torch_bridge.warmup(
            **sizes,
            max_tokens=5,
            topk=3,
            dtypes=[torch.int64],
            tokens_per_expert=counts,
            return_inverse=counts,
            **given,
        )
        cases.append((given, counts))
    for ignore, prefix in ((False, True), (True, False)):
        torch_bridge.warmup(
            **sizes,
            max_tokens=15,
            dtypes=[torch.int64],
            ignore_invalid_experts=ignore,
            tokens_per_expert=prefix,
            sglang=True,
        )
    torch_bridge.warmup(num_experts=12, block_size=8, max_tokens=30, batched=True)
    monkeypatch.setattr(store.here.machine, "compile", lambda *a: pytest.fail("compiled"))
    counts = torch.arange(12).cuda() * 3
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        got = torch_bridge.vllm.batched_moe_align_block_size(30, 8, counts)
    graph.replay()
    want = oracle.align_batched(range(0, 36, 3), max_tokens_per_batch=30, block_size=8)
    assert_triple(got, want)
    for given, counts in cases:
        if counts:
            torch_bridge.align_blocks(ids, path="direct", return_inverse=True, **sizes, **given)
        else:
            torch_bridge.moe_align_block_size(ids, 12, 8, path="direct", **given)
    for ignore, prefix in ((False, True), (True, False)):
        torch_bridge.sglang.moe_align_block_size(
            ids, 8, 12, ignore, return_inactive_prefix_count=prefix
        )


# -- no jax, no memory --------------------------------------------------------------------------------

ALONE = """
    import sys, torch
    ids = torch.randint(0, 64, (8192,), dtype=torch.int32, device="cuda")
    torch.empty(32 << 20, dtype=torch.uint8, device="cuda")  # torch has its first pages
    from torch_bridge import moe_align_block_size, explain
    torch.cuda.synchronize()
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    # ready
    for _ in range(3):
        got = moe_align_block_size(ids, 64, 128)
        moe_align_block_size(ids[:100], 64, 128)
    torch.cuda.synchronize()
    taken = free - torch.cuda.mem_get_info()[0] - (torch.cuda.memory_reserved() - reserved)
    print(explain(ids, 64, 128).path, "jax" in sys.modules, "jaxlib" in sys.modules, taken, int(got[2]))
    want = sum(-(-c // 128) * 128 for c in torch.bincount(ids.cpu(), minlength=64).tolist())
    assert int(got[2]) == want
"""


# ALONE's two programs are three modules, and CUDA takes memory for code 2 MiB at a time; one more for what
# the driver itself may need. A client of jax's would take hundreds.
MODULES_MIB = 4 * 2


@pytest.mark.alone
def test_gpu_process_has_no_jax_and_loses_no_memory_but_the_modules(record_property):
    for start in ("first", "second"):  # the first may compile, in a process of its own
        path, jax_there, jaxlib_there, taken, _ = _run(ALONE).split()
        assert (path, jax_there, jaxlib_there) == ("direct", "False", "False")
        mib = int(taken) / 2**20
        record_property(f"MiB taken, {start} process", mib)
        print(f"{start} process: {mib:g} MiB of GPU memory beyond torch's allocator")  # pytest -s
        # The GPU's free memory is everybody's: other processes must be quiet while this runs.
        assert mib <= MODULES_MIB


def test_gpu_warm_call_starts_no_process():
    refuse = """
    import subprocess
    def refuse(*a, **k): raise AssertionError("a process was started")
    subprocess.Popen.__init__ = refuse
    """
    assert "# ready" in ALONE
    _run(ALONE)
    assert _run(ALONE.replace("# ready", refuse.strip())).split()[0] == "direct"


# -- threads, devices, fork ---------------------------------------------------------------------------


def test_gpu_eight_threads_on_four_streams():
    seen = soak.run_threads(20)
    assert seen["done"] > 1000 and seen["wrong"] == 0


def test_gpu_replays_with_changed_inputs():
    seen = soak.run_replays(1000)
    assert seen["done"] == 1000 and seen["wrong"] == 0


def test_gpu_tensors_freed_at_once_under_pressure():
    code = "from tests.gpu import soak; s = soak.run_pressure(8); print(s['done'], s['wrong'], s['growth'])"
    done, wrong, growth = _run(code).split(maxsplit=2)
    assert int(done) > 100 and (wrong, growth.strip()) == ("0", "[]")


def test_gpu_20000_calls_do_not_grow():
    code = "from tests.gpu import soak; s = soak.run_calls(20_000); print(s['wrong'], s['growth'])"
    seen = _run(code).strip()
    # "GPU bytes" are the whole GPU's, other processes' too: `python -m tests.gpu.soak` is alone there.
    mine = ("torch bytes", "host bytes", "handles")
    assert seen.startswith("0 ") and not [label for label in mine if label in seen], seen


def test_gpu_every_device():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; torch sees {torch.cuda.device_count()}")
    torch.cuda.set_device(0)
    array, ids = ids_of(torch.int64, num_tokens=2000)
    want = oracle.align_numpy(array, block_size=8, num_experts=16)
    for _ in range(3):
        for index in range(torch.cuda.device_count()):
            there = ids.to(f"cuda:{index}")
            got = torch_bridge.moe_align_block_size(there, 16, 8)
            assert {x.device.index for x in got} == {index}
            assert torch.cuda.current_device() == 0
            assert_triple(got, want)
            with torch.cuda.device(index):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    assert_triple(torch_bridge.moe_align_block_size(there, 16, 8), want)


def test_gpu_forked_child_gets_an_error_and_the_parent_works_on():
    """torch refuses CUDA in a forked child; so do calls on tensors that came along."""
    out = _run("""
        import os, sys, torch, torch_bridge
        ids = torch.randint(0, 64, (4096,), dtype=torch.int32, device="cuda")
        want = [x.cpu() for x in torch_bridge.moe_align_block_size(ids, 64, 16)]
        out = tuple(torch.empty_like(x, device="cuda") for x in want)
        torch_bridge.moe_align_block_size(ids, 64, 16, out=out)
        torch.cuda.synchronize()
        for options in ({}, {"out": out}, {"path": "direct"}, {"path": "direct", "out": out}):
            child = os.fork()
            if child == 0:
                try:
                    torch_bridge.moe_align_block_size(ids, 64, 16, **options)
                except RuntimeError as error:
                    print("refused:", str(error).splitlines()[0], flush=True)
                    os._exit(3)
                except BaseException as error:
                    print("other:", type(error).__name__, error, flush=True)
                os._exit(4)
            print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        again = [x.cpu() for x in torch_bridge.moe_align_block_size(ids, 64, 16)]
        print("parent", all(torch.equal(a, b) for a, b in zip(want, again)))
    """)
    lines = out.splitlines()
    assert [x for x in lines if x.startswith("status")] == ["status 3"] * 4, out
    assert sum(x.startswith("refused: ") and "CUDA" in x for x in lines) == 4, out
    assert lines[-1] == "parent True", out


def test_gpu_data_loader_that_forks():
    """Workers that align on the CPU beside a parent that aligns on the GPU, then use no CUDA."""
    out = _run("""
        import torch, torch_bridge
        ids = torch.randint(0, 64, (8, 512), dtype=torch.int32)
        first = torch_bridge.moe_align_block_size(ids[0].cuda(), 64, 16)
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, k): return ids[k]
        loader = torch.utils.data.DataLoader(
            Data(), num_workers=2, multiprocessing_context="fork", batch_size=None)
        sums = []
        for k, row in enumerate(loader):
            got = torch_bridge.moe_align_block_size(row.cuda(), 64, 16)
            counts = torch.bincount(ids[k], minlength=64)
            assert int(got[2]) == int(((counts + 15) // 16 * 16).sum())
            sums.append(int(got[2]))
        print(len(sums))
    """)
    assert out.split() == ["8"]


# -- errors -----------------------------------------------------------------------------------------


def _bad_calls():
    ids = torch.zeros(4, 3, dtype=torch.int32, device="cuda")
    rows = oracle.capacity(12, 4, 4, False)
    out = [torch.full((k,), -7, dtype=torch.int32, device="cuda") for k in (rows, -(-rows // 4), 1)]
    on_cpu = torch.arange(4)
    yield "float ids", (ids.float(), 4, 4), {}, TypeError
    yield "bool ids", (ids.bool(), 4, 4), {}, TypeError
    yield "sparse ids", (ids.to_sparse(), 4, 4), {}, TypeError
    yield "array", (ids.cpu().numpy(), 4, 4), {}, TypeError
    yield "num_experts 0", (ids, 0, 4), {}, ValueError
    yield "num_experts bool", (ids, True, 4), {}, TypeError
    yield "num_experts float", (ids, 4.0, 4), {}, TypeError
    yield "block_size 0", (ids, 4, 0), {}, ValueError
    yield "block_size text", (ids, 4, "4"), {}, TypeError
    yield "too large", (ids, 4, 2**30), {}, ValueError
    yield "topk", (ids, 4, 4, 2), {}, ValueError
    yield "topk float", (ids, 4, 4, 3.0), {}, TypeError
    yield "map list", (ids, 4, 4), {"expert_map": [0, 1, 2, 3]}, TypeError
    yield "map dtype", (ids, 4, 4), {"expert_map": torch.zeros(4).cuda()}, TypeError
    yield "map shape", (ids, 4, 4), {"expert_map": torch.arange(3).cuda()}, ValueError
    yield "map device", (ids, 4, 4), {"expert_map": on_cpu}, ValueError
    yield "flag", (ids, 4, 4), {"ignore_invalid_experts": 1}, TypeError
    yield "pad flag", (ids, 4, 4), {"pad_sorted_ids": None}, TypeError
    yield "limit float", (ids, 4, 4), {"num_valid_pairs": 2.0}, TypeError
    yield "limit vector", (ids, 4, 4), {"num_valid_pairs": torch.arange(2).cuda()}, ValueError
    yield "limit device", (ids, 4, 4), {"num_valid_pairs": torch.tensor(3)}, ValueError
    yield "path", (ids, 4, 4), {"path": "xla"}, ValueError
    yield "two outs", (ids, 4, 4), {"out": out[:2]}, TypeError
    yield "int64 out", (ids, 4, 4), {"out": (out[0].long(), *out[1:])}, TypeError
    yield "short out", (ids, 4, 4), {"out": (out[0][1:], *out[1:])}, ValueError
    yield "2-D out", (ids, 4, 4), {"out": (*out[:2], out[2][None])}, ValueError
    yield "out device", (ids, 4, 4), {"out": (out[0].cpu(), *out[1:])}, ValueError
    yield "strided out", (ids, 4, 4), {"out": (out[0].repeat(2)[::2], *out[1:])}, ValueError
    yield "same out", (ids, 4, 4), {"out": (out[0], out[1], out[0][:1])}, ValueError
    yield "out over ids", (ids, 4, 4), {"out": (*out[:2], ids.view(-1)[3:4])}, ValueError


BAD = [
    *("float ids", "bool ids", "sparse ids", "array", "num_experts 0", "num_experts bool"),
    *("num_experts float", "block_size 0", "block_size text", "too large", "topk", "topk float"),
    *("map list", "map dtype", "map shape", "map device", "flag", "pad flag", "limit float"),
    *("limit vector", "limit device", "path", "two outs", "int64 out", "short out", "2-D out"),
    *("out device", "strided out", "same out", "out over ids"),
]


@pytest.mark.parametrize("path", ["auto", "direct"])
@pytest.mark.parametrize("name", BAD)
def test_gpu_bad_input_raises_and_the_context_works_on(name, path):
    """After a good call like it, so that the short way is open to the bad one."""
    cases: dict[str, Any] = {case: rest for case, *rest in _bad_calls()}
    assert list(cases) == BAD
    arguments, options, kind = cases[name]
    array, good = ids_of(torch.int32, num_tokens=4, num_experts=4)
    want = oracle.align(array.ravel(), block_size=4, num_experts=4)
    good = good.cuda()
    assert_triple(torch_bridge.moe_align_block_size(good, 4, 4), want)
    with pytest.raises(kind) as caught:
        torch_bridge.moe_align_block_size(*arguments, **{"path": path} | options)
    assert_format(caught.value)
    for tensor in options.get("out", ()):
        assert tensor.unique().tolist() in ([-7], [0])
    torch.cuda.synchronize()
    assert_triple(torch_bridge.moe_align_block_size(good, 4, 4), want)


@pytest.mark.parametrize("transform", ["vmap", "functionalize"])
def test_gpu_transforms_are_refused_or_right(transform):
    """Inside them a tensor's pointer is an error or 0: no kernel may see it."""
    ids = torch.zeros(3, 8, dtype=torch.int32, device="cuda")
    want = oracle.align([0] * 8, block_size=4, num_experts=4)
    assert_triple(torch_bridge.moe_align_block_size(ids[0], 4, 4), want)

    def call(x):
        return torch_bridge.moe_align_block_size(x, 4, 4)

    if transform == "vmap":
        # torch's fallback: the operator once per row.
        for got, one in zip(torch.func.vmap(call)(ids), want[:3], strict=True):
            assert got.tolist() == [list(one)] * len(ids)
    else:
        assert_triple(tuple(torch.func.functionalize(call)(ids[0])), want)
    torch.cuda.synchronize()
    assert_triple(torch_bridge.moe_align_block_size(ids[0], 4, 4), want)


# -- falling back -----------------------------------------------------------------------------------


@pytest.fixture
def no_worker(monkeypatch, tmp_path):
    """Nothing is loaded or kept, and compiling fails."""
    monkeypatch.setenv("TORCH_BRIDGE_CACHE_DIR", str(tmp_path))
    machine = Machine()
    machine.compile = lambda index, problems: ["no worker here"] * len(problems)
    monkeypatch.setattr(store, "here", store.Store(machine))
    fast_path.forget_all()
    yield
    fast_path.forget_all()


def test_gpu_auto_falls_back_with_one_warning(no_worker):
    array, ids = ids_of(torch.int64)
    want, ids = oracle.align(array.ravel(), block_size=8, num_experts=16), ids.cuda()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for given in (ids, ids, ids[:30]):
            got = torch_bridge.moe_align_block_size(given, 16, 8)
            if given is ids:
                assert_triple(got, want)
    assert sum("no worker here" in str(w.message) for w in seen) == 1
    explained = torch_bridge.explain(ids, 16, 8)
    assert explained.path == "dlpack" and explained.reasons["direct"] == "no worker here"


def test_gpu_direct_by_name_and_warmup_raise(no_worker):
    _, ids = ids_of(torch.int64)
    calls = [
        lambda: torch_bridge.moe_align_block_size(ids.cuda(), 16, 8, path="direct"),
        lambda: torch_bridge.align_blocks(ids.cuda(), num_experts=16, block_size=8, path="direct"),
        lambda: torch_bridge.warmup(num_experts=16, block_size=8, max_tokens=4),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="(?i)no worker here") as caught:
            call()
        assert_format(caught.value)
