"""Compiles the kernels that go over rows without a GPU, and checks the result.

    python -m tests.no_gpu.rows

As `compile` does for the alignment: nothing spills, the launch that was read is the one that jaxlib makes,
rows are read and written 16 bytes at a time where they can be, and a row that is moved is loaded before it is
stored. Exit code 1 otherwise.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.no_gpu import ptx, script, worker


class Compiled(NamedTuple):
    """A kernel to compile.

    Attributes:
        what: it is.
        kernel: with `name`, `inputs`, `outputs`, `call` and `structs`.
        widths: bytes at a time of the buffers named.
        faults: more to say of its PTX and parameters.
    """

    what: str
    kernel: Any
    widths: dict[str, int]
    faults: Callable[[str, tuple[str, ...]], Iterator[str]]


class _Direct(NamedTuple):
    name: str
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    call: Callable
    structs: list


def copies() -> Iterator[Compiled]:
    """The layouts of dispatch, and what is unusual."""
    import jax
    import jax.numpy as jnp

    from moe_align_jax._layout.kernels import masked_copy, sizes
    from moe_align_jax._simt import mosaic

    fp8 = (sizes.Leaf("float8_e4m3fn", 7168), sizes.Leaf("float32", 224))
    wide = (sizes.Leaf("bfloat16", 14336),)
    mixed = (sizes.Leaf("int8", 20), sizes.Leaf("uint16", 48), sizes.Leaf("uint32", 4))
    problems = [
        *(sizes.MaskedCopy(t, 8, e, t, False, fp8) for t, e in ((32, 64), (512, 64), (1024, 32))),
        sizes.MaskedCopy(512, 8, 64, 512, True, fp8),
        sizes.MaskedCopy(512, 8, 64, 512, True, wide),
        sizes.MaskedCopy(4096, 32, 4096, 16, True, (sizes.Leaf("float32", 1 << 16),)),
        sizes.MaskedCopy(1, 1, 1, 1, True, mixed),
        sizes.MaskedCopy(300, 5, 130, 7, False, ()),
    ]
    for problem in problems:
        config = sizes.copy_config(problem)
        [kernel] = masked_copy.build(problem, config).kernels
        structs = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in kernel.inputs.values()]
        names = [x for x, _ in masked_copy.leaf_names(problem)]
        for name, leaf in zip(names, problem.leaves, strict=True):
            size = kernel.inputs[name][0] * 4 // jnp.dtype(leaf.dtype).itemsize
            structs[list(kernel.inputs).index(name)] = jax.ShapeDtypeStruct((size,), leaf.dtype)
        call = mosaic.launcher(kernel)
        direct = _Direct(kernel.name, dict(kernel.inputs), dict(kernel.outputs), call, structs)
        widths = {n: leaf.unit_bytes for n, leaf in zip(names, problem.leaves, strict=True)}
        yield Compiled(f"{problem}, {config}", direct, widths, _loads_first)


def messages() -> Iterator[Compiled]:
    """What stands around the exchanges of the transport "all_to_all", and what is unusual."""
    import jax
    import jax.numpy as jnp

    from moe_align_jax._expert_parallel import message_kernels as kernels
    from moe_align_jax._expert_parallel.message_kernels import problems
    from moe_align_jax._simt import mosaic

    def fields(**dtypes: int) -> tuple:
        return tuple(kernels.Field(columns, jnp.dtype(name)) for name, columns in dtypes.items())

    fp8, plain = kernels.quantised(7168), fields(bfloat16=7168)
    odd = fields(bfloat16=6, float32=3, int8=20)
    given = [
        *((kernels.Message(2, tokens, 8, 128, fp8), True, 2 * tokens) for tokens in (8, 128)),
        (kernels.Message(2, 128, 8, 8, fp8), True, 256),
        (kernels.Message(8, 128, 8, 32, plain), False, 1024),
        (kernels.Message(8, 64, 16, 4, fp8), False, 50),
        (kernels.Message(3, 5, 3, 5, odd), False, 4),
        (kernels.Message(2, 2048, 2, 3000, fields(float32=64)), False, 100),
        (kernels.Message(2, 1, 32, 2, fields(bfloat16=1 << 16)), False, 2),
    ]
    for form, quantise, room in given:
        pack, unpack = kernels.Pack(form, quantise), kernels.Unpack(form, room)
        gathered = unpack._replace(gathered=True, quantise=quantise)
        for problem in (pack, unpack, gathered):
            kernel = kernels.build(problem)
            structs = [jax.ShapeDtypeStruct(*array) for array in problem.inputs.values()]
            shapes = [{n: s for n, (s, _) in a.items()} for a in (problem.inputs, problem.outputs)]
            direct = _Direct(kernel.name, *shapes, mosaic.launcher(kernel), structs)
            source = "message" if problem is unpack else "field"
            target = "message" if problem is pack else "boxes"
            widths = {}
            if source == "field":
                widths = {f"field{k}": 4 * field.width for k, field in enumerate(problem.given)}
            if target == "boxes":
                # Eight codes come of 16 bytes that are quantised here, and a scale of 16 times as many.
                quantised = quantise and problem is not unpack
                written = (8, 4) if quantised else [4 * f.width for f in form.payload]
                widths |= {f"boxes{k}": width for k, width in enumerate(written)}
            assert problems.THREADS == 128
            yield Compiled(str(problem), direct, widths, _loads_before(source, target))


def sums() -> Iterator[Compiled]:
    """The sums of combine, and what is unusual."""
    import jax
    import jax.numpy as jnp

    from moe_align_jax._layout.kernels import sizes, weighted_sum

    problems = [
        sizes.RowSum(512, 8, 64 * 512, 7168, "bfloat16", "bfloat16", True),
        sizes.RowSum(32, 8, 64 * 32, 7168, "bfloat16", "bfloat16", True),
        sizes.RowSum(5000, 8, 40960, 2880, "bfloat16", "float32", True),
        sizes.RowSum(100, 6, 3000, 4096, "float32", "float32", False),
        sizes.RowSum(7, 64, 300, 1152, "float16", "bfloat16", False),
        sizes.RowSum(1, 1, 1, 136, "bfloat16", "float16", True),
    ]
    for problem in problems:
        config = sizes.sum_config(problem)
        inputs = {
            "y": problem.grained(problem.num_rows),
            "row_of_pair": (problem.num_tokens, problem.top_k),
        }
        structs = [jax.ShapeDtypeStruct(inputs["y"], problem.dtype)]
        structs.append(jax.ShapeDtypeStruct(inputs["row_of_pair"], jnp.int32))
        if problem.weighted:
            inputs["weights"] = inputs["row_of_pair"]
            structs.append(jax.ShapeDtypeStruct(inputs["weights"], jnp.float32))
        outputs = {"out": problem.grained(problem.num_tokens)}
        call = weighted_sum.build(problem, config)
        direct = _Direct("sum_rows", inputs, outputs, call, structs)
        values = config.tile // 128  # of a thread
        widths = {
            "y": min(values * problem.item_bytes, 16),
            "out": min(values * jnp.dtype(problem.out_dtype).itemsize, 16),
        }
        yield Compiled(f"{problem}, {config}", direct, widths, _together(config.ahead))


def activations() -> Iterator[Compiled]:
    """The backward step across an activation: Mixtral's rows, Qwen3's, and those of the narrow tile."""
    import jax
    import jax.numpy as jnp

    from moe_align_jax._grouped_matmul import across_activation_kernel as kernel
    from moe_align_jax._grouped_matmul.problem import ActivationGradient, MatmulProblem, Weights

    for rows, n, dtype in (
        (17952, 14336, "bfloat16"),
        (1152, 768, "bfloat16"),
        (300, 384, "float16"),
    ):
        given = {"k": 4096, "num_experts": 8, "block_size": 192, "zero_padding": False}
        product = MatmulProblem("test", "blocks", rows, n=n, dtype=dtype, out_dtype=dtype, **given)
        problem = ActivationGradient(product, Weights(activation="silu", gated=True))
        sizes = kernel.sizes_of(problem)
        inputs = {
            "count": (1,),
            "scale": (rows,),
            "products": (rows, 2, n),
            "g": (rows, n),
        }
        dtypes = (jnp.int32, jnp.float32, jnp.dtype(dtype), jnp.dtype(dtype))
        structs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(inputs.values(), dtypes, strict=True)]
        outputs = {"toward": inputs["products"], "scaled": inputs["g"]}
        outputs["parts"] = (sizes.parts, rows)
        call = kernel.build(problem, sizes)
        direct = _Direct("across_activation", inputs, outputs, call, structs)
        widths = dict.fromkeys(("products", "g", "toward", "scaled"), sizes.tile // 16)
        yield Compiled(f"{problem}, {sizes}", direct, widths, lambda text, parameters: iter(()))


def _together(ahead: int) -> Callable:
    """As many rows are asked for, with no branch between them, as the sizes say."""

    def found(text: str, parameters: tuple[str, ...]) -> Iterator[str]:
        at = parameters.index("y")
        loads = [a.position for a in ptx.global_accesses(text) if at in a.parameters]
        branches = [text.count("bra", 0, position) for position in loads]
        if not branches or branches.count(branches[0]) < ahead:
            yield f"branches before each load of a row: {branches}; {ahead} belong together"

    return found


def _loads_before(source: str, target: str) -> Callable:
    """The loads of rows stand before the first store to one: of buffers whose names begin so."""

    def found(text: str, parameters: tuple[str, ...]) -> Iterator[str]:
        accesses = ptx.global_accesses(text)

        def places(prefix: str, instruction: str) -> list[int]:
            at = {k for k, name in enumerate(parameters) if name.startswith(prefix)}
            return [
                a.position
                for a in accesses
                if a.parameters & at and a.instruction.startswith(instruction)
            ]

        loads, stores = places(source, "ld"), places(target, "st")
        if loads and stores and max(loads) > min(stores):
            yield "a row is stored before all of it was asked for"

    return found


_loads_first = _loads_before("x", "rows")


def faults(one: Compiled, text: str, launch: Any, used: ptx.Usage) -> Iterator[str]:
    yield from worker.resource_faults(used, 128, text)
    yield from worker.order_faults(text, pdl=False, first=True)
    if launch.block != (128, 1, 1) or launch.cluster != (1, 1, 1):
        yield f"block {launch.block}, cluster {launch.cluster}"
    if missing := set(one.kernel.outputs) - set(launch.parameters):
        yield f"outputs that are not passed: {sorted(missing)}"
    accesses = ptx.global_accesses(text)
    for name, width in one.widths.items():
        at = launch.parameters.index(name)
        found = {a.bytes for a in accesses if at in a.parameters}
        if found != {width}:
            yield f"{name} is accessed {sorted(found)} bytes at a time, not {width}"
    yield from one.faults(text, launch.parameters)


def check(plugin: str, runtime: str) -> Iterator[script.Report]:
    every = (*activations(), *messages(), *sums(), *copies())
    given = ((one.what, one.kernel, functools.partial(faults, one)) for one in every)
    yield from script.direct(plugin, runtime, given)


if __name__ == "__main__":
    sys.exit(script.main("tests.no_gpu.rows", check))
