"""Refuses calls in a process that was forked off one in which jax was running.

jax's threads do not survive a fork, and what waits for them waits for ever: a compile, and any program that
XLA hands to its thread pool. jax warns at the fork; a call of ours in the child says why it cannot run. A
fork before the first use of jax is fine. A leaf: imports nothing of ours but the error's format, no jax.
"""

import os
import sys

from moe_align_jax._core import checks

# The process that this one was forked off while jax was running there; None where there is no such.
_parent: int | None = None


def _after_fork_in_child() -> None:
    global _parent
    # Looked up and not asked: jax's own question takes a lock, which the fork may have copied locked.
    backends = getattr(sys.modules.get("jax._src.xla_bridge"), "_backends", None)
    if backends:
        _parent = os.getppid()


if hasattr(os, "register_at_fork"):  # POSIX
    os.register_at_fork(after_in_child=_after_fork_in_child)


def check(function: str) -> None:
    """RuntimeError where jax cannot run; at the start of everything that runs it. Costs one comparison."""
    if _parent is not None:
        raise RuntimeError(
            checks.message(
                function,
                "the call",
                "be made in a process that was not forked while jax was running",
                f"process {os.getpid()}, forked off process {_parent}",
                "jax's threads do not survive a fork, and the call would hang: start workers by "
                'multiprocessing.get_context("spawn") or "forkserver", or fork before the first '
                "use of jax.",
            )
        )
