"""Launches the expert layer's programs on torch's current stream.

What lies between two kernels is one piece of memory from torch's allocator, which is free again when the call
returns: the allocator hands it out in the order of the stream.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moe_align_jax._grouped_matmul.direct_problem import NUM_PAIRS, NUM_ROWS, DirectMatmul
from moe_align_jax._grouped_matmul.shape import shape_of
from moe_align_jax.types import LAUNCH_SIZES
from torch_bridge._direct.call import bound, narrow
from torch_bridge._direct.machine import Machine
from torch_bridge._direct.problems import ID_WORDS
from torch_bridge._direct.program import LoadedProgram
from torch_bridge._moe.calls import ALIGNED, Layer, Matmul, weights_of
from torch_bridge._moe.programs import LayerPrograms

# Kernels take their pointers for aligned so; what TMA alone reads or writes needs less.
_ALIGNMENT, _TMA_ALIGNMENT = 256, 16


def boundaries(program: LoadedProgram, names: Sequence[str]) -> dict[str, int]:
    """Bytes that each of a program's arrays must start on a multiple of."""
    passed = {position for spec in program.specs for position in spec.parameters}
    return {
        name: _ALIGNMENT if position in passed else _TMA_ALIGNMENT
        for position, name in enumerate(names)
    }


def copy_reason(tensor: torch.Tensor, boundary: int) -> str | None:
    """Why a tensor cannot be read where it lies, or None."""
    if tensor.is_neg():
        return "it is a lazy negation"
    if not tensor.is_contiguous():
        return f"it is not contiguous (shape {list(tensor.shape)}, strides {list(tensor.stride())})"
    if tensor.data_ptr() % boundary:
        return f"its pointer is not on a {boundary}-byte boundary"
    return None


def in_place(machine: Machine, tensor: torch.Tensor, boundary: int) -> torch.Tensor:
    """The tensor, or a copy that the kernels can read."""
    if copy_reason(tensor, boundary) is None:
        return tensor
    shape, stride = tuple(tensor.shape), _row_major(tensor.shape)
    return machine.empty(shape, stride, tensor.dtype).copy_(tensor.resolve_neg())


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def laid_out_bias(direct: DirectMatmul, bias: torch.Tensor) -> torch.Tensor:
    """As the kernel reads it: float32, whole tiles of columns (see `launch.bias`)."""
    problem, bias = direct.problem, bias.to(torch.float32)
    shape, weights = shape_of(problem, direct.tiles), problem.weights
    spare = shape.n_tiles * shape.columns - problem.n
    pad = torch.nn.functional.pad
    if not weights.gated:
        return pad(bias, (0, spare)) if spare else bias
    if weights.interleaved and not weights.transposed:
        return pad(bias, (0, 2 * spare)) if spare else bias
    parts = (problem.num_experts, 2, problem.n)
    if weights.interleaved:
        bias = bias.reshape(problem.num_experts, problem.n, 2).transpose(1, 2)
    elif not spare:
        return bias
    return pad(bias.reshape(parts), (0, spare)).reshape(problem.num_experts, -1)


class BoundMatmul:
    """A product's launch, bound to its program and sizes: only tensors are missing.

    Args:
        machine: where the program is loaded.
        call, direct: what is asked, and which problem serves it.
        program: its program.
        operands: the call's tensors by name; their shapes and dtypes count.

    Attributes:
        device: the program's device.
        order: names of the caller's tensors, as `run_plain` takes them.
        needed: bytes that each of them must start on a multiple of.
        is_plain: whether `run_plain` takes the caller's tensors as they are, if they lie well.
    """

    def __init__(
        self,
        machine: Machine,
        call: Matmul,
        direct: DirectMatmul,
        program: LoadedProgram,
        operands: Mapping[str, torch.Tensor],
    ):
        self._machine, self._call, self._direct, self._launch = (
            machine,
            call,
            direct,
            program.launch,
        )
        self.device = operands["x"].get_device()
        names = (*direct.inputs, "out")
        arrays = ("x", *weights_of(dict(operands)), *_ALIGNED)
        self.order = arrays
        self.needed = dict.fromkeys(arrays, 1) | boundaries(program, names)
        rows, pairs = call.shape[0], operands["x"].shape[0] * call.top_k
        self._sizes = (rows << 8, pairs << 8)
        at = {name: k for k, name in enumerate((NUM_ROWS, NUM_PAIRS, *arrays, "out", *_OF_ROWS))}
        self._pick = operator.itemgetter(*[at[name] for name in names])
        self.is_plain = not direct.spare_rows and not set(_OF_ROWS) & set(operands)

    def run_plain(self, pointers: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """The result of a call that `is_plain`, whose tensors lie well.

        Args:
            pointers: where the tensors of `order` are; `row_weights` and `bias` may follow.
            out: the result; None for a new one.
        """
        count = len(self.order)
        if out is None:
            shape = self._call.shape
            out = self._machine.empty(shape, (shape[1], 1), self._call.out_dtype)
        values = (*self._sizes, *pointers[:count], out.data_ptr(), *(pointers[count:] or (0, 0)))
        self._launch(*self._pick(values))
        return out

    def run(
        self, operands: Mapping[str, torch.Tensor], out: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """The result. Whatever cannot be read as it lies is converted first."""
        direct, machine = self._direct, self._machine
        given = {name: x.detach() for name, x in operands.items()}
        if "bias" in given:
            given["bias"] = laid_out_bias(direct, given["bias"])
        if "row_weights" in given:
            given["row_weights"] = given["row_weights"].to(torch.float32)
        if spare := direct.spare_rows:
            for name, value in (("sorted_token_ids", -1), ("row_weights", 0)):
                if name in given:
                    given[name] = torch.nn.functional.pad(given[name], (0, spare), value=value)
        kept = {name: in_place(machine, x, self.needed[name]) for name, x in given.items()}
        pointers = [
            kept[name].data_ptr() if name in kept else 0 for name in (*self.order, *_OF_ROWS)
        ]
        if out is None or copy_reason(out, self.needed["out"]) is None:
            return (self.run_plain(pointers, out),)
        return (out.copy_(self.run_plain(pointers)),)


_ALIGNED, _OF_ROWS = ALIGNED[:3], ("row_weights", "bias")
# Values of a layer's launches, in this order ahead of the tensors' pointers.
_BETWEEN = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "row_of_pair")
_MORE = ("num_valid_pairs", "tokens_per_expert", "bias", "bias_down")
_NO_MAP, _NO_MORE = (0,), (0,) * len(_MORE)


class BoundLayer:
    """A layer's launches, bound to its programs and sizes: only tensors are missing.

    Args:
        machine: where the programs are loaded.
        call, programs: what is asked, and which problems serve it.
        loaded: their programs, in order.
        operands: the call's tensors by name; their shapes and dtypes count.

    Attributes:
        device: the programs' device.
        order: names of the caller's tensors, as `run_plain` takes them.
        needed: bytes that each of them must start on a multiple of.
        is_plain: whether `run_plain` takes the caller's tensors as they are, if they lie well.
    """

    def __init__(
        self,
        machine: Machine,
        call: Layer,
        programs: LayerPrograms,
        loaded: Sequence[LoadedProgram],
        operands: Mapping[str, torch.Tensor],
    ):
        self.call, self.programs, self._machine = call, programs, machine
        self.device = operands["x"].get_device()
        *first_ones, first, second, total = loaded
        align = first_ones[0] if first_ones else None
        x, ids = operands["x"], operands["topk_ids"]
        tokens, hidden = call.shape
        self._first_names = weights_of(dict(operands))
        self._aligned = align is None
        rows = programs.num_rows
        item = x.element_size()
        blocks = rows // programs.block_size
        # Words of what lies between the kernels, one behind the other.
        sizes = {
            "sorted_token_ids": rows,
            "expert_ids": blocks,
            "num_tokens_post_padded": 1,
            "row_of_pair": programs.num_pairs,
        }
        if self._aligned:
            sizes = {}
        sizes |= {"hidden": rows * call.ffn * item // 4, "y": rows * hidden * item // 4}
        words, starts = 0, {}
        for name, size in sizes.items():
            starts[name] = 4 * words
            words += -(-size // 64) * 64
        self._num_words = words
        constants = {
            NUM_ROWS: rows << 8,
            NUM_PAIRS: programs.num_pairs << 8,
            "num_tokens": tokens << 8,
        }
        # In the order of `run_plain`.
        given = ["x", *self._first_names, "w_down", "weights", "out", "ids", "first_id"]
        given += ["expert_map", *_MORE]
        if self._aligned:
            given += _BETWEEN
        names = [*constants, *starts, *given]
        at = {name: position for position, name in enumerate(names)}
        renamed = {
            LAUNCH_SIZES[0]: NUM_PAIRS,
            LAUNCH_SIZES[1]: NUM_ROWS,
            "topk_ids": "ids",
        }

        def picker(problem: Any, others: dict[str, str]) -> Callable[[Sequence[int]], Any]:
            wanted = [*problem.inputs, *problem.outputs]
            return operator.itemgetter(*[at[others.get(name, name)] for name in wanted])

        self._steps: list[tuple[Callable[..., None], Callable[[Sequence[int]], Any]]] = []
        if align is not None:
            self._steps.append((align.launch, picker(programs.align, renamed)))
        self._steps += [
            (first.launch, picker(programs.first, {"out": "hidden"})),
            (
                second.launch,
                picker(
                    programs.second,
                    {"x": "hidden", "w": "w_down", "out": "y", "bias": "bias_down"},
                ),
            ),
            (total.launch, picker(programs.total, {})),
        ]
        self._constants, self._starts = tuple(constants.values()), tuple(starts.values())
        self._given, self._ids_at = given, len(self._first_names) + 3
        id_bytes = ids.element_size() if ids.dtype in ID_WORDS else 4  # the others are converted
        self._id_bytes, self._id_shift = id_bytes, 8 - (id_bytes.bit_length() - 1)
        self.order = ("x", *self._first_names, "w_down", "topk_weights", "topk_ids")
        self.order += ("expert_map",) if "expert_map" in operands else ()
        self.needed = self._boundaries(first, second)
        biased = "bias" in operands or "bias_down" in operands
        self.is_plain = (
            not biased
            and not call.weights_on_input
            and not call.counted
            and not self._aligned
            and programs.align is not None
            and not programs.align.has_num_valid_pairs
            and operands["topk_weights"].dtype is torch.float32
            and ids.dtype in ID_WORDS
            and ("expert_map" not in operands or operands["expert_map"].dtype is torch.int32)
        )

    def _boundaries(self, first: LoadedProgram, second: LoadedProgram) -> dict[str, int]:
        of_first = boundaries(first, (*self.programs.first.inputs, "out"))
        of_second = boundaries(second, (*self.programs.second.inputs, "out"))
        needed = {"x": of_first["x"], "w_down": of_second["w"]}
        needed |= {name: of_first[name] for name in self._first_names}
        needed |= {"topk_ids": self._id_bytes, "topk_weights": _ALIGNMENT}  # ids: any element
        return needed | {"expert_map": _ALIGNMENT, "out": _ALIGNMENT}

    def launch(self, pointers: Sequence[int]) -> None:
        """Enqueues the kernels; `pointers` are the values of `_given`, in order."""
        memory = self._machine.empty((self._num_words,), (1,), torch.int32)
        base = memory.data_ptr()
        values = [*self._constants, *[base + start for start in self._starts], *pointers]
        for enqueue, pick in self._steps:
            enqueue(*pick(values))

    def run_plain(self, pointers: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """The result of a call that `is_plain`, whose tensors lie well.

        Args:
            pointers: where x, the weights of the first product and of the second, topk_weights, topk_ids
                and, if there is one, expert_map are.
            out: the result; None for a new one.
        """
        if out is None:
            shape = self.call.shape
            out = self._machine.empty(shape, (shape[1], 1), self.call.out_dtype)
        at = self._ids_at
        ids = pointers[at]
        behind = ids & 255
        self.launch(
            (
                *pointers[:at],
                *(out.data_ptr(), ids - behind, behind << self._id_shift),
                *(pointers[at + 1 :] or _NO_MAP),
                *_NO_MORE,
            )
        )
        return out

    def run(
        self, operands: Mapping[str, torch.Tensor], out: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """The results. Whatever cannot be read as it lies is converted first."""
        call, machine, programs = self.call, self._machine, self.programs
        given = {name: x.detach().resolve_neg() for name, x in operands.items()}
        x, shares = given["x"], given["topk_weights"]
        tokens, hidden = call.shape
        shares = shares.to(torch.float32)
        if call.weights_on_input:
            scaled = x.to(torch.float32)[:, None, :] * shares[..., None]
            x, shares = scaled.to(x.dtype).reshape(-1, hidden), torch.ones_like(shares)
        tensors = {"x": x, "weights": shares, "w_down": given["w_down"]}
        tensors |= {name: given[name] for name in self._first_names}
        if "bias" in given:
            tensors["bias"] = laid_out_bias(programs.first, given["bias"])
        if "bias_down" in given:
            tensors["bias_down"] = laid_out_bias(programs.second, given["bias_down"])
        results: list[torch.Tensor] = []
        if self._aligned:
            tensors |= {name: given[name].reshape(-1) for name in _BETWEEN}
            if not call.weights_on_input:
                tensors["weights"] = self._of_experts_here(tensors, shares)
            if call.counted:
                results.append(given["tokens_per_expert"])
        else:
            tensors |= self._routing(given)
        if call.counted and not self._aligned:
            assert programs.align is not None
            counts = machine.empty((programs.align.num_experts,), (1,), torch.int32)
            tensors["tokens_per_expert"] = counts
            results.append(counts[: call.num_experts])
        kept = {
            name: in_place(machine, tensor, self.needed.get(name, _ALIGNMENT))
            for name, tensor in tensors.items()
            if name != "ids"
        }
        target = out
        if target is None or copy_reason(target, _ALIGNMENT):
            target = machine.empty(call.shape, (hidden, 1), call.out_dtype)
        pointers = {name: tensor.data_ptr() for name, tensor in kept.items()}
        if "ids" in tensors:
            pointers |= self.id_values(tensors["ids"].data_ptr())
        pointers["out"] = target.data_ptr()
        self.launch([pointers.get(name, 0) for name in self._given])
        if out is not None and target is not out:
            target = out.copy_(target)
        return (target, *results)

    def _of_experts_here(
        self, tensors: Mapping[str, torch.Tensor], shares: torch.Tensor
    ) -> torch.Tensor:
        """The weights; 0 for pairs in blocks of no expert: their rows are zero, their weights may be NaN."""
        experts = tensors["expert_ids"]
        block = tensors["row_of_pair"].div(self.programs.block_size, rounding_mode="floor")
        expert = experts[block.clamp(0, experts.shape[0] - 1)].view(shares.shape)
        return shares.masked_fill((expert < 0) | (expert >= self.call.num_experts), 0)

    def id_values(self, pointer: int) -> dict[str, int]:
        """Where ids begin: their 256-byte boundary, and how many elements behind it."""
        behind = pointer & 255
        return {"ids": pointer - behind, "first_id": behind << self._id_shift}

    def _routing(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The alignment's operands, as its kernels read them."""
        ids, call = given["topk_ids"], self.call
        if ids.dtype not in ID_WORDS:
            ids = ids.to(torch.int32)
        found = {"ids": ids.contiguous()}
        if "expert_map" in given:
            expert_map = given["expert_map"]
            if expert_map.dtype != torch.int32:
                expert_map = narrow(expert_map, -1, expert_map.shape[0] - 1)
            found["expert_map"] = expert_map
        tokens, top_k = ids.shape
        if call.max_valid_tokens >= 0:
            pairs = min(call.max_valid_tokens, tokens) * top_k
            found["num_valid_pairs"] = torch.full((1,), pairs, dtype=torch.int32, device=ids.device)
        elif "num_valid_tokens" in given:
            limit = bound(given["num_valid_tokens"]).to(torch.int64).clamp(0, tokens) * top_k
            found["num_valid_pairs"] = limit.to(torch.int32).view(1)
        return found
