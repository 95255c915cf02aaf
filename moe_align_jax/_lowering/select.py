"""Which implementation runs: one primitive of our own, with a lowering rule per platform.

A primitive is used because the choice belongs to the platform that the program is *lowered* for, from one
trace; `lax.platform_dependent` leaves `case` ops behind and breaks shard_map's check_vma, Explicit meshes
and two-platform export.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from moe_align_jax._align import tables
from moe_align_jax._core import checks
from moe_align_jax.types import AlignProblem, BatchedAlignProblem, Implementation, Selection

type Problem = AlignProblem | BatchedAlignProblem

IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

# The jax releases whose Mosaic GPU lowering our kernels were checked with: [oldest, first unknown).
OLDEST_JAX, UNKNOWN_JAX = (0, 11, 2), (0, 13, 0)
# Those that jax lowers for under a name of its own.
PLATFORMS = ("cpu", "tpu", "rocm", "cuda")
# CUDA allows 65,535 along grid.y, where a vmapped batch goes.
MAX_KERNEL_BATCH = 65_535


def jax_version() -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", jax.__version__)[:3])


def _cuda_capability() -> float | None:
    """Lowest compute capability among this process's CUDA devices; None without one."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:  # no CUDA backend here: lowering ahead of time
        return None
    return min(float(getattr(d, "compute_capability", "0")) for d in devices)


def gpu_kind() -> str | None:
    """The kind of this process's CUDA devices: the first one's, which is the same in every process of a
    distributed program; None without one."""
    try:
        return getattr(jax.devices("cuda")[0], "device_kind", None)
    except RuntimeError:  # no CUDA backend here
        return None


def kernels_unavailable(platform: str) -> str | None:
    """Why the Mosaic GPU kernels cannot be lowered for `platform`, or None when they can."""
    if platform != "cuda":
        return f"Mosaic GPU kernels run on NVIDIA GPUs only, not on {platform!r}"
    version = jax_version()
    if not OLDEST_JAX <= version < UNKNOWN_JAX:
        low, high = (".".join(map(str, v)) for v in (OLDEST_JAX, UNKNOWN_JAX))
        return f"the kernels need jax >= {low}, < {high}; this is jax {jax.__version__}"
    try:
        import moe_align_jax._simt.mosaic  # noqa: F401
    except ImportError as error:
        return f"Pallas' Mosaic GPU lowering does not import here: {error}"
    capability = _cuda_capability()
    if capability is not None and capability < 9.0:
        return f"the kernels need compute capability 9.0 (Hopper) or newer; a GPU here has {capability}"
    return None


def _unavailable(implementation: str, platform: str) -> str | None:
    """Why a named implementation cannot run for `platform`, or None."""
    if implementation == "mosaic_gpu":
        return kernels_unavailable(platform)
    if implementation == "emulator" and platform != "cpu":
        return f"the emulator runs the kernel bodies by NumPy on a CPU, not on {platform!r}"
    return None


def _choose(platform: str, implementation: str | None) -> str:
    if implementation is None:
        return "xla" if kernels_unavailable(platform) else "mosaic_gpu"
    return implementation


def _not_implemented(function: str, implementation: str, reason: str) -> NotImplementedError:
    return NotImplementedError(
        checks.message(
            function,
            "implementation",
            "be one that can run here",
            repr(implementation),
            f"{reason[0].upper()}{reason[1:]}. Pass implementation=None for the best available.",
        )
    )


# -- how each implementation computes a problem, unbatched ---------------------------------------


def _reference_call(problem: Problem, *operands: jax.Array) -> tuple[jax.Array, ...]:
    from moe_align_jax._align import reference

    named = dict(zip(problem.inputs, operands, strict=True))
    if isinstance(problem, BatchedAlignProblem):
        return reference.batched_block_align(problem, **named)
    return reference.block_align(problem, **named)


def _kernel_call(problem: Problem, batched: bool, *operands: jax.Array) -> tuple[jax.Array, ...]:
    from moe_align_jax._align import kernels
    from moe_align_jax._simt import mosaic

    problem = problem._replace(tuning=tables.table_name(gpu_kind()))
    program = kernels.build(problem, tables.config_for(problem), batched=batched)
    return mosaic.run(program, operands)


def _emulator_call(problem: Problem, batched: tuple[bool, ...], *operands: jax.Array):
    from moe_align_jax._align import kernels
    from moe_align_jax._simt import emulator

    program = kernels.build(problem, tables.config_for(problem), batched=any(batched))

    def on_host(*arrays):
        arrays = [np.asarray(a) for a in arrays]
        if not any(batched):
            return tuple(emulator.run(program, arrays))
        size = next(a.shape[0] for a, b in zip(arrays, batched, strict=True) if b)
        rows = [
            emulator.run(program, [a[i] if b else a for a, b in zip(arrays, batched, strict=True)])
            for i in range(size)
        ]
        return tuple(np.stack(column) for column in zip(*rows, strict=True))

    batch = next((a.shape[:1] for a, b in zip(operands, batched, strict=True) if b), ())
    shapes = [jax.ShapeDtypeStruct(batch + s, np.int32) for s in problem.outputs.values()]
    return jax.pure_callback(on_host, tuple(shapes), *operands)


def _over_batch(call: Callable, batched: tuple[bool, ...]) -> Callable:
    return (
        jax.vmap(call, in_axes=tuple(0 if b else None for b in batched)) if any(batched) else call
    )


# -- the primitive -------------------------------------------------------------------------------

block_align_p = Primitive("moe_align_block_size")
block_align_p.multiple_results = True


def _batch_shape(problem: Problem, avals: Any) -> tuple[Any, ...]:
    for shape, aval in zip(problem.inputs.values(), avals, strict=True):
        if aval.ndim > len(shape):
            return aval.shape[:1]
    return ()


def result_like(aval: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of a primitive's result, on the mesh of an operand, which it varies over a shard_map with."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=shape, dtype=np.dtype(dtype), weak_type=False, sharding=sharding)


@block_align_p.def_abstract_eval
def _abstract_eval(*avals, problem: Problem, implementation: str | None, batched: tuple[bool, ...]):
    del implementation, batched
    batch = _batch_shape(problem, avals)
    return [result_like(avals[0], batch + s, np.int32) for s in problem.outputs.values()]


def run_eagerly(primitive: Primitive, *operands: jax.Array, **params: Any) -> Any:
    """A primitive outside jit: a program of its own, also under `jax.disable_jit`."""
    with jax.disable_jit(False):
        return jax.jit(functools.partial(primitive.bind, **params))(*operands)


block_align_p.def_impl(functools.partial(run_eagerly, block_align_p))


def _lower(platform: str, ctx, *operands, problem: Problem, implementation, batched):
    choice = _choose(platform, implementation)
    if reason := _unavailable(choice, platform):
        raise _not_implemented(problem.name, choice, reason)
    if choice == "emulator":
        call = functools.partial(_emulator_call, problem, batched)
    elif choice == "xla":
        call = _over_batch(functools.partial(_reference_call, problem), batched)
    else:
        _check_kernel_sizes(problem, _batch_shape(problem, ctx.avals_in))
        call = _over_batch(functools.partial(_kernel_call, problem, any(batched)), batched)
    return mlir.lower_fun(call, multiple_results=True)(ctx, *operands)


def _check_kernel_sizes(problem: Problem, batch: tuple[Any, ...]) -> None:
    sizes = [d for shape in (*problem.inputs.values(), batch) for d in shape]
    if not all(isinstance(d, (int, np.integer)) for d in sizes):
        raise _not_implemented(
            problem.name,
            "mosaic_gpu",
            "the kernels need static shapes; export a symbolic shape with 'xla'",
        )
    if batch and batch[0] > MAX_KERNEL_BATCH:
        raise ValueError(
            checks.message(
                problem.name,
                "a vmapped batch",
                f"be at most {MAX_KERNEL_BATCH} on a GPU",
                batch[0],
                "Use jax.lax.map with batch_size, or implementation='xla'.",
            )
        )


for _platform in PLATFORMS:
    mlir.register_lowering(block_align_p, functools.partial(_lower, _platform), platform=_platform)
mlir.register_lowering(block_align_p, functools.partial(_lower, "another platform"))


def on_each_shard(call: Callable, operands: Any, dims: Any) -> Any:
    """`call(*operands)` of a vmapped batch, by parts where the batch is split over Explicit mesh axes.

    The primitives' results have no sharding of their own: without this the parts would be gathered first.

    Args:
        call: returns a list of arrays whose first dimension is the batch.
        operands: its arguments.
        dims: the dimension of the batch in each of them, None where it has none.
    """
    types = [(jax.typeof(x).sharding, dim) for x, dim in zip(operands, dims, strict=True)]
    split = {sharding.spec[dim] for sharding, dim in types if dim is not None} - {None}
    if not split:
        return call(*operands)
    [axes] = split
    mesh = next(sharding.mesh for sharding, dim in types if dim is not None)
    names = axes if isinstance(axes, tuple) else (axes,)
    return jax.shard_map(
        lambda *parts: call(*_vary_together(list(parts))),
        mesh=mesh,
        in_specs=tuple(
            PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, axes)
            for _, dim in types
        ),
        out_specs=PartitionSpec(axes),
        axis_names=set(names),
    )(*operands)


def _batching_rule(operands, dims, *, problem, implementation, batched):
    """Any depth of vmap becomes one leading batch axis."""
    call = functools.partial(
        _flat_batch, dims=dims, problem=problem, implementation=implementation, batched=batched
    )
    results = on_each_shard(call, operands, dims)
    return results, [0] * len(results)


def _flat_batch(*operands, dims, problem, implementation, batched):
    [size] = {a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None}
    inner = next(
        (
            a.shape[0 if d is None or d > 0 else 1]
            for a, d, b in zip(operands, dims, batched, strict=True)
            if b
        ),
        None,
    )
    flat, flat_batched = [], []
    for operand, dim, has_inner in zip(operands, dims, batched, strict=True):
        if dim is not None:
            operand = (
                lax.transpose(operand, (dim, *[i for i in range(operand.ndim) if i != dim]))
                if dim
                else operand
            )
        if inner is not None and (dim is not None or has_inner):
            core = operand.shape[int(dim is not None) + int(has_inner) :]
            axes = tuple(i for i, there in enumerate((dim is not None, has_inner)) if there)
            rest = tuple(range(2, 2 + len(core)))
            operand = lax.broadcast_in_dim(operand, (size, inner, *core), axes + rest)
            operand = lax.reshape(operand, (size * inner, *core))
        flat.append(operand)
        flat_batched.append(dim is not None or has_inner)
    results = block_align_p.bind(
        *flat, problem=problem, implementation=implementation, batched=tuple(flat_batched)
    )
    if inner is not None:
        results = [lax.reshape(r, (size, inner, *r.shape[1:])) for r in results]
    return results


batching.primitive_batchers[block_align_p] = _batching_rule


def no_tangent(x: jax.Array) -> Any:
    """The tangent of a result that has none: an integer."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _jvp_rule(primals, tangents, **params):
    """Integer in, integer out: no tangent."""
    del tangents
    results = block_align_p.bind(*primals, **params)
    return results, [no_tangent(r) for r in results]


ad.primitive_jvps[block_align_p] = _jvp_rule


def _vary_together(operands: list[jax.Array]) -> list[jax.Array]:
    """Under shard_map with check_vma, casts every operand to vary over the union of their axes."""
    varying = [getattr(jax.typeof(x), "mat", None) for x in operands]
    axes = [frozenset(m.varying) if m is not None else frozenset() for m in varying]
    union = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(sorted(union - have)), to="varying") if union - have else x
        for x, have in zip(operands, axes, strict=True)
    ]


def replicate(x: jax.Array) -> jax.Array:
    """With Explicit mesh axes, gathers a sharded operand: the result is the global alignment."""
    sharding = jax.typeof(x).sharding
    if all(axes is None for axes in sharding.spec):
        return x
    # With its mesh: an eager call may stand outside jax.set_mesh.
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def align(problem: Problem, implementation: str | None, *operands: jax.Array):
    """Binds the primitive: the results of `problem.outputs`, in order."""
    return block_align_p.bind(
        *_vary_together(list(operands)),
        problem=problem,
        implementation=implementation,
        batched=(False,) * len(operands),
    )


# -- asking ---------------------------------------------------------------------------------------


def check_implementation(function: str, implementation: object) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(
            checks.message(
                function,
                "implementation",
                f"be None or one of {names}",
                repr(implementation),
                "Pass None for the best available.",
            )
        )


def check_platform(function: str, platform: str | None) -> str:
    """The platform to lower for: one that jax has a name for, or that this process has devices of."""
    if platform is None:
        platform = jax.default_backend()
    if platform == "gpu":
        return "cuda"
    if platform not in PLATFORMS and platform not in [d.platform for d in jax.devices()]:
        names = ", ".join(map(repr, ("gpu", *PLATFORMS)))
        remedy = "Leave it out for this process's default."
        rule = f"be None or one of {names}"
        raise ValueError(checks.message(function, "platform", rule, repr(platform), remedy))
    return platform


def select_implementation(
    topk_ids_or_shape: Any,
    *,
    block_size: int,
    num_experts: int,
    platform: str | None = None,
    implementation: str | None = None,
) -> Selection:
    """Says what `moe_align_block_size` would run, and why the others would not.

    Args:
        topk_ids_or_shape: the ids, or their shape as an int or a tuple of ints.
        block_size: rows per block.
        num_experts: E.
        platform: "cuda" (or "gpu"), "cpu", "tpu" or "rocm", for which to lower; None for this process's
            default backend.
        implementation: as for `moe_align_block_size`.

    Returns:
        `Selection(implementation, form, reasons)`.

    Raises:
        NotImplementedError: the named implementation cannot run for that platform.
        TypeError, ValueError: as `moe_align_block_size`.

    Example:
        >>> select_implementation((4096, 2), block_size=128, num_experts=64, platform="cuda")[:2]
        ('mosaic_gpu', 'cluster')
    """
    function = "select_implementation"
    block_size = checks.check_block_size(function, block_size)
    num_experts = checks.check_num_experts(function, num_experts)
    check_implementation(function, implementation)
    shape = getattr(topk_ids_or_shape, "shape", topk_ids_or_shape)
    given = shape if isinstance(shape, (tuple, list)) else (shape,)
    remedy = "Pass topk_ids, or its shape as a tuple of ints."
    try:
        if isinstance(topk_ids_or_shape, (jax.Array, np.ndarray, np.generic)):
            if not np.issubdtype(topk_ids_or_shape.dtype, np.integer):
                raise TypeError
        shape = tuple(checks.check_int(function, "topk_ids_or_shape", d, 0, remedy) for d in given)
    except TypeError:
        rule, got = "be an array or a shape", checks.describe(topk_ids_or_shape)
        raise TypeError(checks.message(function, "topk_ids_or_shape", rule, got, remedy)) from None
    padded = checks.max_num_tokens_padded(
        int(np.prod(shape, dtype=object)), block_size=block_size, num_experts=num_experts
    )
    # The emulator takes the default table everywhere: its results do not depend on the machine.
    tuning = "" if implementation == "emulator" else tables.table_name(gpu_kind())
    problem = AlignProblem(
        int(np.prod(shape, dtype=object)), num_experts, block_size, padded, tuning=tuning
    )
    platform = check_platform(function, platform)
    choice = _choose(platform, implementation)
    if reason := _unavailable(choice, platform):
        raise _not_implemented(function, choice, reason)
    reasons = {}
    for other in IMPLEMENTATIONS:
        if other == choice:
            continue
        if reason := _unavailable(other, platform):
            reasons[other] = reason
        elif implementation is not None:
            reasons[other] = f"implementation={implementation!r} was asked for"
        elif other == "emulator":
            reasons[other] = "it runs only when named: it is for tests and debugging"
        else:
            sizes = tables.describe(tuning)
            reasons[other] = f"the Mosaic GPU kernels run here and are faster (sizes: {sizes})"
    if problem.num_pairs == 0:
        form = "empty"
    else:
        form = "sort" if choice == "xla" else tables.config_for(problem).form
    return Selection(choice, form, reasons)
