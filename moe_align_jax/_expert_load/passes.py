"""What `ExpertDistributionRecorder` keeps of the passes in progress and of what callers said about them."""

import functools
import json
import threading
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from moe_align_jax._core import checks


class Metadata(NamedTuple):
    """What `with_forward_pass` was given, for the rows of one pass.

    Attributes:
        first, last: the pass ids of its rows are first, ..., last - 1: ints, or scalars on the device, which
            nothing waits for before a dump.
        value: the caller's object.
        text: the same as JSON, made when the pass ended.
    """

    first: Any
    last: Any
    value: Any
    text: str


class Current(threading.local):
    """Where one thread's hooks stand. Each thread has its own, so that passes may run side by side."""

    def __init__(self) -> None:
        self.layer: int | None = None
        self.in_pass = False
        self.pending: dict[str, Any] = {}
        self.wrote = False  # `state` was assigned: a step ran
        self.first: Any = 0  # the pass id that the state gives next


@jax.jit
def next_pass(control: jax.Array) -> jax.Array:
    return control[0, 1] >> 1


def concrete(hook: str, value: Any) -> Any:
    """The value, which must not be one that jit traces: it would outlive the trace."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{hook}: the hook must run outside jit; got a traced array. Inside, call "
            "record_expert_load and return its state."
        )
    return value


@functools.partial(jax.jit, static_argnames="num_experts")
def count(topk_ids: jax.Array, num_experts: int) -> jax.Array:
    flat = topk_ids.reshape(-1)
    slot = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    return jnp.zeros(num_experts, jnp.int32).at[slot].add(1, mode="drop")


def check_metadata(function: str, metadata: Any) -> None:
    """Refuses what `text_of` could not write."""
    try:
        json.dumps(metadata, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        rule, remedy = "be what JSON can hold", "Keys of dicts are strings or numbers."
        got = f"{checks.describe(metadata)} ({error})"
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(checks.message(function, "metadata", rule, got, remedy)) from None


def text_of(metadata: Any) -> str:
    """The metadata as JSON; of an object that was changed since it was checked, its text."""
    try:
        return json.dumps(metadata, default=str)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(str(metadata))
