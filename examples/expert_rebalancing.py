"""Serves a skewed stream with MoE layers, records the load of their experts, and rebalances them.

Every device of a mesh holds the weights of some physical slots. A popular expert gets several slots; where
they are is an `ExpertLocation`, an argument of the compiled step. Every N passes the recorded load goes
through `rebalance_experts`, the weights move, and the step goes on with another location: nothing is
compiled again, and no output changes. Halfway the stream turns to other experts.
Run it: `python examples/expert_rebalancing.py --picture load.png`.

L layers, El experts, Ep = El + redundant slots, D devices, e = Ep / D, T tokens, K top_k, H hidden, F within
an expert.
"""

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_layer import MoEParams, apply_experts, parse

from moe_align_jax import (
    ExpertDistributionRecorder,
    ExpertLocation,
    moe_align_block_size,
    plan_expert_moves,
    rebalance_experts,
    record_expert_load,
    route_topk,
    to_physical_ids,
    update_expert_weights,
)

BLOCK_SIZE = 16


class Model(NamedTuple):
    """Weights of L layers.

    Attributes:
        router: `[L, H, El]`, on every device.
        experts: gate, up `[L, Ep, H, F]` and down `[L, Ep, F, H]`, dimension 1 split over the devices.
    """

    router: jax.Array
    experts: dict[str, jax.Array]


def init(
    rng: np.random.Generator, mesh: Mesh, location: ExpertLocation, *, hidden: int, ffn: int
) -> Model:
    """Random experts, each copied into the slots that the location gives it."""
    slots = np.asarray(location.physical_to_logical_map)
    layers, experts = len(slots), location.num_logical_experts

    def place(value: np.ndarray, spec: P) -> jax.Array:
        return jax.device_put(value.astype(np.float32), NamedSharding(mesh, spec))

    weights = {}
    for name, shape in {"gate": (hidden, ffn), "up": (hidden, ffn), "down": (ffn, hidden)}.items():
        logical = rng.normal(size=(layers, experts, *shape)) / np.sqrt(shape[0])
        physical = logical[np.arange(layers)[:, None], slots]
        weights[name] = place(physical, P(None, "ep"))
    router = rng.normal(size=(layers, hidden, experts)) / np.sqrt(hidden)
    return Model(place(router, P()), weights)


def make_step(mesh: Mesh, *, top_k: int) -> tuple[Any, list]:
    """The jitted `(model, location, load, number, x [T, H], popularity [L, El]) -> (y [T, H], load)`.

    Every device sees all tokens, applies its own experts, and the results are summed over the devices.
    The load counts what each device did, layer by layer: one update at the end, in the row of the pass's
    number (a state that counts passes itself costs a kernel more). With the step comes a list
    with an entry for each time that it was traced (and so compiled).
    """
    traced = []

    def forward(model, location, load, number, x, popularity):
        traced.append(x.shape)
        slots = model.experts["gate"].shape[1]  # e, of this device
        first = jax.lax.axis_index("ep") * slots
        counts = []
        for layer in range(model.router.shape[0]):
            logits = x @ model.router[layer] + popularity[layer][None]
            weights, topk_ids = route_topk(logits, top_k=top_k)
            physical = to_physical_ids(topk_ids, location, layer=layer)
            # This device's slots; the others' are out of range, and so dropped.
            mine = jnp.where((physical >= first) & (physical < first + slots), physical - first, -1)
            aligned = moe_align_block_size(
                mine, block_size=BLOCK_SIZE, num_experts=slots, return_inverse=True
            )
            counts.append(aligned.tokens_per_expert)
            params = MoEParams(
                model.router[layer], *(model.experts[n][layer] for n in ("gate", "up", "down"))
            )
            # It aligns the same ids again; XLA makes one of the two.
            part = apply_experts(params, x, weights, mine, block_size=BLOCK_SIZE)
            x = x + jax.lax.psum(part, "ep")
        load = record_expert_load(
            load, None, counts, physical_to_logical_map=location, forward_pass_id=number
        )
        return x, load

    specs = Model(P(), P(None, "ep"))
    mapped = jax.shard_map(
        forward, mesh=mesh, in_specs=(specs, P(), P("ep"), P(), P(), P()), out_specs=(P(), P("ep"))
    )
    return jax.jit(mapped, donate_argnums=2), traced


def zipf(rng: np.random.Generator, layers: int, experts: int, strength: float) -> np.ndarray:
    """`[L, El]` float32 logits: in every layer the experts follow Zipf's law in an order of its own."""
    ranks = np.log(np.arange(1, experts + 1))
    return np.stack([-strength * ranks[rng.permutation(experts)] for _ in range(layers)]).astype(
        np.float32
    )


class Period(NamedTuple):
    """What the recorder saw between two rebalancings.

    Attributes:
        first, last: passes.
        balancedness: mean tokens per GPU / tokens of the busiest, over passes and layers.
        worst: the same of the worst layer.
        moved: slots whose expert came from another GPU in the rebalancing after it.
        tokens_per_gpu: `[L, D]`.
    """

    first: int
    last: int
    balancedness: float
    worst: float
    moved: int
    tokens_per_gpu: np.ndarray


def serve(options: argparse.Namespace, mesh: Mesh) -> tuple[list[Period], float, int]:
    """Runs the stream.

    Returns:
        The periods; the largest relative change of a probe's output over all rebalancings; how often the
        step was compiled.
    """
    gpus, layers, experts = mesh.devices.size, options.layers, options.experts
    slots = -(-(experts + options.redundant) // gpus) * gpus  # the same on every device
    location = ExpertLocation.trivial(layers, experts, slots)
    rng = np.random.default_rng(0)
    model = init(rng, mesh, location, hidden=options.hidden, ffn=2 * options.hidden)
    recorder = ExpertDistributionRecorder(
        "stat",
        num_layers=layers,
        num_physical_experts=slots,
        num_logical_experts=experts,
        buffer_size=options.every,
        num_gpus=gpus,
        num_shards=gpus,
        local_experts=True,
        sharding=NamedSharding(mesh, P("ep")),
    )
    step, traced = make_step(mesh, top_k=options.top_k)
    probe = rng.normal(size=(options.tokens, options.hidden)).astype(np.float32)
    popularity = zipf(rng, layers, experts, options.skew)

    def run(x):
        y, recorder.state = step(model, location, recorder.state, np.int32(number), x, popularity)
        return np.asarray(y)

    recorder.start_record()
    periods, change = [], 0.0
    for number in range(1, options.passes + 1):
        if number == options.passes // 2 + 1:
            popularity = zipf(rng, layers, experts, options.skew)
        run(rng.normal(size=probe.shape).astype(np.float32))
        if number % options.every:
            continue
        metrics = recorder.metrics()
        load = recorder.dump_record("object")["logical_count"].sum(axis=0)
        with recorder.disable_this_region():
            before = run(probe)
        old = np.asarray(location.physical_to_logical_map)
        new = rebalance_experts(load, slots, 1, 1, gpus, previous=old).physical_to_logical_map
        moves = plan_expert_moves(old, new, num_gpus=gpus)
        model = model._replace(experts=update_expert_weights(model.experts, moves))
        location = ExpertLocation.from_map(new, experts)
        with recorder.disable_this_region():
            after = run(probe)
        change = max(change, float(np.abs(after - before).max() / np.abs(before).max()))
        each = metrics.balancedness[1000]
        own = np.arange(slots) // (slots // gpus)
        moved = int((moves.source // (slots // gpus) != own).sum())
        periods.append(
            Period(
                number - options.every,
                number,
                float(each.mean()),
                float(each.min()),
                moved,
                metrics.tokens_per_gpu,
            )
        )
    return periods, change, len(traced)


def draw(first: Period, last: Period, path: Path) -> None:
    """Heat maps of layers x GPUs, before the first and after the last rebalancing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    loads = [p.tokens_per_gpu / p.tokens_per_gpu.mean(axis=1, keepdims=True) for p in (first, last)]
    for axis, load, period in zip(axes, loads, (first, last), strict=True):
        image = axis.imshow(load, vmin=0, vmax=max(part.max() for part in loads), aspect="auto")
        title = f"passes {period.first + 1}-{period.last}: balancedness {period.balancedness:.2f}"
        axis.set(title=title, xlabel="GPU")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="tokens / mean tokens of the layer")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Serves, rebalances, and prints what it saw."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--passes", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="passes between rebalancings")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--redundant", type=int, default=8, help="slots beyond one per expert")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--skew", type=float, default=1.0, help="exponent of Zipf's law; 0 is even")
    parser.add_argument("--picture", type=Path, help="a PNG of the load of each GPU")
    options = parse(parser)
    for name in ("passes", "every", "layers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(options, name)}")
    if options.redundant < 0:
        parser.error(f"--redundant must be at least 0; got {options.redundant}")
    if not 0 <= options.skew < float("inf"):
        parser.error(f"--skew must be a number of at least 0; got {options.skew}")
    if options.picture:
        try:  # now, not after all the passes
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error(
                "--picture needs matplotlib, which is not installed: leave --picture out, or install "
                "the extra plot (in a checkout: pip install -e '.[plot]')"
            )

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 8)
    devices = jax.devices()
    if len(devices) == 1:
        devices = jax.devices("cpu")  # one GPU has nothing to balance: eight CPU devices show it
    mesh = jax.make_mesh((len(devices),), ("ep",), axis_types=(AxisType.Auto,), devices=devices)
    with jax.default_device(devices[0]):
        periods, change, compiled = serve(options, mesh)
    print(
        f"{options.layers} layers of {options.experts} experts on {len(devices)} devices "
        f"({devices[0].device_kind}), {options.tokens} tokens, top-{options.top_k}"
    )
    print("passes      balancedness   worst layer   experts that then changed device")
    for period in periods:
        turned = "   <- the stream turns" if period.first == options.passes // 2 else ""
        print(
            f"{period.first + 1:4}-{period.last:<4} {period.balancedness:12.3f} "
            f"{period.worst:13.3f} {period.moved:10}{turned}"
        )
    print(f"the same batch before and after a rebalancing: outputs differ by {change:.1e} at most")
    print(f"the step was compiled {compiled} time{'s' if compiled != 1 else ''}")
    if options.picture:
        half = [period for period in periods if period.last <= options.passes // 2] or periods
        try:
            draw(half[0], half[-1], options.picture)
        except OSError as error:
            raise SystemExit(f"not written: {error}") from None
        print(f"wrote {options.picture}")


if __name__ == "__main__":
    main()
