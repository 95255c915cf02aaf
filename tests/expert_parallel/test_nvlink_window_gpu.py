"""The transport "nvlink_window" on GPUs of one host: against "nvlink", in graphs, late and abandoned."""

import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._expert_parallel.transports import windows
from moe_align_jax._expert_parallel.transports.nvlink import NvLink
from tests.expert_parallel.test_nvlink_gpu import Tokens, mesh  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
WINDOW = "nvlink_window"
COLLECTIVE = "uses_xla_collective_metadata = true"


def pair(given, transport, payload=None, room=None, initialize=False):
    """dispatch and combine in low-latency mode, an expert e multiplying by 1 + e / 64."""

    def body(x, ids, weights):
        got = given.dispatch(
            x, ids, weights, mode="low_latency", payload=payload, transport=transport,
            max_low_latency_tokens=512, max_tokens_per_expert=room, initialize=initialize,
        )  # fmt: skip
        used = jnp.arange(got.x.shape[1], dtype=jnp.int32)[None] < got.masked_m[:, None]
        used |= initialize  # then all rows are told of, zeros too
        rows = got.x.astype(jnp.float32)
        if got.scales is not None:
            rows *= jnp.repeat(got.scales, 128, axis=-1)
        local = given.experts // given.mesh.shape["ep"]
        first = jax.lax.axis_index("ep") * local
        scale = 1 + (first + jnp.arange(local, dtype=jnp.int32)).astype(jnp.float32) / 64
        rows = jnp.where(used[..., None], rows * scale[:, None, None], 0).astype(jnp.bfloat16)
        layout = tuple(got.handle.layout)
        return maj.combine(rows, got.handle), rows, got.masked_m, layout, got.handle.topk_weights

    return body


@pytest.mark.parametrize(
    ("tokens", "room", "payload", "initialize"),
    [
        (1, None, None, True),
        (8, None, "fp8", False),
        (8, None, "fp8", True),
        (128, None, "fp8", False),
        (128, None, None, True),
        (250, 3, "fp8_ue8m0", False),
    ],
)
def test_all_results_are_those_of_nvlink(
    monkeypatch,
    mesh,  # noqa: F811
    tokens,
    room,
    payload,
    initialize,
):
    """With `initialize` also those of four kernels, of which one fills the boxes with zeros."""
    given = Tokens(mesh, tokens, 4, seed=tokens, hidden=7168)
    spec = jax.sharding.PartitionSpec(("dp", "ep"))
    arguments = [given.placed(a) for a in (given.x, given.ids, given.weights)]
    results = []
    for transport, times, clears in ((WINDOW, 5, True), ("nvlink", 2, True), ("nvlink", 1, False)):
        monkeypatch.setattr(NvLink, "clears_boxes", clears)
        body = pair(given, transport, payload, room, initialize)
        step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
        results += [step(*arguments) for _ in range(times)]
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


def stepped(given, transport, pairs, donate=True):
    """A jitted step of so many pairs, each rank's tokens turned on by one expert each time."""
    spec = jax.sharding.PartitionSpec(("dp", "ep"))

    def body(x, ids, weights):
        for i in range(pairs):
            x = pair(given, transport)(x, (ids + i) % given.experts, weights)[0]
            x /= jnp.max(jnp.abs(x), axis=1, keepdims=True)
        return x

    step = jax.shard_map(body, mesh=given.mesh, in_specs=spec, out_specs=spec)
    return jax.jit(step, donate_argnums=0 if donate else ())


def settled(mesh, tokens, hidden=7168):  # noqa: F811
    """Tokens that all have experts."""
    given = Tokens(mesh, tokens, 2, seed=4, hidden=hidden)
    given.ids = np.abs(given.ids) % given.experts
    return given


def test_xla_takes_its_kernels_for_ordinary_ones(mesh):  # noqa: F811
    given = settled(mesh, 8)
    arguments = [given.placed(a) for a in (given.x, given.ids, given.weights)]
    texts = [stepped(given, t, 1).lower(*arguments).as_text() for t in (WINDOW, "nvlink")]
    assert (COLLECTIVE in texts[0], COLLECTIVE in texts[1]) == (False, True)
    assert windows._windows


@pytest.mark.parametrize(("tokens", "donate"), [(8, True), (128, False)])
def test_hundreds_of_executions(mesh, tokens, donate):  # noqa: F811
    """300 executions of 8 pairs: the first ones kernel by kernel, the others as XLA's graph; bit for bit."""
    given = settled(mesh, tokens)
    results = []
    for transport in (WINDOW, "nvlink"):
        step = stepped(given, transport, 8, donate)
        x, ids, weights = (given.placed(a) for a in (given.x, given.ids, given.weights))
        checkpoints = []
        for number in range(300):
            x = step(x, ids, weights)
            if number in (0, 1, 2, 50, 299):
                checkpoints.append(np.asarray(x))
                assert np.isfinite(checkpoints[-1].astype(np.float32)).all()
        results.append(checkpoints)
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_two_programs_take_turns_over_one_window(mesh):  # noqa: F811
    """Of other sizes, so that each writes where the other one's rows and flags were."""
    programs = []
    for tokens in (5, 128, 40):
        given = settled(mesh, tokens)
        step = stepped(given, WINDOW, 3, donate=False)
        arguments = [given.placed(a) for a in (given.x, given.ids, given.weights)]
        want = np.asarray(stepped(given, "nvlink", 3, donate=False)(*arguments))
        programs.append((step, arguments, want))
    for number in (*range(30), 1, 1, 0, 0, 2, 2, 1):
        step, arguments, want = programs[number % 3]
        np.testing.assert_array_equal(np.asarray(step(*arguments)), want)
    # Without waiting, so that one device may run ahead.
    results = [(programs[k % 3][0](*programs[k % 3][1]), programs[k % 3][2]) for k in range(60)]
    for got, want in results:
        np.testing.assert_array_equal(np.asarray(got), want)


def test_loops_rematerialisation_and_gradients(mesh):  # noqa: F811
    given = Tokens(mesh, 9, 3, seed=2, dtype=jnp.float32)
    # A layer that enlarges x by 15 three times would enlarge what float32 rounds by thousands.
    given.weights /= 16

    def body(transport, x, ids, weights):
        layer = given.layer(mode="low_latency", transport=transport, initialize=False)

        def loss(x, weights):
            one = jax.checkpoint(lambda x: jnp.tanh(layer(x, ids, weights)))
            x, _ = jax.lax.scan(lambda x, _: (one(x), None), x, None, length=3)
            return jnp.sum(jnp.sin(x))

        return jax.grad(loss, argnums=(0, 1))(x, weights)

    ours, theirs = (given.run(functools.partial(body, t)) for t in (WINDOW, "all_to_all"))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(other), rtol=1e-4, atol=1e-4)


def busy(device, milliseconds):
    """Work for so long, about, on one device, begun when this returns."""

    @jax.jit
    def work(x):
        return jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x @ x), x)

    # 8192^3 products of bfloat16 take about 2 ms on an H200.
    rounds = max(1, milliseconds // 2)
    return work(jax.device_put(jnp.ones((8192, 8192), jnp.bfloat16), device))


@pytest.mark.parametrize("transport", [WINDOW, "nvlink", "all_to_all"])
def test_a_device_that_comes_late(mesh, transport):  # noqa: F811
    given = settled(mesh, 64)
    step = stepped(given, transport, 4, donate=False)
    arguments = [given.placed(a) for a in (given.x, given.ids, given.weights)]
    want = np.asarray(step(*arguments))
    for late in mesh.devices.flat:
        busy(late, 20)
        for _ in range(3):
            np.testing.assert_array_equal(np.asarray(step(*arguments)), want)


ABANDONED = """
    import sys
    import jax, numpy as np
    from moe_align_jax._simt import mlir
    mlir.PATIENCE = 10**8  # 0.1 s
    from tests.expert_parallel.test_nvlink_window_gpu import busy, settled, stepped

    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, len(jax.devices())), ("dp", "ep"), axes)
    given = settled(mesh, 8)
    step = stepped(given, "TRANSPORT", 1, donate=False)
    arguments = [given.placed(a) for a in (given.x, given.ids, given.weights)]
    np.asarray(step(*arguments))
    jax.block_until_ready(busy(jax.devices()[0], 2))
    busy(jax.devices()[0], 2000)
    try:
        for shard in step(*arguments).addressable_shards:
            try:
                np.asarray(shard.data)
                print("no error on", shard.device, flush=True)
            except Exception as error:
                print("error on", shard.device, type(error).__name__, str(error)[:120], flush=True)
    finally:
        sys.stdout.flush()
"""


def run_over_two_gpus(program: str, transport: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, which an error of a GPU ends."""
    if len(jax.devices("gpu")) < 2:
        pytest.skip("needs two GPUs")
    code = textwrap.dedent(program).replace("TRANSPORT", transport)
    command = [sys.executable, "-X", "faulthandler", "-c", code]  # says which signal ended it
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("transport", [WINDOW])
def test_a_device_that_never_comes_is_an_error_in_time(transport):
    """Here for the device that waits; the other one then waits for it in turn."""
    ended = run_over_two_gpus(ABANDONED, transport)
    told = ended.stdout + ended.stderr
    assert "no error on" not in ended.stdout, told
    assert "error on" in ended.stdout or ended.returncode != 0, told
    assert "CUDA_ERROR_LAUNCH_FAILED" in told or "launch failure" in told, told[-3000:]


GIVEN_UP = """
    import ctypes, os, threading, time
    import jax, numpy as np
    import moe_align_jax as maj
    from moe_align_jax._simt import mlir
    mlir.PATIENCE = 3 * 10**9  # 3 s
    from tests.expert_parallel.test_nvlink_window_gpu import settled

    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, len(jax.devices())), ("dp", "ep"), axes)
    given = settled(mesh, 8)

    def body(x, ids, weights):
        def pair(_, x):
            options = {"mode": "low_latency", "transport": "TRANSPORT", "initialize": False}
            got = given.dispatch(x, ids, weights, **options)
            return maj.combine(got.x, got.handle)
        return jax.lax.fori_loop(0, 20000, pair, x)  # 0.2 s and more

    spec = jax.sharding.PartitionSpec(("dp", "ep"))
    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
    arguments = [given.placed(a) for a in (given.x, given.ids, given.weights)]
    jax.block_until_ready(step(*arguments))

    cuda = ctypes.CDLL("libcuda.so.1")
    def call(name, *arguments):
        if error := getattr(cuda, name)(*arguments):
            raise OSError(f"{name}: {error}")
    last, device = jax.local_devices()[-1], ctypes.c_int()
    context, module, function, stream = (ctypes.c_void_p() for _ in range(4))
    code = b".version 8.0\\n.target sm_90\\n.address_size 64\\n.visible .entry t() { trap; ret; }\\n\\0"
    call("cuDeviceGet", ctypes.byref(device), last.local_hardware_id)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuModuleLoadData", ctypes.byref(module), code)
    call("cuModuleGetFunction", ctypes.byref(function), module, b"t")
    call("cuStreamCreate", ctypes.byref(stream), 1)  # 1: it waits for no other stream
    told, began = {}, time.time()

    def look(device, shard):
        try:
            np.asarray(shard.data)
            told[device] = "no error on"
        except Exception as error:
            told[device] = "error on"
            print(type(error).__name__, str(error)[:200], flush=True)
        print(f"{told[device]} {device} after {time.time() - began:.1f} s", flush=True)

    def work():
        try:
            shards = step(*arguments).addressable_shards
        except Exception as error:
            told.update(dict.fromkeys(mesh.devices.flat, "error on"))
            print("error at the call:", type(error).__name__, str(error)[:200], flush=True)
            return
        for shard in shards:
            threading.Thread(target=look, args=(shard.device, shard), daemon=True).start()

    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.06)
    call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, stream, None, None)
    print("given up while it ran:", not told, flush=True)
    while len(told) < mesh.size and time.time() < began + 15:
        time.sleep(0.05)
    count = sum(found == "error on" for found in told.values())
    print(f"{count} of {mesh.size} are told", flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("transport", [WINDOW, "nvlink", "all_to_all"])
def test_a_step_that_one_gpu_gives_up_is_an_error_on_all(transport):
    """By a trap of another kernel on the last GPU, while the step runs."""
    ended = run_over_two_gpus(GIVEN_UP, transport)
    told = f"ended with {ended.returncode}\n{ended.stdout}{ended.stderr[-3000:]}"
    print(told)
    assert "given up while it ran: True" in ended.stdout, told
    count = len(jax.devices("gpu"))
    assert f"{count} of {count} are told" in ended.stdout or ended.returncode < 0, told
