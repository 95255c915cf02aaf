"""sharded_fused_moe on 8 CPU devices: values and gradients of one device's fused_moe, within rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import moe_align_jax as maj
from tests.matmul.oracle import error
from tests.moe_layer.test_moe_layer import make_layer, normal, wanted


def mesh_of(axis_type=AxisType.Auto, **axes):
    count = int(np.prod(list(axes.values())))
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))


def check(mesh, options, layer_options, *, gradients=True):
    """Against one device: the result, the counts, and the gradient of everything that has one."""
    operands, given = make_layer(
        routing="dropped", experts=8, hidden=16, ffn=8, **{"tokens": 29, **layer_options}
    )
    x, first, second, weights, ids = operands
    if not gradients:
        y, counts = maj.sharded_fused_moe(
            *operands, mesh=mesh, return_tokens_per_expert=True, **options, **given
        )
        want, pairs = wanted(operands, given)
        assert error(y, want) < 1e-5
        np.testing.assert_array_equal(counts, pairs)
        return
    names = [name for name in ("bias_gate_up", "bias_down") if name in given]
    floats = (x, first, second, weights, *(given.pop(name) for name in names))
    direction = normal(np.random.default_rng(7), x.shape, "float32")

    def run(function, floats, ids, direction):
        *head, weights = floats[:4]
        biases = dict(zip(names, floats[4:], strict=True))
        y, counts = function(
            *(*head, weights, ids), return_tokens_per_expert=True, **biases, **given
        )
        return jnp.sum(y * direction), (y, counts)

    sharded = functools.partial(maj.sharded_fused_moe, mesh=mesh, **options)
    found, want = [
        jax.jit(jax.grad(functools.partial(run, f), has_aux=True))(floats, ids, direction)
        for f in (sharded, maj.fused_moe)
    ]
    np.testing.assert_array_equal(found[1][1], want[1][1])
    np.testing.assert_allclose(found[1][0], want[1][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(g[0]) for g in (found, want)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


WAYS = {
    "dispatch, boxes": ({}, {"bias": True}, False),
    "dispatch, rows": ({"max_low_latency_tokens": 1}, {"bias": True}, True),
    "replicate": ({"method": "replicate"}, {"bias": True, "num_valid_tokens": 17}, True),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_axis_at_once(way):
    """Experts, tensor and fsdp over 2 devices each."""
    options, layer, gradients = WAYS[way]
    mesh = mesh_of(data=2, ep=2, tp=2)
    axes = {"expert_axis": "ep", "data_axes": "data", "tensor_axis": "tp", "fsdp_axis": "data"}
    check(mesh, axes | options, layer, gradients=gradients)


MORE = {
    "weights on input": ("dispatch", {"weights_on_input": True}),
    "pair, transposed": ("dispatch", {"pair": True, "transpose_rhs": True, "bias": True}),
    "interleaved": ("replicate", {"interleaved": True, "bias": True}),
    "transposed, K = 1": ("dispatch", {"transpose_rhs": True, "top_k": 1}),
    "not gated": ("replicate", {"gated": False, "activation": "relu2", "tokens": 3}),
}


@pytest.mark.parametrize("name", MORE)
def test_layouts(name):
    method, layer = MORE[name]
    axes = {"expert_axis": "ep", "tensor_axis": "tp", "method": method}
    check(mesh_of(ep=4, tp=2), axes, layer, gradients=False)


def test_an_expert_named_twice_by_padding_pushes_nobody_out():
    """Tokens of padding with ids [0, 0]: the boxes of the low-latency mode hold a token once."""
    rng = np.random.default_rng(3)
    x, first, second = (
        normal(rng, shape, "float32") for shape in ((8, 16), (2, 16, 16), (2, 8, 16))
    )
    ids = np.array([[0, 0]] * 6 + [[0, 1]] * 2, np.int32)
    weights = np.array([[0, 0]] * 5 + [[0.25, 0.5]] + [[0.5, 0.5]] * 2, np.float32)
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,))
    operands = (x, first, second, weights, ids)
    got = jax.jit(functools.partial(maj.sharded_fused_moe, mesh=mesh, expert_axis="ep"))(*operands)
    np.testing.assert_allclose(got, maj.fused_moe(*operands), rtol=1e-5, atol=1e-5)


def test_explicit_axes():
    """Of the mesh that jax makes by default, with arrays that lie split over it."""
    mesh = mesh_of(AxisType.Explicit, ep=4, tp=2)
    (x, first, second, weights, ids), _ = make_layer(tokens=32, experts=8, hidden=16, ffn=8)
    place = functools.partial(NamedSharding, mesh)
    moved = (
        jax.device_put(x, place(Spec("ep"))),
        jax.device_put(first, place(Spec("ep", None, "tp"))),
        jax.device_put(second, place(Spec("ep", "tp"))),
        jax.device_put(weights, place(Spec("ep"))),
        jax.device_put(ids, place(Spec("ep"))),
    )
    with jax.set_mesh(mesh):
        y = maj.sharded_fused_moe(*moved, mesh=mesh, expert_axis="ep", tensor_axis="tp")
        assert jax.typeof(y).sharding.spec == Spec("ep", None)
    assert error(y, wanted((x, first, second, weights, ids), {})[0]) < 1e-5


def test_a_mesh_of_explicit_and_auto_axes():
    """Only the Explicit ones are written into an array's type."""
    kinds = (AxisType.Explicit, AxisType.Auto, AxisType.Explicit)
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((2, 2, 2), ("data", "ep", "tp"), axis_types=kinds)
    axes = {"expert_axis": "ep", "data_axes": "data", "tensor_axis": "tp", "fsdp_axis": "data"}
    check(mesh, axes, {"tokens": 13, "bias": True}, gradients=False)


def test_fsdp_gathers_weights_and_scatters_their_gradient():
    """The gradient lies as the weights do; its values are those that the test of all axes compares."""
    mesh = mesh_of(fsdp=4, ep=2)
    (x, first, second, weights, ids), _ = make_layer(tokens=16, experts=4, hidden=16, ffn=8)
    place = NamedSharding(mesh, Spec("ep", "fsdp"))
    stored = jax.device_put(first, place)
    call = functools.partial(
        maj.sharded_fused_moe, mesh=mesh, expert_axis="ep", fsdp_axis="fsdp", method="replicate"
    )

    @functools.partial(jax.jit, out_shardings=place)
    def gradient(w):
        return jax.grad(lambda w: jnp.sum(call(x, w, second, weights, ids) ** 2))(w)

    text = gradient.lower(stored).compile().as_text()
    assert "reduce-scatter" in text and "all-gather" in text


@pytest.mark.parametrize(
    ("kind", "text", "change"),
    [
        (TypeError, "mesh must be a jax.sharding.Mesh", {"mesh": None}),
        (ValueError, "expert_axis must name an axis", {"expert_axis": "experts"}),
        (ValueError, "data_axes must name an axis", {"data_axes": ("data", "dp")}),
        (TypeError, "data_axes must be the name of an axis", {"data_axes": 5}),
        (TypeError, "data_axes must be the name of an axis", {"data_axes": None}),
        (ValueError, "the axes must be different", {"tensor_axis": "ep"}),
        (ValueError, "the axes must be different", {"fsdp_axis": "ep"}),
        (ValueError, "method must be", {"method": "all_to_all"}),
        (ValueError, "w_down must hold a multiple of 4 experts", {"expert_axis": "data"}),
    ],
)
def test_errors(kind, text, change):
    (x, first, second, weights, ids), _ = make_layer(experts=2)
    given = {"mesh": mesh_of(data=4, ep=2), "expert_axis": "ep"} | change
    with pytest.raises(kind, match=f"^sharded_fused_moe: {text}.*; got .*\\. "):
        maj.sharded_fused_moe(x, first, second, weights, ids, **given)


def test_another_mesh_around_it():
    """A shard_map's, whose axes are no longer to be split, or that of jax.set_mesh."""
    (x, first, second, weights, ids), _ = make_layer(experts=2)
    mesh = mesh_of(pp=2, ep=2)
    stages = jnp.stack([x, x])

    def stage(x):
        y = maj.sharded_fused_moe(*(x[0], first, second, weights, ids), mesh=mesh, expert_axis="ep")
        return y[None]

    spec = {"mesh": mesh, "in_specs": Spec("pp"), "out_specs": Spec("pp")}
    wanted_mesh = "^sharded_fused_moe: mesh must be the mesh of jax.set_mesh"
    for names in ({"pp"}, {"pp", "ep"}):
        with pytest.raises(ValueError, match=wanted_mesh):
            jax.shard_map(stage, axis_names=names, **spec)(stages)
    with jax.set_mesh(mesh_of(ep=2)), pytest.raises(ValueError, match=wanted_mesh):
        stage(stages)


def test_no_tokens():
    (x, first, second, weights, ids), _ = make_layer(0, experts=2)
    y, counts = maj.sharded_fused_moe(
        *(x, first, second, weights, ids),
        mesh=mesh_of(ep=2),
        expert_axis="ep",
        return_tokens_per_expert=True,
    )
    assert y.shape == x.shape and counts.tolist() == [0, 0]
