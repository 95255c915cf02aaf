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

from moe_align_jax import eplb
from moe_align_jax._core import checks, files, fork
from moe_align_jax._core.checks import fail
from moe_align_jax._eplb import loads, maps, placement_files
from moe_align_jax._lowering import export

Dispatch = Literal["static", "dynamic", "round_robin"]
Tokens = Literal["per_rank", "replicated"]

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
            to; `[L, El]` once `for_rank` has chosen d. None where tokens are replicated.
        first_token: `[L]` int32, what the hash counts the first token of a batch as.
        dispatch: static. How a token chooses among replicas where `to_physical_ids` is not told:
            "dynamic", "static" or "round_robin".
        tokens: static. "per_rank": each GPU has tokens of its own, and sends each pair to the GPU of its
            slot. "replicated": all GPUs see the same tokens and compute the pairs whose slots they hold
            (by `expert_map`), as SGLang does with moe_a2a_backend="none". A choice by GPU would then have
            some pairs computed twice and others never; so all GPUs choose alike: the rank has no
            influence, and "static" chooses by the hash of the token, as "dynamic" does, which uses all
            replicas evenly.
    """

    physical_to_logical_map: Any
    logical_to_physical_map: Any
    num_replicas: Any
    static_dispatch_map: Any
    first_token: Any
    dispatch: Dispatch = "dynamic"
    tokens: Tokens = "per_rank"

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
        tokens: Tokens = "per_rank",
    ) -> "ExpertLocation":
        """The location that a physical_to_logical_map describes.

        Args:
            physical_to_logical_map: `[L, Ep]` integers; every expert has a slot in every layer.
            num_logical_experts: El; None for one more than the greatest expert in the map.
            num_gpus: D, a divisor of Ep; needed for `dispatch="static"` of tokens per rank.
            dispatch, tokens: of the result.

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
        return _made(cls, function, (physical, slots, count), num_gpus, dispatch, tokens)

    @classmethod
    def trivial(
        cls,
        num_layers: int,
        num_logical_experts: int,
        num_physical_experts: int | None = None,
        *,
        num_gpus: int | None = None,
        dispatch: Dispatch = "dynamic",
        tokens: Tokens = "per_rank",
    ) -> "ExpertLocation":
        """Slot p holds expert `p % El`: the redundant slots replicate the first experts.

        Args:
            num_layers: L.   num_logical_experts: El.   num_physical_experts: Ep >= El; None for El.
            num_gpus, dispatch, tokens: as `from_map`.

        Raises:
            TypeError, ValueError: a size is not an int, or out of range.

        Example:
            >>> ExpertLocation.trivial(1, 3, 5).physical_to_logical_map.tolist()
            [[0, 1, 2, 0, 1]]
        """
        function, remedy = "ExpertLocation.trivial", "Pass a count."
        num_layers = checks.check_positive_int(function, "num_layers", num_layers, remedy)
        logical = checks.check_positive_int(
            function, "num_logical_experts", num_logical_experts, remedy
        )
        physical = logical
        if num_physical_experts is not None:
            physical = checks.check_positive_int(
                function, "num_physical_experts", num_physical_experts, remedy
            )
        if physical < logical:
            rule = f"be at least num_logical_experts ({logical})"
            fail(function, "num_physical_experts", rule, physical, "Every expert needs a slot.")
        slots = np.tile(np.arange(physical) % logical, (num_layers, 1))
        return cls.from_map(slots, logical, num_gpus=num_gpus, dispatch=dispatch, tokens=tokens)

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
        previous_num_gpus: int | None = None,
        spread_replicas: bool = False,
        dispatch: Dispatch = "dynamic",
        tokens: Tokens = "per_rank",
    ) -> "ExpertLocation":
        """The placement that `rebalance_experts` makes of recorded loads.

        Args:
            logical_count: `[L, El]` or `[S, L, El]`, such as a recorder dumps.
            num_physical_experts: Ep.
            num_gpus, num_nodes, num_groups, algorithm, previous, previous_num_gpus, spread_replicas: as
                `rebalance_experts`; `previous` also takes an `ExpertLocation`.
            dispatch, tokens: of the result.

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
            previous_num_gpus=previous_num_gpus,
            spread_replicas=spread_replicas,
        )
        physical, slots, count = placed
        width = physical.shape[1] - slots.shape[1] + 1
        room = ((0, 0), (0, 0), (0, width - slots.shape[2]))
        slots = np.pad(slots, room, constant_values=-1)
        function = "ExpertLocation.from_counts"
        return _made(cls, function, (physical, slots, count), num_gpus, dispatch, tokens)

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
        tokens: Tokens = "per_rank",
    ) -> "ExpertLocation":
        """From a placement or a recording in a file: ours, SGLang's, vllm-ascend's or TensorRT-LLM's.

        A recording (it holds `physical_count` or `records`) is rebalanced; so is a file with
        `logical_count` and no map. Otherwise the placement is taken as it is: a `physical_to_logical_map`,
        such as SGLang's `--init-expert-location` takes, vllm-ascend's `expert_map.json`, or the YAML of
        TensorRT-LLM's load balancer.

        Args:
            path: a .json, .npz, .pt (torch is not needed), .arrow or .parquet (extra `arrow`), .yaml or .yml
                file (extra `yaml`), or JSON text that begins with "{".
            num_physical_experts, num_gpus: needed to rebalance.
            num_nodes, num_groups, algorithm: for the rebalance.
            dispatch, tokens: of the result.

        Raises:
            OSError: the file cannot be read.
            ImportError: the extra that the file needs is not installed.
            TypeError, ValueError: it is damaged or holds no valid placement or load.
        """
        function = "ExpertLocation.from_file"
        if isinstance(path, str) and path.lstrip().startswith("{"):
            contents = files.parse_json(path, function=function)
            named: Any = contextlib.nullcontext()
        else:
            contents = placement_files.read(path, function=function)
            named = files.naming(path)
        with named:
            recording = not contents.keys().isdisjoint(("physical_count", "records"))
            placed = not contents.keys().isdisjoint(placement_files.NAMES)
            found = placement_files.find(contents, function=function) if placed else None
            if found is not None and not recording:
                gpus = found.num_gpus if num_gpus is None else num_gpus
                return cls.from_map(found.slots, num_gpus=gpus, dispatch=dispatch, tokens=tokens)
            history = loads.recorded_load(contents, function=function)
            remedy = "The file holds loads, from which a placement must be made."
            return cls.from_counts(
                history,
                num_physical_experts=checks.check_positive_int(
                    function, "num_physical_experts", num_physical_experts, remedy
                ),
                num_gpus=checks.check_positive_int(function, "num_gpus", num_gpus, remedy),
                num_nodes=num_nodes,
                num_groups=num_groups,
                algorithm=algorithm,
                dispatch=dispatch,
                tokens=tokens,
            )

    def layer(self, layer: Any) -> "ExpertLocation":
        """The location of one layer: an int, or an integer scalar that a program computes (clamped).

        Raises:
            TypeError: the layer is not an integer (True and 1.0 are none).
            ValueError: it is out of range, or the location is of one layer.
        """
        fork.check("ExpertLocation.layer")
        if self.num_layers is None:
            fail("ExpertLocation.layer", "location", "have layers", "one layer", "Use it as it is.")
        remedy = "Pass a layer of the map."
        layer = integer_scalar("ExpertLocation.layer", "layer", layer, remedy)
        if isinstance(layer, int):
            if not 0 <= layer < self.num_layers:
                rule = f"be in [0, {self.num_layers})"
                fail("ExpertLocation.layer", "layer", rule, layer, remedy)
            return jax.tree.map(lambda leaf: leaf[layer], self)
        return jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(jnp.asarray(leaf), layer, keepdims=False), self
        )

    def for_rank(self, rank: Any, *, first_token: Any = 0) -> "ExpertLocation":
        """What one GPU needs: its row of the static map, and where its tokens begin for the hash.

        Args:
            rank: an int, or an integer scalar such as `lax.axis_index("ep")`.
            first_token: integer scalar, the number of the first token of this GPU's batch: with
                `rank * num_tokens`, the GPUs' tokens together are spread over replicas as one batch. The
                same on all GPUs where tokens are replicated.

        Raises:
            TypeError: an argument is not an integer.   ValueError: the rank is out of range.
        """
        fork.check("ExpertLocation.for_rank")
        function, remedy = "ExpertLocation.for_rank", "Pass the GPU's number."
        rank = integer_scalar(function, "rank", rank, remedy)
        if isinstance(rank, int) and rank < 0:
            fail(function, "rank", "be at least 0", rank, remedy)
        first_token = integer_scalar(
            function, "first_token", first_token, "Pass the number of a token."
        )
        row = self.static_dispatch_map
        layered = self.num_layers is not None
        if row is not None and row.ndim == 2 + layered:
            num_gpus = row.shape[-2]
            if isinstance(rank, int) and rank >= num_gpus:
                fail(function, "rank", f"be in [0, {num_gpus})", rank, remedy)
            row = lax.dynamic_index_in_dim(
                jnp.asarray(row), rank, axis=row.ndim - 2, keepdims=False
            )
        if isinstance(first_token, int):  # token numbers wrap, as the hash of them does
            first_token = np.int32((first_token + 2**31) % 2**32 - 2**31)
        first = jnp.broadcast_to(jnp.asarray(first_token).astype(_I32), self.first_token.shape)
        return dataclasses.replace(self, static_dispatch_map=row, first_token=first)

    def update(self, other: "ExpertLocation", layer_ids: Any) -> "ExpertLocation":
        """This location with the layers listed taken from another; placed on the same devices.

        Args:
            other: of the same sizes.
            layer_ids: ints in [0, L).

        Raises:
            TypeError: other is no location, or layer_ids are not integers (a mask of bools is none).
            ValueError: the sizes differ, or a layer is out of range.
        """
        function = "ExpertLocation.update"
        fork.check(function)
        if not isinstance(other, ExpertLocation):
            rule, got = "be an ExpertLocation", checks.describe(other)
            raise TypeError(checks.message(function, "other", rule, got, "Make one from a map."))
        if self.num_layers is None:
            fail(function, "location", "have layers", "one layer", "Update that of all layers.")
        mine, theirs = (jax.tree.map(lambda leaf: leaf.shape, x) for x in (self, other))
        if mine != theirs:
            got = f"{_sizes(other)} for {_sizes(self)}"
            fail(function, "other", "have this location's sizes and dispatch", got, "Make it so.")
        chosen = maps.check_layers(function, layer_ids, self.num_layers)

        def replace(old: Any, new: Any) -> Any:
            rows = chosen.reshape(-1, *[1] * (old.ndim - 1))
            if isinstance(old, jax.core.Tracer) or not getattr(old, "committed", False):
                return jnp.where(rows, new, old)
            # To the very sharding: one that is only equivalent would trace a jitted step again.
            merged = jnp.where(rows, jax.device_put(new, old.sharding), old)
            return jax.device_put(merged, old.sharding)

        return jax.tree.map(replace, self, other)


export.register_namedtuple(eplb.ExpertMoves)
export.register_namedtuple(eplb.ExpertPlacement)
export.register_dataclass(
    ExpertLocation,
    data_fields=[
        "physical_to_logical_map",
        "logical_to_physical_map",
        "num_replicas",
        "static_dispatch_map",
        "first_token",
    ],
    meta_fields=["dispatch", "tokens"],
)


def _sizes(location: ExpertLocation) -> str:
    slots, experts = location.physical_to_logical_map.shape, location.num_logical_experts
    return (
        f"[{', '.join(map(str, slots))}] slots of {experts} experts, {location.dispatch}, "
        f"{location.tokens} tokens"
    )


def _made(
    cls: type[ExpertLocation],
    function: str,
    placed: tuple[np.ndarray, np.ndarray, np.ndarray],
    num_gpus: int | None,
    dispatch: Dispatch,
    tokens: Tokens,
) -> ExpertLocation:
    fork.check(function)
    """`placed`: the map, the slots of each expert and how many those are."""
    physical, slots, count = placed
    check_dispatch(function, dispatch)
    _check_choice(function, "tokens", tokens, get_args(Tokens))
    static = None
    by_rank = dispatch == "static" and tokens == "per_rank"
    if num_gpus is not None:
        num_gpus = checks.check_positive_int(function, "num_gpus", num_gpus, "Pass a count.")
        if physical.shape[1] % num_gpus:
            rule = f"divide the {physical.shape[1]} slots"
            fail(function, "num_gpus", rule, num_gpus, "Each GPU holds the same number of slots.")
        if by_rank:
            static = maps.static_dispatch(physical, slots, count, num_gpus)
    elif by_rank:
        fail(function, "num_gpus", 'be given for dispatch="static"', None, "Pass the GPUs.")
    if slots.shape[2] > _MOST_REPLICAS:
        got = slots.shape[2] - 1
        fail(function, "redundant slots", f"be below {_MOST_REPLICAS}", got, "Use fewer.")
    first = np.zeros(len(physical), np.int32)
    leaves = jax.tree.map(jnp.asarray, (physical, slots, count, static, first))
    return cls(*leaves, dispatch=dispatch, tokens=tokens)


def check_dispatch(function: str, dispatch: Any) -> None:
    _check_choice(function, "dispatch", dispatch, get_args(Dispatch))


def _check_choice(function: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        rule = f"be one of {', '.join(choices)}"
        fail(function, argument, rule, checks.shown(value), "See ExpertLocation.")


def integer_scalar(function: str, argument: str, value: Any, remedy: str) -> Any:
    """An int where the value is known on the host, else the integer scalar of a device or program.

    Raises:
        TypeError: it is no integer; a bool and a float are none.   ValueError: no scalar.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    arrays = (jax.Array, np.ndarray)
    if not isinstance(value, arrays) or not jnp.issubdtype(value.dtype, jnp.integer):
        rule, got = "be an int or an integer scalar", checks.describe(value)
        raise TypeError(checks.message(function, argument, rule, got, remedy))
    if value.size != 1:
        fail(function, argument, "be a scalar", checks.describe(value), remedy)
    return int(value.reshape(())) if isinstance(value, np.ndarray) else value.reshape(())
