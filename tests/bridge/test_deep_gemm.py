"""torch_bridge.deep_gemm against NumPy's products of the dequantised operands, by DeepGEMM's own rule."""

import ast
import ctypes
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

import torch_bridge
import torch_bridge.deep_gemm as deep_gemm
from tests.gpu.graphs import capture
from torch_bridge._direct import store
from torch_bridge.deep_gemm import calls, direct, repeated
from torch_bridge.deep_gemm import scales as layouts

GROUPS, K, N = 4, 256, 192
COUNTS = (130, 0, 1, 128)  # rows of each group
NAN = 0x7F


@pytest.fixture
def device(request):
    """Where a test runs; "launched": on the CPU, by the launches that a GPU would get."""
    if request.param != "launched":
        yield request.param
        return
    fake = request.getfixturevalue("fake")
    fake.launches_directly = True
    yield "cpu"
    assert fake.launched and not fake.capturing


@pytest.fixture(autouse=True)
def _alignment_kept():
    repeated.calls.forget_all()
    yield
    repeated.calls.forget_all()
    deep_gemm.set_mk_alignment_for_contiguous_layout(128)


def everywhere(names, cases, by_jax):
    """Parametrises `device` and `names`: every case launched and on a GPU, some on a CPU, by jax."""
    gpu = [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in cases]
    given = [("cpu", *case) for case in by_jax] + [("launched", *case) for case in cases] + gpu
    return pytest.mark.parametrize(("device", *names), given, indirect=["device"])


# -- operands, and their products in float64 -------------------------------------------------------


def codes(rng, *shape):
    """e4m3 codes of every finite value, subnormals included, and their values in float64."""
    raw = rng.integers(0, 256, shape).astype(np.uint8)
    raw = torch.from_numpy(np.where(raw & 0x7F == NAN, np.uint8(8), raw)).view(torch.float8_e4m3fn)
    return raw, raw.to(torch.float32).numpy().astype(np.float64)


def powers(rng, *shape):
    """Scales that exponents can tell, some of them 0."""
    found = np.exp2(rng.integers(-9, -4, shape)).astype(np.float32)
    return np.where(rng.integers(0, 20, shape) == 0, np.float32(0), found)


def pack(scales):
    """int32 `[..., ceil(G / 4)]`: exponent i of a word in its byte i."""
    exponents = (scales.view(np.int32) >> 23).astype(np.uint8)
    spare = [(0, 0)] * (scales.ndim - 1) + [(0, -scales.shape[-1] % 4)]
    return np.ascontiguousarray(np.pad(exponents, spare)).view(np.int32)


def mn_major(scales, spare):
    """Rows innermost, `spare` elements between the last row and the next column: NaN, never to be used."""
    *lead, rows, words = scales.shape
    memory = np.full((*lead, words, rows + spare), -1 if scales.dtype == np.int32 else np.nan)
    memory = memory.astype(scales.dtype)
    memory[..., :rows] = scales.swapaxes(-1, -2)
    return torch.from_numpy(memory)[..., :rows].transpose(-1, -2)


def cut_off(scales):
    """DeepGEMM's own: the memory ends with the last row of the last column."""
    lain = layouts.mn_major(torch.from_numpy(scales))
    end = 1 + sum((n - 1) * s for n, s in zip(lain.shape, lain.stride(), strict=True))
    return torch.empty(end).as_strided(lain.shape, lain.stride()).copy_(lain)


LAYOUTS = {
    "row-major": torch.from_numpy,
    "mn-major": lambda s: mn_major(s, -s.shape[-2] % 4),
    "mn-major, cut off": cut_off,
    "packed": lambda s: mn_major(pack(s), 0),
    "packed, row-major": lambda s: torch.from_numpy(pack(s)),
    "every other column": lambda s: torch.from_numpy(np.repeat(s, 2, axis=-1))[..., ::2],
}


def make_b(rng, groups=GROUPS, n=N, k=K):
    values, wide = codes(rng, groups, n, k)
    scales = powers(rng, groups, -(-n // 128), k // 128)
    return (values, torch.from_numpy(scales)), wide * scales.repeat(128, 1)[:, :n].repeat(128, 2)


def make_a(rng, layout, *rows, k=K, padding=None):
    """((values, scales), float64); rows of `padding` hold NaN, and infinite scales."""
    values, wide = codes(rng, *rows, k)
    scales = powers(rng, *rows, k // 128)
    wide = wide * scales.repeat(128, -1)
    if padding is not None:
        values.view(torch.uint8)[torch.from_numpy(padding)] = NAN
        if "packed" not in layout:
            scales[padding] = np.inf
    return (values, LAYOUTS[layout](scales)), wide


def to(device, value):
    """Each tensor there, with its strides."""
    if isinstance(value, tuple):
        return tuple(to(device, each) for each in value)
    if device == "cpu" or value.is_contiguous():
        return value.to(device)
    raw = value.untyped_storage()
    flat = torch.empty(0, dtype=value.dtype).set_(raw).to(device)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


def labels(counts, alignment):
    """`[M]` int32: a row's group, -1 for padding; a block of padding at the end."""
    found = []
    for group, count in enumerate(counts):
        found += [group] * count + [-1] * (-count % alignment)
    return np.array(found + [-1] * alignment, np.int32)


def ends(counts, alignment):
    found, start = [], 0
    for count in counts:
        found.append(start + count)
        start = -(-found[-1] // alignment) * alignment
    return np.array(found, np.int32)


def check(found, want):
    """DeepGEMM's rule, and a relative error within bfloat16's rounding."""
    found = found.float().cpu().numpy().astype(np.float64)
    assert found.shape == want.shape
    assert 1 - 2 * (found * want).sum() / ((found**2).sum() + (want**2).sum()) < 1e-3
    assert np.linalg.norm(found - want) < 5e-3 * np.linalg.norm(want)


# -- the contiguous layout -------------------------------------------------------------------------


@everywhere(["layout"], [[name] for name in LAYOUTS], [["mn-major, cut off"], ["packed"]])
def test_contiguous(layout, device):
    rng = np.random.default_rng(0)
    group = labels(COUNTS, 128)
    a, wide_a = make_a(rng, layout, len(group), padding=group < 0)
    b, wide_b = make_b(rng)
    d = torch.full((len(group), N), 7.0, dtype=torch.bfloat16, device=device)
    given = to(device, (a, b)), d, to(device, torch.from_numpy(group))
    assert deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*given[0], *given[1:]) is None
    real = group >= 0
    want = np.einsum("mk,mnk->mn", wide_a[real], wide_b[group[real]], optimize=True)
    check(d[torch.from_numpy(real).to(device)], want)


@everywhere(["layout", "rows"], [["mn-major", 0], ["row-major", 40], ["packed", 100]], [])
def test_halves_of_blocks_without_rows(layout, rows, device):
    """Groups of every number of rows around 64, in tiles whose second half may be left out; a last block of
    so many rows. Rows of padding are NaN, and of d written or not: none is read for another."""
    counts, n, k = (1, 63, 64, 65, 128, 0, 129, 127, 192), 384, 1024
    rng = np.random.default_rng(14)
    group = labels(counts, 128)[: sum(-(-count // 128) for count in counts) * 128 + rows]
    group[len(group) - rows :] = len(counts) - 1
    a, wide_a = make_a(rng, layout, len(group), k=k, padding=group < 0)
    b, wide_b = make_b(rng, len(counts), n, k)
    d = torch.full((len(group), n), 7.0, dtype=torch.bfloat16, device=device)
    given = *to(device, (a, b)), d, to(device, torch.from_numpy(group))
    call = calls.checked("f", calls.CONTIGUOUS, *given[0], *given[1], d, given[3], 128, 0)
    assert direct.program_problem(call.problem, "NVIDIA H200").tiles.skips
    for _ in range(2):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*given)
    real = group >= 0
    want = np.einsum("mk,mnk->mn", wide_a[real], wide_b[group[real]], optimize=True)
    check(d[torch.from_numpy(real).to(device)], want)


@everywhere(["alignment"], [[128], [64], [192]], [[128]])
def test_ends_of_groups(alignment, device):
    deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
    rng = np.random.default_rng(1)
    group = labels(COUNTS, alignment)
    a, wide_a = make_a(rng, "mn-major", len(group))
    b, wide_b = make_b(rng)
    d = torch.full((len(group), N), 7.0, dtype=torch.bfloat16, device=device)
    layout = to(device, torch.from_numpy(ends(COUNTS, alignment)))
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        *to(device, (a, b)), d, layout, use_psum_layout=True, expected_m_for_psum_layout=65
    )
    real = group >= 0
    want = np.einsum("mk,mnk->mn", wide_a[real], wide_b[group[real]], optimize=True)
    check(d[torch.from_numpy(real).to(device)], want)


@everywhere(
    ["turned", "use_psum_layout"],
    [(turned, psum) for turned in (False, True) for psum in (False, True)],
    [(True, False)],
)
def test_bfloat16_contiguous(turned, use_psum_layout, device):
    rng = np.random.default_rng(2)
    group = labels(COUNTS, 128)
    a = torch.from_numpy(rng.standard_normal((len(group), 72))).bfloat16()
    b = torch.from_numpy(rng.standard_normal((GROUPS, 40, 72))).bfloat16()
    a[torch.from_numpy(group < 0)] = float("nan")
    d = torch.full((len(group), 40), 7.0, dtype=torch.bfloat16, device=device)
    layout = torch.from_numpy(ends(COUNTS, 128) if use_psum_layout else group)
    given = b.transpose(1, 2).contiguous().to(device).transpose(1, 2) if turned else b.to(device)
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(
        a.to(device), given, d, layout.to(device), use_psum_layout=use_psum_layout
    )
    real = torch.from_numpy(group >= 0)
    rows, weights = (x.float().numpy().astype(np.float64) for x in (a[real], b))
    check(d[real.to(device)], np.einsum("mk,mnk->mn", rows, weights[group[group >= 0]]))


def test_parts_of_larger_tensors(fake):
    """Rows of a, and of scales by columns, that begin within them, and a d off the boundary."""
    fake.launches_directly = True
    rng = np.random.default_rng(10)
    b, wide_b = make_b(rng)
    (values, scales), wide = make_a(rng, "mn-major", 300)
    memory = torch.full((256 * N + 8,), 7.0, dtype=torch.bfloat16)
    layout = torch.full((256,), 2, dtype=torch.int32)
    for first in (0, 1, 44):
        part = slice(first, first + 256)
        d = memory[1 + first % 2 : 1 + first % 2 + 256 * N].view(256, N)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((values[part], scales[part]), b, d, layout)
        check(d, wide[part] @ wide_b[2].T)
        assert memory[0] == 7 and (memory[256 * N + 2 :] == 7).all()
    assert fake.launched


# -- calls like an earlier one ---------------------------------------------------------------------


def on_boundaries(*values):
    """Each tensor where a GPU's allocator would put it; its storage is as long as before."""
    found = []
    for value in values:
        if isinstance(value, tuple):
            found.append(on_boundaries(*value))
            continue
        size = value.untyped_storage().nbytes()
        memory = np.empty(size + 256, np.uint8)
        first = -memory.ctypes.data % 256
        whole = torch.from_numpy(memory[first : first + size])
        assert whole.data_ptr() % 256 == 0 and whole.untyped_storage().nbytes() == size
        whole.copy_(torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()))
        flat = torch.empty(0, dtype=value.dtype).set_(whole.untyped_storage())
        found.append(flat.as_strided(value.shape, value.stride(), value.storage_offset()))
    return tuple(found)


REPEATED = ["row-major", "mn-major", "packed", "packed, row-major"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", [*REPEATED, "mn-major, cut off", "every other column"])
def test_a_call_like_an_earlier_one_is_launched_without_checks(layout, masked, fake, monkeypatch):
    """But not where scales are copied for each call."""
    fake.launches_directly = True
    rng, rows = np.random.default_rng(12), (GROUPS, 22) if masked else (254,)
    where = torch.full((GROUPS,), 22, dtype=torch.int32)
    if not masked:
        where = torch.tensor([2, 0], dtype=torch.int32).repeat_interleave(128)[:254].clone()
    [where] = on_boundaries(where)
    checked, checks = calls.checked, []
    monkeypatch.setattr(calls, "checked", lambda *given: checks.append(1) or checked(*given))
    for count in range(1, 4):
        (a, wide_a), (b, wide_b) = make_a(rng, layout, *rows), make_b(rng)
        a, b, d = on_boundaries(a, b, torch.full((*rows, N), 7.0, dtype=torch.bfloat16))
        before = len(fake.launched)
        if masked:
            deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, where, 22)
            want = np.einsum("gmk,gnk->gmn", wide_a, wide_b)
        else:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, where)
            want = np.einsum("mk,mnk->mn", wide_a, wide_b[where.numpy()])
        check(d, want)
        assert len(fake.launched) == before + 1  # without a list of tiles: groups are few
        assert len(checks) == (1 if layout in REPEATED else count)


def test_what_differs_from_an_earlier_call_is_checked_again(fake):
    fake.launches_directly = True
    rng = np.random.default_rng(13)
    (a, wide_a), (b, wide_b) = make_a(rng, "mn-major", 384), make_b(rng)
    memory = torch.full((384 * N + 8,), 7.0, dtype=torch.bfloat16)
    layout = torch.zeros(384, dtype=torch.int32)
    a, b, memory, layout = on_boundaries(a, b, memory, layout)
    multiply = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    d = memory[: 384 * N].view(384, N)
    multiply(a, b, d, layout)
    check(d, wide_a @ wide_b[0].T)
    assert len(repeated.calls._known) == 1
    off = memory[4 : 4 + 384 * N].view(384, N)  # its boundary
    multiply(a, b, off, layout)
    check(off, wide_a @ wide_b[0].T)
    deep_gemm.set_mk_alignment_for_contiguous_layout(192)  # whose label counts
    other = torch.tensor([1, 2, 3], dtype=torch.int32).repeat_interleave(128)
    multiply(a, b, d, other)
    check(d, np.einsum("mk,mnk->mn", wide_a, wide_b[np.repeat([1, 2], 192)]))
    within = torch.empty(0, dtype=torch.bfloat16).set_(a[0].untyped_storage())[: 128 * 192]
    with pytest.raises(ValueError, match="d must not overlap"):
        multiply((a[0][:128], a[1][:128]), b, within.view(128, 192), layout[:128])
    multiply((a[0][:128], a[1][:128]), b, d[:128], layout[:128])
    with pytest.raises(ValueError, match="d must not overlap"):  # the same, as a repeated call
        multiply((a[0][:128], a[1][:128]), b, within.view(128, 192), layout[:128])
    with pytest.raises(TypeError, match="grouped_layout must be int32"):
        multiply(a, b, d, layout.long())


def test_rows_of_padding_are_zero_where_those_of_a_are():
    """What DeepGEMM promises as ensure_zero_padding."""
    rng = np.random.default_rng(3)
    group = labels(COUNTS, 128)
    a, _ = make_a(rng, "row-major", len(group))
    a[0].view(torch.uint8)[torch.from_numpy(group < 0)] = 0
    d = torch.full((len(group), N), 7.0, dtype=torch.bfloat16)
    layout = torch.from_numpy(ends(COUNTS, 128))
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, make_b(rng)[0], d, layout, use_psum_layout=True)
    used = -(-int(layout[-1]) // 128) * 128
    assert (d[:used][torch.from_numpy(group[:used] < 0)] == 0).all()
    assert (d[torch.from_numpy(group >= 0)] != 0).any()


# -- the masked layout -----------------------------------------------------------------------------


@everywhere(["layout"], [[name] for name in LAYOUTS], [["row-major"], ["mn-major"]])
def test_masked(layout, device):
    most, counts = 22, np.array([22, 0, 1, 17], np.int32)
    rng = np.random.default_rng(4)
    padding = np.arange(most)[None] >= counts[:, None]
    a, wide_a = make_a(rng, layout, GROUPS, most, padding=padding)
    b, wide_b = make_b(rng)
    d = torch.full((GROUPS, most, N), 7.0, dtype=torch.bfloat16, device=device)
    masked_m = torch.from_numpy(counts).to(device)
    multiply = deep_gemm.m_grouped_fp8_gemm_nt_masked
    if layout == "mn-major":
        multiply = deep_gemm.fp8_m_grouped_gemm_nt_masked
    assert multiply(*to(device, (a, b)), d, masked_m, 10) is None
    used = torch.from_numpy(~padding)
    check(d[used.to(device)], np.einsum("gmk,gnk->gmn", wide_a, wide_b)[~padding])


@everywhere([], [[]], [])
def test_bfloat16_masked(device):
    rng = np.random.default_rng(5)
    counts = np.array([9, 0, 3], np.int32)
    a = torch.from_numpy(rng.standard_normal((3, 9, 72))).bfloat16()
    b = torch.from_numpy(rng.standard_normal((3, 40, 72))).bfloat16()
    used = torch.arange(9)[None] < torch.from_numpy(counts)[:, None]
    a[~used] = float("nan")
    d = torch.empty(3, 9, 40, dtype=torch.bfloat16, device=device)
    masked_m = torch.from_numpy(counts).to(device)
    deep_gemm.m_grouped_bf16_gemm_nt_masked(a.to(device), b.to(device), d, masked_m, 4)
    want = np.einsum("gmk,gnk->gmn", a.float().numpy(), b.float().numpy())
    check(d[used.to(device)], want[used.numpy()].astype(np.float64))


def test_nothing_to_multiply():
    rng = np.random.default_rng(6)
    (values, scales), _ = make_a(rng, "row-major", 128)
    behind = torch.full((1, N), 7, dtype=torch.bfloat16)
    empty = (values[:0], scales[:0]), make_b(rng)[0], behind[:0], torch.empty(0, dtype=torch.int32)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*empty)
    assert (behind == 7).all()


def test_tracers_see_an_operator_that_mutates_d_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen, given = [], arguments()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode() as mode:
        fake = {
            name: tuple(map(mode.from_tensor, x)) if isinstance(x, tuple) else mode.from_tensor(x)
            for name, x in given.items()
        }
        with Record():
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(**fake)
    op = torch.ops.moe_align_jax.deep_gemm_into_dlpack.default
    assert seen == [op]
    written = [x.name for x in op._schema.arguments if x.alias_info and x.alias_info.is_write]
    assert written == ["d"]


LARGE = ((700, 300), 1024, 192)  # rows of each group, K, N: tiles that clusters share


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "expected_m"), [("contiguous", 0), ("masked", 200), ("masked", 600)]
)
def test_tiles_that_clusters_share(rows, expected_m, monkeypatch):
    """And none of their registers is spilled: the driver's linker would ignore setmaxnreg."""
    counts, k, n = LARGE
    rng, groups = np.random.default_rng(14), len(counts)
    b, wide_b = make_b(rng, groups, n, k)
    given = []
    bound = direct.program_for
    monkeypatch.setattr(
        direct, "program_for", lambda *args: given.append(bound(*args)) or given[-1]
    )
    if rows == "contiguous":
        group = labels(counts, 128)
        a, wide_a = make_a(rng, "mn-major", len(group), k=k)
        d = torch.full((len(group), n), 7.0, dtype=torch.bfloat16, device="cuda")
        where = to("cuda", torch.from_numpy(group))
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*to("cuda", (a, b)), d, where)
        real = group >= 0
        check(d[to("cuda", torch.from_numpy(real))], product(wide_a[real], wide_b, group[real]))
    else:
        a, wide_a = make_a(rng, "mn-major", groups, 768, k=k)
        d = torch.full((groups, 768, n), 7.0, dtype=torch.bfloat16, device="cuda")
        where = torch.tensor(counts, dtype=torch.int32, device="cuda")
        deep_gemm.m_grouped_fp8_gemm_nt_masked(*to("cuda", (a, b)), d, where, expected_m)
        for group, count in enumerate(counts):
            check(d[group, :count], wide_a[group, :count] @ wide_b[group].T)
    [used] = given
    assert used.direct.tiles.sharing == 2
    library = store.here.machine.driver.library
    for spec in used.program.specs:
        local = ctypes.c_int(-1)
        library.cuFuncGetAttribute(ctypes.byref(local), 3, ctypes.c_void_p(spec.function))
        assert local.value == 0  # CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES


def product(wide_a, wide_b, group):
    """float64, a group at a time."""
    found = np.empty((len(wide_a), wide_b.shape[1]))
    for each in set(group.tolist()):
        found[group == each] = wide_a[group == each] @ wide_b[each].T
    return found


@pytest.mark.gpu
def test_compiled():
    """One operator in the graph, for two numbers of rows."""
    rng = np.random.default_rng(7)
    b, wide_b = make_b(rng)

    def step(a, b, layout):
        d = a[0].new_empty((a[0].shape[0], N), dtype=torch.bfloat16)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout)
        return d * 2

    compiled = torch.compile(step, fullgraph=True)
    for counts in ((128, 0, 5, 0), (1, 1, 1, 1)):
        group = labels(counts, 128)
        a, wide_a = make_a(rng, "mn-major", len(group))
        out = compiled(*to("cuda", (a, b)), to("cuda", torch.from_numpy(group)))
        real = group >= 0
        want = np.einsum("mk,mnk->mn", wide_a[real], wide_b[group[real]], optimize=True)
        check(out[torch.from_numpy(real).cuda()] / 2, want)


@pytest.mark.gpu
@pytest.mark.parametrize("use_psum_layout", [False, True])
def test_captured_into_a_graph(use_psum_layout):
    """Rows and labels change between replays, and nothing is copied to the host."""
    rng = np.random.default_rng(10)
    b, wide_b = make_b(rng)
    counts = [(128, 0, 5, 0), (1, 100, 0, 70)]
    made = [
        (group, *make_a(rng, "mn-major", len(group)))
        for group in (labels(each, 128)[:384] for each in counts)
    ]
    where = [
        torch.from_numpy(ends(c, 128) if use_psum_layout else m[0])
        for c, m in zip(counts, made, strict=True)
    ]
    a, b, layout = *to("cuda", (made[0][1], b)), where[0].cuda()
    d = torch.empty(384, N, dtype=torch.bfloat16, device="cuda")

    def call():
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout, use_psum_layout=use_psum_layout)

    call()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        call()
    for (group, given, wide_a), new in reversed(list(zip(made, where, strict=True))):
        for target, source in zip((*a, layout), (*given, new), strict=True):
            target.copy_(source)
        graph.replay()
        real = group >= 0
        want = np.einsum("mk,mnk->mn", wide_a[real], wide_b[group[real]], optimize=True)
        check(d[torch.from_numpy(real).cuda()], want)


@pytest.mark.gpu
def test_captured_before_its_first_call():
    """New sizes in a capture: an error that says what to do."""
    rng = np.random.default_rng(11)
    a, b = to("cuda", (make_a(rng, "mn-major", 2, 12, k=384)[0], make_b(rng, 2, 320, 384)[0]))
    d = torch.zeros(2, 12, 320, dtype=torch.bfloat16, device="cuda")
    masked_m = torch.ones(2, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(torch_bridge.Miss, match="Call it once with these shapes"),
        capture(graph),
    ):
        deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["row-major", "mn-major"])
def test_deep_gemm_itself(layout):
    """The package, where benchmarks.fetch left it and it loads: the same call on the same tensors."""
    from benchmarks import deep_gemm_peer

    if not deep_gemm_peer.is_in(".peers"):
        pytest.skip("python -m benchmarks.fetch deep_gemm gets it")
    theirs = deep_gemm_peer.load(".peers")
    rng = np.random.default_rng(12)
    group = labels(COUNTS, 128)
    (values, _), _ = make_a(rng, layout, len(group))
    scales = LAYOUTS[layout](powers(rng, len(group), K // 128))
    a, b = to("cuda", ((values, scales), make_b(rng)[0]))
    grouped_layout = torch.from_numpy(group).cuda()
    results = []
    for library in (deep_gemm, theirs):
        d = torch.empty(len(group), N, dtype=torch.bfloat16, device="cuda")
        library.m_grouped_fp8_gemm_nt_contiguous(a, b, d, grouped_layout, disable_ue8m0_cast=True)
        results.append(d[grouped_layout >= 0])
    check(results[0], results[1].float().cpu().numpy().astype(np.float64))


# -- helpers ---------------------------------------------------------------------------------------


def test_alignment_is_set_and_told():
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 128
    for value in (64, 192):
        deep_gemm.set_mk_alignment_for_contiguous_layout(value)
        assert deep_gemm.get_mk_alignment_for_contiguous_layout() == value
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout() == 128
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(20) == 128
    with pytest.raises(NotImplementedError, match="^set_mk_alignment_.* must be one of 64, 128"):
        deep_gemm.set_mk_alignment_for_contiguous_layout(32)
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 192


@pytest.mark.parametrize("shape", [(5, 3), (8, 3), (2, 5, 3), (1, 1, 1)], ids=str)
def test_scales_are_turned_once(shape):
    sf = torch.randn(shape)
    turned = deep_gemm.get_mn_major_tma_aligned_tensor(sf)
    pitch = -(-shape[-2] // 4) * 4
    assert turned.stride() == (shape[-1] * pitch, 1, pitch)[-len(shape) :]
    assert torch.equal(turned, sf)
    assert deep_gemm.get_mn_major_tma_aligned_tensor(turned) is turned
    options = {"num_groups": shape[0] if len(shape) == 3 else None, "is_sfa": True}
    again = deep_gemm.transform_sf_into_required_layout(
        sf, shape[-2], 128 * shape[-1], (1, 128, 128), **options
    )
    assert torch.equal(again, sf) and again.stride() == turned.stride()


def test_sizes_and_tensors_of_the_helpers_are_checked():
    turn, tma = deep_gemm.transform_sf_into_required_layout, deep_gemm.get_tma_aligned_size
    for kind, text, call in (
        (TypeError, "mn must be a static", lambda: turn(torch.ones(5, 2), None, 256, (1, 128))),
        (ValueError, "x must be at least 0", lambda: tma(-5, 4)),
        (
            TypeError,
            "sf must be a dense",
            lambda: deep_gemm.get_mn_major_tma_aligned_tensor(torch.ones(4, 2).to_sparse()),
        ),
    ):
        with pytest.raises(kind, match=f": {text}.*; got "):
            call()


def test_scales_of_weights_stay():
    sf = torch.randn(3, 2, 5)
    transform = deep_gemm.transform_sf_into_required_layout
    assert transform(sf, 200, 600, (1, 128, 128), 3, False) is sf
    turned = sf.transpose(1, 2).contiguous().transpose(1, 2)
    assert transform(turned, 200, 600, (128, 128), 3) is turned
    for kind, text, change in (
        (ValueError, r"sf must have shape \[3, 2, 4\]", {"k": 500}),
        (ValueError, "sf must be contiguous, or so with", {"sf": torch.randn(3, 2, 10)[..., ::2]}),
        (NotImplementedError, "recipe must be", {"recipe": (1, 32)}),
        (NotImplementedError, "sf must be float32", {"sf": sf.to(torch.int32)}),
        (TypeError, "recipe must be", {"recipe": (1, 128, 128)}),
    ):
        given = {"sf": sf, "mn": 200, "k": 600, "recipe": (128, 128), "num_groups": 3} | change
        with pytest.raises(kind, match=f"^transform_sf_into_required_layout: {text}.*; got "):
            transform(**given)


# -- signatures and errors -------------------------------------------------------------------------

_FP8 = "recipe=None, recipe_a=None, recipe_b=None, compiled_dims='nk', disable_ue8m0_cast=False"
_PSUM = "use_psum_layout=False, ensure_zero_padding=True, expected_m_for_psum_layout=None"
SIGNATURES = {
    "m_grouped_fp8_gemm_nt_contiguous": f"a, b, d, grouped_layout, {_FP8}, {_PSUM}, epilogue=None",
    "m_grouped_fp8_gemm_nt_masked": f"a, b, d, masked_m, expected_m, {_FP8}, epilogue=None",
    "m_grouped_bf16_gemm_nt_contiguous": (
        f"a, b, d, grouped_layout, compiled_dims='nk', {_PSUM}, epilogue=None"
    ),
    "m_grouped_bf16_gemm_nt_masked": (
        "a, b, d, masked_m, expected_m, compiled_dims='nk', epilogue=None"
    ),
}


def bare(parameters):
    return [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY]


def parsed(arguments):
    made = {}
    exec(f"def function({arguments}): pass", made)
    return list(inspect.signature(made["function"]).parameters.values())


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_deep_gemms(name):
    ours = inspect.signature(getattr(deep_gemm, name)).parameters.values()
    assert bare(ours) == bare(parsed(SIGNATURES[name]))
    if name == "m_grouped_fp8_gemm_nt_masked":
        alias = inspect.signature(deep_gemm.fp8_m_grouped_gemm_nt_masked).parameters
        assert bare(alias.values()) == bare(ours)
        more = ["enable_overlap", "max_block_n", "signal"]
        assert [n for n, p in alias.items() if p.kind is p.KEYWORD_ONLY] == more


def test_signatures_against_the_package_itself():
    """As benchmarks.fetch took it out of vLLM's wheel; read, not imported."""
    file = Path(__file__).parents[2] / ".peers" / "deep_gemm" / "_C.py"
    if not file.is_file():
        pytest.skip("python -m benchmarks.fetch deep_gemm gets it")
    found = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            found[node.name.replace("fp8_fp4", "fp8")] = parsed(ast.unparse(node.args))
    for name in SIGNATURES:
        assert bare(found[name]) == bare(parsed(SIGNATURES[name]))


def arguments():
    rng = np.random.default_rng(8)
    (a, sa), _ = make_a(rng, "row-major", 128)
    (b, sb), _ = make_b(rng)
    d = torch.full((128, N), 7.0, dtype=torch.bfloat16)
    layout = torch.zeros(128, dtype=torch.int32)
    return {"a": (a, sa), "b": (b, sb), "d": d, "grouped_layout": layout}


def errors():
    given = arguments()
    (a, sa), (b, sb), d, layout = given.values()
    wide = torch.zeros(128, 2 * N, dtype=torch.bfloat16)
    shared = torch.zeros(128 * N * 2 + 128 * K, dtype=torch.uint8)
    shared = shared[: 128 * N * 2].view(torch.bfloat16).view(128, N)
    over = shared.view(torch.uint8).view(-1)[: 128 * K].view(torch.float8_e4m3fn).view(128, K)
    turned = b.transpose(1, 2).contiguous().transpose(1, 2)
    mixed, fp4 = NotImplementedError, torch.zeros(GROUPS, N, K // 2, dtype=torch.int8)
    return [
        (TypeError, r"a must be \(values, scales\)", {"a": a}),
        (TypeError, "a must be a tensor", {"a": (a.float().numpy(), sa)}),
        (TypeError, "a must be float8_e4m3fn", {"a": (a.float(), sa)}),
        (TypeError, "scales of a must be a tensor", {"a": (a.bfloat16(), None)}),
        (TypeError, "scales of b must be a tensor", {"b": (b, None)}),
        (TypeError, "a must be a dense tensor", {"a": (a.float().to_sparse(), sa)}),
        (mixed, "b must be float8_e4m3fn", {"b": (fp4, sb)}),
        (TypeError, "d must be bfloat16", {"d": d.float()}),
        (TypeError, "grouped_layout must be int32", {"grouped_layout": layout.long()}),
        (ValueError, r"a must have shape \[M, K\]", {"a": (a[None], sa[None])}),
        (ValueError, r"a must have shape \[M, 256\], as b", {"a": (a[:, :128].clone(), sa)}),
        (ValueError, r"d must have shape \[128, 192\]", {"d": d[:64]}),
        (ValueError, "d must be contiguous", {"d": wide[:, ::2]}),
        (ValueError, "b must be contiguous", {"b": (turned, sb)}),
        (ValueError, r"grouped_layout must be contiguous, of shape \[128\]", {"use_psum": 0}),
        (ValueError, r"grouped_layout must be contiguous, of shape \[4\]", {"use_psum": 1}),
        (ValueError, r"scales of a must have shape \[128, 2\]", {"a": (a, sa[:, :1])}),
        (TypeError, "scales of a must be float32", {"a": (a, sa.double())}),
        (ValueError, r"scales of b must have shape \[4, 2, 2\]", {"b": (b, sb[:, :1])}),
        (mixed, "scales of b must be float32", {"b": (b, sb.to(torch.int32))}),
        (mixed, "recipe must be", {"recipe": (1, 1, 128)}),
        (TypeError, "recipe must be None or a tuple", {"recipe": 128}),
        (TypeError, "recipe must be None or a tuple", {"recipe": (torch.ones(2), 128, 128)}),
        (mixed, "recipe_a must be", {"recipe_a": (1, 32), "recipe_b": (128, 128)}),
        (ValueError, "recipe must be None, or", {"recipe_a": (1, 128)}),
        (mixed, "epilogue must be None", {"epilogue": object()}),
        (ValueError, "compiled_dims must hold", {"compiled_dims": "xy"}),
        (TypeError, "use_psum_layout must be a Python bool", {"use_psum_layout": 1}),
        (ValueError, "expected_m_for_psum_layout must be None", {"expected_m_for_psum_layout": 3}),
        (ValueError, "d must not overlap a", {"a": (over, sa), "d": shared}),
    ]


ERRORS = errors()


@pytest.mark.parametrize(("kind", "text", "change"), ERRORS, ids=[e[1][:40] for e in ERRORS])
def test_errors(kind, text, change):
    given, change = arguments(), dict(change)
    use_psum = change.pop("use_psum", None)
    if use_psum is not None:
        given["grouped_layout"] = given["grouped_layout"][: 64 if not use_psum else 3].clone()
        change["use_psum_layout"] = bool(use_psum)
    given |= change
    before = given["d"].clone()
    with pytest.raises(kind, match=f"^m_grouped_fp8_gemm_nt_contiguous: {text}.*; got ") as caught:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(**given)
    assert str(caught.value)[-1] == "."
    assert torch.equal(given["d"], before)


def test_a_result_that_is_no_tensor_is_named():
    given = arguments()
    for d in (None, [given["d"]]):
        with pytest.raises(TypeError, match="d must be a tensor; got"):
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(**given | {"d": d})


@pytest.mark.parametrize("name", ["a", "b", "d", "scales of a"])
@pytest.mark.parametrize("launched", [False, True])
def test_no_gradient_is_lost(name, launched, fake):
    """d was written without autograd's knowledge; also where an earlier call without one is known."""
    fake.launches_directly = launched
    tensors = {
        "a": torch.ones(2, 4, 128, dtype=torch.bfloat16),
        "b": torch.ones(2, 128, 128, dtype=torch.bfloat16),
        "d": torch.zeros(2, 4, 128, dtype=torch.bfloat16),
        "scales of a": torch.ones(2, 4, 1),
    }
    counts = torch.full((2,), 4, dtype=torch.int32)

    def multiply():
        a, b, d, scales = tensors.values()
        if name != "scales of a":
            return deep_gemm.m_grouped_bf16_gemm_nt_masked(a, b, d, counts, 4)
        pairs = (
            (a.to(torch.float8_e4m3fn), scales),
            (b.to(torch.float8_e4m3fn), torch.ones(2, 1, 1)),
        )
        return deep_gemm.m_grouped_fp8_gemm_nt_masked(*pairs, d, counts, 4)

    tensors[name].requires_grad_()
    with torch.no_grad():
        multiply()
        assert bool((tensors["d"] == 128).all())
        tensors["d"].zero_()
    with pytest.raises(NotImplementedError, match=f"{name} must need no gradient; got requires_gr"):
        multiply()
    assert not tensors["d"].detach().any()


def test_sglangs_overlap_is_refused():
    rng = np.random.default_rng(9)
    a, b = make_a(rng, "row-major", GROUPS, 8)[0], make_b(rng)[0]
    d = torch.empty(GROUPS, 8, N, dtype=torch.bfloat16)
    given = a, b, d, torch.zeros(GROUPS, dtype=torch.int32), 4
    for change in ({"enable_overlap": True}, {"signal": torch.zeros(4)}):
        with pytest.raises(NotImplementedError, match="^fp8_m_grouped_gemm_nt_masked: .* left out"):
            deep_gemm.fp8_m_grouped_gemm_nt_masked(*given, max_block_n=128, **change)
    deep_gemm.fp8_m_grouped_gemm_nt_masked(*given, enable_overlap=False, max_block_n=256)
    with pytest.raises(ValueError, match="^m_grouped_fp8_gemm_nt_masked: expected_m must be"):
        deep_gemm.m_grouped_fp8_gemm_nt_masked(*given[:-1], 0)
