"""update_expert_weights: moves sharded expert weights to a new placement, a few layers at a time."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_align_jax._core import checks, fork
from moe_align_jax._core.checks import fail
from moe_align_jax._eplb.moves import ExpertMoves, MoveKind

_FUNCTION = "update_expert_weights"


def update_expert_weights(
    weights: Any, moves: ExpertMoves, *, axis_name: str = "ep", layers_per_chunk: int = 1
) -> Any:
    """Moves expert weights to a new placement: `new[l, p] = old[l, moves.source[l, p]]`, bit for bit.

    The weights passed in are donated. A chunk of layers is made beside them and then written over the old
    ones: at any time the extra memory per device is one chunk of one array, and one expert. Experts
    that change GPU travel one by one, on rings: for each distance d, every GPU sends to the one d further
    on, as often as the busiest of them must. All placements share one compiled program.

    Args:
        weights: a pytree of jax arrays `[L, Ep, ...]` of any dtype, with `NamedSharding`s over one mesh whose
            dimension 1 is split over `axis_name` and nothing else; dimension 0 is whole; others may be
            split over other axes. An array that stands in several places is moved once.
        moves: of `plan_expert_moves`, for as many GPUs as the axis has devices.
        axis_name: the expert-parallel mesh axis.
        layers_per_chunk: a chunk. More layers use the links more evenly, and take more memory.

    Returns:
        The same pytree, with the same shardings.

    Raises:
        TypeError: a leaf is no jax array, or an argument of another type.
        ValueError: shapes, shardings and plan do not fit, or an array was donated before.

    Example:
        >>> mesh = jax.make_mesh((1,), ("ep",))
        >>> spec = jax.sharding.PartitionSpec(None, "ep")
        >>> weights = jnp.arange(8).reshape(1, 4, 2)
        >>> weights = jax.device_put(weights, jax.sharding.NamedSharding(mesh, spec))
        >>> moves = plan_expert_moves([[0, 1, 2, 1]], [[0, 0, 1, 2]], num_gpus=1)
        >>> update_expert_weights(weights, moves)[0].tolist()
        [[0, 1], [0, 1], [2, 3], [4, 5]]

    Source: the contract of SGLang's expert location updater (Apache-2.0); no code taken.
    """
    chunks = update_expert_weights_by_chunks(
        weights, moves, axis_name=axis_name, layers_per_chunk=layers_per_chunk
    )
    return functools.reduce(lambda _, chunk: chunk[0], chunks, weights)


def update_expert_weights_by_chunks(
    weights: Any, moves: ExpertMoves, *, axis_name: str = "ep", layers_per_chunk: int = 1
) -> Iterator[tuple[Any, list[int]]]:
    """`update_expert_weights` with a pause after each chunk, in which a model can serve.

    Args:
        weights, moves, axis_name, layers_per_chunk: as `update_expert_weights`.

    Returns:
        An iterator of (the weights so far, the layers that just moved): use them with
        `location.update(new, layers)`. The weights that it gave before are donated. Layers in which
        nothing moves are passed over, so that a plan without moves gives nothing.

    Raises:
        TypeError, ValueError: as `update_expert_weights`, before anything moves.

    Example:
        >>> mesh = jax.make_mesh((1,), ("ep",))
        >>> where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "ep"))
        >>> weights = {"up": jax.device_put(jnp.array([[1, 2], [3, 4], [5, 6]]), where)}
        >>> moves = plan_expert_moves([[0, 1]] * 3, [[1, 0], [0, 1], [1, 0]], num_gpus=1)
        >>> for weights, layers in update_expert_weights_by_chunks(weights, moves):
        ...     print(layers, weights["up"].tolist())
        [0] [[2, 1], [3, 4], [5, 6]]
        [2] [[2, 1], [3, 4], [6, 5]]
    """
    fork.check(_FUNCTION)
    _check_moves(moves)
    if not isinstance(axis_name, str):
        rule, got = "be the name of a mesh axis", checks.describe(axis_name)
        remedy = 'Pass the expert-parallel axis, such as "ep".'
        raise TypeError(checks.message(_FUNCTION, "axis_name", rule, got, remedy))
    leaves, structure = jax.tree.flatten(weights)
    layers_per_chunk = checks.check_positive_int(
        _FUNCTION, "layers_per_chunk", layers_per_chunk, "Pass a count of layers."
    )
    for leaf in leaves:
        _check_leaf(leaf, moves, axis_name)
    return _chunks(leaves, structure, moves, axis_name, layers_per_chunk)


def _chunks(
    leaves: list[Any], structure: Any, moves: ExpertMoves, axis_name: str, layers_per_chunk: int
) -> Iterator[tuple[Any, list[int]]]:
    busy = np.flatnonzero((moves.kind != MoveKind.UNCHANGED).any(axis=1)).tolist()
    # One array in several places moves once: it is donated, and a second time it would be gone.
    once = {id(leaf): leaf for leaf in leaves}
    order = {number: place for place, number in enumerate(once)}
    places = [order[id(leaf)] for leaf in leaves]
    leaves = list(once.values())
    # Not fewer where fewer move: the size of a chunk is the shape of a compiled program.
    size = min(layers_per_chunk, len(moves.kind))
    for start in range(0, len(busy), size):
        layers = busy[start : start + size]
        routes = _plan_routes(moves, layers, size)
        on_mesh: dict[Any, _Routes] = {}
        for index, leaf in enumerate(leaves):
            mesh = leaf.sharding.mesh
            if mesh not in on_mesh:
                shardings = [NamedSharding(mesh, spec) for spec in _route_specs(axis_name)]
                on_mesh[mesh] = jax.device_put(routes, _Routes(*shardings))
            spec = P(*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec)))
            moved = _move_chunk(leaf, on_mesh[mesh], mesh=mesh, spec=spec, axis_name=axis_name)
            # Names the sharding as before; an equivalent one would trace a jitted step again.
            leaves[index] = jax.device_put(moved, leaf.sharding)
        yield jax.tree.unflatten(structure, [leaves[place] for place in places]), layers


# -- the plan, as tables for the devices ------------------------------------------------------------------


class _Routes(NamedTuple):
    """One chunk of C layers, on D devices of e slots; a row is `layer in the chunk * e + local slot`.

    Attributes:
        layers: `[C]` the layers, `num_layers` of them in use.
        kept: `[D, C * e]` the row on the same device that a row begins with: its source if that is local.
        send: `[D, D - 1, C * e]` for distance d + 1 and each round, the row to send; 0 with nothing to send.
        receive: the same shape, where the row that comes in belongs; C * e with nothing to keep.
        ride: `[D, C * e, 2]` (from, to): copies of what came in; C * e with nothing to copy.
        rounds: `[D - 1]` rounds of each distance, those of the busiest device.
        num_riders: `[]` the most entries of `ride` that any device has.
        num_layers: `[]`.
    """

    layers: Any
    kept: Any
    send: Any
    receive: Any
    ride: Any
    rounds: Any
    num_riders: Any
    num_layers: Any


def _route_specs(axis_name: str) -> _Routes:
    """Tables with a leading D are split, the others whole."""
    split, whole = P(axis_name), P()
    return _Routes(whole, split, split, split, split, whole, whole, whole)


def _plan_routes(moves: ExpertMoves, layers: list[int], chunk: int) -> _Routes:
    devices = moves.num_gpus
    slots = moves.source.shape[1] // devices
    rows = chunk * slots
    numbers = np.array(layers + [0] * (chunk - len(layers)), np.int32)
    kept = np.tile(np.arange(rows, dtype=np.int32), (devices, 1))
    send = np.zeros((devices, max(devices - 1, 1), rows), np.int32)
    receive = np.full(send.shape, rows, np.int32)
    ride = np.full((devices, rows, 2), rows, np.int32)
    used = np.zeros((devices, max(devices - 1, 1)), np.int32)
    riders = np.zeros(devices, np.int32)
    for number, layer in enumerate(layers):
        first: dict[tuple[int, int], int] = {}  # (device, source): the row that receives it
        for slot in np.flatnonzero(moves.kind[layer] != MoveKind.UNCHANGED).tolist():
            source = int(moves.source[layer, slot])
            here, there = slot // slots, source // slots
            row, origin = (number * slots + s % slots for s in (slot, source))
            if here == there:
                kept[here, row] = origin
            elif (here, source) in first:
                ride[here, riders[here]] = first[here, source], row
                riders[here] += 1
            else:
                first[here, source] = row
                distance = (here - there) % devices - 1
                turn = used[there, distance]
                send[there, distance, turn], receive[here, distance, turn] = origin, row
                used[there, distance] += 1
    rounds, count = used.max(axis=0), np.int32(len(layers))
    return _Routes(numbers, kept, send, receive, ride, rounds, riders.max(), count)


# -- on the devices ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("mesh", "spec", "axis_name"))
def _move_chunk(
    weights: jax.Array, routes: _Routes, *, mesh: Any, spec: P, axis_name: str
) -> jax.Array:
    function = functools.partial(_move_local, axis_name=axis_name, devices=mesh.shape[axis_name])
    in_specs = (spec, _route_specs(axis_name))
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=spec)(weights, routes)


def _move_local(weights: jax.Array, routes: _Routes, *, axis_name: str, devices: int) -> jax.Array:
    """One device's part: `weights` `[L, e, ...]`, split tables with a leading 1."""
    layers, kept, send, receive, ride, rounds, num_riders, num_layers = routes
    kept, send, receive, ride = kept[0], send[0], receive[0], ride[0]
    slots, one = weights.shape[1], (1, 1, *weights.shape[2:])
    zero = np.int32(0)  # indices of one dtype, also where jax's ints have 64 bits
    rest = (zero,) * (weights.ndim - 2)

    def read(row: jax.Array) -> jax.Array:
        where = (layers[row // slots], row % slots, *rest)
        return lax.dynamic_slice(weights, where, one)[0]

    def write(new: jax.Array, row: jax.Array, value: jax.Array) -> jax.Array:
        # Slices clamp: a row beyond the end is written with what it holds.
        held = lax.dynamic_slice(new, (row, *rest), value.shape)
        value = jnp.where(row < new.shape[0], value, held)
        return lax.dynamic_update_slice(new, value, (row, *rest))

    # Beside the old weights, since each of them may still be read.
    new = weights.at[layers[kept // slots], kept % slots].get(mode="clip")
    for distance in range(1, devices):
        ring = [(i, (i + distance) % devices) for i in range(devices)]

        def pass_on(turn: Any, new: jax.Array, distance: int = distance, ring: Any = ring) -> Any:
            expert = lax.ppermute(read(send[distance - 1, turn]), axis_name, ring)
            return write(new, receive[distance - 1, turn], expert)

        new = lax.fori_loop(0, rounds[distance - 1], pass_on, new)

    def copy(turn: Any, new: jax.Array) -> jax.Array:
        value = lax.dynamic_slice(new, (ride[turn, 0], *rest), one[1:])
        return write(new, ride[turn, 1], value)

    new = lax.fori_loop(0, num_riders, copy, new)

    def store(number: Any, weights: jax.Array) -> jax.Array:
        layer = lax.dynamic_slice_in_dim(new, number * slots, slots)[None]
        return lax.dynamic_update_slice(weights, layer, (layers[number], zero, *rest))

    return lax.fori_loop(0, num_layers, store, weights)


# -- checks -----------------------------------------------------------------------------------------------


def _check_moves(moves: Any) -> None:
    if not isinstance(moves, ExpertMoves):
        rule, got = "be an ExpertMoves", checks.describe(moves)
        raise TypeError(
            checks.message(_FUNCTION, "moves", rule, got, "Make it with plan_expert_moves.")
        )
    if not moves.same_size:
        got = (
            f"{moves.old_num_slots} slots on {moves.old_num_gpus} GPUs before, "
            f"{moves.source.shape[1]} on {moves.num_gpus} after"
        )
        rule = "be between placements of the same slots and GPUs"
        remedy = "Weights move in place; arrays of another size must be made anew, by moves.source."
        fail(_FUNCTION, "moves", rule, got, remedy)


def _check_leaf(leaf: Any, moves: ExpertMoves, axis_name: str) -> None:
    got = checks.describe(leaf)
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        rule, remedy = "hold jax arrays with values", "Call it outside jit, on the arrays."
        raise TypeError(checks.message(_FUNCTION, "weights", rule, got, remedy))
    if leaf.is_deleted():  # found between two moves, the weights that moved would be lost
        rule, remedy = (
            "not be deleted",
            "Pass what the last call returned: it donates its argument.",
        )
        fail(_FUNCTION, "weights", rule, f"{got}, which was donated", remedy)
    if leaf.ndim < 2 or leaf.shape[:2] != moves.source.shape:
        rule = f"have shape {checks.leading(moves.source.shape)}"
        fail(_FUNCTION, "weights", rule, got, "Pass [layers, slots, ...], as the plan.")
    sharding = leaf.sharding
    remedy = f"Place them with NamedSharding(mesh, PartitionSpec(None, {axis_name!r}, ...))."
    if not isinstance(sharding, NamedSharding) or axis_name not in sharding.mesh.shape:
        rule = f"be sharded over mesh axis {axis_name!r}"
        fail(_FUNCTION, "weights", rule, sharding, remedy)
    layer_axis, slot_axis, *_ = (*sharding.spec, None, None)
    if layer_axis is not None or slot_axis not in (axis_name, (axis_name,)):
        rule = f"be split over {axis_name!r} in dimension 1, and not in dimension 0"
        fail(_FUNCTION, "weights", rule, sharding.spec, remedy)
    if sharding.mesh.shape[axis_name] != moves.num_gpus:
        got = f"a plan for {moves.num_gpus} GPUs"
        rule = f"fit the {sharding.mesh.shape[axis_name]} devices of axis {axis_name!r}"
        fail(_FUNCTION, "moves", rule, got, "Plan with that many.")
