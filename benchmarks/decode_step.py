"""The decode step of an expert-parallel stack: 16 layers of route, dispatch, experts, combine in one program.

python -m benchmarks.decode_step --output ROWS.jsonl

A layer is `x = x0 + experts(norm(x))`: a router, an exchange, and two masked grouped products with SwiGLU
between them. Layers take turns over as many sets of weights as fit. Every step that computes is first held to
the same layers in float32. Then steps are timed by each clock (`benchmarks.clocks`), in time per layer.
Beside ours stand

- "plain": the same job on plain collectives and jax.numpy, with the same products on boxes ("boxes"), or on
  rows sorted by expert (`ragged_dot`, "sorted");
- "gathered tokens": tokens are all-gathered in bfloat16, each GPU computes its own experts on them, and a
  psum_scatter adds up;
- "no communication": routing and the same products on rows that are there. What a step takes beyond that is
  the price of its communication, layouts included;
- ours with the experts' load recorded from `masked_m`, once a step: `record_expert_load`.

The formats: "bf16", "fp8-wire" (rows travel as e4m3 and are dequantised) and "fp8" (e4m3 products too).
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import moe_align_jax as maj  # noqa: E402
from benchmarks import clocks, decode_layers  # noqa: E402
from benchmarks.decode_layers import Layer, Model, Weights  # noqa: E402
from benchmarks.exchanges import AXIS, Size, quantised  # noqa: E402

MODELS = {
    # DeepSeek-V3's experts, 16 of its 256; all experts of a layer of Qwen3-30B-A3B.
    "deepseek-v3": Model(7168, 2048, 16, 8),
    "qwen3-30b-a3b": Model(2048, 768, 128, 8),
    "tiny": Model(128, 128, 4, 2),
}
# 1 - 2xy / (xx + yy) of what the last layer's experts added to the tokens, at most.
LIMITS = {"bf16": 2e-3, "fp8-wire": 4e-3, "fp8": 8e-3}
_FILLED = 0.4  # of a GPU's memory, with weights


class Stack:
    """A model's layers over a mesh: weights, routers, tokens, and what they should give.

    Args:
        mesh: over the axis "ep".
        model: sizes.
        form: of FORMATS.
        layers: L.
        sets: of weights, which the layers take in turns.
    """

    def __init__(self, mesh: jax.sharding.Mesh, model: Model, form: str, layers: int, sets: int):
        self.mesh, self.model, self.form, self.layers = mesh, model, form, layers
        key = jax.random.key(0)
        make = jax.jit(self._over(self._make, P(), P(AXIS)))
        self.sets = [make(jax.random.fold_in(key, number)) for number in range(sets)]
        shape = (model.hidden, model.experts)
        route = jax.jit(
            lambda key: (jax.random.normal(key, shape) / model.hidden**0.5).astype(jnp.bfloat16),
            out_shardings=NamedSharding(mesh, P()),
        )
        self.routers = [route(jax.random.fold_in(key, 1000 + number)) for number in range(sets)]

    def _over(self, body: Callable, in_specs: Any, out_specs: Any) -> Callable:
        options = {"mesh": self.mesh, "in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(body, check_vma=False, **options)

    def _make(self, key: jax.Array) -> Weights:
        model, local = self.model, self.model.experts // self.mesh.size
        key = jax.random.fold_in(key, lax.axis_index(AXIS))

        def normal(number: int, k: int, n: int) -> Any:
            each = jax.random.fold_in(key, number)
            shape = (local, n, k) if self.form == "fp8" else (local, k, n)
            w = (jax.random.normal(each, shape, jnp.bfloat16) / k**0.5).astype(jnp.bfloat16)
            return maj.quantize_blockwise(w) if self.form == "fp8" else w

        return Weights(normal(0, model.hidden, 2 * model.ffn), normal(1, model.ffn, model.hidden))

    def tokens(self, count: int) -> jax.Array:
        """x0 `[D * T, H]`: root mean square 1."""
        shape = (count * self.mesh.size, self.model.hidden)
        x = np.random.default_rng(count).standard_normal(shape, np.float32)
        return jax.device_put(x.astype(jnp.bfloat16), NamedSharding(self.mesh, P(AXIS)))

    def step(self, layer: Layer, masked_m: Any, boxes: Any) -> tuple[Callable, tuple]:
        """(`((x, load), *rest) -> (x, load)`, rest) of all layers; `boxes` and `masked_m [L, E]` for a bare
        one, `load` for one that records, else None."""
        model, count = self.model, len(self.sets)

        @jax.jit  # traced and lowered once, not once per layer
        def one(x, x0, router, w, boxes):
            h = decode_layers.normalised(x)
            ids, weights = decode_layers.routed(model, x0, x, router)
            added = layer.run(h, ids, weights, w, boxes)
            added, rows = added if layer.records else (added, None)
            return x0 + added.astype(x0.dtype), rows

        def body(carry, x0, routers, sets, masked_m, boxes):
            x, load = carry
            rows = []
            for number in range(self.layers):
                given = (*boxes, masked_m[number]) if layer.bare else None
                x, more = one(x, x0, routers[number % count], sets[number % count], given)
                rows.append(more)
            if layer.records:
                load = maj.record_expert_load(load, None, jnp.stack(rows))
            return x, load

        given = (masked_m, boxes) if layer.bare else (None, None)
        specs = (P(AXIS), P(AXIS), P(), P(AXIS), P(None, AXIS), P(AXIS))
        return self._over(body, specs, P(AXIS)), (self.routers, self.sets, *given)

    def load(self) -> Any:
        """What records the experts' load: each rank counts the rows of its own experts."""
        return maj.init_expert_load(
            "stat",
            num_layers=self.layers,
            num_physical_experts=self.model.experts,
            num_passes=8,
            num_shards=self.mesh.size,
            local_experts=True,
            sharding=NamedSharding(self.mesh, P(AXIS)),
            recording=True,
        )

    def boxes(self, tokens: int) -> tuple[jax.Array, jax.Array | None]:
        """Rows `[E, R, H]` and their scales that lie there."""
        shape = (self.model.experts // self.mesh.size, tokens * self.mesh.size, self.model.hidden)

        def make(key):
            x = jax.random.normal(key, shape, jnp.bfloat16)
            if self.form == "bf16":
                return x, None
            q, scales = quantised(x.reshape(-1, shape[-1]))
            return q.reshape(shape), scales.reshape(*shape[:2], -1)

        return jax.jit(self._over(make, P(), P(AXIS)))(jax.random.key(1))

    def reference(self, x0: jax.Array) -> tuple[np.ndarray, jax.Array]:
        """(what the last layer adds to the tokens, in float32; pairs of each layer's experts `[L, E]`)."""
        model, ranks = self.model, self.mesh.size
        local = model.experts // ranks

        def dequantised(w):
            if self.form != "fp8":
                return w.astype(jnp.float32)
            values, scales = w
            scales = jnp.repeat(jnp.repeat(scales, 128, axis=0), 128, axis=1)
            return (values.astype(jnp.float32) * scales).T

        def body(x, routers, sets):
            x0, added, counts = x, None, []
            for number in range(self.layers):
                w = sets[number % len(sets)]
                h = decode_layers.normalised(x)
                ids, weights = decode_layers.routed(model, x0, x, routers[number % len(sets)])
                h, ids, weights = (lax.all_gather(a, AXIS, tiled=True) for a in (h, ids, weights))
                h = h.astype(jnp.float32)
                first = lax.axis_index(AXIS).astype(jnp.int32) * local

                def expert(total, one, h=h, ids=ids, weights=weights, first=first):
                    number, w = one
                    share = jnp.sum(jnp.where(ids == first + number, weights, 0.0), axis=1)
                    gate, up = jnp.split(h @ dequantised(w.gate_up), 2, axis=1)
                    y = (jax.nn.silu(gate) * up) @ dequantised(w.down)
                    count = jnp.sum(ids == first + number, dtype=jnp.int32)
                    return total + share[:, None] * y, count

                every = (jnp.arange(local, dtype=jnp.int32), w)
                total, count = lax.scan(expert, jnp.zeros_like(h), every)
                added = lax.psum_scatter(total, AXIS, tiled=True)
                x = (x0.astype(jnp.float32) + added).astype(x0.dtype)
                counts.append(count)
            return added, jnp.stack(counts)

        specs = (P(AXIS), P(), P(AXIS))
        run = jax.jit(self._over(body, specs, (P(AXIS), P(None, AXIS))))
        with jax.default_matmul_precision("highest"):
            added, counts = run(x0, self.routers, self.sets)
        return np.asarray(added, np.float64), counts


def sets_that_fit(mesh: jax.sharding.Mesh, model: Model, form: str, layers: int) -> int:
    """At least two, at most one for each layer."""
    stats = mesh.devices.flat[0].memory_stats() or {}
    words = 3 * model.experts // mesh.size * model.hidden * model.ffn
    size = words * (1 if form == "fp8" else 2)
    return int(np.clip(stats.get("bytes_limit", 0) * _FILLED // size, 2, max(2, layers)))


def difference(x: np.ndarray, y: np.ndarray) -> float:
    return float(1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()))


def steps_of(
    stack: Stack, tokens: int, implementation: str | None, platform: str, beginnings: tuple
) -> Iterator[clocks.Step]:
    """A step for each provider whose name begins so."""
    model, ranks = stack.model, stack.mesh.size
    plain = stack.form == "bf16"
    size = Size("low_latency", tokens, model.hidden, model.top_k, model.experts, plain)
    x0 = stack.tokens(tokens)
    want, counts = stack.reference(x0)
    boxes = stack.boxes(tokens)
    start = np.asarray(x0).astype(np.float64)
    power = float((want**2).mean())
    every = decode_layers.every(size, ranks, stack.form, implementation, platform)
    for layer in every:
        if not layer.name.startswith(beginnings):
            continue
        function, rest = stack.step(layer, counts, boxes)

        def check(carry, layer=layer):
            """After many steps, which start from each other's end: as much is added as in the first, and each
            pass that is kept has the pairs of the experts."""
            x, load = carry
            added = np.asarray(x).astype(np.float64) - start
            found = float((added**2).mean()) / power
            if not (layer.bare or math.isclose(found, 1, rel_tol=0.2)):
                raise AssertionError(
                    f"{layer.name}: the experts add {found:.3g} of what they should"
                )
            if layer.records:
                passes = maj.collect_expert_load(load).logical_count
                if not (len(passes) and (passes == np.asarray(counts)).all()):
                    raise AssertionError(f"{layer.name}: other counts than those of the ids")

        def check_first(carry, layer=layer):
            if layer.bare:
                return
            x, _ = carry
            error = difference(np.asarray(x).astype(np.float64) - start, want)
            if not error < LIMITS[stack.form]:
                raise AssertionError(f"{layer.name}: difference {error:.3g} from float32")

        carry = x0, stack.load() if layer.records else None
        yield clocks.Step(
            layer.name, function, carry, (x0, *rest), stack.layers, check, check_first
        )


# -- the command ------------------------------------------------------------------------------------------


def communication(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What each step takes beyond the one without communication, and ours relative to the plain one's."""
    cells: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if "us" in row:
            clock = row["way"] if row["clock"] == "wall" else row["clock"]
            cells.setdefault((row["case"], clock), {})[row["provider"]] = row["us"]
    for (case, clock), found in cells.items():
        alone = found.pop("no communication", None)
        if alone is None:
            continue
        beyond = {name: us - alone for name, us in found.items()}
        plain = [us for name, us in beyond.items() if name.startswith("plain")]
        parts = []
        for name, us in beyond.items():
            ratio = (
                f" ({us / min(plain):.2f} of plain)" if plain and name.startswith("ours") else ""
            )
            parts.append(f"{name} {us:.1f}{ratio}")
        yield f"{case}, {clock}: µs a layer beyond {alone:.1f}: {'; '.join(parts)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    clocks.add_arguments(parser, budget=300, launches="default")
    parser.add_argument("--models", default="deepseek-v3,qwen3-30b-a3b", help=", ".join(MODELS))
    parser.add_argument("--formats", default="fp8,bf16", help=", ".join(decode_layers.FORMATS))
    parser.add_argument("--tokens", default="8,64,128", help="per GPU")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--sets", type=int, help="of weights; as many as fit by default")
    parser.add_argument("--devices", type=int, help="of those there are; all by default")
    parser.add_argument("--providers", default="", help='by how their names begin: "ours;plain"')
    options = parser.parse_args(argv)
    if options.launch is None:
        given = sys.argv[1:] if argv is None else argv
        return clocks.run_launches("benchmarks.decode_step", given, options)
    until = time.monotonic() + options.budget
    devices = jax.devices()[: options.devices]
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    platform = "gpu" if devices[0].platform in ("gpu", "cuda") else "cpu"
    implementation = "mosaic_gpu" if platform == "gpu" else None
    keep, failed = clocks.keeper(options), False
    repeated = clocks.repetitions(options, (3, 2), platform == "gpu")
    for name in options.models.split(","):
        model = MODELS[name]
        for form in options.formats.split(","):
            sets = options.sets or sets_that_fit(mesh, model, form, options.layers)
            if time.monotonic() > until:
                keep({"case": f"{name} {form}", "provider": "all", "note": "left out: no time"})
                continue
            stack = Stack(mesh, model, form, options.layers, sets)
            for tokens in map(int, options.tokens.split(",")):
                case = f"{name} {form} {tokens}"
                facts = {"case": case, **model._asdict(), "format": form, "tokens": tokens}
                facts |= {"layers": options.layers, "sets": sets, "devices": mesh.size}
                if time.monotonic() > until:
                    keep(facts | {"provider": "all", "note": "left out: no time"})
                    continue
                chosen = tuple(options.providers.split(";"))
                steps = list(steps_of(stack, tokens, implementation, platform, chosen))
                rows = []
                for row in clocks.rows_of(steps, **repeated, until=until):
                    failed |= "AssertionError" in row.get("note", "")
                    keep(facts | row)
                    rows.append(facts | row)
                print("\n".join(communication(rows)), flush=True)
            del stack
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
