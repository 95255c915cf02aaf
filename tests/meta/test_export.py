"""Programs that take or return our types, written by jax.export and read again: structure and bits."""

import dataclasses
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax._expert_parallel.transports.ragged import RaggedPlan
from moe_align_jax._lowering import export

pytest.importorskip("flatbuffers", reason="the extra export is not installed")

IDS = np.array([[1, 0], [1, -1], [2, 1]], np.int32)
WEIGHTS = np.array([[0.5, 0.25], [1.0, 2.0], [0.125, 3.0]], np.float32)
X = np.arange(6, dtype=np.float32).reshape(3, 2)
COUNTS = np.array([[5, 1, 2, 3], [1, 1, 9, 1]])


def there_and_back(function, *arguments):
    """What the exported, written and read function returns, beside what the function itself does."""
    exported = jax.export.export(jax.jit(function))(*arguments)
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree and again.out_tree == exported.out_tree
    return again.call(*arguments), jax.jit(function)(*arguments)


def assert_identical(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)


def mesh():
    devices = jax.devices("cpu")[:2]
    return jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,), devices=devices)


def load(mode="stat", **options):
    sizes = {"num_layers": 12, "num_physical_experts": 4, "num_passes": 3, "recording": True}
    return maj.init_expert_load(mode, **sizes, **options)


def location(dispatch="dynamic"):
    return maj.ExpertLocation.from_counts(
        COUNTS, num_physical_experts=6, num_gpus=2, dispatch=dispatch
    )


def dispatched(mode, given):
    """A dispatch over two devices that returns what `given` makes of its result, and its arguments."""

    def step(x, ids, weights):
        got = maj.dispatch(x, ids, weights, axis_name="ep", num_experts=4, mode=mode)
        return given(got)

    step = jax.shard_map(step, mesh=mesh(), in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
    split = jax.NamedSharding(mesh(), P("ep"))
    return step, [jax.device_put(np.tile(array, (2, 1)), split) for array in (X, IDS, WEIGHTS)]


# Of each public type a value, as a program takes it.
VALUES = {
    "AlignedBlocks": lambda: maj.moe_align_block_size(IDS, block_size=2, num_experts=3),
    "AlignedBlocks with inverse": lambda: maj.moe_align_block_size(
        IDS, block_size=2, num_experts=3, return_inverse=True
    ),
    "CappedPairs": lambda: maj.drop_over_capacity(IDS, num_experts=3, capacity_factor=1.0),
    "ContiguousLayout": lambda: maj.permute_to_contiguous(X, IDS, num_experts=3)[1],
    "MaskedLayout": lambda: maj.permute_to_masked(X, IDS, num_experts=3)[1],
    "ExpertLoad": load,
    "ExpertLoad in the midst of a pass": lambda: maj.record_expert_load(
        maj.record_expert_load(load(), 10, jnp.arange(4)), 2, jnp.ones(4, jnp.int32)
    ),
    "ExpertLoad per token": lambda: load("per_token", max_tokens=4, top_k=2),
    "ExpertLoad with a map": lambda: load(num_logical_experts=3),
    "ExpertLoad compiled out": lambda: load(None),
    "ExpertLocation": location,
    "ExpertLocation static": lambda: location("static"),
    "ExpertLocation of a layer": lambda: location("round_robin").layer(1),
    "ExpertMoves": lambda: maj.plan_expert_moves([[0, 1, 2, 0]], [[2, 1, 0, 1]], num_gpus=2),
    "ExpertPlacement": lambda: maj.rebalance_experts(COUNTS, 6, 1, 1, 2),
    "LoadRecord": lambda: maj.collect_expert_load(
        maj.record_expert_load(load(), None, jnp.ones((12, 4), jnp.int32))
    )._replace(forward_pass_id=np.zeros(1, np.int32)),
    "TransportChoice": lambda: maj.select_transport(4, top_k=2, num_ranks=2, platform="cpu"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_program_that_takes_and_returns_it(name):
    value = VALUES[name]()
    # The host's records hold int64, which a program without x64 narrows.
    value = jax.tree.map(lambda leaf: jnp.asarray(leaf), value)
    got, want = there_and_back(lambda v: jax.tree.map(lambda leaf: leaf + 1, v), value)
    assert type(got) is type(value) and type(got).__name__ == name.split()[0]
    assert_identical(got, want)
    assert_identical(jax.tree.map(lambda leaf: leaf - 1, got), value)


def test_every_public_type_that_can_be_an_argument_is_tried():
    """So that a type that is added is registered, too."""
    tried = {name.split()[0] for name in VALUES} | {"Dispatched", "DispatchHandle"}
    no_arrays = {
        "Selection",
        "ExpertWeights",
    }  # strings, and what is unpacked: no program takes them
    for name in maj.__all__:
        value = getattr(maj, name)
        if isinstance(value, type) and (
            hasattr(value, "_fields") or dataclasses.is_dataclass(value)
        ):
            assert name in tried | no_arrays, f"{name} is a pytree that no test serialises"


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_a_program_that_returns_what_dispatch_gives_and_one_that_takes_it(mode):
    step, arguments = dispatched(mode, given=lambda got: got)
    got, want = there_and_back(step, *arguments)
    assert type(got) is maj.Dispatched and type(got.handle) is maj.DispatchHandle
    assert_identical(got, want)
    assert got.choice == want.choice and got.choice.reasons == want.choice.reasons
    assert got.handle.info == want.handle.info and got.handle.info.group.size == 2

    back = jax.shard_map(
        lambda got: maj.combine(got.x, got.handle),
        mesh=mesh(),
        in_specs=P("ep"),
        out_specs=P("ep"),
        check_vma=False,
    )
    got, want = there_and_back(back, want)
    assert_identical(got, want)
    if mode == "low_latency":  # sum over k of the weights of pairs in range, times x
        kept = np.where(IDS >= 0, WEIGHTS, 0).sum(1, keepdims=True)
        np.testing.assert_allclose(got, np.tile(kept * X, (2, 1)), rtol=1e-6)


def test_the_plan_of_a_transport_that_no_cpu_has():
    plan = RaggedPlan(*(jnp.arange(n) for n in (1, 2, 3, 4)))
    assert_identical(*there_and_back(lambda p: p, plan))


def test_tuple_axis_names_stay_tuples():
    step, arguments = dispatched("normal", given=lambda got: got.handle)
    got, _ = there_and_back(step, *arguments)
    info = dataclasses.replace(
        got.info, group=got.info.group._replace(axis_name=("a", ("b",)), size=np.int64(2))
    )
    again = export._load(export._dump(info))
    assert again == info and again.group.axis_name == ("a", ("b",))
    assert type(again.group) is type(info.group)


def test_a_field_that_was_added_takes_its_default(monkeypatch):
    """As in a file of an earlier release."""
    dump = export._dump
    earlier = {"dispatch"}  # with a default

    def without(value):
        value["static"] = {k: v for k, v in value["static"].items() if k not in earlier}
        return dump(value)

    monkeypatch.setattr(export, "_dump", without)
    exported = jax.export.export(jax.jit(lambda v: v))(location())
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree
    exported = jax.export.export(jax.jit(lambda v: v))(location("round_robin"))
    assert jax.export.deserialize(exported.serialize()).in_tree == again.in_tree


def test_what_cannot_be_written_says_so():
    with pytest.raises(NotImplementedError, match="cannot write a static object"):
        export._dump({"field": object()})
    with pytest.raises(ValueError, match="static Unknown, which this moe_align_jax does not know"):
        export._load(b'["Unknown", {}]')


@pytest.mark.parametrize(
    "name, make",
    [
        ("AlignedBlocks", "m.moe_align_block_size(np.zeros(2, 'i4'), block_size=2, num_experts=2)"),
        ("ExpertLocation", "m.ExpertLocation.trivial(1, 2, 4)"),
    ],
)
def test_another_process_that_has_the_type_reads_it(tmp_path, name, make):
    file = tmp_path / "program"
    write = (
        f"import jax, jax.export, numpy as np, moe_align_jax as m; value = {make};"
        "exported = jax.export.export(jax.jit(lambda v: v))(value);"
        f"open({str(file)!r}, 'wb').write(exported.serialize())"
    )
    read = (
        f"import jax, jax.export; from moe_align_jax import {name};"
        f"again = jax.export.deserialize(bytearray(open({str(file)!r}, 'rb').read()));"
        f"print(again.in_tree.children()[0].children()[0].node_data()[0] is {name})"
    )
    for code in (write, read):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"
