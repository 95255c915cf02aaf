"""A call of DeepGEMM's products: the checks of its tensors, and how it runs.

All rows of a block of the contiguous layout belong to one group: the kernel reads the label of a block's
first row out of `grouped_layout`. Where that holds the groups' ends, torch finds the blocks' labels among
them, on the device: the host never waits, and a CUDA graph can capture a call.
"""

import functools
from typing import Any, NamedTuple

import torch

from moe_align_jax._core import checks
from moe_align_jax._core.fp8 import GROUP, GROUPS_PER_WORD
from moe_align_jax._grouped_matmul.problem import E4M3, MatmulProblem, Scales, Weights
from torch_bridge import _checks, _plan, dlpack
from torch_bridge._direct import inplace
from torch_bridge._dlpack_path import run as dlpack_call
from torch_bridge.deep_gemm import direct, repeated
from torch_bridge.deep_gemm import scales as layouts

# How rows belong to groups: by a label for each, by the groups' ends, or in the masked layout.
CONTIGUOUS, ENDS, MASKED = "contiguous", "ends", "masked"


class Call(NamedTuple):
    """A call whose tensors have been checked, but for what needs data.

    Attributes:
        problem: what is computed; its operands are those of `_operands`.
        a, b: values.
        a_scales, b_scales: as the problem has them; None for bfloat16.
        d: of the problem's result.
        layout: where the groups' rows are.
        rows: CONTIGUOUS, ENDS or MASKED.
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


def checked(
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
) -> Call:
    """The checks that also work while tracing."""
    masked, quantized = rows == MASKED, a_scales is not None
    named = {"a": a, "b": b, "d": d}
    named |= {"scales of a": a_scales, "scales of b": b_scales} if quantized else {}
    where = "masked_m" if masked else "grouped_layout"
    named[where] = layout
    for argument, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            got, remedy = _checks.describe(tensor), "Pass a PyTorch tensor."
            checks.refuse(TypeError, function, argument, "be a tensor", got, remedy)
        if what := _checks.not_dense(tensor):
            remedy = "Call to_dense() or dequantize() first."
            checks.refuse(TypeError, function, argument, "be a dense tensor", what, remedy)
        _checks.check_no_gradient(function, argument, tensor)
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
    sizes = groups if masked or rows == ENDS else a.shape[0]
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
        MASKED if masked else "blocks",
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
        row_labels=rows == CONTIGUOUS,
        expected_rows=min(expected_m, a.shape[1]) if masked else 0,
    )
    return Call(problem, a, of_a, b, of_b, d, layout, rows)


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


def run(path: str, call: Call) -> repeated.Launched | None:
    """Runs a call whose tensors have passed `checked`. None where jax did, or there is nothing to do."""
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


def _where(call: Call) -> list[torch.Tensor]:
    """The problem's operands that tell where the groups' rows are, made on the device."""
    layout, block, rows = call.layout, call.problem.block_size, call.problem.num_rows
    if call.rows == MASKED or call.problem.row_labels:
        return [layout]
    if call.rows == CONTIGUOUS:
        every = torch.full((1,), rows, dtype=torch.int32, device=layout.device)
        return [layout[::block].contiguous(), every]
    first = torch.arange(0, rows, block, dtype=torch.int32, device=layout.device)
    group = torch.searchsorted(layout, first, right=True, out_int32=True)
    return [group, layout[-1:].clamp(0, rows)]


def _tensors(call: Call) -> list[torch.Tensor]:
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


def _by_jax(call: Call) -> None:
    from moe_align_jax._grouped_matmul import primitive

    call = call._replace(problem=call.problem._replace(row_labels=False))
    problem, device = call.problem, call.d.device
    dlpack.check_not_capturing(problem.function, device)
    platform = dlpack.jax_platform(problem.function, device)
    implementation = primitive.choose(problem, platform, _plan.forced_implementation())
    boundary = dlpack.alignment(device.type, implementation)
    with dlpack.on_device(device):
        inputs = {
            name: dlpack.compact(x, boundary)
            for name, x in zip(problem.inputs, _tensors(call), strict=True)
        }
        compiled = _compiled(problem, implementation)
        [view] = dlpack.call_jax(lambda arrays: [compiled(*arrays.values())], inputs)
        call.d.detach().copy_(view.view(call.d.shape))
        if device.type == "cuda":
            dlpack_call.kept_memory.keep_until_read([view])
