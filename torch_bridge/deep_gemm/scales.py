"""DeepGEMM's helpers, as it has them on Hopper: layouts of scales, alignment of the contiguous layout."""

from collections.abc import Sequence

import torch

from moe_align_jax._core import checks
from moe_align_jax._core.fp8 import GROUP
from torch_bridge import _checks

_TMA_BYTES = 16
_DEFAULT_ALIGNMENT = 128
# Blocks of these rows have a tile of their own: see moe_align_jax/_grouped_matmul/choose_e4m3_tiles.py.
_ALIGNMENTS = (64, 128, 192)
_alignment = _DEFAULT_ALIGNMENT
HOPPER_RECIPE = (1, GROUP, GROUP)


def get_mk_alignment_for_contiguous_layout() -> int:
    """Rows that a group of the contiguous layout is padded to a multiple of: 128, or what was set.

    Example:
        >>> get_mk_alignment_for_contiguous_layout()
        128

    Source: DeepGEMM 2.8.1 (MIT), name and meaning; no code taken.
    """
    return _alignment


def set_mk_alignment_for_contiguous_layout(value: int) -> None:
    """Sets it, for the layouts of all later calls of this process: 64, 128 or 192.

    192 rows are the tile that is best for groups of a thousand rows and more; 64 waste less padding.

    Raises:
        TypeError: value is no integer.
        NotImplementedError: no kernel has blocks of so many rows.

    Example:
        >>> set_mk_alignment_for_contiguous_layout(192)
        >>> get_mk_alignment_for_contiguous_layout()
        192
        >>> set_mk_alignment_for_contiguous_layout(get_theoretical_mk_alignment_for_contiguous_layout())

    Source: DeepGEMM 2.8.1 (MIT), name and meaning; no code taken.
    """
    global _alignment
    function = "set_mk_alignment_for_contiguous_layout"
    remedy = "128 is DeepGEMM's on Hopper."
    value = checks.check_positive_int(function, "value", value, remedy)
    if value not in _ALIGNMENTS:
        rule = f"be one of {', '.join(map(str, _ALIGNMENTS))}"
        checks.refuse(NotImplementedError, function, "value", rule, value, remedy)
    _alignment = value


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """128, whatever is expected: DeepGEMM's answer on Hopper.

    Args:
        expected_m: rows of a mean group; it changes the answer on Blackwell only.

    Example:
        >>> get_theoretical_mk_alignment_for_contiguous_layout(20)
        128

    Source: DeepGEMM 2.8.1 (MIT), name and meaning; no code taken.
    """
    if expected_m is not None:
        function = "get_theoretical_mk_alignment_for_contiguous_layout"
        remedy = "Pass the rows of a mean group, or None."
        checks.check_positive_int(function, "expected_m", expected_m, remedy)
    return _DEFAULT_ALIGNMENT


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """x in steps of 16 bytes: what a pitch must be for TMA.

    Args:
        x: a number of elements.
        element_size: bytes of each, 1, 2, 4, 8 or 16.

    Returns:
        The least number of elements that is not below x and whose bytes are a multiple of 16.

    Raises:
        TypeError, ValueError: an argument is no such number.

    Example:
        >>> get_tma_aligned_size(5, 4)
        8

    Source: DeepGEMM 2.8.1 (MIT), name and meaning; no code taken.
    """
    function, remedy = "get_tma_aligned_size", "Pass a number of elements and the bytes of each."
    size = checks.check_positive_int(function, "element_size", element_size, remedy)
    if _TMA_BYTES % size:
        checks.refuse(ValueError, function, "element_size", f"divide {_TMA_BYTES}", size, remedy)
    x = checks.check_int(function, "x", x, 0, remedy)
    return checks.round_up(x, _TMA_BYTES // size)


def get_mn_major_tma_aligned_tensor(sf: torch.Tensor) -> torch.Tensor:
    """float32 scales with the rows' index innermost, at a pitch that TMA takes.

    Args:
        sf: `[mn, G]` or `[groups, mn, G]` float32, of any strides.

    Returns:
        A tensor of sf's shape with strides `(1, pitch)`, `(G * pitch, 1, pitch)`, pitch being mn in steps of
        4: sf itself where it lies so, otherwise a copy. What lies between mn and the pitch is unspecified.

    Raises:
        TypeError: sf is no float32 tensor.
        ValueError: it has another number of dimensions.

    Example:
        >>> get_mn_major_tma_aligned_tensor(torch.ones(2, 5, 3)).stride()
        (24, 1, 8)

    Source: DeepGEMM 2.8.1 (MIT), name and contract; no code taken.
    """
    function = "get_mn_major_tma_aligned_tensor"
    remedy = "Pass a scale for each row and 128 columns."
    if not isinstance(sf, torch.Tensor) or sf.dtype != torch.float32:
        checks.refuse(TypeError, function, "sf", "be a float32 tensor", sf, remedy)
    if what := _checks.not_dense(sf):
        checks.refuse(
            TypeError, function, "sf", "be a dense tensor", what, "Call to_dense() first."
        )
    if sf.dim() not in (2, 3):
        rule = "have shape [mn, G] or [groups, mn, G]"
        checks.refuse(ValueError, function, "sf", rule, sf, remedy)
    return mn_major(sf)


def mn_major(scales: torch.Tensor) -> torch.Tensor:
    """`get_mn_major_tma_aligned_tensor` of float32 or int32, unchecked."""
    *lead, rows, words = scales.shape
    pitch = checks.round_up(rows, _TMA_BYTES // scales.element_size())
    if pitch_of(scales) == pitch:
        return scales
    strides = (words * pitch, 1, pitch)[-scales.dim() :]
    storage = scales.new_empty(
        (*lead, words, pitch)
    )  # so that a view of whole columns is in its memory
    return storage.as_strided(scales.shape, strides).copy_(scales)


def pitch_of(scales: torch.Tensor) -> int | None:
    """From one column to the next where the rows' index is innermost, in elements; None elsewhere."""
    *_, rows, words = scales.shape
    pitch = scales.stride(-1)
    if scales.stride(-2) != 1 or pitch < rows:
        return None
    if scales.dim() == 3 and scales.stride(0) != words * pitch:
        return None
    return pitch


def transform_sf_into_required_layout(
    sf: torch.Tensor,
    mn: int,
    k: int,
    recipe: Sequence[int],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scales as the kernels take them on Hopper.

    Args:
        sf: float32 `[ceil(mn / gran_mn), ceil(k / gran_k)]`, with `num_groups` in front where it is given.
        mn: rows, or columns of the result.
        k: columns of a.
        recipe: `(gran_m, gran_n, gran_k)`, with `is_sfa`; or `(gran_mn, gran_k)`, without. Rows have
            (1, 128), weights (128, 128).
        num_groups: leading size.
        is_sfa: whether sf belongs to a, with a recipe of three.
        disable_ue8m0_cast, psum_layout: accepted; they have no effect on Hopper, whose scales stay float32.

    Returns:
        For (1, 128) what `get_mn_major_tma_aligned_tensor` returns; for (128, 128) sf itself.

    Raises:
        TypeError: sf is no tensor, or is_sfa does not fit the recipe.
        ValueError: sf has another shape, or weights' scales are not contiguous.
        NotImplementedError: another recipe, or scales that are not float32: those of Blackwell.

    Example:
        >>> transform_sf_into_required_layout(torch.ones(5, 2), 5, 256, (1, 128, 128), is_sfa=True).stride()
        (1, 8)
        >>> transform_sf_into_required_layout(torch.ones(3, 2, 2), 200, 256, (128, 128), 3).stride()
        (4, 2, 1)

    Source: DeepGEMM 2.8.1 (MIT), signature and contract; no code taken.
    """
    del disable_ue8m0_cast, psum_layout
    function = "transform_sf_into_required_layout"
    numbers = list(recipe) if isinstance(recipe, (tuple, list)) else []
    if len(numbers) not in (2, 3) or (len(numbers) == 3) != isinstance(is_sfa, bool):
        rule = "be (gran_m, gran_n, gran_k) with is_sfa, or (gran_mn, gran_k) without"
        got = f"{recipe!r} with is_sfa={is_sfa!r}"
        checks.refuse(TypeError, function, "recipe", rule, got, "Rows of e4m3 have (1, 128).")
    if len(numbers) == 3:
        numbers = [numbers[0] if is_sfa else numbers[1], numbers[2]]
    if numbers not in ([1, GROUP], [GROUP, GROUP]):
        rule, remedy = "be (1, 128) for rows or (128, 128) for weights", "Others are of Blackwell."
        checks.refuse(NotImplementedError, function, "recipe", rule, str(tuple(numbers)), remedy)
    if not isinstance(sf, torch.Tensor):
        got, remedy = _checks.describe(sf), "Pass the scales."
        checks.refuse(TypeError, function, "sf", "be a tensor", got, remedy)
    if sf.dtype != torch.float32:
        remedy = "Packed exponents are the layout of Blackwell."
        checks.refuse(NotImplementedError, function, "sf", "be float32 on Hopper", sf, remedy)
    if what := _checks.not_dense(sf):
        remedy = "Call to_dense() first."
        checks.refuse(TypeError, function, "sf", "be a dense tensor", what, remedy)
    remedy = "Pass the sizes of the tensor that sf belongs to."
    mn, k = (checks.check_int(function, n, x, 0, remedy) for n, x in (("mn", mn), ("k", k)))
    if num_groups is not None:
        num_groups = checks.check_int(function, "num_groups", num_groups, 0, remedy)
    shape = (checks.cdiv(mn, numbers[0]), checks.cdiv(k, GROUP))
    shape = shape if num_groups is None else (num_groups, *shape)
    if tuple(sf.shape) != shape:
        remedy = f"One scale for each {numbers[0]} x {GROUP}."
        checks.refuse(ValueError, function, "sf", f"have shape {list(shape)}", sf, remedy)
    if numbers[0] == 1:
        return mn_major(sf)
    if not (sf.is_contiguous() or sf.transpose(-1, -2).is_contiguous()):
        got = f"strides {list(sf.stride())}"
        rule = "be contiguous, or so with its last two axes exchanged"
        checks.refuse(ValueError, function, "sf", rule, got, "Pass sf.contiguous().")
    return sf
