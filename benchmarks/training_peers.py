"""Grouped products and their gradients by other libraries: tokamax, haliax, jax's examples.

The only file that imports them. `absent` says why one cannot run here. Each function takes rows in the order
of groups, `[m, k]` and `[m, n]`, weights `[E, k, n]`, and the rows of each group, `[E]` int32.
"""

import ast
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

KINDS = ("forward", "input gradient", "weight gradient")
# Where the ragged dimension and the contracted ones are, by kind, as tokamax's tuning files have them.
_CONTRACTED = {
    "[[[1], [1]], [[], []]]": "forward",
    "[[[1], [2]], [[], []]]": "input gradient",
    "[[[0], [0]], [[], []]]": "weight gradient",
}
_TUNED_ON = "nvidia_h100_80gb_hbm3"
# (block_m, block_n, block_k, max_concurrent_steps, grid_block_n) of jax's two examples.
_JAX_TILES = {
    "weight gradient": [(128, 128, 64, 4, 4), (128, 128, 64, 6, 8), (64, 128, 64, 6, 4)],
    "forward": [(128, 128, 64, 4, 4), (128, 192, 64, 4, 2)],
}


def absent(library: str) -> str:
    """Why a library cannot be imported here, or ""."""
    return "" if importlib.util.find_spec(library) else f"{library} is not installed"


# -- tokamax -------------------------------------------------------------------------------------------


@functools.cache
def _tokamax() -> Any:
    """tokamax's `ragged_dot.api`.

    xprof is a clock of its own that is not used here; it is 32 MB and may be missing. jax-triton reads a
    constant of Triton's driver that Triton 3.6 does not have, for descriptors that tokamax does not use.
    """
    if importlib.util.find_spec("xprof") is None:
        parts = "xprof.cli.tools.get_kernel_stats_tool".split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            sys.modules[name] = module = types.ModuleType(name)
            # Who looks for it once more, where this import failed the first time, asks for its spec.
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            if i:
                setattr(sys.modules[".".join(parts[:i])], parts[i], sys.modules[name])
    if importlib.util.find_spec("triton") is not None:
        import triton.backends.nvidia.driver as driver

        if not hasattr(driver, "TMA_TF32"):
            driver.TMA_TF32 = 11  # type: ignore[attr-defined]
        _take_tuples_apart()
    return importlib.import_module("tokamax._src.ops.ragged_dot.api")


def _take_tuples_apart() -> None:
    """`a, b = c` of a constexpr tuple, as tokamax' kernels in Triton have it, for Triton before 3.7.

    jax-triton 0.4.1, the first that takes the None that tokamax 0.0.17 passes, asks for Triton 3.7, whose
    front end has this. Nothing but the assignment changes: the same values get the same names.
    """
    import triton
    import triton.language as tl
    from triton.compiler import code_generator

    generator: Any = code_generator.CodeGenerator
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    visit = generator.visit_Assign

    def as_tuple(value: Any) -> Any:
        return (
            tl.tuple([*map(as_tuple, value)]) if isinstance(value, tuple) else tl.constexpr(value)
        )

    def visit_assign(self: Any, node: ast.Assign) -> Any:
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Name):
            value = self.visit(node.value)
            if isinstance(value, tl.constexpr) and isinstance(value.value, tuple):
                return self.assignTarget(target, as_tuple(value.value))
        return visit(self, node)

    generator.visit_Assign = visit_assign


def _tuned(implementation: str) -> dict[str, Any]:
    text = resources.files("tokamax").joinpath(
        "data/autotuning",
        _TUNED_ON,
        {"mosaic_gpu": "pallas_mosaic_gpu_ragged_dot", "triton": "triton_ragged_dot"}[
            implementation
        ]
        + ".json",
    )
    return json.loads(text.read_text())


def _sizes_of(kind: str, given: dict[str, Any]) -> tuple[int, int, int, int]:
    """(m, k, n, E) of the product that an entry of a tuning file belongs to; operands are `bf16[m,k]`."""
    (m, first), other = (
        [int(d) for d in re.findall(r"\d+", given[name])[1:]] for name in ("lhs", "rhs")
    )
    groups = given["group_sizes"]
    experts = groups["num_groups"] if isinstance(groups, dict) else len(groups)
    if kind == "weight gradient":
        return m, first, other[-1], experts
    return m, other[1], other[2], experts


def tokamax_config(implementation: str, kind: str, m: int, k: int, n: int, experts: int) -> Any:
    """What tokamax's file for an H100 has for the sizes that are nearest to these.

    H100 and H200 have the same multiprocessors; tokamax ships no file for an H200, and its heuristics are
    several times slower.
    """
    import pydantic

    api = _tokamax()  # before its files are looked for, which imports it
    best: tuple[float, str] | None = None
    for key, configs in _tuned(implementation).items():
        given = json.loads(key)
        if not (isinstance(given["lhs"], str) and isinstance(given["rhs"], str)):  # quantised
            continue
        numbers = json.dumps(given["ragged_dot_dimension_numbers"]["dot_dimension_numbers"])
        if _CONTRACTED.get(numbers) != kind or given["return_residuals"] or not configs:
            continue
        sizes = _sizes_of(kind, given)
        far = sum(abs(math.log(a / b)) for a, b in zip(sizes, (m, k, n, experts), strict=True))
        fastest = min(configs, key=lambda c: min(configs[c]["evaluation_times_ms"]))
        if best is None or far < best[0]:
            best = far, fastest
    assert best is not None
    cls = type(api.IMPLEMENTATIONS[implementation]).config_cls
    return pydantic.TypeAdapter(cls).validate_json(best[1])


def tokamax_op(implementation: str, kind: str, m: int, k: int, n: int, experts: int) -> Any:
    """Its op with the tuned tiles of a kind of product."""
    config = tokamax_config(implementation, kind, m, k, n, experts)
    return _tokamax().IMPLEMENTATIONS[implementation].replace(config=config, vjp=None)


def _tokamax_numbers(kind: str) -> Any:
    base = importlib.import_module("tokamax._src.ops.ragged_dot.base")
    return {
        "forward": base.DEFAULT_RAGGED_DOT_DIM_NUMS,
        "input gradient": base.TRANS_RHS_RAGGED_DOT_DIM_NUMS,
        "weight gradient": base.RAGGED_CONTRACTING_DOT_DIM_NUMS,
    }[kind]


def tokamax_dot(
    implementations: dict[str, str], m: int, k: int, n: int, experts: int
) -> Callable[..., Any]:
    """`ragged_dot(x, w, sizes)` with a derivative, each kind of product by the named implementation."""
    _tokamax()
    base = importlib.import_module("tokamax._src.ops.ragged_dot.base")
    ops = {kind: tokamax_op(name, kind, m, k, n, experts) for kind, name in implementations.items()}
    vjp = functools.partial(
        base.vjp, dlhs_ragged_dot=ops["input gradient"], drhs_ragged_dot=ops["weight gradient"]
    )
    forward = ops["forward"].replace(vjp=vjp)
    return lambda x, w, sizes: forward(x, w, group_sizes=sizes)


# -- the products --------------------------------------------------------------------------------------


def products(
    kind: str, m: int, k: int, n: int, experts: int
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(Name, product of (left, right, sizes)) of every library that has one.

    left and right: x `[m, k]` and w forward; the result's cotangent `[m, n]` and w for the input's gradient;
    x and the cotangent for the weights'.
    """
    for implementation in ("mosaic_gpu", "triton"):
        name = f"tokamax {implementation.removesuffix('_gpu')}"
        yield name, functools.partial(_by_tokamax, implementation, kind, (m, k, n, experts))
    for implementation in ("triton_tile_map", "triton"):
        yield f"haliax {implementation}", functools.partial(_by_haliax, implementation, kind)
    tiles = _JAX_TILES["weight gradient" if kind == "weight gradient" else "forward"]
    columns = k if kind == "input gradient" else n
    for block in tiles:
        if columns % (block[1] * block[4]) == 0:
            yield f"jax example {block}", functools.partial(_by_jax_example, block, kind)


def _by_tokamax(
    implementation: str, kind: str, sizes: tuple[int, int, int, int], left: Any, right: Any, g: Any
) -> Any:
    if reason := absent("tokamax"):
        raise ImportError(reason)
    api = _tokamax()
    if implementation not in api.IMPLEMENTATIONS:
        raise ImportError(f"tokamax has no {implementation} here: jax-triton is not installed")
    op = tokamax_op(implementation, kind, *sizes)
    given = {"group_sizes": g, "preferred_element_type": left.dtype}
    return op(left, right, ragged_dot_dimension_numbers=_tokamax_numbers(kind), **given)


def _haliax_dot(implementation: str) -> Callable[..., Any]:
    if reason := absent("haliax"):
        raise ImportError(reason)
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    where: Any = pallas
    where.dot = triton.dot  # jax 0.11 took it out of `pallas`, where haliax looks for it
    ragged_dot: Any = importlib.import_module("haliax.nn.ragged_dot").ragged_dot

    return functools.partial(ragged_dot, implementation=implementation)


def _by_haliax(implementation: str, kind: str, left: Any, right: Any, g: Any) -> Any:
    """Its gradients are those of its `custom_vjp`; what a gradient does not need is dead code."""
    import jax
    import jax.numpy as jnp

    dot = _haliax_dot(implementation)
    if kind == "forward":
        return dot(left, right, g)
    if kind == "input gradient":
        x = jnp.zeros((left.shape[0], right.shape[1]), left.dtype)
        [found] = jax.vjp(lambda x: dot(x, right, g), x)[1](left)
        return found
    w = jnp.zeros((g.shape[0], left.shape[1], right.shape[1]), left.dtype)
    [found] = jax.vjp(lambda w: dot(left, w, g), w)[1](right)
    return found


def _by_jax_example(block: tuple[int, ...], kind: str, left: Any, right: Any, g: Any) -> Any:
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    names = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")
    tiles: dict[str, Any] = dict(zip(names, block, strict=True))
    if kind == "weight gradient":
        return transposed_ragged_dot_mgpu.transposed_ragged_dot(left, right, group_sizes=g, **tiles)
    transposed = kind == "input gradient"
    return ragged_dot_mgpu.ragged_dot(left, right, group_sizes=g, transpose_rhs=transposed, **tiles)


# -- the layer -----------------------------------------------------------------------------------------


def layer(dot: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
    """An expert layer as models write it on `ragged_dot(rows, weights, sizes)`: sort, gather, two products.

    Rows are gathered as a permutation of repeated tokens, so that no gradient is a scatter that adds up. The
    layer is jitted: a model of many of them traces and lowers their kernels once, as it does ours.
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def run(x: Any, gate_up: Any, down: Any, weights: Any, ids: Any) -> Any:
        tokens, top_k = ids.shape
        flat = ids.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=gate_up.shape[0]).astype(jnp.int32)
        take: dict[str, Any] = {"mode": "promise_in_bounds", "unique_indices": True}
        rows = jnp.repeat(x, top_k, axis=0).at[order].get(**take)
        gate, up = jnp.split(dot(rows, gate_up, sizes), 2, axis=1)
        y = second(jax.nn.silu(gate) * up, down, sizes)
        y = y.at[jnp.argsort(order)].get(**take).reshape(tokens, top_k, -1)
        return jnp.einsum("tkh,tk->th", y.astype(jnp.float32), weights).astype(x.dtype)

    return run


def layers(
    tokens: int, hidden: int, ffn: int, experts: int, top_k: int
) -> Iterator[tuple[str, Callable[[], Callable[..., Any]]]]:
    """(Name, maker of the layer) on tokamax, on haliax and on `lax.ragged_dot`."""
    import jax

    m = tokens * top_k
    ways = {
        "tokamax mosaic": dict.fromkeys(KINDS, "mosaic_gpu"),
        "tokamax triton": dict.fromkeys(KINDS, "triton"),
        "tokamax mosaic, weights' gradient triton": dict.fromkeys(KINDS, "mosaic_gpu")
        | {"weight gradient": "triton"},
        "tokamax triton, inputs' gradient mosaic": dict.fromkeys(KINDS, "triton")
        | {"input gradient": "mosaic_gpu"},
    }

    def on_tokamax(way: dict[str, str]) -> Callable[..., Any]:
        if reason := absent("tokamax"):
            raise ImportError(reason)
        first = tokamax_dot(way, m, hidden, 2 * ffn, experts)
        return layer(first, tokamax_dot(way, m, ffn, hidden, experts))

    def on_haliax() -> Callable[..., Any]:
        dot = _haliax_dot("triton_tile_map")
        return layer(dot, dot)

    for name, way in ways.items():
        yield name, functools.partial(on_tokamax, way)
    yield "haliax triton_tile_map", on_haliax
    yield "lax.ragged_dot", lambda: layer(jax.lax.ragged_dot, jax.lax.ragged_dot)
