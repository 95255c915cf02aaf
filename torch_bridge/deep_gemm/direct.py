"""Launches DeepGEMM's products on torch's current stream."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._grouped_matmul.choose_tiles import config_for
from moe_align_jax._grouped_matmul.config import UNIT
from moe_align_jax._grouped_matmul.direct_problem import (
    NUM_PAIRS,
    NUM_ROWS,
    SCALE_PITCH,
    DirectMatmul,
)
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from torch_bridge import _plan
from torch_bridge._direct import store
from torch_bridge._direct.program import LoadedProgram
from torch_bridge._moe.direct import boundaries, in_place
from torch_bridge._moe.run import gpu_kind
from torch_bridge.deep_gemm.repeated import Launched

_LEAST_ROWS = 1024
_MOST_ROWS = (1 << 30) - 1
_REMEDY = "Call it once with these shapes and options before the capture."


class Bound(NamedTuple):
    """A program, ready to launch.

    Attributes:
        direct: what it was compiled for.
        program: loaded.
        names: of its values, in order.
        needed: bytes that each of its arrays must start on a multiple of.
    """

    direct: DirectMatmul
    program: LoadedProgram
    names: tuple[str, ...]
    needed: Mapping[str, int]


@functools.lru_cache(maxsize=1024)
def _bound(direct: DirectMatmul, program: LoadedProgram) -> Bound:
    names = (*direct.inputs, "out")
    return Bound(direct, program, names, boundaries(program, names))


@functools.lru_cache(maxsize=4096)
def _problem_and_refusal(problem: MatmulProblem, gpu_kind: str) -> tuple[DirectMatmul, str | None]:
    direct = program_problem(problem, gpu_kind)
    return direct, direct.refusal


def program_problem(problem: MatmulProblem, gpu_kind: str) -> DirectMatmul:
    """The problem whose program serves a call: one for every number of rows up to a power of two.

    What a caller expects of a mean group only chooses tiles, of which there are few.
    """
    tiles = config_for(problem, gpu_kind)
    general = problem._replace(function="grouped_matmul", expected_rows=0)
    if problem.rows == "blocks":
        block = problem.block_size
        most = min(_MOST_ROWS, INT32_MAX // max(problem.k // UNIT, 1)) // block * block
        rows = max(_LEAST_ROWS, 1 << (problem.num_rows - 1).bit_length())
        rows = max(min(rows // block * block, most), problem.num_rows)
        general = general._replace(num_rows=rows)
        if problem.scales and problem.scales.x == "column_major":
            pitch = max(-(-rows // 4) * 4, tiles.bm)
            general = general._replace(scales=problem.scales._replace(pitch=pitch))
    return DirectMatmul(general, gpu_kind, tiles)


def program_for(problem: MatmulProblem, out: torch.Tensor) -> Bound | None:
    """The program, ready to launch on the result's device; None where that cannot be, and jax computes.

    Raises:
        torch_bridge.Miss: it is not loaded, and torch's current stream is captured.
    """
    here = store.here
    if _plan.forced_implementation() or here.machine.unavailable(out.device):
        return None
    index = out.get_device()
    direct, reason = _problem_and_refusal(problem, gpu_kind(index))
    if reason:
        here.warn_once(reason)
        return None
    if here.failure(index, direct):
        return None
    try:
        return _bound(direct, here.program_for(problem.function, index, direct, _REMEDY))
    except store.Unavailable as unavailable:
        here.warn_once(str(unavailable))
        return None


def launch(
    bound: Bound,
    problem: MatmulProblem,
    tensors: Mapping[str, torch.Tensor],
    out: torch.Tensor,
) -> Launched:
    """One launch. What does not lie as the kernel reads it is copied; out's memory is written.

    Args:
        bound: of `program_for`.
        problem: of the call.
        tensors: by the names of `problem.inputs`; scales of x by columns are `[..., words, pitch]` views.
        out: contiguous.
    """
    machine, (direct, program, names, needed) = store.here.machine, bound
    with machine.on_device(out.get_device()):
        given: dict[str, Any] = dict(tensors)
        numbers = {NUM_ROWS: problem.num_rows << 8, NUM_PAIRS: 0}
        if "x_scales" in given and problem.scales and problem.scales.x == "column_major":
            given["x_scales"], pitch = _columns(direct, problem, given["x_scales"])
            numbers[SCALE_PITCH] = pitch << 8
        kept = {name: in_place(machine, x, needed[name]) for name, x in given.items()}
        target = out
        if out.data_ptr() % needed["out"]:
            target = machine.empty(tuple(out.shape), out.stride(), out.dtype)
        numbers = {name: value for name, value in numbers.items() if name in names}
        pointers = {name: x.data_ptr() for name, x in kept.items() if name in names}
        pointers["out"] = target.data_ptr()
        values = numbers | pointers
        program.launch(*[values[name] for name in names])
        if target is not out:
            out.copy_(target)
    scale_bytes = kept["x_scales"].nbytes if "x_scales" in kept else 0
    return Launched(names, pointers, numbers, needed, scale_bytes, program.launch)


def _columns(
    direct: DirectMatmul, problem: MatmulProblem, scales: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """The scales as TMA reads them, and from one column to the next in elements."""
    pitch, rows = scales.shape[-1], problem.max_rows or problem.num_rows
    if not direct.pitched:  # its descriptor is compiled
        return scales, pitch
    if pitch % 4 == 0 and pitch >= direct.tiles.bm and scales.data_ptr() % 16 == 0:
        return scales, pitch
    wider = max(-(-rows // 4) * 4, direct.tiles.bm)
    whole = scales.new_zeros((*scales.shape[:-1], wider))
    whole[..., :rows].copy_(scales[..., :rows])
    return whole, wider
