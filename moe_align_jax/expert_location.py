"""ExpertLocation: where the replicas of each expert are, as a pytree. `expert_dispatch` uses it."""

import contextlib
import dataclasses
import os
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax import _checks, _export, _files, _fork, eplb
from moe_align_jax._eplb import loads, maps
from moe_align_jax._eplb.maps import fail

Dispatch = Literal["static", "dynamic", "round_robin"]

# So that the dispatch's (hash * replicas) fits int32, with hash < 2**16.
_MOST_REPLICAS = 2**15
_I32 = jnp.int32


@dataclasses.dataclass(frozen=True)
class ExpertLocation:
    """Where the replicas of each expert are: a pytree that a step takes as an argument.

    Its shapes depend on sizes alone: another placement is another value, and compiles nothing. L layers,
    El logical experts, Ep physical slots, D GPUs, X = Ep - El + 1: the most replicas an expert can have.
    `layer(i)`, or `lax.scan` over the whole, gives the location of one layer: the same without L.

    Attributes:
        physical_to_logical_map: `[L, Ep]` int32, the expert that each slot holds.
        logical_to_physical_map: `[L, El, X]` int32, the slots of expert i, then -1.
        num_replicas: `[L, El]` int32, how many those are, >= 1.
        static_dispatch_map: None, or `[L, D, El]` int32: the one slot that GPU d sends tokens of expert i
            to; `[L, El]` once `for_rank` has chosen d.
        first_token: `[L]` int32, what the hash counts the first token of a batch as.
        dispatch: static. How a token chooses among replicas where `to_physical_ids` is not told:
            "dynamic", "static" or "round_robin".
    """

    physical_to_logical_map: Any
    logical_to_physical_map: Any
    num_replicas: Any
    static_dispatch_map: Any
    first_token: Any
    dispatch: Dispatch = "dynamic"

    @property
    def num_physical_experts(self) -> int:
        return self.physical_to_logical_map.shape[-1]

    @property
    def num_logical_experts(self) -> int:
        return self.logical_to_physical_map.shape[-2]

    @property
    def num_layers(self) -> int | None:
        """L; None for the location of one layer."""
        shape = self.physical_to_logical_map.shape
        return shape[0] if len(shape) == 2 else None

    @classmethod
    def from_map(
        cls,
        physical_to_logical_map: Any,
        num_logical_experts: int | None = None,
        *,
        num_gpus: int | None = None,
        dispatch: Dispatch = "dynamic",
    ) -> "ExpertLocation":
        """The location that a physical_to_logical_map describes.

        Args:
            physical_to_logical_map: `[L, Ep]` integers; every expert has a slot in every layer.
            num_logical_experts: El; None for one more than the greatest expert in the map.
            num_gpus: D, a divisor of Ep; needed for `dispatch="static"`.
            dispatch: of the result.

        Raises:
            TypeError: the map is not integers.
            ValueError: a shape, an expert or a size is wrong, or an expert has no slot.

        Example:
            >>> location = ExpertLocation.from_map([[0, 1, 2, 1]])
            >>> location.logical_to_physical_map[0].tolist(), location.num_replicas[0].tolist()
            ([[0, -1], [1, 3], [2, -1]], [1, 2, 1])
        """
        function = "ExpertLocation.from_map"
        physical, num_logical = maps.check_map(
            function, physical_to_logical_map, num_logical_experts
        )
        width = physical.shape[1] - num_logical + 1
        slots, count = maps.slots_of_experts(physical, num_logical, width)
        return _made(cls, function, physical, slots, count, num_gpus, dispatch)

    @classmethod
    def trivial(
        cls,
        num_layers: int,
        num_logical_experts: int,
        num_physical_experts: int | None = None,
        *,
        num_gpus: int | None = None,
        dispatch: Dispatch = "dynamic",
    ) -> "ExpertLocation":
        """Slot p holds expert `p % El`: the redundant slots replicate the first experts.

        Args:
            num_layers: L.   num_logical_experts: El.   num_physical_experts: Ep >= El; None for El.
            num_gpus, dispatch: as `from_map`.

        Raises:
            TypeError, ValueError: a size is not an int, or out of range.

        Example:
            >>> ExpertLocation.trivial(1, 3, 5).physical_to_logical_map.tolist()
            [[0, 1, 2, 0, 1]]
        """
        function, remedy = "ExpertLocation.trivial", "Pass a count."
        num_layers = _checks.check_positive_int(function, "num_layers", num_layers, remedy)
        logical = _checks.check_positive_int(
            function, "num_logical_experts", num_logical_experts, remedy
        )
        physical = _checks.check_positive_int(
            function, "num_physical_experts", num_physical_experts or logical, remedy
        )
        if physical < logical:
            rule = f"be at least num_logical_experts ({logical})"
            fail(function, "num_physical_experts", rule, physical, "Every expert needs a slot.")
        slots = np.tile(np.arange(physical) % logical, (num_layers, 1))
        return cls.from_map(slots, logical, num_gpus=num_gpus, dispatch=dispatch)

    @classmethod
    def from_counts(
        cls,
        logical_count: Any,
        *,
        num_physical_experts: int,
        num_gpus: int,
        num_nodes: int = 1,
        num_groups: int = 1,
        algorithm: eplb.Algorithm = "auto",
        previous: Any = None,
        dispatch: Dispatch = "dynamic",
    ) -> "ExpertLocation":
        """The placement that `rebalance_experts` makes of recorded loads.

        Args:
            logical_count: `[L, El]` or `[S, L, El]`, such as a recorder dumps.
            num_physical_experts: Ep.
            num_gpus, num_nodes, num_groups, algorithm, previous: as `rebalance_experts`; `previous`
                also takes an `ExpertLocation`.
            dispatch: of the result.

        Raises:
            TypeError, ValueError: as `rebalance_experts`.
        """
        if isinstance(previous, ExpertLocation):
            previous = np.asarray(previous.physical_to_logical_map)
        placed = eplb.rebalance_experts(
            logical_count,
            num_physical_experts,
            num_groups,
            num_nodes,
            num_gpus,
            algorithm=algorithm,
            previous=previous,
        )
        physical, slots, count = placed
        width = num_physical_experts - slots.shape[1] + 1
        room = ((0, 0), (0, 0), (0, width - slots.shape[2]))
        slots = np.pad(slots, room, constant_values=-1)
        function = "ExpertLocation.from_counts"
        return _made(cls, function, physical, slots, count, num_gpus, dispatch)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        num_physical_experts: int | None = None,
        num_gpus: int | None = None,
        num_nodes: int = 1,
        num_groups: int = 1,
        algorithm: eplb.Algorithm = "auto",
        dispatch: Dispatch = "dynamic",
    ) -> "ExpertLocation":
        """From a placement or a recording in a file: ours, or SGLang's `--init-expert-location`.

        A recording (it holds `physical_count` or `records`) is rebalanced; so is a file with
        `logical_count` and no map. Otherwise the file's `physical_to_logical_map` is taken as it is.

        Args:
            path: a .json, .npz or .pt file (torch is not needed), or JSON text that begins with "{".
            num_physical_experts, num_gpus: needed to rebalance.
            num_nodes, num_groups, algorithm: for the rebalance.
            dispatch: of the result.

        Raises:
            OSError: the file cannot be read.
            TypeError, ValueError: it is damaged or holds no valid placement or load.
        """
        function = "ExpertLocation.from_file"
        if isinstance(path, str) and path.lstrip().startswith("{"):
            contents = _files.parse_json(path, function=function)
            named: Any = contextlib.nullcontext()
        else:
            contents = _files.read_file(path, function=function)
            named = _files.naming(path)
        recording = not contents.keys().isdisjoint(("physical_count", "records"))
        with named:
            if "physical_to_logical_map" in contents and not recording:
                slots = loads.map_in_force(contents)
                return cls.from_map(slots, num_gpus=num_gpus, dispatch=dispatch)
            history = loads.recorded_load(contents, function=function)
            remedy = "The file holds loads, from which a placement must be made."
            return cls.from_counts(
                history,
                num_physical_experts=_checks.check_positive_int(
                    function, "num_physical_experts", num_physical_experts, remedy
                ),
                num_gpus=_checks.check_positive_int(function, "num_gpus", num_gpus, remedy),
                num_nodes=num_nodes,
                num_groups=num_groups,
                algorithm=algorithm,
                dispatch=dispatch,
            )

    def layer(self, layer: Any) -> "ExpertLocation":
        """The location of one layer: an int, or an integer scalar that a program computes (clamped)."""
        _fork.check("ExpertLocation.layer")
        if self.num_layers is None:
            fail("ExpertLocation.layer", "location", "have layers", "one layer", "Use it as it is.")
        if isinstance(layer, (int, np.integer)):
            if not 0 <= layer < self.num_layers:
                rule = f"be in [0, {self.num_layers})"
                fail("ExpertLocation.layer", "layer", rule, layer, "Pass a layer of the map.")
            return jax.tree.map(lambda leaf: leaf[layer], self)
        return jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(jnp.asarray(leaf), layer, keepdims=False), self
        )

    def for_rank(self, rank: Any, *, first_token: Any = 0) -> "ExpertLocation":
        """What one GPU needs: its row of the static map, and where its tokens begin for the hash.

        Args:
            rank: an int, or an integer scalar such as `lax.axis_index("ep")`.
            first_token: integer scalar, the number of the first token of this GPU's batch: with
                `rank * num_tokens`, the GPUs' tokens together are spread over replicas as one batch.
        """
        _fork.check("ExpertLocation.for_rank")
        row = self.static_dispatch_map
        layered = self.num_layers is not None
        if row is not None and row.ndim == 2 + layered:
            num_gpus = row.shape[-2]
            if isinstance(rank, (int, np.integer)) and not 0 <= rank < num_gpus:
                rule = f"be in [0, {num_gpus})"
                fail("ExpertLocation.for_rank", "rank", rule, rank, "Pass the GPU's number.")
            row = lax.dynamic_index_in_dim(
                jnp.asarray(row), rank, axis=row.ndim - 2, keepdims=False
            )
        first = jnp.broadcast_to(jnp.asarray(first_token).astype(_I32), self.first_token.shape)
        return dataclasses.replace(self, static_dispatch_map=row, first_token=first)

    def update(self, other: "ExpertLocation", layer_ids: Any) -> "ExpertLocation":
        """This location with the layers listed taken from another; placed on the same devices.

        Args:
            other: of the same sizes.
            layer_ids: ints in [0, L).

        Raises:
            ValueError: the sizes differ, or a layer is out of range.
        """
        function = "ExpertLocation.update"
        _fork.check(function)
        mine, theirs = (jax.tree.map(lambda leaf: leaf.shape, x) for x in (self, other))
        if mine != theirs:
            got = f"{theirs.physical_to_logical_map} for {mine.physical_to_logical_map}"
            fail(function, "other", "have this location's sizes and dispatch", got, "Make it so.")
        chosen = np.zeros(self.physical_to_logical_map.shape[0], bool)
        ids = np.asarray(layer_ids, np.int64).reshape(-1)
        if self.num_layers is None or ids.size and not 0 <= ids.min() <= ids.max() < len(chosen):
            fail(function, "layer_ids", "be layers of the location", ids.tolist(), "Pass ints.")
        chosen[ids] = True

        def replace(old: Any, new: Any) -> Any:
            rows = chosen.reshape(-1, *[1] * (old.ndim - 1))
            if isinstance(old, jax.core.Tracer) or not getattr(old, "committed", False):
                return jnp.where(rows, new, old)
            # To the very sharding: one that is only equivalent would trace a jitted step again.
            merged = jnp.where(rows, jax.device_put(new, old.sharding), old)
            return jax.device_put(merged, old.sharding)

        return jax.tree.map(replace, self, other)


_export.register_namedtuple(eplb.ExpertMoves)
_export.register_namedtuple(eplb.ExpertPlacement)
_export.register_dataclass(
    ExpertLocation,
    data_fields=[
        "physical_to_logical_map",
        "logical_to_physical_map",
        "num_replicas",
        "static_dispatch_map",
        "first_token",
    ],
    meta_fields=["dispatch"],
)


def _made(
    cls: type[ExpertLocation],
    function: str,
    physical: np.ndarray,
    slots: np.ndarray,
    count: np.ndarray,
    num_gpus: int | None,
    dispatch: Dispatch,
) -> ExpertLocation:
    _fork.check(function)
    check_dispatch(function, dispatch)
    static = None
    if num_gpus is not None:
        num_gpus = _checks.check_positive_int(function, "num_gpus", num_gpus, "Pass a count.")
        if physical.shape[1] % num_gpus:
            rule = f"divide the {physical.shape[1]} slots"
            fail(function, "num_gpus", rule, num_gpus, "Each GPU holds the same number of slots.")
        if dispatch == "static":
            static = maps.static_dispatch(physical, slots, count, num_gpus)
    elif dispatch == "static":
        fail(function, "num_gpus", 'be given for dispatch="static"', None, "Pass the GPUs.")
    if slots.shape[2] > _MOST_REPLICAS:
        got = slots.shape[2] - 1
        fail(function, "redundant slots", f"be below {_MOST_REPLICAS}", got, "Use fewer.")
    first = np.zeros(len(physical), np.int32)
    leaves = jax.tree.map(jnp.asarray, (physical, slots, count, static, first))
    return cls(*leaves, dispatch=dispatch)


def check_dispatch(function: str, dispatch: Any) -> None:
    if dispatch not in get_args(Dispatch):
        rule = f"be one of {', '.join(get_args(Dispatch))}"
        fail(function, "dispatch", rule, repr(dispatch), "See ExpertLocation.")
