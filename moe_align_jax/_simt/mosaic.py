"""The language as MLIR: a kernel becomes one `plgpu.kernel` whose body is one `inline_mgpu` block.

`mosaic_machine` has the primitives, `mlir` the values; the other files of `_simt` see no MLIR. Checked with
jax 0.11.2 and 0.12.
"""

import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from moe_align_jax._simt.language import Int, Kernel, Program, check_launch
from moe_align_jax._simt.mlir import MlirInt, Ref, global_ref, order_asm, value_of
from moe_align_jax._simt.mosaic_machine import MosaicSimt, WindowedMosaic
from moe_align_jax._simt.window import Window

# What Mosaic does ahead of a body that waits for nothing of its own (jax 0.11.2, 0.12): the CTAs of a cluster
# wait for each other, then the threads of a CTA, twice.
_FENCE = "fence.mbarrier_init.release.cluster;"
_CLUSTER_BARRIER = ("barrier.cluster.arrive.relaxed.aligned;", "barrier.cluster.wait.aligned;")
_CTA_BARRIER = "gpu.barrier"
# Operations ahead of a body that change nothing that others can see.
_HARMLESS_DIALECTS = {"arith", "builtin"}
_HARMLESS = {
    *("gpu.thread_id", "gpu.block_id", "gpu.block_dim", "gpu.grid_dim"),
    *("gpu.dynamic_shared_memory", "memref.subview", "mosaic_gpu.slice_smem"),
    *("mosaic_gpu.custom_primitive", "nvvm.elect.sync", "nvvm.shfl.sync"),
    *("llvm.add", "llvm.mul", "llvm.extractvalue", "llvm.insertvalue", "llvm.mlir.constant"),
    *("llvm.mlir.undef", "llvm.ptrtoint", "llvm.inttoptr"),
}


def _ahead_of_body() -> list[tuple[str, Any]]:
    """(name, or code of an inline assembly, operation) of all that stands ahead of the insertion point in the
    kernel and may do more than compute, in order."""
    block, found = ir.InsertionPoint.current.block, []
    while True:
        here = []
        for operation in block.operations:
            name = operation.operation.name
            if name == "llvm.inline_asm":
                name = ir.StringAttr(operation.operation.attributes["asm_string"]).value
            elif name in _HARMLESS or name.split(".")[0] in _HARMLESS_DIALECTS:
                continue
            here.append((name, operation.operation))
        found = here + found  # what is around a block stands ahead of it
        owner: Any = block.owner
        if owner.operation.name in ("builtin.module", "gpu.launch"):
            return found
        block = owner.operation.block


def _drop_barriers(kernel: Kernel) -> None:
    """Takes out Mosaic's barriers ahead of the body, of which the kernel has no need.

    Those of the CTA stand behind Mosaic's own barriers in shared memory, of which there are none here
    (`Kernel.starts_at_once`). That of the cluster: a kernel with a mailbox has one of its own
    (`open_mailbox`, `cluster_ready`), which stands behind its first loads and does for both. Half a barrier
    would make the kernel wait for ever, and a barrier that we do not know may be there for something that we
    do not know: unless exactly what we know stands ahead, as may be so in another release of jax, all stays.
    The kernel then waits at barriers that it does not need.
    """
    found = _ahead_of_body()
    of_cluster = _CLUSTER_BARRIER if kernel.cluster > 1 else ()
    if [name for name, _ in found] != [_FENCE, *of_cluster, _CTA_BARRIER, _CTA_BARRIER]:
        return
    for name, operation in found:
        of_cta = name == _CTA_BARRIER and kernel.starts_at_once
        if of_cta or (name in _CLUSTER_BARRIER and kernel.mailbox):
            operation.erase()


def _name_module(kernel: Kernel) -> None:
    """Names the module that is being made, for dumps, after the kernel and its sizes.

    jaxlib 0.11.2 would count the modules of the process in that name and serialise it: a kernel's bytes, so
    the key in jax's compilation cache, would depend on what was lowered before.
    """
    operation: Any = ir.InsertionPoint.current.block.owner
    while operation.name != "builtin.module":
        operation = operation.parent
    sizes = repr((kernel.inputs, kernel.outputs, kernel.num_ctas, kernel.num_threads))
    name = f"{kernel.name}_{zlib.crc32(sizes.encode()):08x}"
    operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(name)


def launcher(
    kernel: Kernel, *, pdl: bool = False, window: Window | None = None
) -> Callable[..., Sequence[jax.Array]]:
    """The kernel as a function of its inputs, in order.

    `pdl`: for a launch with programmatic dependent launch, which the launcher must then ask for.
    `window`: in which the devices meet; an int32 `[1]`, the place of the device among windows, then stands
    ahead of the inputs. None: XLA tells the kernel its peers' addresses, and places are those in the mesh.
    """
    check_launch(kernel)
    words = kernel.shared_words
    # One array for all of shared memory: Pallas rounds each of its arrays up to 1,024 bytes.
    scratch: list[Any] = [plgpu.SMEM((words,), jnp.int32)] if words else []
    by_xla = kernel.devices is not None and window is None
    outputs = {**kernel.outputs, **(kernel.staged if by_xla else {})}
    buffers = {**({"": (1,)} if window else {}), **kernel.inputs, **outputs}

    def body(*refs):
        if by_xla:
            counters = plgpu.SemaphoreType.REGULAR((kernel.inbox + kernel.num_ctas,))
            refs = (*refs, pl.get_global(counters))

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def emit(context, *memrefs):
            _name_module(kernel)
            given, own = memrefs[: len(buffers)], memrefs[len(buffers) :]
            named = zip(buffers.items(), given, strict=True)
            refs = {name: global_ref(m, words) for (name, words), m in named}
            offset = 0
            for name, size in kernel.shared_arrays.items():
                refs[name] = Ref(own[0], offset)
                offset += -(-size // 4) * 4
            if window:
                machine = WindowedMosaic(kernel, window, refs.pop(""))
                refs |= {name: machine.staged(name) for name in kernel.staged}
            else:
                machine = MosaicSimt(
                    kernel,
                    pdl=pdl,
                    context=context,
                    zeroed=own[-1] if by_xla else None,
                    mailbox=refs.pop("mailbox", None),
                    mail_barrier=refs.pop("mail_barrier", None),
                )
            if kernel.mailbox or kernel.starts_at_once:
                _drop_barriers(kernel)
            if kernel.mailbox and not kernel.opens_mailbox:
                machine.open_mailbox()
            kernel.body(machine, SimpleNamespace(**refs))
            machine.check_loops()

        emit(*refs)

    clusters = kernel.num_ctas // kernel.cluster
    with_grid = clusters > 1 or kernel.devices is not None
    grid: dict[str, Any] = {"grid": (clusters,), "grid_names": ("cta",)} if with_grid else {}
    if kernel.cluster > 1:
        grid |= {"cluster": (kernel.cluster,), "cluster_names": ("peer",)}
    if by_xla:  # whose addresses Mosaic finds by following a value to the kernel's argument
        lane = plgpu.LoweringSemantics.Lane
        grid["compiler_params"] = plgpu.CompilerParams(lowering_semantics=lane)
    arrays = [kernel.arrays.get(name, (w, jnp.int32)) for name, w in outputs.items()]
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays],
        scratch_types=scratch,
        num_threads=kernel.num_warpgroups,
        thread_name="warpgroup",
        kernel_name=kernel.name,
        **grid,
    )


def run_between(arrays: Sequence[jax.Array], name: str, code: str, words: int) -> list[jax.Array]:
    """The arrays, each in its own memory as it was, and int32 `[1, words]` that a kernel of one CTA stores.

    It runs behind what makes the arrays, and ahead of what uses those returned. `code`: its instructions for
    each of 128 threads, as PTX; `$0` is the address of the words.

    Compile the program without `xla_gpu_enable_dynamic_slice_fusion`, which is on by default: XLA would fuse
    a slice among the arrays with the kernel, and lose it.
    """

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def emit(_, *memrefs):
            i64 = ir.IntegerType.get_signless(64)
            order_asm(code, [llvm.ptrtoint(i64, mgpu_utils.memref_ptr(memrefs[-1]))], "l,")

        emit(*refs)

    # A kernel that may write to the arrays is one that their readers wait for.
    held = [jax.new_ref(x) for x in arrays]
    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((1, words), jnp.int32)],
        num_threads=1,
        thread_name="warpgroup",
        kernel_name=name,
    )
    [found] = run(*held)
    return [*(jax.freeze(x) for x in held), found]


def inline_scalars(
    kernel: Kernel,
    compute: Callable[..., Sequence[Int]],
    count: int,
    *,
    values: Sequence[jax.Array] = (),
    **refs: Any,
) -> list[jax.Array]:
    """`count` int32 scalars that code of the language computes within another Pallas kernel.

    `kernel` says who runs: one-dimensional in its grid, and named as the other one. Every thread of a
    warpgroup must compute the same. `refs` are the other kernel's, int32, by name. `compute` is given the
    machine, the refs, and the `values`: int32 scalars of the other kernel.
    """
    scalar = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT)
    types: Any = [plgpu.RefType()] * len(refs) + [plgpu.Layout.WG_SPLAT(())] * len(values)

    @plgpu.inline_mgpu(arg_types=tuple(types), return_type=[scalar] * count)
    def emit(_, *given):
        _name_module(kernel)
        named = zip(refs, given[: len(refs)], strict=True)
        r = SimpleNamespace(**{name: Ref(m) for name, m in named})
        own = [MlirInt(array.registers.item()) for array in given[len(refs) :]]
        machine = MosaicSimt(kernel)
        found = compute(machine, r, *own)
        machine.check_loops()
        return [mgpu.FragmentedArray.splat(value_of(v), (), is_signed=True) for v in found]

    scalars: Any = emit(*refs.values(), *values)
    return scalars


def run(program: Program, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Traces the program over jax arrays: one Mosaic custom call per kernel."""
    buffers = dict(zip(program.inputs, operands, strict=True))
    for kernel in program.kernels:
        outputs = launcher(kernel)(*[buffers[name] for name in kernel.inputs])
        buffers.update(zip(kernel.outputs, outputs, strict=True))
    return tuple(buffers[name] for name in program.results)
