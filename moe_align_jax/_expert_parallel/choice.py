"""Which transport runs: a rule that can be read, asked and overridden.

The rule has no table of sizes and GPUs. On two H200 "nvlink_window" took the least time of all in low-latency
mode, at 8 and 128 tokens per GPU, and "nvlink" in mode "normal" at 4096, both by wall clock and by device
span (docs/notebook/2026-11.md; with jax 0.11.2). So the rule asks whether they can run here; of the others
"all_to_all" is the fastest or close to it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from moe_align_jax._core import checks
from moe_align_jax._expert_parallel.transport import Transport
from moe_align_jax._expert_parallel.transports import ragged
from moe_align_jax._expert_parallel.transports.all_gather import AllGather
from moe_align_jax._expert_parallel.transports.all_to_all import AllToAll
from moe_align_jax._expert_parallel.transports.nvlink import MAX_DEVICES, NVLINK, NVLINK_WINDOW
from moe_align_jax._lowering import export, select

TransportName = Literal["all_gather", "all_to_all", "nvlink", "nvlink_window", "ragged_all_to_all"]
Mode = Literal["normal", "low_latency", "auto"]

TRANSPORTS: dict[str, Transport] = {
    t.name: t for t in (AllGather(), AllToAll(), NVLINK, NVLINK_WINDOW, ragged.RaggedAllToAll())
}

# The jax releases (major, minor) with which all tests of a transport ran on GPUs; with others it compiles.
NVLINK_RUN_WITH = ((0, 11), (0, 12))
WINDOW_RUN_WITH = ((0, 11), (0, 12))
# The most GPUs of a mesh over which windows have run. Over more, a kernel has more peers than any that ran.
WINDOW_GPUS = 2
_DENSE = "the dense exchange of the shortest device span measured"


@export.register_static
@dataclass(frozen=True)
class TransportChoice:
    """What `select_transport` answers, and what `dispatch` says it took. Static: no leaves in a pytree.

    Attributes:
        transport: the transport that runs.
        mode: "normal" or "low_latency".
        reasons: for each transport, why it runs or not.
    """

    transport: str
    mode: str
    reasons: dict[str, str] = field(hash=False)


def resolve_mode(function: str, mode: Any, num_tokens: int, most: int) -> str:
    if not checks.is_one_of(mode, ("normal", "low_latency", "auto")):
        rule = 'be "normal", "low_latency" or "auto"'
        remedy = '"auto" decides by the static number of tokens.'
        raise ValueError(checks.message(function, "mode", rule, checks.shown(mode), remedy))
    if mode == "auto":
        return "low_latency" if num_tokens <= most else "normal"
    if mode == "low_latency" and num_tokens > most:
        raise ValueError(
            checks.message(
                function,
                "x",
                f'have at most max_low_latency_tokens ({most}) rows in mode "low_latency"',
                num_tokens,
                'Use mode="normal" or "auto", or raise max_low_latency_tokens.',
            )
        )
    return mode


def choose(
    function: str,
    transport: Any,
    *,
    mode: str,
    num_ranks: int,
    platform: str,
    axis_name: Any = None,
) -> TransportChoice:
    """The named transport if it can run, or the rule's; `axis_name` where a mesh encloses the call."""
    cannot = {name: t.unavailable(platform) for name, t in TRANSPORTS.items()}
    if axis_name is not None:
        cannot = {name: why or TRANSPORTS[name].refuses(axis_name) for name, why in cannot.items()}
    if transport is not None:
        if not checks.is_one_of(transport, TRANSPORTS):
            rule = f"be one of {', '.join(TRANSPORTS)}, or None"
            got, remedy = checks.shown(transport), "None chooses by shape."
            raise ValueError(checks.message(function, "transport", rule, got, remedy))
        if cannot[transport]:
            rule, got = f"be able to run on {platform}", repr(transport)
            remedy = f"{cannot[transport]}: leave transport=None, or name another."
            raise NotImplementedError(checks.message(function, "transport", rule, got, remedy))
        reasons = {name: "another was named" for name in TRANSPORTS} | {transport: "named"}
        return TransportChoice(transport, mode, reasons)

    reasons = {
        "all_gather": "as many bytes as all_to_all, and its reduce-scatter adds in the payload's dtype",
        "all_to_all": _DENSE
        if jax.process_count() == 1
        else f"{_DENSE}, by collectives that run across processes (NCCL's on GPUs)",
        "ragged_all_to_all": cannot["ragged_all_to_all"]
        or "XLA has no fast form of it yet: no shape where it won was measured",
    }
    run_with = {NVLINK_WINDOW.name: WINDOW_RUN_WITH, NVLINK.name: NVLINK_RUN_WITH}
    against = {
        name: cannot[name] or _nvlink_unwanted(num_ranks, releases)
        for name, releases in run_with.items()
    }
    if mode == "normal":
        many = 'mode "normal" moves more rows than a window holds'
        against[NVLINK_WINDOW.name] = against[NVLINK_WINDOW.name] or many
    if max(num_ranks, jax.sharding.get_abstract_mesh().size) > WINDOW_GPUS:
        more = f"it has run on {WINDOW_GPUS} GPUs: name it to take it on more"
        against[NVLINK_WINDOW.name] = against[NVLINK_WINDOW.name] or more
    reasons |= {name: reason for name, reason in against.items() if reason}
    taken = next((name for name, reason in against.items() if reason is None), None)
    if taken is None:
        return TransportChoice("all_to_all", mode, reasons)
    reasons["all_to_all"] = "longer, by wall clock and by device span, than our own kernels"
    reasons[taken] = "our kernels write to the peers: the least wall clock and device span measured"
    if taken != NVLINK.name:
        reasons.setdefault(NVLINK.name, "XLA prepares each of its kernels on the host")
    return TransportChoice(taken, mode, reasons)


def _nvlink_unwanted(num_ranks: int, run_with: tuple[tuple[int, ...], ...]) -> str | None:
    """Why our kernels are not the choice where they can run, or None; `run_with`: releases that ran them."""
    if num_ranks == 1:
        return "one rank has no peers"
    if num_ranks > MAX_DEVICES:
        return f"it takes at most {MAX_DEVICES} devices"
    if select.jax_version()[:2] not in run_with:
        seen = " and ".join(".".join(map(str, release)) for release in run_with)
        return f"seen running with jax {seen} only; this is {jax.__version__}: name it to take it"
    return None
