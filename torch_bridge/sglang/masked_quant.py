"""SGLang's fused activation and quantisation of the masked layout, on our kernel.

`torch_bridge.sglang` re-exports it. On a Hopper GPU the kernel is launched on torch's current stream and
writes into the caller's tensors; elsewhere jax computes, over DLPack, and valid rows are copied. Torch's
tracers see an operator that mutates them (and its twin over DLPack, as in `torch_bridge._ops`).
"""

import functools
import inspect

import torch

from moe_align_jax._core import checks
from moe_align_jax._masked_quant.problem import GROUPS_PER_WORD, MaskedQuantProblem
from torch_bridge import _checks, _ops, dlpack
from torch_bridge._direct import inplace, store
from torch_bridge._direct.program import LoadedProgram
from torch_bridge._dlpack_path import run as dlpack_call

_FUNCTION = "silu_and_mul_masked_post_quant_fwd"
_REMEDY = "See torch_bridge.sglang for what each tensor holds."
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_OPERATOR = "silu_and_mul_masked_quant_into"
_SCHEMA = (
    "(Tensor input, Tensor masked_m, Tensor(a!) output, Tensor(b!) output_scale, int quant_group_size, "
    "bool scale_ue8m0, float gemm1_alpha, float gemm1_clamp_limit) -> ()"
)


def silu_and_mul_masked_post_quant_fwd(
    input: torch.Tensor,
    output: torch.Tensor,
    output_scale: torch.Tensor,
    quant_group_size: int,
    masked_m: torch.Tensor,
    scale_ue8m0: bool = False,
    gemm1_alpha: float | None = 0.0,
    gemm1_clamp_limit: float | None = 0.0,
    num_real_tokens: int | None = None,
    topk: int | None = None,
) -> None:
    """SGLang's `silu_and_mul_masked_post_quant_fwd`: writes codes and scales of the valid rows in place.

    Args:
        input: `[e, M, 2 N]` bfloat16 or float16, contiguous: gate, then up.
        output: `[e, M, N]` float8_e4m3fn, contiguous. Written in rows below masked_m.
        output_scale: float32 `[e, M, N / quant_group_size]`, or int32 `[e, G / 4, M]`: packed exponents,
            which need scale_ue8m0. Contiguous (or float32 scales of which `[e, G, M]` is, whose pitch
            is that of M in steps of 16 bytes: the layout of TMA). Written likewise.
        quant_group_size: values that share a scale; N is a multiple of it.
        masked_m: `[e]` any integer dtype, valid rows; clamped to [0, M].
        scale_ue8m0: scales are powers of two.
        gemm1_alpha: above 0, the activation is `min(gate, limit) * sigmoid(alpha * gate) * (up + 1)` with up
            clamped to +-limit; otherwise `silu(gate) * up`, and no limit.
        gemm1_clamp_limit: that limit.
        num_real_tokens, topk: accepted; the grid does not depend on them.

    Returns:
        None.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape, device or layout does not fit, or tensors share memory.
        NotImplementedError: a tensor needs a gradient.
        torch_bridge.Miss: a stream is captured into a CUDA graph and the kernel for these sizes was
            not used before: call it once ahead of the capture. Nothing is written in any of these cases.

    Example:
        >>> x = torch.ones(1, 2, 256, dtype=torch.bfloat16)
        >>> q = torch.empty(1, 2, 128, dtype=torch.float8_e4m3fn)
        >>> scale = torch.zeros(1, 2, 1)
        >>> silu_and_mul_masked_post_quant_fwd(x, q, scale, 128, torch.tensor([1], dtype=torch.int32))
        >>> q[0, 0, 0].item(), scale[0].tolist() == [[0.73046875 / 448], [0.0]]
        (448.0, True)

    Source: sglang 0.5.23 `kernels/ops/moe/ep_moe_kernels.py` (Apache-2.0), signature and contract; no code
    taken.
    """
    del num_real_tokens, topk
    alpha = 0.0 if gemm1_alpha is None else gemm1_alpha
    limit = 0.0 if gemm1_clamp_limit is None else gemm1_clamp_limit
    tensors = {"input": input, "masked_m": masked_m, "output": output, "output_scale": output_scale}
    group = _check(tensors, quant_group_size, scale_ue8m0, alpha, limit)
    if _ops.launches_at_once(tensors):
        _run("auto", tensors, group, scale_ue8m0, alpha, limit)
        return
    op = _ops.chosen(_OPERATOR, input.device)
    op(*tensors.values(), group, scale_ue8m0, float(alpha), float(limit))


def _run(path, tensors, group, ue8m0, alpha, limit) -> None:
    """Runs a call whose tensors have passed `_check`."""
    _check_data(tensors)
    if not tensors["output"].numel():
        return
    problem = _problem(tensors, group, ue8m0, alpha, limit)
    x, masked_m, output, output_scale = tensors.values()
    if path == "auto" and (program := _program(problem, tensors.values())) is not None:
        with torch.cuda.device(x.device):
            if masked_m.dtype != torch.int32 or masked_m.data_ptr() % dlpack.MOSAIC_ALIGNMENT:
                masked_m = masked_m.clamp(0, problem.max_rows).to(torch.int32, copy=True)
            program.launch(*(t.data_ptr() for t in (x, masked_m, output, output_scale)))
        return
    _by_jax(problem, *tensors.values())


def _operator(path, x, masked_m, output, output_scale, group, ue8m0, alpha, limit) -> None:
    """The operator's body: also for callers who come by `torch.ops`."""
    tensors = {"input": x, "masked_m": masked_m, "output": output, "output_scale": output_scale}
    _check(tensors, group, ue8m0, alpha, limit)
    _run(path, tensors, group, ue8m0, alpha, limit)


# -- the direct launch ---------------------------------------------------------------------------


def _program(problem: MaskedQuantProblem, tensors) -> LoadedProgram | None:
    """The kernel, ready to launch on these tensors; None where that is not possible, and jax computes."""
    x, masked_m, output, scales = tensors
    if store.unavailable(x.device) is not None:
        return None
    if any(t.data_ptr() % dlpack.MOSAIC_ALIGNMENT for t in (x, output, scales)):
        return None
    if x.is_neg() or masked_m.is_neg():  # jax gets a copy that has the signs
        return None
    index, programs = x.get_device(), store.here
    if programs.failure(index, problem):
        return None
    remedy = "Call it once with these shapes and options before the capture."
    try:
        return programs.program_for(_FUNCTION, index, problem, remedy)
    except store.Unavailable as reason:
        programs.warn_once(str(reason))
        return None


# -- over DLPack ---------------------------------------------------------------------------------


@functools.cache
def _compiled(problem: MaskedQuantProblem):
    import jax

    from moe_align_jax import silu_and_mul_masked_quant

    # The problem's other fields are sizes of x, or the kernel's own.
    named = inspect.signature(silu_and_mul_masked_quant).parameters
    options = {name: value for name, value in problem._asdict().items() if name in named}
    return jax.jit(functools.partial(silu_and_mul_masked_quant, **options))


def _by_jax(problem: MaskedQuantProblem, x, masked_m, output, output_scale) -> None:
    dlpack.jax_platform(_FUNCTION, x.device)
    dlpack.check_not_capturing(_FUNCTION, x.device)
    with dlpack.on_device(x.device):
        boundary = dlpack.alignment(x.device.type, "mosaic_gpu")
        valid = masked_m.clamp(0, problem.max_rows).to(torch.int32, copy=True)
        compiled, inputs = _compiled(problem), {"x": dlpack.compact(x, boundary), "valid": valid}
        q, scales = views = dlpack.call_jax(lambda arrays: compiled(*arrays.values()), inputs)
        rows = torch.arange(problem.max_rows, device=x.device)[None] < valid[:, None]
        _copy_rows(output.view(torch.uint8), q.view(torch.uint8), rows[..., None])
        column_major = problem.scale_layout == "column_major"
        if column_major and not problem.packed:
            scales = scales[..., : problem.max_rows].transpose(1, 2)
        _copy_rows(output_scale, scales, rows[:, None] if problem.packed else rows[..., None])
        if x.is_cuda:
            dlpack_call.kept_memory.keep_until_read(views)


def _copy_rows(target: torch.Tensor, source: torch.Tensor, rows: torch.Tensor) -> None:
    target.copy_(torch.where(rows, source, target))


# -- checks --------------------------------------------------------------------------------------


def _check(tensors: dict[str, torch.Tensor], group_size, ue8m0, alpha, limit) -> int:
    """The checks that also work while tracing; returns the group size as an int."""
    for argument, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            what, remedy = _checks.describe(tensor), "Pass a PyTorch tensor."
            rule = "be a torch.Tensor"
            raise TypeError(checks.message(_FUNCTION, argument, rule, what, remedy))
        if tensor.is_nested:  # it has no shape to ask for
            rule, what = "be a dense tensor", "a nested tensor"
            raise TypeError(checks.message(_FUNCTION, argument, rule, what, _REMEDY))
        _checks.check_no_gradient(_FUNCTION, argument, tensor)
    x, masked_m, output, output_scale = tensors.values()
    _checks.check_bool(_FUNCTION, "scale_ue8m0", ue8m0)
    remedy = "Pass how many values share a scale, for example 128."
    group = checks.check_positive_int(_FUNCTION, "quant_group_size", group_size, remedy)
    for argument, number in (("gemm1_alpha", alpha), ("gemm1_clamp_limit", limit)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            what, remedy = checks.describe(number), "It is compiled into the kernel."
            raise TypeError(checks.message(_FUNCTION, argument, "be a Python number", what, remedy))
        if not checks.is_finite_float32(number) or number < 0:
            rule, remedy = "be at least 0 and a finite float32", "Pass 0 for none."
            raise ValueError(checks.message(_FUNCTION, argument, rule, number, remedy))
    if x.dtype not in _DTYPES:
        checks.refuse(TypeError, _FUNCTION, "input", "be bfloat16 or float16", x, _REMEDY)
    if output.dtype != torch.float8_e4m3fn:
        checks.refuse(TypeError, _FUNCTION, "output", "be float8_e4m3fn", output, _REMEDY)
    if output_scale.dtype not in (torch.float32, torch.int32):
        checks.refuse(
            TypeError,
            _FUNCTION,
            "output_scale",
            "be float32, or int32 for packed scales",
            output_scale,
            _REMEDY,
        )
    if x.dim() != 3 or x.shape[2] % 2 or not x.shape[2] or x.shape[2] // 2 % group:
        checks.refuse(
            ValueError,
            _FUNCTION,
            "input",
            f"have shape [e, M, 2 N], N a multiple of {group}",
            x,
            _REMEDY,
        )
    experts, rows, width = x.shape[0], x.shape[1], x.shape[2] // 2
    _checks.check_integer_tensor(
        _FUNCTION, "masked_m", masked_m, "Pass the valid rows of each expert."
    )
    packed, groups = output_scale.dtype == torch.int32, width // group
    if packed and (not ue8m0 or groups % GROUPS_PER_WORD):
        rule = "be float32 unless scale_ue8m0 holds and N is a multiple of 4 groups"
        checks.refuse(ValueError, _FUNCTION, "output_scale", rule, output_scale, _REMEDY)
    shapes = {
        "output": (experts, rows, width),
        "output_scale": (
            (experts, groups // GROUPS_PER_WORD, rows) if packed else (experts, rows, groups)
        ),
        "masked_m": (experts,),
    }
    for argument, shape in shapes.items():
        if tuple(tensors[argument].shape) != shape:
            checks.refuse(
                ValueError,
                _FUNCTION,
                argument,
                f"have shape {list(shape)}",
                tensors[argument],
                _REMEDY,
            )
    for argument, tensor in tensors.items():
        if tensor.device != x.device:
            rule = f"be on the input's device, {x.device}"
            raise ValueError(
                checks.message(_FUNCTION, argument, rule, tensor.device, "Move it there.")
            )
    _scale_layout(output_scale)
    for argument in ("input", "output", "masked_m"):
        if not tensors[argument].is_contiguous():
            strides = f"strides {list(tensors[argument].stride())}"
            remedy = f"Pass {argument}.contiguous()."
            raise ValueError(checks.message(_FUNCTION, argument, "be contiguous", strides, remedy))
    return group


def _check_data(tensors: dict[str, torch.Tensor]) -> None:
    """The checks that need tensors with memory."""
    for argument, tensor in tensors.items():
        dlpack.check_tensor(_FUNCTION, argument, tensor)
    operands = {name: tensors[name] for name in ("input", "masked_m")}
    buffers = {name: tensors[name] for name in ("output", "output_scale")}
    inplace.check_no_overlap(_FUNCTION, buffers, operands)


def _problem(tensors: dict[str, torch.Tensor], group, ue8m0, alpha, limit) -> MaskedQuantProblem:
    x, scales = tensors["input"], tensors["output_scale"]
    form = "ue8m0" if ue8m0 else "float32"
    return MaskedQuantProblem(
        x.shape[0],
        x.shape[1],
        x.shape[2] // 2,
        _DTYPES[x.dtype],
        group,
        "ue8m0_packed" if scales.dtype == torch.int32 else form,
        _scale_layout(scales),
        float(limit) if alpha else None,
        float(alpha) or None,
    )


def _scale_layout(scales: torch.Tensor) -> str:
    packed = scales.dtype == torch.int32
    if scales.is_contiguous():
        return "column_major" if packed else "row_major"
    experts, rows, groups = scales.shape
    pitch = checks.round_up(rows, 4)
    if not packed and scales.stride() == (groups * pitch, 1, pitch):
        return "column_major"
    rule, what = "be contiguous, or column-major for TMA", f"strides {list(scales.stride())}"
    remedy = "Pass torch.empty([e, M, G])."
    raise ValueError(checks.message(_FUNCTION, "output_scale", rule, what, remedy))


_ops.register(_OPERATOR, _SCHEMA, _ops.both(_operator))
