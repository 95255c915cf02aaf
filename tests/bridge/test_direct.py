"""The direct path without a GPU: programs sized at launch, and the way to the launch on a fake driver."""

import threading
import warnings

import numpy as np
import pytest
import torch

import torch_bridge
from moe_align_jax._align import kernels, tables
from moe_align_jax._simt import emulator
from moe_align_jax._simt.emulator.faults import EmulatorError
from moe_align_jax.types import AlignProblem
from tests import oracle
from tests.bridge.fake_cuda import assert_results, exact_shapes, problem_of, resized, want_of
from tests.bridge.helpers import assert_format, ids_of, sized
from torch_bridge import _ops, _plan, _specs
from torch_bridge._direct import call, compile_pool, disk_cache, driver, problems, selftest, store
from torch_bridge._direct.program import LoadedProgram

GARBAGE = -77_777

# -- programs sized at launch ----------------------------------------------------------------------

# num_experts, block_size, sizes: both ends of buckets of every form, and between.
WARP = (8, 4, (1, 2, 7, 8, 9, 16, 31, 32))
BLOCK = (64, 16, (33, 64, 128, 129, 200, 256, 257, 512, 513, 1000, 2048))
CLUSTER = (16, 8, (2049, 2100, 4096, 4097, 5000, 8192))
GRID = (100, 8, (4097, 5000, 8192, 8193, 9000))
SORTED = (5000, 4, (33, 64, 65, 300, 512, 513, 1500))
SIZES = [(n, e, b) for e, b, sizes in (WARP, BLOCK, CLUSTER, GRID, SORTED) for n in sizes]
SIZES += [(20_000, 60, 64), (1, 1, 1), (100, 1, 3), (40, 65_535, 1)]
SIZES += [(1100, 65_535, 3), (17_000, 5000, 4)]

OPTIONS = {
    "plain": {"return_counts": False},
    "counts": {},
    "label": {"expert_map": "label", "return_inverse": True, "id_words": 2},
    "filter": {"expert_map": "filter", "has_num_valid_pairs": True, "return_counts": False},
    "limit": {"has_num_valid_pairs": True, "return_inverse": True},
    "minus one": {"minus_one": True, "id_words": 2, "return_counts": False},
}


def sized_problem(n, num_experts, block_size, options):
    end = tables.size_bucket(n, num_experts, block_size)
    rows = oracle.capacity(end, block_size, num_experts, False)
    return AlignProblem(end, num_experts, block_size, rows, sized_at_launch=True, **options)


def emulate(problem, trial, *, garbage=GARBAGE):
    """A launch on a smaller size: buffers hold no word more than they must, and garbage ahead of the ids."""
    exact = exact_shapes(problem, **trial.sizes)
    program = resized(kernels.build(problem, tables.config_for(problem)), exact)
    arrays = []
    for name in problem.inputs:
        if name in trial.sizes:
            arrays.append(np.array([trial.sizes[name]], np.int32))
            continue
        array = trial.inputs[name]
        if name == "topk_ids":
            array = array.copy()
            array[: trial.sizes["first_id"]] = garbage
            array = array.view(np.int32).reshape(exact[name])
        arrays.append(array)
    return emulator.run(program, arrays)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("n", "num_experts", "block_size"), SIZES)
def test_sized_program_gives_the_exact_result(n, num_experts, block_size, options):
    """Against the trial, which test_compile_worker.py holds to the oracle."""
    problem = sized_problem(n, num_experts, block_size, options)
    trial = selftest.align_example(problem, n, seed=n)
    results = emulate(problem, trial, garbage=n % num_experts)  # ids that would count
    for name, got in zip(problem.outputs, results, strict=True):
        np.testing.assert_array_equal(got, trial.expected[name], err_msg=name)


def test_every_form_is_among_the_sizes():
    forms = {tables.config_for(sized_problem(*size, {})).form for size in SIZES}
    assert forms == {"warp", "pairs", "block", "cluster", "grid", "sorted", "radix"}


@pytest.mark.parametrize("n", [3, 100, 2500])
def test_emulator_sees_a_read_past_the_ids(n):
    """What the exact sizes above rest on: one id less than the launch says."""
    problem = sized_problem(n, 16, 8, {})
    trial = selftest.align_example(problem, n, seed=0)
    exact = exact_shapes(problem, **trial.sizes)
    exact["topk_ids"] = (exact["topk_ids"][0] - 1,)
    program = resized(kernels.build(problem, tables.config_for(problem)), exact)
    arrays = [
        np.array([trial.sizes[name]], np.int32)
        if name in trial.sizes
        else trial.inputs[name][: exact["topk_ids"][0]]
        for name in problem.inputs
    ]
    with pytest.raises(EmulatorError):
        emulator.run(program, arrays)


# -- buckets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "block_size"), [(1, 1), (8, 64), (256, 128), (4096, 16), (9000, 4)]
)
def test_buckets_hold_their_sizes_and_are_few(num_experts, block_size):
    ends = problems.bucket_ends(2**22, num_experts, block_size)
    assert ends == sorted(set(ends)) and ends[-1] >= 2**22 and len(ends) <= 33
    edges = {n for end in ends for n in (end - 1, end, end + 1) if 1 <= n <= 2**22}
    sizes = sorted(edges | set(range(1, 9000)) | set(range(9000, 2**22, 9973)))
    got = [tables.size_bucket(n, num_experts, block_size) for n in sizes]
    assert all(end >= n for n, end in zip(sizes, got, strict=True))
    assert got == sorted(got) and set(got) == set(ends)
    for end in ends:
        assert tables.size_bucket(end, num_experts, block_size) == end
        config = tables.config_for(sized_problem(end, num_experts, block_size, {}))
        assert config.num_ctas >= 1 and config.rounds >= 1


@pytest.mark.parametrize("most", [1, 8, 9, 33, 5000])
def test_bucket_ends_reach_the_most_and_no_further(most):
    ends = problems.bucket_ends(most, 64, 16)
    assert ends[-1] == tables.size_bucket(most, 64, 16)
    assert {tables.size_bucket(n, 64, 16) for n in range(1, most + 1)} == set(ends)


def test_sizes_of_one_bucket_share_a_program():
    def problem(n, dtype):
        return sized(n, 64, 16, dtype, return_counts=True)

    assert problem(513, torch.int32) == problem(1024, torch.uint8)
    assert problem(512, torch.int32) != problem(513, torch.int32)
    assert problem(513, torch.int32) != problem(513, torch.int64)
    assert problem(513, torch.int64) == problem(1000, torch.uint64)
    assert sized(5, 8, 4, torch.int32, minus_one=True).num_experts == 9


# -- the way to the launch ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.uint64], ids=str)
@pytest.mark.parametrize("n", [3, 30, 111, 8200])
def test_every_size_and_dtype(n, dtype, fake):
    array, ids = ids_of(dtype, num_tokens=n, top_k=1)
    problem = _specs.AlignSpec(n, 16, 8, with_counts=True)
    results = _ops.run(problem, {"topk_ids": ids})
    assert_results(problem, results, want_of(problem, array, {}))
    assert len(fake.launched) == (2 if n > 8192 else 1)
    assert {stream for _, stream in fake.launched} == {7}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_view_at_any_element_is_read_where_it_lies(dtype, fake, monkeypatch):
    array, ids = ids_of(dtype, num_tokens=11)
    problem, held = _specs.AlignSpec(33, 16, 8), torch.full((256,), 3, dtype=dtype)
    want = want_of(problem, array, {})
    seen, launched = [], fake._run

    def look(kernel, given, values):
        seen.append(values["topk_ids"] + (values["first_id"] >> 8) * dtype.itemsize)
        launched(kernel, given, values)

    monkeypatch.setattr(fake, "_run", look)
    for offset in range(71):
        view = held[offset : offset + 33].view(11, 3)
        view.copy_(ids)
        assert call.copies({"topk_ids": view}) == {}
        results = _ops.run(problem, {"topk_ids": view})
        assert seen.pop() == view.data_ptr() == held.data_ptr() + offset * dtype.itemsize
        assert_results(problem, results, want)
        view.fill_(3)
    assert len(fake.compiles) == 1


OPERANDS = {
    "map": {"expert_map": torch.from_numpy(oracle.local_map("any", 16, 1))},
    "int64 map": {"expert_map": torch.from_numpy(oracle.local_map("any", 16, 1)).long()},
    "wide map": {"expert_map": torch.tensor([2**32 + 1, -(2**40), *range(14)])},
    "unsigned map": {"expert_map": torch.arange(16).flip(0).to(torch.uint8)},
    "strided map": {"expert_map": torch.arange(32, dtype=torch.int32)[::2] // 2},
    "limit": {"num_valid_pairs": torch.tensor(50)},
    "wide limit": {"num_valid_pairs": torch.tensor([2**40])},
    "negative limit": {"num_valid_pairs": torch.tensor(-(2**40))},
    "both": {
        "expert_map": torch.arange(16, dtype=torch.int32) - 3,
        "num_valid_pairs": torch.tensor(70, dtype=torch.int16),
    },
}
FLAGS = {
    "plain": {},
    "filter": {"ignore_invalid_experts": True},
    "padded": {"pad_sorted_ids": True, "with_counts": True},
    "inverse": {"with_counts": True, "with_inverse": True},
    "scatter": {"ignore_invalid_experts": True, "with_scatter_idx": True},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("name", OPERANDS)
def test_options(name, flags, fake):
    array, ids = ids_of(torch.int32)
    problem = _specs.AlignSpec(ids.numel(), 16, 8, **flags)
    given = {"topk_ids": ids, **OPERANDS[name]}
    results = _ops.run(problem, given)
    assert_results(problem, results, want_of(problem, array, OPERANDS[name]))


@pytest.mark.parametrize("limit", [-1, 0, 50, 2**31 - 1])
def test_limit_as_an_int(limit, fake):
    array, ids = ids_of(torch.int32)
    problem = _specs.AlignSpec(ids.numel(), 16, 8, with_counts=True)
    results = _ops.run(problem, {"topk_ids": ids}, max_valid_pairs=limit)
    assert_results(problem, results, want_of(problem, array, {}, limit))


def test_layouts_that_are_copied(fake):
    array, ids = ids_of(torch.int32)
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    want = want_of(problem, array, {})
    for view in (ids.t().contiguous().t(), torch.stack([ids, ids], 2)[:, :, 0]):
        assert set(call.copies({"topk_ids": view})) == {"topk_ids"}
        assert_results(problem, _ops.run(problem, {"topk_ids": view}), want)
    negated = torch._neg_view(-ids)
    assert "negation" in call.copies({"topk_ids": negated})["topk_ids"]
    assert_results(problem, _ops.run(problem, {"topk_ids": negated}), want)


@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("n", [1, 33, 8200])
def test_out_is_written_and_nothing_beside_it(n, offset, fake):
    array, ids = ids_of(torch.int64, num_tokens=n, top_k=1)
    problem = _specs.AlignSpec(n, 16, 8)
    held = [
        torch.full((offset + shape[0] + 9,), -5, dtype=torch.int32)
        for shape in problem.outputs.values()
    ]
    out = [x[offset : x.numel() - 9] for x in held]
    results = _ops.run(problem, {"topk_ids": ids}, out=out)
    assert all(a is b for a, b in zip(results, out, strict=True))
    assert_results(problem, results, want_of(problem, array, {}))
    for tensor in held:
        assert (tensor[:offset] == -5).all() and (tensor[-9:] == -5).all()


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("inactive", [False, True])
def test_sglang(ignore, inactive, fake):
    """Its function on a CPU runs through jax: another way to the same numbers."""
    _, ids = ids_of(torch.int64, "minus_30", num_tokens=40)
    problem = _specs.SglangSpec(ids.numel(), 16, 8, ignore, inactive)
    got = _ops.run(problem, {"topk_ids": ids})
    want = _ops.run(problem, {"topk_ids": ids}, path="dlpack")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32, torch.uint8], ids=str)
def test_batched(dtype, fake):
    counts = torch.tensor([3, 0, 15, 200, 7, 16, 1, 2]).to(dtype)
    problem = _specs.BatchedSpec(8, 15, 8)
    results = _ops.run(problem, {"expert_num_tokens": counts})
    want = oracle.align_batched(counts.tolist(), max_tokens_per_batch=15, block_size=8)
    assert_results(problem, results, want)


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_batched_into_out(offset, fake):
    counts = torch.tensor([3, 0, 15, 200, 7, 16, 1, 2], dtype=torch.int32)
    problem = _specs.BatchedSpec(8, 15, 8)
    held = [torch.full((offset + k[0] + 5,), -5).int() for k in problem.outputs.values()]
    out = [x[offset:-5] for x in held]
    results = _ops.run(problem, {"expert_num_tokens": counts}, out=out)
    assert all(a is b for a, b in zip(results, out, strict=True))
    want = oracle.align_batched(counts.tolist(), max_tokens_per_batch=15, block_size=8)
    assert_results(problem, results, want)
    for tensor in held:
        assert (tensor[:offset] == -5).all() and (tensor[-5:] == -5).all()


def test_sglang_refuses_unsigned_ids(fake):
    _, ids = ids_of(torch.uint64)
    operands = {"topk_ids": ids}
    plan = _plan.resolve("f", _specs.SglangSpec(ids.numel(), 16, 8), operands).plan
    assert plan.path == "dlpack" and "-1" in plan.reasons["direct"]
    plan = _plan.resolve("f", _specs.AlignSpec(ids.numel(), 16, 8), operands).plan
    assert plan.path == "direct"


# -- streams, threads, buffers between ---------------------------------------------------------------


def test_stream_is_asked_for_at_every_call(fake):
    _, ids = ids_of(torch.int32, num_tokens=3000)
    problem = _specs.AlignSpec(9000, 16, 8)
    for stream in (7, 0, 9, 0, 7):
        fake.stream = stream
        _ops.run(problem, {"topk_ids": ids})
    assert [stream for _, stream in fake.launched] == [7, 7, 0, 0, 9, 9, 0, 0, 7, 7]


def test_buffers_between_are_held_until_the_last_launch(fake, monkeypatch):
    """Another thread on the same stream must not get them from the allocator before."""
    _, ids = ids_of(torch.int32, num_tokens=3000)
    problem, memory, dead = _specs.AlignSpec(9000, 16, 8), [], []

    class Tracked:
        def __init__(self, size, *_):
            self.tensor = torch.empty(size, dtype=torch.int32)
            memory.append(self.tensor)  # stays, so that a defect is seen and does not crash

        def data_ptr(self):
            return self.tensor.data_ptr()

        def __del__(self):
            dead.append(len(fake.launched))

    fake.empty = Tracked
    needed = problem_of(problem, {"topk_ids": ids})
    program = LoadedProgram(fake, -1, needed, fake.entry(needed))
    run, counted = fake._run, []
    monkeypatch.setattr(fake, "_run", lambda *a: (counted.append(len(dead)), run(*a)))
    results = [torch.empty(shape, dtype=torch.int32) for shape in problem.outputs.values()]
    pointer, targets = ids.data_ptr(), [x.data_ptr() for x in results]
    sizes = 9000 << 8, problem.capacity << 8, (pointer & 255) // 4 << 8
    program.launch(pointer - (pointer & 255), *sizes, *targets)
    assert counted == [0, 0] and len(dead) == 1


def test_threads_have_argument_memory_of_their_own(fake):
    cases = []
    for seed in range(4):
        array, ids = ids_of(torch.int32, num_tokens=20 + seed, seed=seed)
        problem = _specs.AlignSpec(ids.numel(), 16, 8)
        cases.append((problem, ids, want_of(problem, array, {})))
    store.here.prepare(-1, [problem_of(p, {"topk_ids": i}) for p, i, _ in cases])
    packed, launches = [], driver.Launches
    start, errors = threading.Barrier(4), []

    class Seen(launches):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            packed.append((threading.get_ident(), self))

    def work(k):
        problem, ids, want = cases[k]
        start.wait()
        try:
            for _ in range(5):
                assert_results(problem, _ops.run(problem, {"topk_ids": ids}), want)
        except BaseException as error:  # noqa: B036 - shown below
            errors.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "Launches", Seen)
        # The fake's own sizes are of one launch at a time.
        lock, kernel = threading.Lock(), fake._run
        patch.setattr(fake, "_run", lambda *a: locked(lock, kernel, a))
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert not errors, errors
    assert len(packed) == len({thread for thread, _ in packed}) == 4


def locked(lock, function, arguments):
    with lock:
        return function(*arguments)


# -- prepare ---------------------------------------------------------------------------------------

SMALL, LARGE = (sized(n, 16, 8, torch.int32) for n in (5, 100))


def test_prepare_compiles_what_is_missing_once_and_keeps_it_on_disk(fake):
    store.here.prepare(-1, [SMALL])
    store.here.prepare(-1, [SMALL, LARGE])
    store.here.prepare(-1, [LARGE])
    assert fake.compiles == [[SMALL], [LARGE]]
    assert len(list(disk_cache.folder().glob("*.mod"))) == 2
    first = store.here.programs.get((-1, SMALL))
    assert first is not None and store.here.programs.get((-1, LARGE)) is not first


def test_next_process_loads_and_compiles_nothing(fake):
    store.here.prepare(-1, [SMALL, LARGE])
    store.here.programs.clear()
    loads = fake.loads
    store.here.prepare(-1, [SMALL, LARGE])
    assert len(fake.compiles) == 1 and fake.loads == loads + 2
    array, ids = ids_of(torch.int32, num_tokens=100, top_k=1)
    problem = _specs.AlignSpec(100, 16, 8)
    assert_results(problem, _ops.run(problem, {"topk_ids": ids}), want_of(problem, array, {}))


def test_devices_have_programs_of_their_own(fake):
    store.here.prepare(0, [SMALL])
    loads = fake.loads
    assert store.here.programs.get((1, SMALL)) is None
    store.here.prepare(1, [SMALL])
    assert len(fake.compiles) == 1 and fake.loads == loads + 1  # the same GPU: from disk
    assert store.here.programs.get((0, SMALL)) is not store.here.programs.get((1, SMALL))


def test_prepare_by_many_threads_compiles_once(fake):
    start = threading.Barrier(8)

    def work():
        start.wait()
        store.here.prepare(-1, [SMALL])

    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert fake.compiles == [[SMALL]]


def test_damaged_entry_is_compiled_again(fake):
    store.here.prepare(-1, [SMALL])
    [file] = disk_cache.folder().glob("*.mod")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    store.here.programs.clear()
    store.here.prepare(-1, [SMALL])
    assert fake.compiles == [[SMALL], [SMALL]]


def test_failure_is_remembered_and_the_others_are_loaded(fake, monkeypatch):
    compile_ = fake.compile

    def failing(index, wanted):
        entries = compile_(index, wanted)
        return ["no luck" if p == LARGE else e for p, e in zip(wanted, entries, strict=True)]

    fake.compile = failing
    for _ in range(2):
        with pytest.raises(store.Unavailable, match="no luck"):
            store.here.prepare(-1, [SMALL, LARGE])
    assert fake.compiles == [[SMALL, LARGE]]
    assert store.here.programs.get((-1, SMALL)) and store.here.failure(-1, LARGE) == "no luck"


def test_miss_during_capture_names_warmup(fake, monkeypatch):
    _, ids = ids_of(torch.int32)
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    fake.capturing = True
    with pytest.raises(RuntimeError, match=r"torch_bridge\.warmup") as caught:
        _ops.run(problem, {"topk_ids": ids})
    assert_format(caught.value)
    assert not fake.compiles and not fake.launched
    fake.capturing = False
    _ops.run(problem, {"topk_ids": ids})
    fake.capturing = True
    _ops.run(problem, {"topk_ids": ids})  # it is loaded now


# -- falling back ------------------------------------------------------------------------------------


@pytest.fixture
def failing(fake, monkeypatch):
    fake.compile = lambda index, wanted: ["no compiler here"] * len(wanted)
    return fake


def test_auto_falls_back_with_one_warning_and_says_why(failing):
    array, ids = ids_of(torch.int32)
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    want = want_of(problem, array, {})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_results(problem, _ops.run(problem, {"topk_ids": ids}), want)
    assert [str(w.message) for w in seen if "no compiler here" in str(w.message)] == [
        "torch_bridge: the direct path cannot run, DLPack is used: no compiler here"
    ]
    assert not failing.launched
    explained = torch_bridge.explain(ids, 16, 8)
    assert explained.path == "dlpack" and explained.reasons["direct"] == "no compiler here"


def test_direct_by_name_raises_instead(failing):
    _, ids = ids_of(torch.int32)
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    for _ in range(2):  # the first time from the attempt, then from the plan
        with pytest.raises(NotImplementedError, match="(?i)no compiler here") as caught:
            _ops.run(problem, {"topk_ids": ids}, path="direct")
        assert_format(caught.value)


def test_worker_that_cannot_start_or_dies_is_a_reason(monkeypatch, tmp_path):
    def first(executable):
        monkeypatch.setattr(compile_pool.sys, "executable", str(executable))
        [answer] = compile_pool.compile_all(0, [SMALL])
        return getattr(answer, "reason", answer)

    assert "no process to compile in" in first(tmp_path / "missing")
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho because of this >&2\nexit 3\n")
    script.chmod(0o755)
    answer = first(script)
    assert "status 3" in answer and "because of this" in answer
    script.write_text('#!/bin/sh\necho noise\necho \'{"error": "a reason"}\'\n')
    assert first(script) == "a reason"
    monkeypatch.setattr(compile_pool, "_COMPILE_SECONDS", 0.2)
    script.write_text("#!/bin/sh\nexec sleep 5\n")
    assert "over 0.2 s" in first(script)
