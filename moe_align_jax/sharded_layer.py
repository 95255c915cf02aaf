"""sharded_fused_moe: the expert layer over the devices of a mesh, for training and for inference."""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_align_jax._align.arguments import narrow_count, narrow_map
from moe_align_jax._core import checks
from moe_align_jax._core.int32 import narrow_on_host
from moe_align_jax._grouped_matmul import arguments as matmul_arguments
from moe_align_jax._grouped_matmul.options import check_flag
from moe_align_jax._grouped_matmul.problem import Activation, Weights
from moe_align_jax._lowering import select
from moe_align_jax._lowering.sharding import replicate
from moe_align_jax._moe_layer import arguments
from moe_align_jax.expert_parallel import combine, dispatch
from moe_align_jax.matmul import masked_grouped_matmul
from moe_align_jax.moe_layer import fused_moe
from moe_align_jax.types import Implementation

__all__ = ["sharded_fused_moe"]

type _Weights = jax.Array | tuple[jax.Array, jax.Array]
Method = Literal["dispatch", "replicate"]
_METHODS = ("dispatch", "replicate")
_I32 = jnp.int32


def sharded_fused_moe(
    x: jax.Array,
    w_gate_up: _Weights,
    w_down: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array | np.ndarray,
    *,
    mesh: Mesh,
    expert_axis: str,
    data_axes: str | tuple[str, ...] = (),
    tensor_axis: str | None = None,
    fsdp_axis: str | None = None,
    method: Method = "dispatch",
    activation: Activation | None = "silu",
    gated: bool = True,
    interleaved: bool = False,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    bias_gate_up: jax.Array | None = None,
    bias_down: jax.Array | None = None,
    transpose_rhs: bool = False,
    weights_on_input: bool = False,
    num_valid_tokens: int | jax.Array | None = None,
    return_tokens_per_expert: bool = False,
    preferred_element_type: Any = None,
    max_low_latency_tokens: int = 128,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`fused_moe` over the devices of a mesh: the same arguments, of all devices, and the same result.

    It is a `jax.shard_map` of its own: call it on global arrays, under `jax.jit` or not. Tokens are split
    over data_axes, fsdp_axis and expert_axis; experts over expert_axis; N over tensor_axis. Arrays that lie
    otherwise are moved by XLA. Two ways for tokens to meet their experts:

        "dispatch": each token is sent to the devices of its experts, and their sums are sent back
            (`dispatch`, `combine`). With at most `max_low_latency_tokens` tokens on a device, the masked
            layout of decode, else rows as they come.
        "replicate": the tokens of expert_axis' devices are gathered on each of them (all-gather), which
            computes its own experts' part of the result, and the parts are added up (reduce-scatter).

    Args:
        x: `[T, H]`. T need not be a multiple of the devices: rows without experts are added to it.
        w_gate_up, w_down: of all E experts, as for `fused_moe`. Each device uses E / devices of expert_axis.
        topk_weights, topk_ids: `[T, K]`, of E experts.
        mesh: of `jax.make_mesh`, with Auto or Explicit axes; within `jax.set_mesh`, that mesh. Axes that are
            not named below see the same work on each of their devices.
        expert_axis: its devices share the experts out. Static.
        data_axes: a name, or several: further axes over which tokens are split; weights are the same on them,
            and their gradient is added up. Static.
        tensor_axis: its devices share out N; the results are added up. Static.
        fsdp_axis: weights lie split over it along H, and are gathered for the time of the layer; their
            gradient is reduced and scattered. Tokens are split over it too, so that it may be one of
            data_axes. Static.
        method: see above. Static.
        activation, gated, interleaved, swiglu_limit, swiglu_alpha, transpose_rhs, weights_on_input,
            preferred_element_type, implementation: as for `fused_moe`.
        bias_gate_up, bias_down: as for `fused_moe`, of all experts.
        num_valid_tokens: as for `fused_moe`, of all T tokens.
        return_tokens_per_expert: also return the pairs that each of the E experts got. Static.
        max_low_latency_tokens: as for `dispatch`. Static.

    Returns:
        `[T, H]`; with `return_tokens_per_expert` also int32 `[E]`. Sums over devices have another order than
        one device's sum: equal to `fused_moe` within rounding, gradients too. "replicate" adds up parts that
        were rounded to the result's dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as `fused_moe`; and ValueError for an axis that the mesh
            does not have, a size that is no multiple of its axis, or a call inside a `jax.shard_map`.

    Example:
        >>> mesh = jax.make_mesh((1,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> x, w_up = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
        >>> w_down = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
        >>> weights, ids = jnp.array([[1.0, 0.5], [1.0, 0.5]]), jnp.array([[0, 1], [1, -1]])
        >>> options = {"activation": "relu2", "gated": False, "mesh": mesh, "expert_axis": "ep"}
        >>> sharded_fused_moe(x, w_up, w_down, weights, ids, **options).tolist()
        [[21.0, 84.0], [360.0, 640.0]]

    Gate and up in one array `[E, H, 2 N]`, gate first, are parted for tensor_axis: a device needs columns of
    both. Arrays that are stored split along 2 N are moved for that in every step; a pair, or interleaved
    columns, are not.
    """
    function = "sharded_fused_moe"
    select.check_implementation(function, implementation)
    axes = _check_axes(function, mesh, expert_axis, data_axes, tensor_axis, fsdp_axis)
    if not checks.is_one_of(method, _METHODS):
        rule, remedy = "be 'dispatch' or 'replicate'", "See its documentation."
        checks.refuse(ValueError, function, "method", rule, checks.shown(method), remedy)
    x = matmul_arguments.check_rows(function, "x", x, 2)
    tokens, hidden = x.shape
    weights, first, w_down, ffn = arguments.check_experts(
        function,
        hidden,
        x.dtype,
        w_gate_up,
        w_down,
        transposed=transpose_rhs,
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        bias=bias_gate_up is not None,
    )
    experts = w_down.shape[0]
    columns = 2 * ffn if weights.gated else ffn
    bias_gate_up = arguments.check_bias(function, "bias_gate_up", bias_gate_up, (experts, columns))
    bias_down = arguments.check_bias(function, "bias_down", bias_down, (experts, hidden))
    topk_weights, topk_ids = arguments.check_routing(function, x, topk_weights, topk_ids)
    for name, size, what in (
        (expert_axis, experts, "experts"),
        (tensor_axis, ffn, "columns N"),
        (fsdp_axis, hidden, "columns H"),
    ):
        if name is not None and size % mesh.shape[name]:
            rule = f"hold a multiple of {mesh.shape[name]} {what}, the devices of {name!r}"
            remedy = "Pad the weights, or take another mesh."
            checks.refuse(ValueError, function, "w_down", rule, size, remedy)
    layer = _Layer(
        axes,
        mesh,
        method,
        weights,
        experts,
        check_flag(function, "weights_on_input", weights_on_input),
        check_flag(function, "return_tokens_per_expert", return_tokens_per_expert),
        matmul_arguments.result_dtype(function, x, preferred_element_type),
        checks.check_positive_int(
            function, "max_low_latency_tokens", max_low_latency_tokens, "Pass a number of tokens."
        ),
        implementation,
    )
    limit = None
    if num_valid_tokens is not None:
        limit = jnp.asarray(arguments.check_tokens(function, num_valid_tokens))
    topk_ids = narrow_on_host(topk_ids, experts)
    floats = (x, first, w_down, bias_gate_up, bias_down, topk_weights)
    if not tokens or not topk_ids.shape[1]:
        pairs = jnp.zeros(experts, _I32)
        y = jnp.zeros((tokens, hidden), layer.out_dtype)
        return (y, pairs) if layer.counted else y
    y, counts = _run(floats, topk_ids, limit, layer=layer)
    return (y, counts) if layer.counted else y


class _Axes(NamedTuple):
    """Names of mesh axes; `tokens` are those that tokens are split over."""

    expert: str
    tokens: tuple[str, ...]
    tensor: str | None
    fsdp: str | None


class _Layer(NamedTuple):
    """Everything static about one call."""

    axes: _Axes
    mesh: Mesh
    method: str
    weights: Weights
    num_experts: int
    weights_on_input: bool
    counted: bool
    out_dtype: str
    most: int
    implementation: Any

    @property
    def options(self) -> dict[str, Any]:
        """Of the products."""
        weights = self.weights
        return {
            "activation": weights.activation,
            "gated": weights.gated,
            "interleaved": weights.interleaved,
            "swiglu_limit": weights.swiglu_limit,
            "swiglu_alpha": weights.swiglu_alpha,
            "transpose_rhs": weights.transposed,
            "implementation": self.implementation,
        }

    @property
    def parted(self) -> bool:
        """Whether gate and up of one array have an axis of their own while N is shared out."""
        weights = self.weights
        one = weights.gated and not weights.pair and not weights.interleaved
        return bool(one and self.axes.tensor)


def _check_axes(function: str, mesh: Any, expert: Any, data: Any, tensor: Any, fsdp: Any) -> _Axes:
    if not isinstance(mesh, Mesh):
        remedy = "Make one with jax.make_mesh."
        checks.refuse(TypeError, function, "mesh", "be a jax.sharding.Mesh", mesh, remedy)
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and context != mesh.abstract_mesh:
        rule = "be the mesh of jax.set_mesh, and stand outside of any jax.shard_map"
        remedy = "Inside jax.shard_map call fused_moe with expert_map, or dispatch and combine."
        got = f"{mesh} within {context}"
        checks.refuse(ValueError, function, "mesh", rule, got, remedy)
    if not isinstance(data, (str, tuple, list)):
        rule = "be the name of an axis, or a tuple of names"
        checks.refuse(TypeError, function, "data_axes", rule, data, "Pass () for none.")
    data = (data,) if isinstance(data, str) else tuple(data)
    rule, remedy = (
        f"name an axis of the mesh, {', '.join(map(repr, mesh.axis_names))}",
        "See mesh.axis_names.",
    )
    named = [("expert_axis", expert), *(("data_axes", name) for name in data)]
    named += [(a, n) for a, n in (("tensor_axis", tensor), ("fsdp_axis", fsdp)) if n is not None]
    for argument, name in named:
        if not isinstance(name, str):
            checks.refuse(TypeError, function, argument, rule, name, remedy)
        if name not in mesh.axis_names:
            checks.refuse(ValueError, function, argument, rule, repr(name), remedy)
    once = [expert, *data, *([tensor] if tensor else [])]
    if len(set(once)) < len(once) or fsdp in (expert, tensor) and fsdp is not None:
        rule, got = "be different axes; fsdp_axis may be one of data_axes", str(named)
        checks.refuse(ValueError, function, "the axes", rule, got, "Use each axis once.")
    split: tuple[str, ...] = (*data, *([fsdp] if fsdp and fsdp not in data else []), expert)
    return _Axes(expert, split, tensor, fsdp)


@functools.partial(jax.jit, static_argnames="layer")
def _run(floats: Any, topk_ids: jax.Array, limit: Any, *, layer: _Layer) -> Any:
    with jax.named_scope("sharded_fused_moe"):
        x, first, w_down, bias_gate_up, bias_down, topk_weights = floats
        axes, mesh, weights = layer.axes, layer.mesh, layer.weights
        tokens, top_k = topk_ids.shape
        ids = replicate(topk_ids).reshape(-1)
        ids = narrow_map(ids, layer.num_experts).reshape(tokens, top_k)
        ids = jnp.where((ids >= 0) & (ids < layer.num_experts), ids, -1)
        if limit is not None:
            row = lax.broadcasted_iota(_I32, ids.shape, 0)
            ids = jnp.where(row < narrow_count(limit)[0], ids, -1)
        devices = math.prod(mesh.shape[name] for name in axes.tokens)
        spare = -tokens % devices
        rows = PartitionSpec(axes.tokens)
        given, specs = [], []

        def add(array: Any, spec: PartitionSpec) -> None:
            given.append(array)
            specs.append(spec)

        for array, value in ((x, 0), (topk_weights, 0), (ids, -1)):
            array = _free(array, mesh)
            if spare:
                array = jnp.pad(array, ((0, spare), (0, 0)), constant_values=value)
            add(array, rows)
        expert, tensor, fsdp = axes.expert, axes.tensor, axes.fsdp
        for array in first:
            spec = (expert, tensor, fsdp) if weights.transposed else (expert, fsdp, tensor)
            if layer.parted:
                array, at = _free(array, mesh), 1 if weights.transposed else 2
                shape = (*array.shape[:at], 2, array.shape[at] // 2, *array.shape[at + 1 :])
                array, spec = array.reshape(shape), (*spec[:at], None, *spec[at:])
            add(array, PartitionSpec(*spec))
        spec = (expert, fsdp, tensor) if weights.transposed else (expert, tensor, fsdp)
        add(w_down, PartitionSpec(*spec))
        if bias_gate_up is not None:
            spec = (expert, tensor)
            if weights.gated and not weights.interleaved and tensor:  # gate, then up
                bias_gate_up = _free(bias_gate_up, mesh).reshape(layer.num_experts, 2, -1)
                spec = (expert, None, tensor)
            add(bias_gate_up, PartitionSpec(*spec))
        if bias_down is not None:
            add(bias_down, PartitionSpec(expert))
        if AxisType.Explicit in mesh.axis_types:
            given = [
                jax.reshard(a, NamedSharding(mesh, _explicit(s, mesh)))
                for a, s in zip(given, specs, strict=True)
            ]
        body = functools.partial(
            _on_a_device,
            layer=layer,
            biases=(bias_gate_up is not None, bias_down is not None),
        )
        out_specs = (rows, PartitionSpec())
        mapped = jax.shard_map(body, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs)
        y, counts = mapped(*given)
        return (_free(y, mesh)[:tokens] if spare else y), counts


def _explicit(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """Its Explicit axes alone: a mesh may have Auto ones too, which XLA sees to."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    parts = []
    for part in spec:
        names = (part,) if isinstance(part, str) else part or ()
        parts.append(tuple(name for name in names if kinds[name] == AxisType.Explicit) or None)
    return PartitionSpec(*parts)


def _free(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Gathered, where an Explicit axis would forbid to change its shape."""
    return replicate(x) if AxisType.Explicit in mesh.axis_types else x


def _on_a_device(*given: jax.Array, layer: _Layer, biases: tuple[bool, bool]) -> Any:
    axes, weights = layer.axes, layer.weights
    rest = list(given)
    x, topk_weights, ids = rest.pop(0), rest.pop(0), rest.pop(0)
    first = tuple(rest.pop(0) for _ in range(1 + weights.pair))
    w_down = rest.pop(0)
    bias_gate_up = rest.pop(0) if biases[0] else None
    bias_down = rest.pop(0) if biases[1] else None
    # Gate and up of one array have an axis of their own: their columns follow each other again.
    at = 1 if weights.transposed else 2
    if layer.parted:
        [w] = first
        first = (w.reshape(*w.shape[:at], 2 * w.shape[at + 1], *w.shape[at + 2 :]),)
    if bias_gate_up is not None and bias_gate_up.ndim == 3:
        bias_gate_up = bias_gate_up.reshape(bias_gate_up.shape[0], -1)
    if axes.fsdp is not None:
        with jax.named_scope("gather_weights"):
            gather = functools.partial(lax.all_gather, axis_name=axes.fsdp, tiled=True)
            first = tuple(gather(w, axis=2 if weights.transposed else 1) for w in first)
            w_down = gather(w_down, axis=1 if weights.transposed else 2)
    if bias_down is not None and axes.tensor is not None:
        # Parts of one sum: only one of them has the bias.
        bias_down = jnp.where(lax.axis_index(axes.tensor) == 0, bias_down, 0.0)
    pair = first if weights.pair else first[0]
    operands = (x, pair, w_down, bias_gate_up, bias_down, topk_weights, ids)
    y = (_replicated if layer.method == "replicate" else _dispatched)(layer, *operands)
    if axes.tensor is not None:
        y = lax.psum(y, axes.tensor)
    every = lax.iota(_I32, layer.num_experts)
    counts = jnp.sum(ids.reshape(-1)[:, None] == every[None, :], axis=0, dtype=_I32)
    return y, lax.psum(counts, axes.tokens)


def _replicated(
    layer: _Layer, x, first, w_down, bias_gate_up, bias_down, topk_weights, ids
) -> jax.Array:
    axis, local = layer.axes.expert, w_down.shape[0]
    with jax.named_scope("gather_tokens"):
        gather = functools.partial(lax.all_gather, axis_name=axis, tiled=True)
        x, topk_weights, ids = gather(x), gather(topk_weights), gather(ids)
    mine = ids - local * lax.axis_index(axis)
    mine = jnp.where((ids >= 0) & (mine >= 0) & (mine < local), mine, -1)
    y = fused_moe(
        *(x, first, w_down, topk_weights, mine),
        bias_gate_up=bias_gate_up,
        bias_down=bias_down,
        weights_on_input=layer.weights_on_input,
        preferred_element_type=layer.out_dtype,
        **layer.options,
    )
    with jax.named_scope("add_parts"):
        return lax.psum_scatter(y, axis, tiled=True)


def _named_once(ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An expert that a token names twice is named once, with the sum of its weights.

    The low-latency mode of `dispatch` has room for each token once in an expert's box.
    """
    top_k = ids.shape[1]
    place = lax.broadcasted_iota(_I32, (1, top_k, top_k), 2)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :]
    first = jnp.min(jnp.where(same, place, top_k), axis=2)  # top_k of a dropped pair
    weights = jnp.where(ids >= 0, weights, 0.0)
    mine = first[:, None, :] == place[:, 0, :, None]
    total = jnp.sum(jnp.where(mine, weights[:, None, :], 0.0), axis=2)
    return jnp.where(first == place[:, 0], ids, -1), total


def _dispatched(
    layer: _Layer, x, first, w_down, bias_gate_up, bias_down, topk_weights, ids
) -> jax.Array:
    # Weights on the input belong to single pairs, which boxes do not know.
    mode: Any = "normal" if layer.weights_on_input else "auto"
    if not layer.weights_on_input:
        ids, topk_weights = _named_once(ids, topk_weights)
    got = dispatch(
        *(x, ids, topk_weights),
        axis_name=layer.axes.expert,
        num_experts=layer.num_experts,
        mode=mode,
        max_low_latency_tokens=layer.most,
    )
    y: Any
    if got.masked_m is None:
        y = fused_moe(
            *(got.x, first, w_down, got.topk_weights, got.topk_ids),
            bias_gate_up=bias_gate_up,
            bias_down=bias_down,
            weights_on_input=layer.weights_on_input,
            preferred_element_type=layer.out_dtype,
            **layer.options,
        )
    else:
        hidden = masked_grouped_matmul(
            *(got.x, first, got.masked_m),
            bias=bias_gate_up,
            expected_m=got.expected_m,
            **layer.options,
        )
        y = masked_grouped_matmul(
            *(hidden, w_down, got.masked_m),
            bias=bias_down,
            transpose_rhs=layer.weights.transposed,
            expected_m=got.expected_m,
            implementation=layer.implementation,
        )
    return combine(y, got.handle, out_dtype=layer.out_dtype)
