"""Checks on torch arguments: static facts only (dtype, shape, device), so that they trace."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch.autograd import forward_ad

from moe_align_jax._core import checks
from torch_bridge._specs import AlignSpec

INTEGER_DTYPES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
PATHS = ("auto", "direct", "dlpack")
_DEVICES = ("cpu", "cuda", "meta")
IDS_REMEDY = "Pass the expert ids that torch.topk returned, not their weights."


def sizes_are_known() -> bool:
    """Whether sizes are numbers that can be compared now.

    Under torch.compile they may be symbols, and under torch.jit.trace they are tensors; then the operator
    checks them when it runs.
    """
    return not (torch.compiler.is_compiling() or torch._C._is_tracing())


def check_path(function: str, path: object) -> str:
    """Checks that `path` is one of PATHS."""
    # As `checks.is_one_of`, without a call: a first call of a size passes here.
    if not isinstance(path, str) or path not in PATHS:
        names = ", ".join(map(repr, PATHS))
        raise ValueError(
            checks.message(
                function,
                "path",
                f"be one of {names}",
                checks.shown(path),
                'Pass "auto" for the best.',
            )
        )
    return path


def check_bool(function: str, argument: str, value: object) -> None:
    """Raises TypeError unless it is a Python bool."""
    if not isinstance(value, bool):
        raise TypeError(
            checks.message(
                function,
                argument,
                "be a Python bool",
                checks.describe(value),
                checks.STATIC_REMEDY,
            )
        )


def check_bools(function: str, flags: Mapping[str, object]) -> None:
    """`check_bool` of several arguments, by name."""
    for argument, value in flags.items():
        check_bool(function, argument, value)


def check_integer_dtypes(function: str, argument: str, value: object) -> tuple[torch.dtype, ...]:
    """The value, which must be a tuple or list of dtypes that ids may have."""
    remedy = "Pass for example (torch.int32, torch.int64)."
    given = value if isinstance(value, (tuple, list)) else ()
    if not given or not all(
        isinstance(dtype, torch.dtype) and dtype in INTEGER_DTYPES for dtype in given
    ):
        what = checks.describe(value)
        rule = "be a tuple of integer dtypes of torch"
        raise TypeError(checks.message(function, argument, rule, what, remedy))
    return tuple(given)


def describe(value: object) -> str:
    """As `checks.describe`, and whose array it is where it is none of torch's."""
    what, package = checks.describe(value), checks.package_of(value)
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    if not is_array or package not in ("jax", "jaxlib", "numpy"):
        return what
    return f"an array of {'NumPy' if package == 'numpy' else 'jax'}, {what}"


def not_dense(tensor: torch.Tensor) -> str | None:
    """What kind of tensor has no plain strided memory, or None."""
    if tensor.is_nested:  # it has no shape to describe
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"{checks.describe(tensor)} of layout {tensor.layout}"
    return f"a quantized tensor, {tensor.dtype}" if tensor.is_quantized else None


def in_forward_mode() -> bool:
    """Whether tensors may have tangents: within torch.func.jvp, jacfwd or forward_ad.dual_level."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether forward mode differentiates by the tensor, of which requires_grad knows nothing."""
    return in_forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


def may_be_differentiated(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether `check_no_gradient` may refuse one of these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return in_forward_mode()


def check_no_gradient(function: str, argument: str, tensor: torch.Tensor) -> None:
    """Raises NotImplementedError where autograd would follow what becomes of the tensor."""
    rule = "need no gradient"
    if tensor.requires_grad and torch.is_grad_enabled():
        remedy = "Call it under torch.no_grad(): it has no derivative."
        checks.refuse(NotImplementedError, function, argument, rule, "requires_grad=True", remedy)
    if has_tangent(tensor):  # the result's would be zeros
        remedy = (
            "Call it outside of torch.func.jvp and forward_ad.dual_level: it has no derivative."
        )
        checks.refuse(NotImplementedError, function, argument, rule, "a tangent", remedy)


def check_integer_tensor(
    function: str, argument: str, value: object, remedy: str, device: torch.device | None = None
) -> torch.Tensor:
    """The value, which must be a dense integer tensor, on `device` if one is given."""
    if not isinstance(value, torch.Tensor):
        what = describe(value)
        raise TypeError(
            checks.message(function, argument, "be an integer torch.Tensor", what, remedy)
        )
    if what := not_dense(value):
        remedy = "Call to_dense() or dequantize() first."
        raise TypeError(checks.message(function, argument, "be a dense tensor", what, remedy))
    if value.dtype not in INTEGER_DTYPES:
        what = checks.describe(value)
        raise TypeError(
            checks.message(function, argument, "be an integer torch.Tensor", what, remedy)
        )
    if device is not None and value.device != device:
        raise ValueError(
            checks.message(
                function,
                argument,
                f"be on the same device as the other tensors, {device}",
                value.device,
                f"Move it there: {argument}.to({str(device)!r}).",
            )
        )
    if value.device.type not in _DEVICES:
        raise NotImplementedError(
            checks.message(
                function,
                argument,
                "be on a CPU or a CUDA device",
                value.device,
                "Move it to one of these.",
            )
        )
    return value


def check_topk(function: str, topk: object, topk_ids: torch.Tensor) -> None:
    """Raises unless `topk` equals the last dimension of `topk_ids`, or divides the length of a 1-D one."""
    remedy = "Pass the experts per token of these topk_ids, or leave topk out."
    number = checks.check_positive_int(function, "topk", topk, remedy)
    if topk_ids.dim() == 1:
        fits, rule = topk_ids.shape[0] % number == 0, "divide the length of a 1-D topk_ids"
    else:
        fits = topk_ids.dim() > 1 and topk_ids.shape[-1] == number
        rule = "equal the last dimension of topk_ids"
    if not fits:
        got = f"{number} for topk_ids {list(topk_ids.shape)}"
        raise ValueError(checks.message(function, "topk", rule, got, remedy))


def check_expert_map(
    function: str, value: object, num_experts: int, device: torch.device
) -> torch.Tensor:
    """The value, which must be an integer tensor of one entry per expert, on `device`."""
    remedy = "Pass one local id (or -1) per global expert."
    expert_map = check_integer_tensor(function, "expert_map", value, remedy, device)
    if expert_map.dim() != 1 or expert_map.shape[0] != num_experts:
        what = checks.describe(expert_map)
        raise ValueError(
            checks.message(function, "expert_map", f"have shape [{num_experts}]", what, remedy)
        )
    return expert_map


def check_num_valid_pairs(
    function: str, value: object, device: torch.device
) -> tuple[torch.Tensor | None, int | None]:
    """num_valid_pairs as (scalar tensor, None) or (None, int within int32); (None, None) where it is None."""
    remedy = "Pass the number of pairs in use, as an int or a scalar integer tensor."
    if value is None:
        return None, None
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = int(value)
        return None, min(max(value, -1), checks.INT32_MAX)
    if not isinstance(value, torch.Tensor):
        what = checks.describe(value)
        raise TypeError(checks.message(function, "num_valid_pairs", "be an integer", what, remedy))
    tensor = check_integer_tensor(function, "num_valid_pairs", value, remedy, device)
    if tensor.numel() != 1:
        what = checks.describe(tensor)
        raise ValueError(checks.message(function, "num_valid_pairs", "be a scalar", what, remedy))
    return tensor, None


def check_alignment(
    function: str,
    topk_ids: object,
    num_experts: object,
    block_size: object,
    topk: object = None,
    expert_map: object = None,
    ignore_invalid_experts: object = False,
    pad_sorted_ids: object = False,
    num_valid_pairs: object = None,
) -> tuple[AlignSpec, dict[str, torch.Tensor], int | None]:
    """Checks an alignment's arguments, but for what needs data.

    Returns:
        What is asked, its tensors by name, and num_valid_pairs where it is an int.
    """
    is_sized = sizes_are_known()
    ids = check_integer_tensor(function, "topk_ids", topk_ids, IDS_REMEDY)
    check_bool(function, "ignore_invalid_experts", ignore_invalid_experts)
    check_bool(function, "pad_sorted_ids", pad_sorted_ids)
    experts = checks.check_num_experts(function, num_experts)
    rows = checks.check_block_size(function, block_size)
    operands, limit = {"topk_ids": ids}, None
    if topk is not None:
        check_topk(function, topk, ids)
    if expert_map is not None:
        operands["expert_map"] = check_expert_map(function, expert_map, experts, ids.device)
    if num_valid_pairs is not None:
        count, limit = check_num_valid_pairs(function, num_valid_pairs, ids.device)
        if count is not None:
            operands["num_valid_pairs"] = count
    sizes = (ids.numel(), experts, rows)
    spec = AlignSpec(*sizes, bool(ignore_invalid_experts), bool(pad_sorted_ids))
    if is_sized:
        spec.check_capacity(function, "topk_ids")
    return spec, operands, limit
