"""DeepGEMM's grouped products: the functions, and the checks of their options.

Torch's tracers see an operator that mutates d (and its twin over DLPack, as in `torch_bridge._ops`).
"""

from collections.abc import Sequence
from typing import Any

import torch

from moe_align_jax._core import checks
from moe_align_jax._core.fp8 import GROUP
from torch_bridge import _checks, _ops
from torch_bridge.deep_gemm import calls, repeated
from torch_bridge.deep_gemm import scales as layouts

type _Pair = tuple[torch.Tensor, torch.Tensor]

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
            `get_mk_alignment_for_contiguous_layout()`: the label of a block's first row is taken for all of
            its rows. In a block of 128 rows, -1 in the 65th says that the rows from there on are padding.
            With `use_psum_layout` `[G]` int32, the row behind each group's last: the next group begins at the
            next multiple, and rows behind the last group are not computed.
        recipe, recipe_a, recipe_b: None, or what scales belong to: (1, 128, 128), or (1, 128) and (128, 128).
        compiled_dims, disable_ue8m0_cast, ensure_zero_padding, expected_m_for_psum_layout: accepted; they
            change nothing here (scales stay float32 on Hopper, and padding is as said above).
        epilogue: None.

    Returns:
        None. Sums are of two levels, as DeepGEMM's: see docs/fp8.md.

    Raises:
        TypeError: an argument is no tensor of its dtype.
        ValueError: shapes, devices or layouts do not fit, or d shares memory with an operand.
        NotImplementedError: fp4, another recipe, an epilogue, or a tensor needs a gradient.
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
    _multiply(function, calls.MASKED, *operands, d, masked_m, expected)


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
    _multiply(function, calls.MASKED, a, None, b, None, d, masked_m, expected)


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
    return calls.ENDS if psum else calls.CONTIGUOUS


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


# -- the operator ----------------------------------------------------------------------------------


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
    call = calls.checked(
        function, rows, a, a_scales, b, b_scales, d, layout, block_size, expected_m
    )
    if _ops.launches_at_once(call.inputs, (d,)):
        launched = calls.run("auto", call)
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
    calls.run(path, calls.checked(function, rows, *given))


_ops.register(_OPERATOR, _SCHEMA, _ops.both(_operator))
