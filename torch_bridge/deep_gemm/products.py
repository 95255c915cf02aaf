"""DeepGEMM's grouped products: the functions, the checks of their arguments, and how they run.

All rows of a block of the contiguous layout belong to one group: the kernel reads the label of a block's
first row out of `grouped_layout`. Where that holds the groups' ends, torch finds the blocks' labels among
them, on the device: the host never waits, and a CUDA graph can capture a call.

Torch's tracers see an operator that mutates d (and its twin over DLPack, as in `torch_bridge._ops`).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moe_align_jax._core import checks
from moe_align_jax._core.fp8 import GROUP, GROUPS_PER_WORD
from moe_align_jax._grouped_matmul.problem import E4M3, MatmulProblem, Scales, Weights
from torch_bridge import _checks, _ops, _plan, dlpack
from torch_bridge._direct import inplace
from torch_bridge._dlpack_path import run as dlpack_call
from torch_bridge.deep_gemm import direct, repeated
from torch_bridge.deep_gemm import scales as layouts

type _Pair = tuple[torch.Tensor, torch.Tensor]

_CONTIGUOUS, _ENDS, _MASKED = "contiguous", "ends", "masked"
_OPERATOR = "deep_gemm_into"
_SCHEMA = (
    "(Tensor a, Tensor? a_scales, Tensor b, Tensor? b_scales, Tensor(a!) d, Tensor layout, str function, "
    "str rows, int block_size, int expected_m) -> ()"
)


def m_grouped_fp8_gemm_nt_contiguous(
    a: _Pair,
    b: _Pair,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    epilogue: object = None,
) -> None:
    """Writes `d = a @ b[group].T`, each block of rows with its group's weights, into d.

    Args:
        a: (float8_e4m3fn `[M, K]`, scales of rows and 128 columns). Scales are float32 `[M, K / 128]`,
            row-major or with the rows' index innermost (`get_mn_major_tma_aligned_tensor`); or int32
            `[M, K / 512]`, four exponents in each, either way. They are read where they lie; of other
            strides a copy is made.
        b: (float8_e4m3fn `[G, N, K]`, float32 `[G, ceil(N / 128), K / 128]`).
        d: `[M, N]` bfloat16, written in place. Rows of padding are unspecified; they are zero where a's are.
        grouped_layout: `[M]` int32, the group of each row, and -1 for padding. Groups begin at multiples of
            `get_mk_alignment_for_contiguous_layout()`: what counts is the first row of each such block. With
            `use_psum_layout` `[G]` int32, the row behind each group's last: the next group begins at the next
            multiple, and rows behind the last group are not computed.
        recipe, recipe_a, recipe_b: None, or what scales belong to: (1, 128, 128), or (1, 128) and (128, 128).
        compiled_dims, disable_ue8m0_cast, ensure_zero_padding, expected_m_for_psum_layout: accepted; they
            change nothing here (scales stay float32 on Hopper, and padding is as said above).
        epilogue: None.

    Returns:
        None. Sums are of two levels, as DeepGEMM's: see docs/fp8.md.

    Raises:
        TypeError: an argument is no tensor of its dtype.
        ValueError: shapes, devices or layouts do not fit, or d shares memory with an operand.
        NotImplementedError: fp4, another recipe, or an epilogue.
        torch_bridge.Miss: a stream is captured into a CUDA graph and the kernel for these sizes was not used
            before: call it once ahead of the capture. Nothing is written in any of these cases.

    Example:
        >>> rows = torch.ones(128, 128).to(torch.float8_e4m3fn), torch.full((128, 1), 0.5)
        >>> weights = torch.ones(2, 64, 128).to(torch.float8_e4m3fn), torch.ones(2, 1, 1)
        >>> d = torch.empty(128, 64, dtype=torch.bfloat16)
        >>> layout = torch.ones(128, dtype=torch.int32)
        >>> m_grouped_fp8_gemm_nt_contiguous(rows, weights, d, layout)
        >>> d[0, 0].item()
        64.0

    Source: DeepGEMM 2.8.1 (MIT), signature and contract; no code taken.
    """
    function = "m_grouped_fp8_gemm_nt_contiguous"
    _check_options(function, compiled_dims, epilogue, (recipe, recipe_a, recipe_b))
    _checks.check_bool(function, "disable_ue8m0_cast", disable_ue8m0_cast)
    rows = _check_contiguous(
        function, use_psum_layout, ensure_zero_padding, expected_m_for_psum_layout
    )
    _multiply(function, rows, *_pair(function, "a", a), *_pair(function, "b", b), d, grouped_layout)


def m_grouped_fp8_gemm_nt_masked(
    a: _Pair,
    b: _Pair,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    epilogue: object = None,
) -> None:
    """Writes `d[g] = a[g] @ b[g].T` in the first `masked_m[g]` rows.

    Args:
        a: (float8_e4m3fn `[G, M, K]`, scales `[G, M, K / 128]`), as DeepEP's low-latency dispatch delivers
            them: see `m_grouped_fp8_gemm_nt_contiguous`.
        b: as there.
        d: `[G, M, N]` bfloat16, written in place. Rows from `masked_m[g]` on are unspecified.
        masked_m: `[G]` int32, rows in use.
        expected_m: rows of a mean group: tiles are chosen for it.
        recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast, epilogue: as there.

    Returns:
        None.

    Raises:
        As `m_grouped_fp8_gemm_nt_contiguous`.

    Example:
        >>> rows = torch.ones(1, 2, 128).to(torch.float8_e4m3fn), torch.ones(1, 2, 1)
        >>> weights = torch.ones(1, 64, 128).to(torch.float8_e4m3fn), torch.full((1, 1, 1), 2.0)
        >>> d = torch.empty(1, 2, 64, dtype=torch.bfloat16)
        >>> m_grouped_fp8_gemm_nt_masked(rows, weights, d, torch.tensor([1], dtype=torch.int32), 1)
        >>> d[0, 0, 0].item()
        256.0

    Source: DeepGEMM 2.8.1 (MIT), signature and contract; no code taken.
    """
    function = "m_grouped_fp8_gemm_nt_masked"
    _check_options(function, compiled_dims, epilogue, (recipe, recipe_a, recipe_b))
    _checks.check_bool(function, "disable_ue8m0_cast", disable_ue8m0_cast)
    expected = _check_expected(function, "expected_m", expected_m)
    operands = *_pair(function, "a", a), *_pair(function, "b", b)
    _multiply(function, _MASKED, *operands, d, masked_m, expected)


def fp8_m_grouped_gemm_nt_masked(
    a: _Pair,
    b: _Pair,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    epilogue: object = None,
    *,
    enable_overlap: bool = False,
    max_block_n: int = 256,
    signal: torch.Tensor | None = None,
) -> None:
    """`m_grouped_fp8_gemm_nt_masked` by the name, and with the arguments, that SGLang calls it with.

    Args:
        enable_overlap, signal: False and None: SGLang's fork of DeepGEMM tells another kernel by them which
            tiles are done.
        max_block_n: accepted, for the overlap alone.
        a, b, d, masked_m, expected_m, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast,
            epilogue: as there.

    Raises:
        NotImplementedError: the overlap is asked for. Otherwise as `m_grouped_fp8_gemm_nt_masked`.

    Source: SGLang 0.5.23 (Apache-2.0) and DeepGEMM 2.8.1 (MIT), signature and contract; no code taken.
    """
    del max_block_n
    function = "fp8_m_grouped_gemm_nt_masked"
    for argument, value in (("enable_overlap", enable_overlap), ("signal", signal)):
        if value is not None and value is not False:
            rule, remedy = (
                "be left out",
                "No signals are given here: run combine after the product.",
            )
            checks.refuse(NotImplementedError, function, argument, rule, value, remedy)
    options = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast, epilogue)
    m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, expected_m, *options)


def m_grouped_bf16_gemm_nt_contiguous(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    epilogue: object = None,
) -> None:
    """As `m_grouped_fp8_gemm_nt_contiguous`, of bfloat16.

    Args:
        a: `[M, K]` bfloat16.
        b: `[G, N, K]` bfloat16, contiguous, or so with its last two axes exchanged (weights `[G, K, N]`).
        d, grouped_layout, compiled_dims, use_psum_layout, ensure_zero_padding, expected_m_for_psum_layout,
            epilogue: as there.

    Raises:
        As `m_grouped_fp8_gemm_nt_contiguous`.

    Example:
        >>> a, b = torch.ones(64, 8, dtype=torch.bfloat16), torch.ones(2, 8, 8, dtype=torch.bfloat16)
        >>> d = torch.empty(64, 8, dtype=torch.bfloat16)
        >>> m_grouped_bf16_gemm_nt_contiguous(a, 3 * b, d, torch.zeros(64, dtype=torch.int32))
        >>> d[63, 7].item()
        24.0

    Source: DeepGEMM 2.8.1 (MIT), signature and contract; no code taken.
    """
    function = "m_grouped_bf16_gemm_nt_contiguous"
    _check_options(function, compiled_dims, epilogue)
    rows = _check_contiguous(
        function, use_psum_layout, ensure_zero_padding, expected_m_for_psum_layout
    )
    _multiply(function, rows, a, None, b, None, d, grouped_layout)


def m_grouped_bf16_gemm_nt_masked(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    compiled_dims: str = "nk",
    epilogue: object = None,
) -> None:
    """As `m_grouped_fp8_gemm_nt_masked`, of bfloat16.

    Args:
        a: `[G, M, K]` bfloat16.
        b: `[G, N, K]` bfloat16, contiguous, or so with its last two axes exchanged.
        d, masked_m, expected_m, compiled_dims, epilogue: as there.

    Raises:
        As `m_grouped_fp8_gemm_nt_contiguous`.

    Example:
        >>> a, b = torch.ones(1, 4, 8, dtype=torch.bfloat16), torch.ones(1, 8, 8, dtype=torch.bfloat16)
        >>> d = torch.empty(1, 4, 8, dtype=torch.bfloat16)
        >>> m_grouped_bf16_gemm_nt_masked(a, b, d, torch.tensor([2], dtype=torch.int32), 2)
        >>> d[0, 1, 0].item()
        8.0

    Source: DeepGEMM 2.8.1 (MIT), signature and contract; no code taken.
    """
    function = "m_grouped_bf16_gemm_nt_masked"
    _check_options(function, compiled_dims, epilogue)
    expected = _check_expected(function, "expected_m", expected_m)
    _multiply(function, _MASKED, a, None, b, None, d, masked_m, expected)


# -- arguments that are no tensors -----------------------------------------------------------------


def _check_options(
    function: str, compiled_dims: object, epilogue: object, recipes: tuple[Any, ...] = ()
) -> None:
    if not isinstance(compiled_dims, str) or set(compiled_dims) - set("mnk"):
        rule, remedy = 'hold letters of "mnk"', "Every size is compiled in here: leave it out."
        got = compiled_dims if isinstance(compiled_dims, str) else type(compiled_dims).__name__
        checks.refuse(ValueError, function, "compiled_dims", rule, repr(got), remedy)
    if epilogue is not None:
        rule, remedy = "be None", "Apply it to d afterwards."
        checks.refuse(
            NotImplementedError, function, "epilogue", rule, type(epilogue).__name__, remedy
        )
    if not recipes:
        return
    for argument, value in zip(("recipe", "recipe_a", "recipe_b"), recipes, strict=True):
        ints = isinstance(value, (tuple, list)) and all(type(size) is int for size in value)
        if value is not None and not ints:
            rule, remedy = "be None or a tuple of ints", "Leave it out."
            checks.refuse(TypeError, function, argument, rule, value, remedy)
    recipe, of_a, of_b = (None if r is None else tuple(r) for r in recipes)
    if (of_a is None) != (of_b is None) or (of_a is not None and recipe is not None):
        rule = "be None, or recipe_a and recipe_b be None, or neither of these two"
        got = f"{recipe}, {of_a}, {of_b}"
        checks.refuse(ValueError, function, "recipe", rule, got, "Leave all three out.")
    rows, blocks = (1, GROUP), (GROUP, GROUP)
    for argument, value, known in (
        ("recipe", recipe, layouts.HOPPER_RECIPE),
        ("recipe_a", of_a, rows),
        ("recipe_b", of_b, blocks),
    ):
        if value not in (None, known):
            remedy = "Scales belong to 128 columns of a row, and to 128 x 128 of the weights."
            checks.refuse(
                NotImplementedError, function, argument, f"be {known}", str(value), remedy
            )


def _check_contiguous(function: str, psum: object, zero_padding: object, expected: object) -> str:
    _checks.check_bool(function, "use_psum_layout", psum)
    _checks.check_bool(function, "ensure_zero_padding", zero_padding)
    if expected is not None:
        argument = "expected_m_for_psum_layout"
        _check_expected(function, argument, expected)
        if not psum:
            rule, remedy = "be None without use_psum_layout", "Leave it out."
            checks.refuse(ValueError, function, argument, rule, str(expected), remedy)
    return _ENDS if psum else _CONTIGUOUS


def _check_expected(function: str, argument: str, value: object) -> int:
    return checks.check_positive_int(function, argument, value, "Pass the rows of a mean group.")


def _pair(function: str, argument: str, value: Any) -> _Pair:
    """(values, scales)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        rule, remedy = "be (values, scales)", "Pass a pair of tensors."
        checks.refuse(TypeError, function, argument, rule, value, remedy)
    if value[1] is None:  # without scales it would be another product
        rule, remedy = "be a tensor", "Call the bf16 product for values without scales."
        checks.refuse(TypeError, function, f"scales of {argument}", rule, "None", remedy)
    return value[0], value[1]


# -- tensors ---------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call whose tensors have been checked, but for what needs data.

    Attributes:
        problem: what is computed; its operands are those of `_operands`.
        a, b: values.
        a_scales, b_scales: as the problem has them; None for bfloat16.
        d: of the problem's result.
        layout: where the groups' rows are.
        rows: _CONTIGUOUS, _ENDS or _MASKED.
    """

    problem: MatmulProblem
    a: torch.Tensor
    a_scales: torch.Tensor | None
    b: torch.Tensor
    b_scales: torch.Tensor | None
    d: torch.Tensor
    layout: torch.Tensor
    rows: str

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        names = ("a", "a_scales", "b", "b_scales", "layout")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def _multiply(
    function: str,
    rows: str,
    a: Any,
    a_scales: Any,
    b: Any,
    b_scales: Any,
    d: Any,
    layout: Any,
    expected_m: int = 0,
) -> None:
    block_size = layouts.get_mk_alignment_for_contiguous_layout()
    options = function, rows, block_size, expected_m
    given = (a, b, layout, d) if a_scales is None else (a, b, a_scales, b_scales, layout, d)
    if repeated.repeat(options, given):
        return
    call = _checked(function, rows, a, a_scales, b, b_scales, d, layout, block_size, expected_m)
    if _ops.launches_at_once(call.inputs, (d,)):
        launched = _run("auto", call)
        if launched is not None:
            scales = call.problem.scales
            columns = scales is not None and scales.x == "column_major"
            repeated.remember(options, given, launched, 2 if columns else None)
        return
    op = _ops.chosen(_OPERATOR, a.device)
    op(a, a_scales, b, b_scales, d, layout, function, rows, block_size, expected_m)


def _operator(
    path, a, a_scales, b, b_scales, d, layout, function, rows, block_size, expected_m
) -> None:
    """The operator's body: also for callers who come by `torch.ops`."""
    given = (a, a_scales, b, b_scales, d, layout, block_size, expected_m)
    _run(path, _checked(function, rows, *given))


def _checked(
    function: str,
    rows: str,
    a: Any,
    a_scales: Any,
    b: Any,
    b_scales: Any,
    d: Any,
    layout: Any,
    block_size: int,
    expected_m: int,
) -> _Call:
    """The checks that also work while tracing."""
    masked, quantized = rows == _MASKED, a_scales is not None
    named = {"a": a, "b": b, "d": d}
    named |= {"scales of a": a_scales, "scales of b": b_scales} if quantized else {}
    where = "masked_m" if masked else "grouped_layout"
    named[where] = layout
    for argument, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            checks.refuse(
                TypeError, function, argument, "be a tensor", tensor, "Pass a PyTorch tensor."
            )
        if what := _checks.not_dense(tensor):
            remedy = "Call to_dense() or dequantize() first."
            checks.refuse(TypeError, function, argument, "be a dense tensor", what, remedy)
    for argument, tensor in named.items():
        if tensor.device != d.device:
            rule, got = f"be on d's device, {d.device}", str(tensor.device)
            checks.refuse(ValueError, function, argument, rule, got, "Move it there.")
    wanted = torch.float8_e4m3fn if quantized else torch.bfloat16
    for argument, tensor in (("a", a), ("b", b)):
        if quantized and tensor.dtype in (torch.int8, torch.uint8):
            rule, remedy = "be float8_e4m3fn", "fp4 has no instructions on Hopper."
            checks.refuse(NotImplementedError, function, argument, rule, tensor, remedy)
        if tensor.dtype != wanted:
            rule = f"be {str(wanted).removeprefix('torch.')}"
            checks.refuse(
                TypeError, function, argument, rule, tensor, "Cast it, or call the other product."
            )
    if d.dtype != torch.bfloat16:
        checks.refuse(TypeError, function, "d", "be bfloat16", d, "Cast it afterwards.")
    if layout.dtype != torch.int32:
        checks.refuse(TypeError, function, where, "be int32", layout, "Cast it.")
    _check_shapes(function, masked, a, b, d)
    groups, n, k = b.shape
    sizes = groups if masked or rows == _ENDS else a.shape[0]
    if tuple(layout.shape) != (sizes,) or not layout.is_contiguous():
        rule, remedy = f"be contiguous, of shape [{sizes}]", "See the function's documentation."
        checks.refuse(ValueError, function, where, rule, layout, remedy)
    transposed = True
    for argument, tensor in (("a", a), ("b", b), ("d", d)):
        if tensor.is_contiguous():
            continue
        if argument == "b" and not quantized and b.transpose(1, 2).is_contiguous():
            transposed = False
            continue
        got = f"strides {list(tensor.stride())} of shape {list(tensor.shape)}"
        remedy = f"Pass {argument}.contiguous()."
        if argument == "b" and quantized:
            remedy = "wgmma reads e4m3 along K alone: pass b.contiguous(), [G, N, K]."
        checks.refuse(ValueError, function, argument, "be contiguous", got, remedy)
    scales, of_a, of_b = None, None, None
    if quantized:
        scales, of_a = _scales_of_a(function, a_scales, a)
        of_b = _scales_of_b(function, b_scales, n, k, groups)
    problem = MatmulProblem(
        function,
        _MASKED if masked else "blocks",
        a.shape[0] * a.shape[1] if masked else a.shape[0],
        k,
        n,
        groups,
        E4M3 if quantized else "bfloat16",
        "bfloat16",
        Weights(transposed=transposed),
        block_size=0 if masked else block_size,
        max_rows=a.shape[1] if masked else 0,
        zero_padding=False,
        scales=scales,
        whole_blocks=not masked,
        row_labels=rows == _CONTIGUOUS,
        expected_rows=min(expected_m, a.shape[1]) if masked else 0,
    )
    return _Call(problem, a, of_a, b, of_b, d, layout, rows)


def _check_shapes(function: str, masked: bool, a: Any, b: Any, d: Any) -> None:
    lead = "G, " if masked else ""
    for argument, tensor, rule in (("a", a, f"[{lead}M, K]"), ("b", b, "[G, N, K]")):
        if tensor.dim() != rule.count(",") + 1:
            checks.refuse(
                ValueError, function, argument, f"have shape {rule}", tensor, "Add or drop axes."
            )
    groups, n, k = b.shape
    if a.shape[-1] != k or (masked and a.shape[0] != groups):
        want = [groups, "M", k] if masked else ["M", k]
        rule = f"have shape [{', '.join(map(str, want))}], as b has"
        checks.refuse(ValueError, function, "a", rule, a, "b is [G, N, K].")
    for argument, size in (("G", groups), ("N", n), ("K", k)):
        if not size:
            checks.refuse(
                ValueError, function, "b", f"have a positive {argument}", b, "Pass weights."
            )
    shape = (*a.shape[:-1], n)
    if tuple(d.shape) != tuple(shape):
        rule = f"have shape {list(shape)}"
        checks.refuse(ValueError, function, "d", rule, d, "It holds a row for each of a.")


def _scales_of_a(
    function: str, scales: torch.Tensor, a: torch.Tensor
) -> tuple[Scales, torch.Tensor]:
    """How they lie, and the tensor, or a copy that lies so."""
    argument, k = "scales of a", a.shape[-1]
    if scales.dtype not in (torch.float32, torch.int32):
        rule = "be float32, or int32 with four exponents in each"
        checks.refuse(TypeError, function, argument, rule, scales, "Cast them to float32.")
    if k % GROUP:
        rule, remedy = f"have a K that is a multiple of {GROUP}", "Pad K with zeros."
        checks.refuse(ValueError, function, "a", rule, f"K = {k}", remedy)
    packed = scales.dtype == torch.int32
    words = checks.cdiv(k // GROUP, GROUPS_PER_WORD) if packed else k // GROUP
    shape = (*a.shape[:-1], words)
    if tuple(scales.shape) != tuple(shape):
        rule = f"have shape {list(shape)}"
        checks.refuse(
            ValueError, function, argument, rule, scales, "One for each row and 128 columns."
        )
    if scales.is_contiguous():
        return Scales("row_major", "blocks", packed), scales
    pitch = layouts.pitch_of(scales)
    if pitch is None:
        scales = layouts.mn_major(scales)
        pitch = scales.stride(-1)
    return Scales("column_major", "blocks", packed, pitch), scales


def _scales_of_b(function: str, scales: torch.Tensor, n: int, k: int, groups: int) -> torch.Tensor:
    argument = "scales of b"
    if scales.dtype == torch.int32:
        rule, remedy = "be float32", "Packed exponents of weights are the layout of Blackwell."
        checks.refuse(NotImplementedError, function, argument, rule, scales, remedy)
    if scales.dtype != torch.float32:
        checks.refuse(TypeError, function, argument, "be float32", scales, "Cast them.")
    shape = (groups, checks.cdiv(n, GROUP), k // GROUP)
    if tuple(scales.shape) != shape:
        rule = f"have shape {list(shape)}"
        checks.refuse(ValueError, function, argument, rule, scales, "One for each 128 x 128.")
    return scales.contiguous()


# -- what runs -------------------------------------------------------------------------------------


def _run(path: str, call: _Call) -> repeated.Launched | None:
    """Runs a call whose tensors have passed `_checked`. None where jax did, or there is nothing to do."""
    function = call.problem.function
    for argument, tensor in {**call.inputs, "d": call.d}.items():
        dlpack.check_tensor(function, argument, tensor)
    inplace.check_plain(function, {"d": call.d})
    inplace.check_no_overlap(function, {"d": call.d}, call.inputs)
    if not call.d.numel():
        return None
    found = direct.program_for(call.problem, call.d) if path == "auto" else None
    if found is None:
        _by_jax(call)
        return None
    with dlpack.on_device(call.d.device):
        tensors = dict(zip(call.problem.inputs, _tensors(call), strict=True))
        return direct.launch(found, call.problem, tensors, call.d.detach())


def _where(call: _Call) -> list[torch.Tensor]:
    """The problem's operands that tell where the groups' rows are, made on the device."""
    layout, block, rows = call.layout, call.problem.block_size, call.problem.num_rows
    if call.rows == _MASKED or call.problem.row_labels:
        return [layout]
    if call.rows == _CONTIGUOUS:
        every = torch.full((1,), rows, dtype=torch.int32, device=layout.device)
        return [layout[::block].contiguous(), every]
    first = torch.arange(0, rows, block, dtype=torch.int32, device=layout.device)
    group = torch.searchsorted(layout, first, right=True, out_int32=True)
    return [group, layout[-1:].clamp(0, rows)]


def _tensors(call: _Call) -> list[torch.Tensor]:
    """The problem's operands, in order."""
    problem = call.problem
    b = call.b if problem.weights.transposed else call.b.transpose(1, 2)
    found = [call.a.view(problem.num_rows, problem.k), b]
    if call.a_scales is not None and call.b_scales is not None:
        found += [_scale_memory(problem, call.a_scales), call.b_scales]
    return [*[tensor.detach() for tensor in found], *_where(call)]


def _scale_memory(problem: MatmulProblem, scales: torch.Tensor) -> torch.Tensor:
    """a's scales as the problem has them: contiguous."""
    assert problem.scales
    words = scales.shape[-1]
    if problem.scales.x == "row_major":
        return scales.view(problem.num_rows, words)
    pitch = problem.scales.pitch
    shape = (*scales.shape[:-2], words, pitch)
    end = scales.storage_offset() + words * pitch * (scales.shape[0] if scales.dim() == 3 else 1)
    if end * scales.element_size() > scales.untyped_storage().nbytes():
        # The last column ends with its last row: there is no memory for what follows it.
        whole = scales.new_empty(shape)
        whole[..., : scales.shape[-2]].copy_(scales.transpose(-1, -2))
        return whole
    strides = (words * pitch, pitch, 1)[-len(shape) :]
    return scales.as_strided(shape, strides)


# -- over DLPack -----------------------------------------------------------------------------------


@functools.cache
def _compiled(problem: MatmulProblem, implementation: str) -> Any:
    import jax

    from moe_align_jax._grouped_matmul import primitive

    return jax.jit(functools.partial(primitive.bind, problem, implementation))


def _by_jax(call: _Call) -> None:
    from moe_align_jax._grouped_matmul import primitive

    call = call._replace(problem=call.problem._replace(row_labels=False))
    problem, device = call.problem, call.d.device
    dlpack.check_not_capturing(problem.function, device)
    platform = dlpack.jax_platform(problem.function, device)
    implementation = primitive.choose(problem, platform, _plan.forced_implementation())
    boundary = dlpack.alignment(device.type, implementation)
    with dlpack.on_device(device):
        operands = [
            dlpack.share(dlpack.compact_copy(x) if dlpack.copy_reason(x, boundary) else x)
            for x in _tensors(call)
        ]
        view = dlpack.to_torch(_compiled(problem, implementation)(*operands))
        call.d.detach().copy_(view.view(call.d.shape))
        if device.type == "cuda":
            dlpack_call.kept_memory.keep_until_read([view])


_ops.register(_OPERATOR, _SCHEMA, _ops.both(_operator))
