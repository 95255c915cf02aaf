"""Tiles of fused_moe's two products beside each other, for the table of a GPU kind.

python -m benchmarks.moe_tiles --out ROWS.jsonl

Each variant is one jitted step of four layers, as in benchmarks.moe_layer, with other tiles, another block
size or another rule (`_grouped_matmul/tile_rules.py`). Before a time is taken, sampled tokens are compared
with float32 products of torch's. The time is the device's span per layer; a variant's kernels are listed
beside it. With `--sustained ROUNDS` the variants then take turns, forth and back, by the host's clock of
benchmarks.moe_layer: steps after each other, in which long products reach the GPU's power limit, so that the
tiles of the least energy win, which need not be those of the least span. A batch size of a model is a child
process. All of them compile first, side by side, then one after the
other measures: one that hangs or dies loses the variants that it had left.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import case_processes, children, moe_layer, timing  # noqa: E402
from benchmarks.moe_cases import LAYERS, MODELS, Case, Model, layer_bytes, make_sets  # noqa: E402
from benchmarks.rows import failed, statistics_of  # noqa: E402
from moe_align_jax._core.hopper import NUM_SMS  # noqa: E402
from moe_align_jax._grouped_matmul.config import Config  # noqa: E402

QWEN, DEEPSEEK, MIXTRAL = MODELS
_PLAIN = Config("swap", 8, 128, 128, 5, group=0)
_GATED = Config("swap", 8, 256, 64, 6, group=0)
_WIDE = Config("m", 128, 256, 64, 4, late=True)


class Variant(NamedTuple):
    """What differs from the usual choice.

    Attributes:
        rules: fields of `tile_rules.Rules`, in place of the GPU kind's.
        first, second: tiles of gate and up, and of down.
        block_size: of the alignment.
    """

    rules: dict[str, Any] = {}
    first: Config | None = None
    second: Config | None = None
    block_size: int | None = None

    @property
    def name(self) -> str:
        parts = [f"{k}={v}" for k, v in self.rules.items()]
        for what, tiles in (("gate_up", self.first), ("down", self.second)):
            if tiles:
                parts.append(f"{what} {tiles.name}/{tiles.num_ctas}")
        if self.block_size:
            parts.append(f"blocks of {self.block_size}")
        return ", ".join(parts) or "usual"

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """What is lowered meanwhile gets it."""
        import jax

        from moe_align_jax._grouped_matmul import choose_tiles, launch, tile_rules
        from moe_align_jax._lowering import select
        from moe_align_jax._moe_layer import token_sum

        kind, usual = select.gpu_kind() or "", choose_tiles.config_for
        rules = tile_rules.RULES.get(kind, tile_rules.DEFAULT_RULES)._replace(**self.rules)

        def config_for(problem, gpu_kind=None):
            mine = self.first if problem.weights.gated else self.second
            return mine or usual(problem, gpu_kind)

        takes = token_sum.takes

        def sums(problem):  # tiles of the second product are of one that leaves the sum to XLA
            return self.second is None and takes(problem)

        jax.clear_caches()  # of layers that were traced with the other way to sum
        with (
            mock.patch.dict(tile_rules.RULES, {kind: rules}),
            mock.patch.object(token_sum, "takes", sums),
        ):
            with mock.patch.object(launch, "config_for", config_for):
                yield


def _in_clusters(tiles: Config, split: int) -> Config:
    return tiles._replace(split=split, num_ctas=128 if split > 2 else NUM_SMS)


def _swapped(bm: int, group: int) -> Config:
    """Tiles of up to 192 rows by 256 columns, with as many stages as fit into shared memory."""
    stages = 4 if bm <= 96 or bm == 144 else 3
    return Config("swap", bm, 256, 64, stages, group=group, lag=stages - 2)


def variants(model: Model, tokens: int) -> list[Variant]:
    """The usual choice first."""
    found = [Variant()]
    pairs = tokens * model.top_k
    if 4 * pairs <= model.experts:
        found.append(Variant({"split": False}))
        for parts in (2, 4, 8):
            found.append(Variant(first=_in_clusters(_GATED, parts)))
            if model.top_k == 2:
                found.append(Variant(second=_in_clusters(_PLAIN, parts)))
        return found
    mean = pairs / model.experts
    if mean <= 100:
        for block in (8, 16, 24, 48, 64, 80, 96):
            if not 1.2 * mean <= block <= max(16, 6 * mean):
                continue
            if block > 64:
                tiles = _swapped(block, 0)
                found.append(Variant({}, tiles, tiles, block))
                continue
            first = _GATED._replace(bm=block, stages=6 if block < 32 else 5)
            second = _PLAIN._replace(bm=block, stages=5 if block <= 40 else 4)
            found.append(Variant({}, first, second, block))
        return found
    rules: dict[str, Any] = {"permute_columns": 1} if mean >= 1000 else {}
    many = ((128, (8,)), (176, (6, 8)), (192, (8, 16)))
    for block, groups in many if mean >= 1000 else ((128, (4,)), (144, (0, 4)), (192, (8,))):
        for group, late in itertools.product(groups, (False, True) if block == 144 else (False,)):
            tiles = _WIDE if block == 128 else _swapped(block, group)
            tiles = tiles._replace(group=group, late=late or block == 128)
            found.append(Variant(rules, tiles, tiles, block))
    if mean >= 1000:
        tiles = _swapped(192, 8)
        found.append(Variant({"permute_columns": 0}, tiles, tiles, 192))
    return found


class Batch(NamedTuple):
    """A model's layer at a batch size."""

    model: Model
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.tokens}"


def run_case(batch: Batch, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compiles every variant, of sizes alone; makes the weights when its turn comes."""
    model, tokens = batch
    import jax

    structs, work = moe_layer.structs_of(model, tokens), []
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for variant in variants(model, tokens):
            try:
                with variant.chosen():
                    step = moe_layer.step_of(variant.block_size)
                    given = jax.jit(step, keep_unused=True, donate_argnums=0)
                    lowered = given.lower(*structs)
                made: Any = pool.submit(lowered.compile)
            except Exception as error:  # one that cannot be built leaves the others
                made = error
            work.append((variant, made))
    children.wait_for_turn()
    rate, case = timing.read_rate(), Case(model, tokens, make_sets(model))
    head: dict[str, Any] = {"model": model.name, "tokens": tokens}
    head["floor_us"] = round(layer_bytes(model, tokens, case.hit) / rate / 1e3, 2)
    measured: list[tuple[dict[str, Any], _Steps]] = []
    for variant, made in work:
        row = head | {"variant": variant.name}
        try:
            if isinstance(made, Exception):
                raise made
            steps = _Steps(case, made.result())
            yield row | {"clock": "span"} | steps.span(options.executions)
            measured.append((row, steps))
        except Exception as error:
            yield row | failed(error)
    turns = [steps.sustained for _, steps in measured]
    for i, taken in timing.in_turns(turns, options.sustained):
        row = measured[i][0] | {"clock": "wall"}
        if isinstance(taken, Exception):
            yield row | failed(taken)
        else:
            yield row | {"status": "ok"} | statistics_of(taken.samples_us)


class _Steps:
    """Steps of a variant, each of which has the results of the one before donated.

    Raises:
        ValueError: the first step's results are wrong, or a later one's have other bits.
    """

    def __init__(self, case: Case, program: Any):
        import jax
        import jax.numpy as jnp

        self.case, self.program, self.rest = case, program, moe_layer.rest_of(case)
        self.us = 0.0  # of a layer, by span
        self.outs = [jnp.full_like(case.x, jnp.nan) for _ in range(LAYERS)]
        first = jax.block_until_ready(self())
        if wrong := case.wrong(lambda layer: np.asarray(first[layer][case.sample])):
            raise ValueError(wrong)
        self.bits = self._bits()

    def __call__(self) -> Any:
        self.outs = self.program(self.outs, *self.rest)
        return self.outs

    def _bits(self) -> list[bytes]:
        return [np.asarray(out[self.case.sample]).tobytes() for out in self.outs]

    def _check(self) -> None:
        if self._bits() != self.bits:
            raise ValueError("other bits in a later run")

    def span(self, executions: int) -> dict[str, Any]:
        samples, facts = moe_layer.spans(self, executions)
        self._check()
        if not samples:
            raise ValueError(facts["note"])
        found = statistics_of(samples)
        self.us = found["us"]
        return {"status": "ok"} | found | facts

    def sustained(self) -> timing.Timing:
        import jax

        wait = lambda: jax.block_until_ready(self.outs)  # noqa: E731
        samples = timing.steady_steps(self, wait, self.us, LAYERS)
        self._check()
        return timing.Timing("wall_us", samples, LAYERS)


def line(row: dict[str, Any]) -> str:
    name = f"{row['model']:16} T {row['tokens']:5} {row['variant']:70}"
    if "us" not in row:
        return f"{name} {row['status']}: {row['reason']}"
    parts = ", ".join(f"{n[:24]} {us}" for n, us in row.get("parts", {}).items())
    read = row["us"] / row["floor_us"]
    return f"{name} {row['clock']:4} {row['us']:9.2f} us {read:.2f} of the read  {parts}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    numbers = lambda text: [int(t) for t in text.split(",")]  # noqa: E731
    parser.add_argument("--models", default="", help="parts of names, comma-separated; all")
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 128, 1024, 8192])
    parser.add_argument("--executions", type=int, default=6, help="traced steps")
    parser.add_argument(
        "--sustained", type=int, default=0, metavar="ROUNDS", help="turns by the host's clock"
    )
    limits: dict[str, Any] = {"patience": 8, "preparing": 100, "budget": 220, "together": 100}
    case_processes.add_arguments(parser, **limits)
    options = parser.parse_args(argv)
    wanted = [part for part in options.models.split(",") if part]
    models = [m for m in MODELS if not wanted or any(part in m.name for part in wanted)]
    batches = [Batch(model, tokens) for tokens in options.tokens for model in models]
    return case_processes.run(
        *("benchmarks.moe_tiles", argv, options, batches, run_case),
        *(line, lambda rows: ()),
    )


if __name__ == "__main__":
    sys.exit(main())
