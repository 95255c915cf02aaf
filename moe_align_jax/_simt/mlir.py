"""Values and refs of the language as MLIR, and instructions as text. Used by `mosaic` alone."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from moe_align_jax._simt.language import Int

FULL_MASK = -1
# Nanoseconds that a kernel waits for another device, which may still be busy with kernels before this one.
# Then the kernel traps: CUDA reports a launch failure, on every device that waits, and nothing hangs.
PATIENCE = 60 * 10**9
_BINARY = {
    "add": arith.addi,
    "sub": arith.subi,
    "mul": arith.muli,
    "udiv": arith.divui,
    "urem": arith.remui,
    "and": arith.andi,
    "or": arith.ori,
    "xor": arith.xori,
    "shl": arith.shli,
    "shr": arith.shrui,
}


def i32() -> ir.Type:
    """MLIR's type int32."""
    return ir.IntegerType.get_signless(32)


def value_of(x: "Int | int") -> ir.Value:
    """A value, or a static int, as an i32 of MLIR; an int from 2**31 on keeps its bits."""
    if isinstance(x, MlirInt):
        return x.value
    x = int(x)  # type: ignore[arg-type]
    return arith.constant(i32(), x - (1 << 32) if x >= 1 << 31 else x)


def index_of(x: "Int | int") -> ir.Value:
    """A value, or a static int, as MLIR's index."""
    return arith.index_cast(ir.IndexType.get(), value_of(x))


class MlirInt(Int):
    """An SSA value, i32 or i1."""

    def __init__(self, value: ir.Value):
        self.value = value

    def _binary(self, name: str, other: Int | int, reverse: bool = False) -> "MlirInt":
        a, b = self.value, value_of(other)
        if reverse:
            a, b = b, a
        if operation := _BINARY.get(name):
            return MlirInt(operation(a, b))
        return MlirInt(arith.cmpi(getattr(arith.CmpIPredicate, name), a, b))


@dataclass(frozen=True)
class Ref:
    """A memref, or the part of the CTA's shared memory from `offset` on."""

    memref: ir.Value
    offset: int = 0
    argument: ir.Value | None = None  # of the kernel, of any dtype
    staged: str = ""  # the name of an array in a window

    def indices(self, index: Any) -> list[ir.Value]:
        """An index of the ref, one value or a tuple of them, as MLIR's indices of the memref."""
        if isinstance(index, tuple):
            return [index_of(i) for i in index]
        return [index_of(index + self.offset if self.offset else index)]

    def pointer(self, index: Int | int) -> ir.Value:
        """The address of a word."""
        element = ir.MemRefType(self.memref.type).element_type
        base = mgpu_utils.memref_ptr(self.memref)
        at = index + self.offset if self.offset else index
        return mgpu_utils.getelementptr(base, [value_of(at)], element)


def shuffle(value: ir.Value, lane: ir.Value, clamp: int, kind: nvvm.ShflKind) -> MlirInt:
    """The value that another lane has: `shfl.sync` of that kind, with its operands `lane` and `clamp`."""
    mask = value_of(FULL_MASK)
    if next(iter(inspect.signature(nvvm.shfl_sync).parameters)) == "thread_mask":  # jax >= 0.12
        return MlirInt(nvvm.shfl_sync(mask, value, lane, value_of(clamp), kind, results=[i32()]))
    # jaxlib's stubs know the signature of one release only.
    return MlirInt(nvvm.shfl_sync(i32(), mask, value, lane, value_of(clamp), kind))  # type: ignore[call-arg]


def global_ref(argument: ir.Value, words: tuple[int, ...]) -> Ref:
    """A kernel's argument as its words."""
    kind = ir.MemRefType(argument.type)
    if str(kind.element_type) == "i32" and tuple(kind.shape) == words:
        return Ref(argument, argument=argument)
    pointer = mgpu_utils.memref_ptr(argument)
    return Ref(
        mgpu_utils.ptr_as_memref(pointer, ir.MemRefType.get(words, i32())), argument=argument
    )


def order_asm(instructions: str, operands: Sequence[ir.Value] = (), constraints: str = "") -> None:
    """Instructions that order memory, or are its messages to others; they give nothing."""
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(
        void, operands, instructions, f"{constraints}~{{memory}}", has_side_effects=True
    )


def patient(look: str, registers: str = "", times: int = 1) -> str:
    """A loop until `look`, instructions that set the predicate `more`, finds what it waits for: so many times
    `PATIENCE` at most."""
    return (
        f"{{ .reg .pred more, first, late; .reg .u64 since, now; {registers} mov.u64 since, 0; "
        f"again: {look} @!more bra there; mov.u64 now, %globaltimer; setp.eq.u64 first, since, 0; "
        "selp.u64 since, now, since, first; sub.u64 now, now, since; "
        f"setp.gt.u64 late, now, {times * PATIENCE}; @late trap; bra again; there: }}"
    )


def address_of(base: int, *terms: tuple["Int | int", int]) -> ir.Value:
    """`base + sum(value * factor)` in 64 bits, as an integer; values are not negative."""
    i64 = ir.IntegerType.get_signless(64)
    address = arith.constant(i64, base)
    for value, factor in terms:
        wide = arith.extui(i64, value_of(value))
        address = arith.addi(address, arith.muli(wide, arith.constant(i64, factor)))
    return address


def global_array(address: ir.Value, words: int) -> ir.Value:
    """A memref of int32 over global memory at an address."""
    pointer = llvm.inttoptr(llvm.PointerType.get(1), address)
    # Through the address space of global memory, or loads and stores would be generic ones.
    pointer = llvm.addrspacecast(llvm.PointerType.get(), pointer)
    return mgpu_utils.ptr_as_memref(pointer, ir.MemRefType.get((words,), i32()))
