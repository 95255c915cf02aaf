"""`moe-align demo`: the main job on this machine, checked against a plain NumPy loop.

The routings are random, of the sizes of real models: no weights are at hand to route with.
"""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from moe_align_jax import AlignedBlocks, moe_align_block_size, select_implementation


class Routing(NamedTuple):
    """One router of the demo."""

    title: str
    num_tokens: int
    num_experts: int
    top_k: int
    block_size: int


ROUTINGS = (
    Routing("64 experts, top-2", 4096, 64, 2, 128),
    Routing("DeepSeek-V3: 256 experts, top-8", 4096, 256, 8, 64),
)
# Up to this many experts each one gets its own cell; beyond, experts are counted by their blocks.
_EXPERTS_SHOWN = 64


def route(routing: Routing, seed: int) -> jax.Array:
    """`[num_tokens, top_k]` int32: top-k of random gating logits, some experts more popular."""
    tokens, popularity = jax.random.split(jax.random.key(seed))
    shape = (routing.num_tokens, routing.num_experts)
    logits = jax.random.normal(tokens, shape)
    logits += 0.25 * jax.random.normal(popularity, (1, routing.num_experts))
    return jax.lax.top_k(logits, routing.top_k)[1]


def plain_loop(topk_ids: np.ndarray, block_size: int, num_experts: int) -> AlignedBlocks:
    """The contract as a loop over experts and pairs: what the result is held to."""
    flat = topk_ids.ravel()
    num_pairs = len(flat)
    capacity = num_pairs + min(num_pairs, num_experts) * (block_size - 1)
    sorted_token_ids = np.full(capacity, num_pairs, np.int32)
    expert_ids = np.full(-(-capacity // block_size), -1, np.int32)
    tokens_per_expert = np.zeros(num_experts, np.int32)
    start = 0
    for expert in range(num_experts):
        row = start
        for pair in np.flatnonzero(flat == expert):
            sorted_token_ids[row] = pair
            row += 1
        tokens_per_expert[expert] = row - start
        while start < row:
            expert_ids[start // block_size] = expert
            start += block_size
    post_padded = np.array([start], np.int32)
    return AlignedBlocks(sorted_token_ids, expert_ids, post_padded, tokens_per_expert)


def differences(got: AlignedBlocks, want: AlignedBlocks) -> list[str]:
    """One line per field that differs, with the first place."""
    found = []
    for name in AlignedBlocks._fields[:4]:
        ours, theirs = np.asarray(getattr(got, name)), getattr(want, name)
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            found.append(f"{name} is {ours.dtype} {ours.shape}, not {theirs.dtype} {theirs.shape}")
        elif (ours != theirs).any():
            first = int(np.flatnonzero(ours != theirs)[0])
            found.append(f"{name}[{first}] is {ours[first]}, not {theirs[first]}")
    return found


def _experts_table(counts: np.ndarray, block_size: int) -> Table:
    """Pairs and blocks of every expert, three experts to a line."""
    table = Table(title="blocks per expert", title_justify="left", box=box.SIMPLE_HEAD)
    lines = -(-len(counts) // 3)
    for _ in range(3):
        table.add_column("expert", justify="right", style="dim")
        table.add_column("pairs", justify="right")
        table.add_column("blocks", justify="right", style="bold")
    for line in range(lines):
        cells = []
        for expert in range(line, len(counts), lines):
            cells += [str(expert), str(counts[expert]), str(-(-counts[expert] // block_size))]
        table.add_row(*cells)
    return table


def _blocks_table(counts: np.ndarray, block_size: int) -> Table:
    """Experts counted by how many blocks they got, with the padding that costs."""
    table = Table(title="experts by number of blocks", title_justify="left", box=box.SIMPLE_HEAD)
    for title in ("blocks", "experts", "pairs of one expert", "padding rows", "padding share"):
        table.add_column(title, justify="right")
    blocks = -(-counts // block_size)
    for number in np.unique(blocks):
        here = counts[blocks == number]
        rows = int(number) * block_size * len(here)
        padding = rows - int(here.sum())
        span = f"{here.min()} to {here.max()}" if here.min() < here.max() else str(here.min())
        share = f"{padding / rows:.1%}" if rows else "-"
        table.add_row(str(number), str(len(here)), span, str(padding), share)
    return table


def run(console: Console, *, implementation: Any, seed: int) -> int:
    """Both routings; 1 when a result differs from the loop's, else 0."""
    device = jax.devices()[0]
    console.print(
        f"Two random routings, of the sizes of real layers: the top-k of normal logits, some experts "
        f"more popular than others (seed {seed}).",
        highlight=False,
    )
    code = 0
    for routing in ROUTINGS:
        topk_ids = jax.block_until_ready(route(routing, seed))
        block_size, num_experts = routing.block_size, routing.num_experts
        selection = select_implementation(
            topk_ids, block_size=block_size, num_experts=num_experts, implementation=implementation
        )
        align = jax.jit(
            lambda ids, block_size=block_size, num_experts=num_experts: moe_align_block_size(
                ids, block_size=block_size, num_experts=num_experts, implementation=implementation
            )
        )
        begun = time.perf_counter()
        aligned = jax.block_until_ready(align(topk_ids))
        first = time.perf_counter() - begun

        counts = np.asarray(aligned.tokens_per_expert)
        rows = int(aligned.num_tokens_post_padded[0])
        pairs = topk_ids.size
        console.rule(f"{routing.title}, {routing.num_tokens} tokens, blocks of {block_size}")
        console.print(
            f"ran [bold]{selection.implementation}[/] (form {selection.form!r}) under jit on "
            f"{device.device_kind} ({device.platform}:{device.id}); first call, compiling "
            f"included: {first:.2f} s",
            highlight=False,
        )
        if num_experts <= _EXPERTS_SHOWN:
            console.print(_experts_table(counts, block_size))
        console.print(_blocks_table(counts, block_size))
        used = rows // block_size
        share = f"{1 - pairs / rows:.1%}" if rows else "-"
        console.print(
            f"{pairs} pairs in {used} blocks = {rows} rows; [bold]padding share {share}[/]; "
            f"{(counts == 0).sum()} experts without a token",
            highlight=False,
        )
        head = np.asarray(aligned.sorted_token_ids[:6]).tolist()
        console.print(
            f"sorted_token_ids [{len(aligned.sorted_token_ids)}] begins {head}; expert_ids "
            f"[{len(aligned.expert_ids)}] begins {np.asarray(aligned.expert_ids[:8]).tolist()}",
            highlight=False,
            markup=False,
        )
        wrong = differences(aligned, plain_loop(np.asarray(topk_ids), block_size, num_experts))
        if wrong:
            code = 1
            console.print(
                "[bold red]WRONG[/]: differs from a plain NumPy loop:", *wrong, sep="\n  "
            )
        else:
            console.print("[bold green]correct[/]: equal to a plain NumPy loop, bit for bit")
        console.print()
    return code
