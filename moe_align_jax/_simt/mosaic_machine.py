"""The primitives of the language as MLIR, for kernels of one device and of several."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, nvvm, scf

from moe_align_jax._simt.language import WARP, Int, Kernel, Simt
from moe_align_jax._simt.mlir import (
    FULL_MASK,
    MlirInt,
    Ref,
    address_of,
    global_array,
    global_ref,
    i32,
    order_asm,
    patient,
    shuffle,
    value_of,
)
from moe_align_jax._simt.window import Window, Windowed


class MosaicSimt(Simt):
    """Emits MLIR at the current insertion point."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        pdl: bool = False,
        context: Any = None,
        zeroed: ir.Value | None = None,
        mailbox: Ref | None = None,
        mail_barrier: Ref | None = None,
    ):
        self.num_threads, self.num_ctas = kernel.num_threads, kernel.num_ctas
        self.cluster = kernel.cluster
        self._pdl = pdl
        # For kernels of several devices: Mosaic's launch context, and zeroed words: the inbox, then how many
        # peers of each CTA have arrived.
        self._devices, self._context, self._zeroed = kernel.devices, context, zeroed
        self._inbox = kernel.inbox
        self._mailbox, self._mail_barrier = mailbox, mail_barrier
        self._mailbox_words, self._tail = kernel.mailbox, kernel.tail_threads

    def thread_id(self) -> Int:
        return MlirInt(arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x)))

    def cta_id(self) -> Int:
        if self.num_ctas == 1:
            return self.const(0)
        if self.num_ctas == self.cluster:  # vmap's batch then shares grid.x with it
            # nvvm's own operation has another signature in each jaxlib.
            return MlirInt(llvm.inline_asm(i32(), [], "mov.u32 $0, %cluster_ctarank;", "=r"))
        return MlirInt(arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x)))

    def const(self, value: int) -> Int:
        return MlirInt(value_of(value))

    def select(self, condition: Int, a: Int | int, b: Int | int) -> Int:
        return MlirInt(arith.select(value_of(condition), value_of(a), value_of(b)))

    def multiply_if(self, condition: Int, a: Int, b: Int, other: Int) -> Int:
        values = [value_of(x) for x in (other, a, b, condition)]
        code = "@$4 mad.lo.s32 $0, $2, $3, 0;"
        return MlirInt(llvm.inline_asm(i32(), values, code, "=r,0,r,r,b"))

    def _lop3(self, a: Int, mask: int, b: Int, table: int) -> Int:
        """Any function of the three, bit by bit, in one instruction: `table` has its values for the 8
        triples of bits, as PTX's `lop3` counts them."""
        code = f"lop3.b32 $0, $1, {mask & 0xFFFFFFFF:#x}, $2, {table:#x};"
        return MlirInt(llvm.inline_asm(i32(), [value_of(a), value_of(b)], code, "=r,r,r"))

    def masked_or(self, a: Int, mask: int, b: Int) -> Int:
        return self._lop3(a, mask, b, 0xEA)

    def masked_xor(self, a: Int, mask: int, b: Int) -> Int:
        return self._lop3(a, mask, b, 0x6A)

    def multiply_add(self, a: Int, b: Int, c: Int) -> Int:
        return self._integer("mad.lo.s32", a, b, c)

    def dot_bytes(self, a: Int, b: Int, c: Int) -> Int:
        return self._integer("dp4a.u32.u32", a, b, c)

    def _integer(self, instruction: str, *operands: Int) -> Int:
        """One instruction on int32 operands, with a result of 32 bits."""
        values = [value_of(x) for x in operands]
        places = ", ".join(f"${k}" for k in range(len(values) + 1))
        constraints = "=r" + ",r" * len(values)
        return MlirInt(llvm.inline_asm(i32(), values, f"{instruction} {places};", constraints))

    def low_halves(self, a: Int, b: Int) -> Int:
        values = [value_of(x) for x in (a, b)]
        return MlirInt(llvm.inline_asm(i32(), values, "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r"))

    def any_lane(self, condition: Int) -> tuple[Int, Int]:
        i1, code = ir.IntegerType.get_signless(1), "vote.sync.any.pred $0, $1, 0xffffffff;"
        operands = [value_of(condition)]
        found = llvm.inline_asm(i1, operands, code, "=b,b", has_side_effects=True)
        return MlirInt(found), MlirInt(arith.xori(found, arith.constant(i1, 1)))

    def hidden(self, value: Int) -> Int:
        code, operands = "mov.b32 $0, $1;", [value_of(value)]
        return MlirInt(llvm.inline_asm(i32(), operands, code, "=r,r", has_side_effects=True))

    def held(self, ref: Ref, zero: Int) -> Ref:
        i64 = ir.IntegerType.get_signless(64)
        address = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref.memref))
        operands, code = [address, arith.extui(i64, value_of(zero))], "add.s64 $0, $1, $2;"
        address = llvm.inline_asm(i64, operands, code, "=l,l,l", has_side_effects=True)
        [words] = ir.MemRefType(ref.memref.type).shape
        return Ref(global_array(address, words))

    def _if(self, condition: Int) -> AbstractContextManager[None]:
        return mgpu_utils.when(value_of(condition))

    def _for_range(self, start: Int | int, stop: Int | int, step: Int | int) -> Iterator[Int]:
        loop = scf.ForOp(value_of(start), value_of(stop), value_of(step), [])
        with ir.InsertionPoint(loop.body):
            yield MlirInt(loop.induction_variable)
            scf.YieldOp([])

    def values_if(
        self, condition: Int, compute: Callable[[], Sequence[Int]], others: Sequence[Int | int]
    ) -> list[Int]:
        branch = scf.IfOp(value_of(condition), [i32()] * len(others), has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.YieldOp([value_of(x) for x in compute()])
        with ir.InsertionPoint(branch.else_block):  # type: ignore[arg-type]
            scf.YieldOp([value_of(x) for x in others])
        return [MlirInt(result) for result in branch.results]

    def values_while(
        self,
        first: Sequence[Int],
        goes_on: Callable[[Sequence[Int]], Int],
        step: Callable[[Sequence[Int]], Sequence[Int]],
    ) -> list[Int]:
        types = [i32()] * len(first)
        loop = scf.WhileOp(types, [value_of(x) for x in first])
        before = loop.before.blocks.append(*types)
        with ir.InsertionPoint.at_block_begin(before):
            values = [MlirInt(x) for x in before.arguments]
            scf.condition(value_of(goes_on(values)), list(before.arguments))
        after = loop.after.blocks.append(*types)
        with ir.InsertionPoint.at_block_begin(after):
            values = [MlirInt(x) for x in after.arguments]
            scf.YieldOp([value_of(x) for x in step(values)])
        return [MlirInt(result) for result in loop.results]

    def load(self, ref: Ref, index: Any) -> Int:
        return MlirInt(memref.load(ref.memref, ref.indices(index)))

    def store(self, ref: Ref, index: Any, value: Int | int) -> None:
        memref.store(value_of(value), ref.memref, ref.indices(index))

    def load4(self, ref: Ref, index: Int | int) -> tuple[Int, ...]:
        words = llvm.load(ir.VectorType.get((4,), i32()), ref.pointer(index), alignment=16)
        return tuple(MlirInt(llvm.extractelement(words, value_of(k))) for k in range(4))

    def load_narrow(self, ref: Ref, index: Int | int, width: int) -> Int:
        kind = ir.IntegerType.get_signless(8 * width)
        base = mgpu_utils.memref_ptr(ref.memref)
        at = mgpu_utils.getelementptr(base, [value_of(index)], kind)
        return MlirInt(arith.extui(i32(), llvm.load(kind, at, alignment=width)))

    def _byte(self, ref: Ref, index: Int) -> tuple[ir.Type, ir.Value]:
        """The type of a byte, and a pointer to one of an array of words."""
        kind = ir.IntegerType.get_signless(8)
        return kind, mgpu_utils.getelementptr(ref.pointer(0), [value_of(index)], kind)

    def load_byte(self, ref: Ref, index: Int) -> Int:
        kind, at = self._byte(ref, index)
        return MlirInt(arith.extui(i32(), llvm.load(kind, at, alignment=1)))

    def store_byte(self, ref: Ref, index: Int, value: Int) -> None:
        kind, at = self._byte(ref, index)
        llvm.store(arith.trunci(kind, value_of(value)), at, alignment=1)

    def store4(self, ref: Ref, index: Int | int, value: Any) -> None:
        self._store_words(ref, index, value if isinstance(value, tuple) else (value,) * 4)

    def store2(self, ref: Ref, index: Int | int, value: tuple[Int, ...]) -> None:
        self._store_words(ref, index, value)

    def _store_words(self, ref: Ref, index: Int | int, values: tuple[Int, ...]) -> None:
        """Stores two or four words at once, at an index that is a multiple of their number."""
        words = llvm.mlir_undef(ir.VectorType.get((len(values),), i32()))
        for k, value in enumerate(values):
            words = llvm.insertelement(words, value_of(value), value_of(k))
        llvm.store(words, ref.pointer(index), alignment=4 * len(values))

    def launch_value(self, ref: Ref) -> Int:
        # It rides in a pointer. LLVM takes a pointer parameter's low 8 bits for zero (it is declared
        # 256-byte aligned), so the launcher shifts the value left by 8.
        pointer = memref.extract_aligned_pointer_as_index(ref.memref)
        word = arith.shrui(pointer, arith.constant(ir.IndexType.get(), 8))
        return MlirInt(arith.index_cast(i32(), word))

    def atomic_add(self, ref: Ref, index: Int | int, value: Int | int) -> None:
        # memref.atomic_rmw would be acq_rel at system scope.
        llvm.atomicrmw(
            llvm.AtomicBinOp.add,
            ref.pointer(index),
            value_of(value),
            llvm.AtomicOrdering.monotonic,
            syncscope="block",
        )

    def _float(self, instruction: str, *operands: Int | int) -> Int:
        """One instruction on float32 operands, with a result of 32 bits."""
        f32 = ir.F32Type.get()
        values = [arith.bitcast(f32, value_of(x)) for x in operands]
        places = ", ".join(f"${k}" for k in range(len(values) + 1))
        constraints = "=r" + ",f" * len(values)
        return MlirInt(llvm.inline_asm(i32(), values, f"{instruction} {places};", constraints))

    def fma(self, a: Int, b: Int, c: Int | int) -> Int:
        return self._float("fma.rn.f32", a, b, c)

    def fma_saturated(self, a: Int, b: Int, c: Int) -> Int:
        return self._float("fma.rn.sat.f32", a, b, c)

    def fadd(self, a: Int, b: Int) -> Int:
        return self._float("add.rn.f32", a, b)

    def fmul(self, a: Int, b: Int | int) -> Int:
        return self._float("mul.rn.f32", a, b)

    def fdiv(self, a: Int | int, b: Int) -> Int:
        return self._float("div.rn.f32", a, b)

    def fmax(self, a: Int, b: Int) -> Int:
        return self._float("max.f32", a, b)

    def fmin(self, a: Int, b: Int) -> Int:
        return self._float("min.f32", a, b)

    def exp2(self, a: Int) -> Int:
        return self._float("ex2.approx.ftz.f32", a)

    def reciprocal(self, a: Int) -> Int:
        return self._float("rcp.approx.ftz.f32", a)

    def fsqrt(self, a: Int) -> Int:
        return self._float("sqrt.approx.ftz.f32", a)

    def from_float16(self, word: Int) -> Int:
        convert = (
            "{ .reg .b16 low, high; .reg .f32 wide; mov.b32 {low, high}, $1; "
            "cvt.f32.f16 wide, low; mov.b32 $0, wide; }"
        )
        return MlirInt(llvm.inline_asm(i32(), [value_of(word)], convert, "=r,r"))

    def bfloat16_pair(self, low: Int, high: Int) -> Int:
        return self._float("cvt.rn.bf16x2.f32", high, low)

    def e4m3_pair(self, low: Int, high: Int) -> Int:
        convert = (
            "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, $1, $2; cvt.u32.u16 $0, pair; }"
        )
        f32 = ir.F32Type.get()
        values = [arith.bitcast(f32, value_of(x)) for x in (high, low)]
        return MlirInt(llvm.inline_asm(i32(), values, convert, "=r,f,f"))

    def shfl(self, value: Int, lane: Int | int) -> Int:
        return shuffle(value_of(value), value_of(lane), 31, nvvm.ShflKind.idx)

    def shfl_up(self, value: Int, delta: int) -> Int:
        return shuffle(value_of(value), value_of(delta), 0, nvvm.ShflKind.up)

    def ballot(self, condition: Int) -> Int:
        return MlirInt(
            llvm.inline_asm(
                i32(),
                [value_of(condition)],
                "vote.sync.ballot.b32 $0, $1, 0xffffffff;",
                "=r,b",
                has_side_effects=True,
            )
        )

    def same_bit(self, value: Int, bit: int) -> Int:
        # Written out: LLVM would test the bit once for the vote and, shifted, again for the choice.
        code = (
            f"{{ .reg .pred p; .reg .b32 mine, votes; and.b32 mine, $1, {1 << bit}; "
            "setp.ne.b32 p, mine, 0; vote.sync.ballot.b32 votes, p, 0xffffffff; "
            "selp.b32 mine, 0, -1, p; xor.b32 $0, votes, mine; }"
        )
        asm = llvm.inline_asm(i32(), [value_of(value)], code, "=r,r", has_side_effects=True)
        return MlirInt(asm)

    def _over_warp(self, operation: str, value: Int) -> Int:
        """A reduction over the warp's 32 lanes, by `redux.sync`."""
        code = f"redux.sync.{operation}.s32 $0, $1, 0xffffffff;"
        return MlirInt(
            llvm.inline_asm(i32(), [value_of(value)], code, "=r,r", has_side_effects=True)
        )

    def warp_sum(self, value: Int) -> Int:
        return self._over_warp("add", value)

    def warp_max(self, value: Int) -> Int:
        return self._over_warp("max", value)

    def warp_min(self, value: Int) -> Int:
        return self._over_warp("min", value)

    def popc(self, value: Int) -> Int:
        return MlirInt(llvm.intr_ctpop(value_of(value)))

    def highest_bit(self, value: Int) -> Int:
        return 31 - MlirInt(llvm.intr_ctlz(value_of(value), False))

    def warp_sync(self) -> None:
        nvvm.bar_warp_sync(value_of(FULL_MASK))

    def block_sync(self) -> None:
        gpu.barrier()

    def tail_sync(self) -> None:
        order_asm(f"bar.sync 1, {self._tail};")  # 0 is the barrier of block_sync

    def open_mailbox(self) -> None:
        """Makes the barrier beside the mailbox on which `post` counts bytes down."""
        with self._if(self.thread_id().eq(0)):
            init = "mbarrier.init.shared::cta.b64 [$0], 1; fence.mbarrier_init.release.cluster;"
            order_asm(init, [self._shared_address(self._mail_barrier, 0)], "r,")
        order_asm("barrier.cluster.arrive.relaxed.aligned;")

    def _shared_address(self, ref: Ref | None, index: Int | int) -> ir.Value:
        """The address of a word of shared memory, as int32."""
        assert ref is not None  # the kernel has a mailbox
        return llvm.ptrtoint(i32(), ref.pointer(index))

    def cluster_ready(self, *, has_first: bool = True) -> None:
        order_asm("barrier.cluster.wait.acquire.aligned;")
        if not has_first:
            return
        # Not before: racecheck cannot tell it from a race with the other lanes' part in the init. Words that
        # come before this is said count, too.
        with self._if(self.thread_id().eq(0)):
            expect = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
            words = [self._shared_address(self._mail_barrier, 0), value_of(self._mailbox_words * 4)]
            order_asm(expect, words, "r,r,")

    def post(self, cta: Int | int, index: Int | int, *values: Int | int) -> None:
        there = [self._shared_address(self._mailbox, index)]
        there += [self._shared_address(self._mail_barrier, 0), value_of(cta & (self.cluster - 1))]
        names = ", ".join(f"${k + 3}" for k in range(len(values)))
        width, source = (".v4", "{" + names + "}") if len(values) == 4 else ("", names)
        asm = (
            "{ .reg .b32 cell, barrier; mapa.shared::cluster.u32 cell, $0, $2; "
            "mapa.shared::cluster.u32 barrier, $1, $2; "
            f"st.async.shared::cluster.mbarrier::complete_tx::bytes{width}.b32 [cell], {source}, "
            "[barrier]; }"
        )
        order_asm(asm, [*there, *map(value_of, values)], "r," * (3 + len(values)))

    def mail_place(self, cta: Int | int, index: Int | int) -> Any:
        words = [self._shared_address(self._mailbox, index)]
        words += [self._shared_address(self._mail_barrier, 0)]
        number, code = value_of(cta & (self.cluster - 1)), "mapa.shared::cluster.u32 $0, $1, $2;"
        # Volatile, or the compiler would compute the addresses where they are used.
        return [
            llvm.inline_asm(i32(), [word, number], code, "=r,r,r", has_side_effects=True)
            for word in words
        ]

    def post_at(self, place: Any, *values: Int | int) -> None:
        names = ", ".join(f"${k + 2}" for k in range(len(values)))
        width, source = (".v4", "{" + names + "}") if len(values) == 4 else ("", names)
        send = "st.async.shared::cluster.mbarrier::complete_tx::bytes"
        asm = f"{send}{width}.b32 [$0], {source}, [$1];"
        order_asm(asm, [*place, *map(value_of, values)], "r," * (2 + len(values)))

    def mail(self) -> Any:
        wait = (
            "{ .reg .pred full; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 full, "
            "[$0], 0; @!full bra again; }"
        )
        order_asm(wait, [self._shared_address(self._mail_barrier, 0)], "r,")
        return self._mailbox

    def rank(self) -> Int:
        assert self._devices is not None
        device = MlirInt(self._context.device_id())
        return device // self._devices.stride % self._devices.count

    def _device(self, rank: Int | int) -> Int:
        """The place of a rank in the mesh."""
        assert self._devices is not None
        device = MlirInt(self._context.device_id())
        return device + (rank - self.rank()) * self._devices.stride

    def remote(self, ref: Ref, rank: Int | int) -> Ref:
        assert ref.argument is not None
        there = self._context.to_remote(ref.argument, value_of(self._device(rank)))
        return global_ref(there, tuple(ir.MemRefType(ref.memref.type).shape))

    def _word(self, index: Int | int, rank: Int | int | None = None) -> ir.Value:
        """A pointer to one of the zeroed words, mine or of the device of that rank."""
        ref = self._zeroed
        if rank is not None:
            ref = self._context.to_remote(ref, value_of(self._device(rank)))
        return mgpu_utils.getelementptr(mgpu_utils.memref_ptr(ref), [value_of(index)], i32())

    def _arrived(self) -> Int:
        """Where the counter of my CTA is."""
        return self.cta_id() + self._inbox

    def device_arrive(self) -> None:
        """A thread per device: one fence for what came before, then a count everywhere at once."""
        assert self._devices is not None
        self.block_sync()
        with self._if(self.thread_id() < self._devices.count):
            signal = "fence.acq_rel.sys; red.relaxed.sys.global.add.u32 [$0], 1;"
            order_asm(signal, [self._word(self._arrived(), self.thread_id())], "l,")

    def device_wait(self) -> None:
        """The first lane looks until the counter has come to the number of devices."""
        assert self._devices is not None
        with self._if((self.thread_id() & (WARP - 1)).eq(0)):
            look = "ld.acquire.sys.global.u32 seen, [$0]; setp.lt.u32 more, seen, $1;"
            operands = [self._word(self._arrived()), value_of(self._devices.count)]
            order_asm(patient(look, ".reg .u32 seen;"), operands, "l,r,")
        self.warp_sync()

    def put(self, rank: Int | int, index: Int | int, value: Int) -> None:
        operands = [self._word(index, rank), value_of(value)]
        order_asm("st.relaxed.sys.global.u32 [$0], $1;", operands, "l,r,")

    def take(self, places: Sequence[tuple[Int, int]]) -> list[tuple[Int, ...]]:
        # All loads before any is looked at: one latency.
        ends = list(itertools.accumulate(width for _, width in places))
        count, loads = ends[-1], []
        for number, (end, (_, width)) in enumerate(zip(ends, places, strict=True)):
            words = ", ".join(f"${k}" for k in range(end - width, end))
            vector, target = (".v4", "{" + words + "}") if width == 4 else ("", words)
            loads.append(f"ld.relaxed.sys.global{vector}.u32 {target}, [${count + number}];")
        looks = ["setp.eq.u32 more, $0, 0;"]
        looks += [f"setp.eq.or.u32 more, ${k}, 0, more;" for k in range(1, count)]
        constraints = ["=&r"] * count + ["l"] * len(places)
        pointers = [self._word(index) for index, _ in places]
        words = _found(patient(" ".join([*loads, *looks])), count, pointers, constraints)
        return [
            tuple(words[end - width : end]) for end, (_, width) in zip(ends, places, strict=True)
        ]

    def _grid_control(self, instruction: str) -> None:
        """Emits an instruction of programmatic dependent launch, in a kernel that is launched so."""
        # Without PDL nothing: so XLA launches (measured: PDL gives nothing in its CUDA graphs).
        if self._pdl:
            order_asm(instruction)

    def grid_dependency_wait(self) -> None:
        self._grid_control("griddepcontrol.wait;")

    def launch_dependents(self) -> None:
        self._grid_control("griddepcontrol.launch_dependents;")


def _found(
    asm: str, count: int, operands: Sequence[ir.Value], constraints: Sequence[str]
) -> list[MlirInt]:
    """The words that instructions find in memory that others write."""
    text = f"!llvm.struct<({', '.join(['i32'] * count)})>"
    kind = i32() if count == 1 else ir.Type.parse(text)  # LLVM has no structs of one result
    constraints = ",".join([*constraints, "~{memory}"])
    found = llvm.inline_asm(kind, operands, asm, constraints, has_side_effects=True)
    if count == 1:
        return [MlirInt(found)]
    return [MlirInt(llvm.extractvalue(i32(), found, [k])) for k in range(count)]


class WindowedMosaic(Windowed, MosaicSimt):
    """A kernel of several devices that meet in windows: for XLA an ordinary kernel of one device."""

    def __init__(self, kernel: Kernel, window: Window, place: Ref):
        super().__init__(kernel)
        self._window, self._words_of = window, kernel.staged
        self.open_window(kernel, self.load(place, 0), window.half_words)

    def remote(self, ref: Ref, rank: Int | int) -> Ref:
        return self.staged(ref.staged, rank)

    def _address(self, offset: Int | int, place: Int | None = None) -> ir.Value:
        """The address of a word of a window: this device's, or that of the device at a place."""
        where = self._place if place is None else place
        return address_of(self._window.address, (where, self._window.num_bytes), (offset, 4))

    def _array(self, name: str, place: Int, offset: Int) -> Ref:
        [words] = self._words_of[name]
        return Ref(global_array(self._address(offset, place), words), staged=name)

    def _now(self, offset: int) -> Int:
        load = "ld.relaxed.gpu.global.u32 $0, [$1];"
        return _found(load, 1, [self._address(offset)], ["=r", "l"])[0]

    def _set(self, offset: int, value: Int) -> None:
        operands = [self._address(offset), value_of(value)]
        order_asm("st.relaxed.gpu.global.u32 [$0], $1;", operands, "l,r,")

    def _add(self, offset: int, value: int) -> Int:
        add = "atom.add.acq_rel.gpu.global.u32 $0, [$1], $2;"
        return _found(add, 1, [self._address(offset), value_of(value)], ["=r", "l", "r"])[0]

    def _tell(self, place: Int, offset: Int, value: Int) -> None:
        operands = [self._address(offset, place), value_of(value)]
        signal = "fence.acq_rel.sys; st.relaxed.sys.global.u32 [$0], $1;"
        order_asm(signal, operands, "l,r,")

    def _tell_alone(self, place: Int, offset: Int, value: Int) -> None:
        operands = [self._address(offset, place), value_of(value)]
        order_asm("st.relaxed.sys.global.u32 [$0], $1;", operands, "l,r,")

    def _watch(self, offset: Int, value: Int) -> None:
        look = "ld.acquire.sys.global.u32 seen, [$0]; setp.ne.u32 more, seen, $1;"
        operands = [self._address(offset), value_of(value)]
        order_asm(patient(look, ".reg .u32 seen;", self._window.patience), operands, "l,r,")

    def _put(self, place: Int, offset: Int, value: Int, epoch: Int) -> None:
        # One access of 8 bytes: the two words of a vector could come one after the other.
        store = "{ .reg .b64 both; mov.b64 both, {$1, $2}; st.relaxed.sys.global.u64 [$0], both; }"
        operands = [self._address(offset, place), value_of(value), value_of(epoch)]
        order_asm(store, operands, "l,r,r,")

    def _put_two(self, place: Int, offset: Int, first: Int, second: Int, epoch: Int) -> None:
        store = (
            "{ .reg .b64 one, two; mov.b64 one, {$1, $3}; mov.b64 two, {$2, $3}; "
            "st.relaxed.sys.global.v2.u64 [$0], {one, two}; }"
        )
        words = [value_of(word) for word in (first, second, epoch)]
        order_asm(store, [self._address(offset, place), *words], "l,r,r,r,")

    def _take(self, offsets: Sequence[tuple[Int, int]], epoch: Int) -> list[tuple[Int, ...]]:
        # All loads before any is looked at: one latency. Two pairs of 8 bytes to a load where there are more.
        ends = list(itertools.accumulate(width for _, width in offsets))
        count, loads = ends[-1], []
        for number, (end, (_, width)) in enumerate(zip(ends, offsets, strict=True)):
            step = 1 if width == 1 else 2
            for k in range(0, width, step):
                pairs = ", ".join(f"pair{end - width + k + i}" for i in range(step))
                vector, target = (".v2", "{" + pairs + "}") if step == 2 else ("", pairs)
                at = f"[${count + number} + {8 * k}]"
                loads.append(f"ld.relaxed.sys.global{vector}.u64 {target}, {at};")
        tag = f"${count + len(offsets)}"
        looks = []
        for k in range(count):
            test, more = ("setp.ne.or.u32", ", more") if k else ("setp.ne.u32", "")
            looks.append(f"mov.b64 {{${k}, tag}}, pair{k}; {test} more, tag, {tag}{more};")
        registers = f".reg .b64 pair<{count}>; .reg .b32 tag;"
        asm = patient(" ".join([*loads, *looks]), registers, self._window.patience)
        constraints = ["=&r"] * count + ["l"] * len(offsets) + ["r"]
        operands = [*(self._address(offset) for offset, _ in offsets), value_of(epoch)]
        words = _found(asm, count, operands, constraints)
        return [
            tuple(words[end - width : end]) for end, (_, width) in zip(ends, offsets, strict=True)
        ]
