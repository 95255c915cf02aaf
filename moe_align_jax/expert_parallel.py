"""dispatch and combine: tokens to the ranks of their experts and back, inside jax.shard_map.

Everything has a static shape and no result waits for the host: a step is one XLA program. Buffers are
sized for the worst case and their tails are marked, by ids of -1 or by `masked_m`.

D ranks, T tokens per rank (static, the same on all), K top_k, E = D * e experts, of which rank r holds
`[r * e, (r + 1) * e)`; R = D * T rows received at most; M rows per expert; H hidden.
"""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_align_jax._core import checks, fork
from moe_align_jax._expert_parallel import message
from moe_align_jax._expert_parallel.arguments import (
    check_ids,
    check_local_experts,
    check_num_valid_tokens,
    check_out_dtype,
    check_pairs,
    check_rows,
    check_x,
    global_ids,
)
from moe_align_jax._expert_parallel.axes import (
    manual,
    mesh_platform,
    nothing_like,
)
from moe_align_jax._expert_parallel.choice import (
    TRANSPORTS,
    Mode,
    TransportChoice,
    TransportName,
    choose,
    resolve_mode,
)
from moe_align_jax._expert_parallel.exchange import (
    DispatchInfo,
    fills_boxes,
    return_rows,
    return_sums,
    send,
    send_to_boxes,
)
from moe_align_jax._expert_parallel.transport import Group
from moe_align_jax._lowering import export, select
from moe_align_jax._lowering.reverse_mode import in_our_words, reverse_mode_only
from moe_align_jax._lowering.sharding import check_axis, vary_together
from moe_align_jax.masked_layout import MaskedLayout, check_rows_per_expert, permute_to_masked


@export.register_namedtuple
class DispatchHandle(NamedTuple):
    """What `combine` needs to bring results home. Its fields may change; pass it on as it is.

    Attributes:
        info: the static part (no leaves).
        plan: the transport's own arrays.
        in_use: `[R]` bool, the received rows that have an expert of this rank.
        layout: the `MaskedLayout` of "low_latency", else None.
        topk_weights: `[R, K]` float32 for "low_latency", else None: there the caller applies them.
        topk_ids: `[R, K]` int32 for "low_latency", else None: local experts, -1 for other ranks'.
    """

    info: Any
    plan: Any
    in_use: Any
    layout: Any
    topk_weights: Any
    topk_ids: Any


@export.register_namedtuple
class Dispatched(NamedTuple):
    """What a rank receives; by mode, the fields that do not apply are None.

    Attributes:
        x: "normal": `[R, H]`, by source rank, then token; rows whose ids are all -1 are unspecified.
            "low_latency": `[e, M, H]`, by expert, then source rank, then token; zero, or unspecified, from
            `masked_m` on. The dtype sent, or e4m3.
        scales: of an fp8 payload, float32 `[R, H / 128]` or `[e, M, H / 128]`: `x * scales` is the value.
            Packed ones: int32 `[R, H / 512]`, or `[e, H / 512, M]`, as `silu_and_mul_masked_quant` has them.
        masked_m: "low_latency": `[e]` int32, rows in use of each expert.
        tokens_per_expert: "low_latency": `[e]` int32, pairs that came for each expert. Where it exceeds
            `masked_m`, the rest was dropped for want of room (`max_tokens_per_expert`).
        topk_ids: "normal": `[R, K]` int32, local expert ids, -1 for a pair of another rank.
        topk_weights: "normal": `[R, K]` float32, 0 where the id is -1.
        handle: for `combine`.
        choice: the `TransportChoice`: which transport and mode run, and why. Static (no leaves).
    """

    x: Any
    scales: Any
    masked_m: Any
    tokens_per_expert: Any
    topk_ids: Any
    topk_weights: Any
    handle: Any
    choice: Any

    @property
    def expected_m(self) -> int | None:
        """Rows of a mean expert where all are hit alike: `ceil(T * K / e)`, at most M; None for "normal".

        A Python int, known when the program is traced: `expected_m` of `masked_grouped_matmul`, whose tiles
        are chosen for it. Padding tokens (`num_valid_tokens`) count as tokens.
        """
        info, ids, layout = self.handle.info, self.handle.topk_ids, self.handle.layout
        if layout is None:
            return None
        mean = -(-info.num_tokens * ids.shape[1] // info.group.num_local_experts)
        return max(1, min(mean, layout.pair_of_row.shape[1]))


def dispatch(
    x: jax.Array | tuple[jax.Array, jax.Array],
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    num_experts: int,
    mode: Mode = "auto",
    max_low_latency_tokens: int = 128,
    payload: str | None = None,
    num_valid_tokens: int | jax.Array | None = None,
    max_tokens_per_expert: int | None = None,
    initialize: bool | None = None,
    transport: TransportName | None = None,
) -> Dispatched:
    """Sends each token to the ranks that hold its experts. Call it inside `jax.shard_map`.

    A token goes to a rank at most once, with its ids and weights, and the scales of an fp8 payload, in
    the same message. Every rank calls it, also one without tokens. Differentiable in x and topk_weights
    (reverse mode): the gradient takes the way of `combine`. Deterministic: the same input gives the same
    bits.

    Args:
        x: `[T, H]` bfloat16, float16 or float32, this rank's tokens; or (e4m3 `[T, H]`, float32 scales
            `[T, H / 128]` or packed int32 ones `[T, H / 512]`), quantised by the caller.
        topk_ids: `[T, K]` any integer dtype, global (physical) experts; outside `[0, E)` nothing is sent.
        topk_weights: `[T, K]` floating point.
        axis_name: the mesh axis over which experts are split, or a tuple of axes.
        num_experts: E, a multiple of D. Static.
        mode: "normal": rows as they come, for `permute_to_contiguous`; the caller applies the weights.
            "low_latency": rows by expert in boxes of M; `combine` applies the weights. "auto": the latter
            where T is at most max_low_latency_tokens. The choice is made when the program is traced.
        max_low_latency_tokens: the largest T of "low_latency". Static.
        payload: None sends x as it is; "fp8" sends e4m3 with one float32 scale per 128 columns, and
            returns that. "fp8_ue8m0": the scales are powers of two (rounded up); "fp8_ue8m0_packed": and
            travel as exponents, four to an int32, the first in the lowest byte. None of the three has a
            gradient in x: asking for one is an error.
        num_valid_tokens: None, an int or an integer scalar (a device value): rows from it on are padding.
        max_tokens_per_expert: "low_latency": M; None for R, which is enough where the ids of a token are
            distinct. With less, pairs past M are dropped: `tokens_per_expert` of the result counts them.
            Of no effect where "auto" takes "normal", so that one call serves decode and prefill; an error
            with mode "normal".
        initialize: "low_latency": whether rows from `masked_m` on are zero. False saves writing them (most
            of the memory traffic), for consumers that never read them; not for training. None: not with an
            fp8 payload.
        transport: None for the best that can run here; or a name. The result's `choice` says which ran.

    Returns:
        `Dispatched`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: `axis_name` is no axis of the enclosing shard_map, E is no multiple of D, T exceeds
            max_low_latency_tokens, H is no multiple of 128 for fp8 (512 if packed), or a shape does not
            fit.
        NotImplementedError: the named transport cannot run here; a gradient of an fp8 payload; a
            derivative in forward mode (`jax.jvp`, `jax.hessian`: take `jax.jacrev` twice).

    Example:
        >>> mesh = jax.make_mesh((1,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> def double(x, ids, weights):
        ...     got = dispatch(x, ids, weights, axis_name="ep", num_experts=2)
        ...     return combine(2 * got.x, got.handle)
        >>> spec = jax.sharding.PartitionSpec("ep")
        >>> step = jax.jit(jax.shard_map(double, mesh=mesh, in_specs=spec, out_specs=spec))
        >>> ids, weights = jnp.array([[1, 0], [1, -1]]), jnp.array([[0.5, 0.25], [1.0, 9.0]])
        >>> step(jnp.array([[1.0], [10.0]]), ids, weights).tolist()
        [[1.5], [20.0]]

    Source: the contract of DeepEP's dispatch and low_latency_dispatch (MIT); no code taken.
    """
    function = "dispatch"
    fork.check(function)
    remedy = 'Call it inside jax.shard_map over that axis, for example axis_name="ep".'
    size = check_axis(function, axis_name, remedy)
    group = Group(axis_name, size, check_local_experts(function, num_experts, size))
    x, scales = check_x(function, x, payload)
    ids = check_ids(function, topk_ids)
    weights = check_pairs(function, ids, topk_weights, x.shape[0])
    num_valid_tokens = check_num_valid_tokens(num_valid_tokens)
    limits = max_low_latency_tokens, max_tokens_per_expert
    chosen = _check_mode(function, mode, x.shape[0], *limits)
    if initialize is not None:
        remedy = "True makes unused rows zero, False leaves them unwritten, None chooses."
        initialize = checks.check_bool(function, "initialize", initialize, remedy)
    elif chosen == "low_latency":
        initialize = payload is None and scales is None
    platform, sizes = mesh_platform(), {"mode": chosen, "num_ranks": size}
    choice = choose(function, transport, **sizes, platform=platform, axis_name=axis_name)
    rows_per_expert = None
    if chosen == "low_latency":
        rows = size * x.shape[0]
        experts = group.num_local_experts
        rows_per_expert = check_rows_per_expert(
            function, max_tokens_per_expert, experts, rows, ids.shape[1]
        )

    info = DispatchInfo(chosen, choice.transport, group, x.shape[0])
    with jax.named_scope(function), in_our_words(function):
        info, sent = _prepare(info, x, scales, weights, ids, payload, num_valid_tokens)
        with jax.named_scope("plan"):
            plan = TRANSPORTS[info.transport].plan(sent.ids, group)
        with jax.named_scope("send"):
            received, layout = _send(info, sent, plan, rows_per_expert, bool(initialize))
        return _lay_out(info, received, layout, plan, rows_per_expert, bool(initialize), choice)


class _Message(NamedTuple):
    """What is sent or has come of each token: x, perhaps its scales, weights and ids."""

    x: Any
    scales: Any
    weights: Any
    ids: Any


def _check_mode(
    function: str,
    mode: Any,
    num_tokens: int,
    max_low_latency_tokens: Any,
    max_tokens_per_expert: Any,
) -> str:
    """The mode that runs: "normal" or "low_latency"."""
    remedy = "Pass a number of tokens."
    most = checks.check_positive_int(
        function, "max_low_latency_tokens", max_low_latency_tokens, remedy
    )
    chosen = resolve_mode(function, mode, num_tokens, most)
    if max_tokens_per_expert is not None and mode == "normal":
        rule, remedy = 'be left out in mode "normal"', "Rows are not laid out by expert there."
        checks.fail(function, "max_tokens_per_expert", rule, max_tokens_per_expert, remedy)
    return chosen


def _prepare(
    info: DispatchInfo,
    x: jax.Array,
    scales: jax.Array | None,
    weights: jax.Array,
    ids: jax.Array,
    payload: str | None,
    num_valid_tokens: Any,
) -> tuple[DispatchInfo, _Message]:
    """What is sent: x quantised, unless the transport does so on the way; ids of -1 where nothing is."""
    transport, group = TRANSPORTS[info.transport], info.group
    names = group.axis_name if isinstance(group.axis_name, tuple) else (group.axis_name,)
    if not (transport.checks_ids and num_valid_tokens is None and ids.dtype == jnp.int32):
        num_experts = group.size * group.num_local_experts
        ids = global_ids(ids, num_experts, num_valid_tokens, info.num_tokens)
    if transport.quantises(x, payload):
        x, info = message.without_gradient(x), dataclasses.replace(info, quantise=True)
    elif payload is not None:
        x, scales = message.quantize(message.without_gradient(x), message.PAYLOADS[payload])
    elif scales is not None:
        x, scales = message.without_gradient((x, scales))
    if info.num_tokens == 0:
        x, scales, weights, ids = nothing_like((x, scales, weights, ids), *names)
    if scales is None:  # others have no derivative at all
        x = reverse_mode_only("dispatch", x)
    weights = reverse_mode_only("dispatch", weights)
    return info, _Message(*vary_together((x, scales, weights, ids), *names))


def _send(
    info: DispatchInfo, given: _Message, plan: Any, rows_per_expert: int | None, initialize: bool
) -> tuple[_Message, MaskedLayout | None]:
    """What came, and its layout where the transport has put the rows into the experts' boxes already."""
    clears = TRANSPORTS[info.transport].clears_boxes
    if (
        rows_per_expert
        and (clears or not initialize)
        and fills_boxes(info, *given, rows_per_expert)
    ):
        info = dataclasses.replace(info, initialize=initialize)
        *received, layout = send_to_boxes(info, rows_per_expert, *given, plan)
        return _Message(*received), MaskedLayout(*layout)
    return _Message(*send(info, *given, plan)), None


def _lay_out(
    info: DispatchInfo,
    received: _Message,
    layout: MaskedLayout | None,
    plan: Any,
    rows_per_expert: int | None,
    initialize: bool,
    choice: TransportChoice,
) -> Dispatched:
    """The result: rows as they came, or with `rows_per_expert` in a box for each expert."""
    x, scales, weights, ids = received
    in_use = jnp.any(ids >= 0, axis=1)
    if rows_per_expert is None:
        handle = DispatchHandle(info, plan, in_use, None, None, None)
        return Dispatched(x, scales, None, None, ids, weights, handle, choice)
    if layout is None:
        (x, scales), layout = permute_to_masked(
            (x, scales),
            ids,
            num_experts=info.group.num_local_experts,
            max_tokens_per_expert=rows_per_expert,
            initialize=initialize,
        )
    if scales is not None and scales.dtype == jnp.int32:
        scales = jnp.swapaxes(scales, 1, 2)
    handle = DispatchHandle(info, plan, in_use, layout, weights, ids)
    used, counts = layout.masked_m, layout.tokens_per_expert
    return Dispatched(x, scales, used, counts, None, None, handle, choice)


def combine(y: jax.Array, handle: DispatchHandle, *, out_dtype: Any = None) -> jax.Array:
    """Brings the experts' results back to the tokens' ranks and adds them up.

    "low_latency": `out[t] = sum_k topk_weights[t, k] * y(expert of (t, k))`; a rank adds its own experts in
    float32, and sends one row per token. "normal": `out[t]` is the plain sum over the ranks that have t of
    their rows of y, to which the caller has applied the weights. Rows travel in the dtype of y. Over
    ranks every transport adds in float32, in the order of the ranks, but for "all_gather", which adds in the
    dtype of y. Rows that are not in use count as zero, whatever they hold.

    Args:
        y: "low_latency": `[e, M, H]`; "normal": `[R, H]`; floating point. H need not be that of x.
        handle: of the `dispatch` that delivered the rows.
        out_dtype: floating point; None for the dtype of y.

    Returns:
        `[T, H]`, this rank's tokens; zero for a token without experts.

    Raises:
        TypeError: y or out_dtype is not floating point, or the handle is none.
        ValueError: y does not fit the handle.

    Example:
        >>> mesh = jax.make_mesh((1,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> def add_one(x, ids, weights):
        ...     got = dispatch(x, ids, weights, axis_name="ep", num_experts=2, mode="normal")
        ...     return combine((got.x + 1) * got.topk_weights.sum(1, keepdims=True), got.handle)
        >>> spec = jax.sharding.PartitionSpec("ep")
        >>> step = jax.jit(jax.shard_map(add_one, mesh=mesh, in_specs=spec, out_specs=spec))
        >>> x, weights = jnp.array([[1.0]], "float32"), jnp.array([[0.5, 0.25]], "float32")
        >>> step(x, jnp.array([[1, 0]]), weights).tolist()
        [[1.5]]

    Source: the contract of DeepEP's combine and low_latency_combine (MIT); no code taken.
    """
    function = "combine"
    fork.check(function)
    if not isinstance(handle, DispatchHandle) or not isinstance(handle.info, DispatchInfo):
        rule, got = "be a DispatchHandle", checks.describe(handle)
        remedy = "Pass the handle of what dispatch returned."
        raise TypeError(checks.message(function, "handle", rule, got, remedy))
    info: DispatchInfo = handle.info
    masked = info.mode == "low_latency"
    shape = handle.layout.pair_of_row.shape if masked else handle.in_use.shape
    remedy = "Pass one row for each row of what dispatch returned."
    y = check_rows(function, "y", y, shape, remedy, floating=True)
    if y.ndim != len(shape) + 1:
        rule, got = f"have shape {checks.leading(shape, 'H')}", checks.describe(y)
        raise ValueError(checks.message(function, "y", rule, got, remedy))
    out_dtype = check_out_dtype(function, out_dtype, y.dtype)
    with jax.named_scope(function), in_our_words(function):
        y = reverse_mode_only(function, y)
        if masked:
            pairs = handle.topk_weights, handle.topk_ids
            out = return_sums(info, y, *pairs, handle.layout, handle.plan)
        else:
            with jax.named_scope("return_rows"):
                rows, in_use, plan = vary_together((y, handle.in_use, handle.plan))
                out = return_rows(info, rows, in_use, plan)
        return out.astype(out_dtype)


def select_transport(
    num_tokens: int,
    *,
    top_k: int,
    num_ranks: int,
    mode: Mode = "auto",
    max_low_latency_tokens: int = 128,
    platform: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    transport: TransportName | None = None,
) -> TransportChoice:
    """Which transport `dispatch` would take, and why not the others.

    What a dispatch did take its result says: `Dispatched.choice`.

    Args:
        num_tokens: T, tokens per rank.
        top_k: K. Today's rule does not depend on it.
        num_ranks: D.
        mode: as for `dispatch`.
        max_low_latency_tokens: as for `dispatch`.
        platform: "cpu" or "gpu"; None for the mesh's, or jax's default.
        mesh: of the shard_map that dispatch would be called in, manual over all axes. Our own kernels do not
            take every mesh: with None the answer is for one of all GPUs, of all processes.
        transport: as for `dispatch`.

    Returns:
        `TransportChoice(transport, mode, reasons)`.

    Raises:
        TypeError: a size is not an int.   ValueError: a size, mode, platform or transport is out of range.
        NotImplementedError: the named transport cannot run there; or what dispatch would raise over the mesh.

    Example:
        >>> select_transport(4096, top_k=8, num_ranks=8, platform="cpu").transport
        'all_to_all'
    """
    function = "select_transport"
    remedy = "Pass the static sizes of the exchange."
    sizes = {"top_k": top_k, "num_ranks": num_ranks}
    for argument, value in sizes.items():
        checks.check_positive_int(function, argument, value, remedy)
    if platform is not None:
        select.check_platform(function, platform)
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        rule, got = "be None or a jax.sharding.Mesh", checks.describe(mesh)
        raise TypeError(checks.message(function, "mesh", rule, got, "Leave it out for any."))
    num_tokens = checks.check_int(function, "num_tokens", num_tokens, 0, remedy)
    most = checks.check_positive_int(
        function, "max_low_latency_tokens", max_low_latency_tokens, "Pass a number of tokens."
    )
    chosen = resolve_mode(function, mode, num_tokens, most)
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(manual(mesh)):
        platform = platform or mesh_platform()
        choice = choose(function, transport, mode=chosen, num_ranks=num_ranks, platform=platform)
    TRANSPORTS[choice.transport].check_mesh(mesh)
    return choice
