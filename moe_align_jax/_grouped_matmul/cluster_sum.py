"""Sums over the CTAs of a cluster, in the order of their ranks: each has a part of a tile's result.

A CTA puts its part into its own shared memory; when all have, rank 0 reads all of them over the cluster's
network and adds them up, and the others wait until it has. The warpgroups of a CTA do so for themselves.
Each thread reads back what the same thread of the other CTAs put, so that no layout matters. The order of the
sum is fixed: the same bits in every run.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from moe_align_jax._grouped_matmul import inline

_F32 = jnp.float32
AXIS = "rank"
_PAIR_BYTES = 8  # a thread's two neighbouring values of a row, in wgmma's layout


class ClusterSum:
    """Of float32 `[64 i, n]` in wgmma's layout, by one warpgroup of each CTA.

    Args:
        ranks: CTAs of the cluster.
        parts: this warpgroup's `[words]` float32 in shared memory; in the interpreter `[ranks, words]` in
            global memory.
        ready, free: cluster barriers of this warpgroup.
        interpret: whether Pallas' interpreter runs it.
    """

    def __init__(self, ranks: int, parts: Any, ready: Any, free: Any, interpret: bool):
        self.ranks, self.parts, self.ready, self.free = ranks, parts, ready, free
        self.interpret = interpret

    def put(self, values: Sequence[jax.Array]) -> None:
        """All ranks call it; afterwards rank 0 can `take`."""
        if self.interpret:
            flat = jnp.concatenate([value.reshape(-1) for value in values])
            self.parts[lax.axis_index(AXIS)] = flat
        else:
            _put(self.parts, values)
        plgpu.barrier_arrive(self.ready)
        plgpu.barrier_wait(self.ready)

    def take(self, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
        """Rank 0: the sums of what all ranks put."""
        if not self.interpret:
            return _take(self.parts, self.ranks, shapes)
        total = self.parts[0]
        for rank in range(1, self.ranks):
            total = total + self.parts[rank]
        ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
        pieces = jnp.split(total, [int(end) for end in ends])
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def taken(self) -> None:
        """All ranks, rank 0 behind `take`: they may put again when they have waited for the others."""
        plgpu.barrier_arrive(self.free)

    def wait(self) -> None:
        """Waits until rank 0 has taken what the ranks put before. Ahead of the next `put`."""
        plgpu.barrier_wait(self.free)


def _order_for_cluster() -> None:
    """What this warpgroup's threads wrote or read comes before what any of them signals to the cluster."""
    mgpu_utils.warpgroup_barrier()
    mgpu_utils.inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)


def _place(ref: Any) -> Any:
    """Where this thread's values begin; one pair of every thread, then the next one's."""
    offset = arith.muli(inline.thread_index(), inline.int32(_PAIR_BYTES))
    return arith.addi(inline.shared_address(ref), offset)


def _put(parts: Any, values: Sequence[jax.Array]) -> None:
    """Stores this thread's values to `parts`: a pair of neighbours at a time, `_place` says where."""

    @inline.emits(arg_types=(plgpu.RefType(), *[plgpu.Layout.WGMMA] * len(values)))
    def emit(_, ref, *arrays):
        place, at = _place(ref), 0
        for array in arrays:
            for register in array.registers.flat:
                pair = [vector.extract(register, [], [k]) for k in range(2)]
                address = arith.addi(place, inline.int32(at))
                mgpu_utils.inline_ptx(
                    "st.shared.v2.f32 [$0], {$1, $2};", address, *pair, has_side_effects=True
                )
                at += inline.THREADS * _PAIR_BYTES
        _order_for_cluster()

    emit(parts, *values)


def _take(parts: Any, ranks: int, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """The sums over what all ranks stored, in the order of the ranks: arrays of these shapes."""
    wgmma = plgpu.Layout.WGMMA
    results = [plgpu.ShapeDtypeStruct(shape, jnp.dtype(_F32), layout=wgmma) for shape in shapes]

    @inline.emits(arg_types=(plgpu.RefType(),), return_type=results)
    def emit(_, ref):
        mgpu_utils.inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)
        place = _place(ref)
        places = [
            mgpu_utils.inline_ptx(
                "mapa.shared::cluster.u32 $0, $1, $2;",
                *(place, inline.int32(rank)),
                result_types=inline.i32(),
            )
            for rank in range(ranks)
        ]
        layout, f32 = wgmma.to_mgpu(), ir.F32Type.get()
        kind, at, found = ir.VectorType.get((2,), f32), 0, []
        # All of a rank's loads before the next one's: the sums wait for the first alone.
        counts = [int(np.prod(layout.registers_shape(shape))) for shape in shapes]
        totals: list[Any] = [None] * sum(counts)
        for rank in range(ranks):
            for i in range(len(totals)):
                at = i * inline.THREADS * _PAIR_BYTES
                pair = mgpu_utils.inline_ptx(
                    "ld.shared::cluster.v2.f32 {$0, $1}, [$2];",
                    arith.addi(places[rank], inline.int32(at)),
                    result_types=[f32, f32],
                    has_side_effects=True,
                )
                if rank == 0:
                    totals[i] = list(pair)
                else:
                    totals[i] = [arith.addf(a, b) for a, b in zip(totals[i], pair, strict=True)]
        rest = iter(totals)
        for shape, count in zip(shapes, counts, strict=True):
            registers = np.empty(count, dtype=object)
            for i in range(count):
                first, second = next(rest)
                both = vector.broadcast(kind, first)
                registers[i] = vector.insert(second, both, [], [1])
            found.append(
                mgpu.FragmentedArray(
                    _registers=registers.reshape(layout.registers_shape(shape)),
                    _layout=layout,
                    _is_signed=None,
                )
            )
        _order_for_cluster()
        return found

    return list(emit(parts))
