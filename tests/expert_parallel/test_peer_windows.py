"""Kernels that meet in windows: many launches over one window on the emulator, mutants, what is lowered."""

import ctypes
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import expert_parallel
from moe_align_jax._expert_parallel import nvlink_kernels
from moe_align_jax._expert_parallel.nvlink_kernels import Combine, Dispatch, Field, Send
from moe_align_jax._expert_parallel.transports import nvlink, peer_access, windows
from moe_align_jax._simt import emulator, mosaic, mosaic_machine, window
from moe_align_jax._simt.emulator import faults
from moe_align_jax._simt.language import Devices, Kernel
from tests.simt.mutants import WINDOW, Mutant, markers, mutated

BYTES, BF16 = 1 << 23, np.dtype(jnp.bfloat16)
CODES = np.dtype(jnp.float8_e4m3fn)


def dispatch(rng, devices, tokens, top_k, local, room, columns, quantise=None):
    """The kernel, and each device's operands: ids, weights, rows."""
    send = Send(tokens, top_k, (Field(columns, BF16),), Devices(devices), local, True, quantise)
    ids = rng.integers(-1, devices * local + 1, (devices, tokens, top_k)).astype(np.int32)
    weights = rng.random((devices, tokens, top_k), np.float32)
    x = rng.standard_normal((devices, tokens, columns)).astype(BF16)
    return launch(Dispatch(send, room), ids, weights, x)


def combine(rng, devices, tokens, top_k, local, columns, at_home=False):
    """Every pair has a row of its own, by its number. `at_home`: tokens have experts of their own device."""
    ids = rng.integers(0, devices * local, (devices, tokens, top_k)).astype(np.int32)
    if at_home:
        ids = ids % local + local * np.arange(devices, dtype=np.int32)[:, None, None]
    every = ids.reshape(1, -1, top_k) - local * np.arange(devices, dtype=np.int32)[:, None, None]
    mine = (every >= 0) & (every < local)
    rows = np.arange(every[0].size, dtype=np.int32).reshape(every[0].shape)
    y = rng.standard_normal((devices, rows.size, columns)).astype(BF16)
    weights = rng.random(mine.shape, np.float32)
    problem = Combine(tokens, top_k, rows.size, columns, BF16, Devices(devices), local)
    row, local_ids = (np.where(mine, x, np.int32(-1)) for x in (rows, every))
    return launch(problem, y, row, weights, local_ids, ids)


def launch(problem, *operands):
    kernel = nvlink_kernels.build(problem)
    return kernel, [[a[d].view(np.int32) for a in operands] for d in range(len(operands[0]))]


@functools.cache
def launches(devices, seed=0):
    """Of several sizes: one finds in the window what others left. And what each of them gives alone."""
    rng = np.random.default_rng(seed)
    each = [
        dispatch(rng, devices, 3, 2, 2, 4, 8),
        combine(rng, devices, 3, 2, 2, 8),
        dispatch(rng, devices, 5, 3, 1, 4, 24),
        combine(rng, devices, 2, 3, 1, 1032),
        dispatch(rng, devices, 3, 2, 2, 4, 256, CODES),
        dispatch(rng, devices, 3, 2, 2, 4, 8),
        combine(rng, devices, 3, 2, 2, 8, at_home=True),  # no sum of another device to wait for
        dispatch(rng, devices, 3, 2, 2, 4, 8),
    ]
    alone = [emulator.run_on_devices(kernel, given) for kernel, given in each]
    return each, [
        [mine[: len(kernel.outputs)] for mine in every]
        for (kernel, _), every in zip(each, alone, strict=True)
    ]


# By chance; and each device as far ahead of the others as it can be, the stores of all late or prompt.
SCHEDULES = [
    (0, (), 0.3), (1, (0,), 0.9), (2, (0, 1, 2), 0.0), (3, (2, 1, 0), 0.0), (4, (1,), 0.1),
]  # fmt: skip


def check(monkeypatch, devices=2, epoch=0, schedules=SCHEDULES, tagged=True) -> None:
    """By what is imported now. With `tagged` False rows travel as they do where tagged words are too few."""
    emulated = importlib.import_module("moe_align_jax._simt.emulator.windows")
    if not tagged:
        monkeypatch.setattr(emulated._Cta, "tagged_words", 0)
    each, want = launches(devices)
    for schedule in schedules:
        got = emulated.run_in_window(
            each, emulated.Schedule(*schedule), num_bytes=BYTES, epoch=epoch
        )
        for ours, theirs in zip(got, want, strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                for a, b in zip(mine, other, strict=True):
                    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("devices", "schedules", "tagged"),
    [(2, SCHEDULES, True), (2, SCHEDULES[1:3], False), (3, SCHEDULES[1:3], True)],
)
def test_launches_over_one_window_give_what_each_gives_alone(
    monkeypatch, devices, schedules, tagged
):
    check(monkeypatch, devices, schedules=schedules, tagged=tagged)


def test_the_epoch_goes_on_after_its_greatest(monkeypatch):
    check(monkeypatch, epoch=-3, schedules=SCHEDULES[1:3])


def test_rows_of_few_tokens_carry_their_epoch(monkeypatch):
    """Those of 8 tokens of DeepSeek-V3's size, with no fence; behind those of 128 is a flag."""
    counts = {}
    for name in ("put_tagged", "device_begun", "device_arrive"):
        real = getattr(mosaic_machine.WindowedMosaic, name)

        def counted(self, *args, real=real, name=name):
            counts[name] = counts.get(name, 0) + 1
            return real(self, *args)

        monkeypatch.setattr(mosaic_machine.WindowedMosaic, name, counted)
    for tokens, tagged in ((8, True), (128, False)):
        send = Send(tokens, 8, (Field(7168, BF16),), Devices(2), 128, True, CODES)
        rows = 2 * tokens * 8
        for problem in (
            Dispatch(send, 2 * tokens),
            Combine(tokens, 8, rows, 7168, BF16, Devices(2), 128),
        ):
            counts.clear()
            over = window.Window(windows.FIRST_ADDRESS, windows.SIZES[1])
            run = jax.jit(mosaic.launcher(nvlink_kernels.build(problem), window=over))
            given = [((1,), jnp.int32), *problem.inputs.values()]
            lowered(run, [jax.ShapeDtypeStruct(*one) for one in given])
            assert (counts.get("device_begun"), counts.get("device_arrive")) == (
                (1, None) if tagged else (None, 1)
            )
            assert ("put_tagged" in counts) == tagged


MUTANTS = (
    Mutant(WINDOW, "there is one half", "self._half = self.const(0)", "wrong"),
    Mutant(
        WINDOW,
        "peers are told without a fence",
        "self._arrive(self._tell_alone)",
        "wrong",
    ),
    Mutant(WINDOW, "tickets are not taken back", "pass", "wrong"),
    Mutant(WINDOW, "the epoch stays", "pass", "wrong"),
    Mutant(WINDOW, "no device is waited for", "pass", "wrong"),
    Mutant(
        WINDOW,
        "a word is put without its epoch",
        "self._put(self._at_rank(rank), self._mail(index), value, self.const(0))",
        "DivergentBarrier",
    ),
    Mutant(
        WINDOW,
        "tagged words are put without their epoch",
        "epoch = self.const(0)",
        "DivergentBarrier",
    ),
)


def test_every_marker_has_its_mutant():
    assert {(m.module, m.name) for m in MUTANTS} == markers(WINDOW)


# Of rows that a flag follows. Stores that come through one by one: some of a row may come behind its flag.
UNTAGGED = {
    "peers are told without a fence": [(seed, (), 0.1) for seed in range(7, 12)],
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant, monkeypatch):
    tagged, schedules = mutant.name not in UNTAGGED, UNTAGGED.get(mutant.name, SCHEDULES)
    with mutated(mutant), pytest.raises(mutant.errors):
        check(monkeypatch, schedules=schedules, tagged=tagged)


def test_a_kernel_that_does_not_fit_is_refused():
    emulated = importlib.import_module("moe_align_jax._simt.emulator.windows")
    kernel, _ = one = combine(np.random.default_rng(0), 2, 2, 1, 1, 1032)
    needed = window.bytes_needed(kernel)
    # Half a window holds the parts of both ranks: 2 * 2 rows of 516 words, in multiples of 64.
    assert needed == 4 * (window.DATA + 2 * (2112 + 2 * window.TAGGED))
    emulated.run_in_window([one], emulated.Schedule(0), num_bytes=needed)
    with pytest.raises(faults.OutOfBounds, match="does not fit"):
        emulated.run_in_window([one], emulated.Schedule(0), num_bytes=needed - 4)


def put_and_take(put, take=lambda t: None):
    """A launch over windows in which thread 0 of each of two devices puts words by `put(t, rank)`."""
    emulated = importlib.import_module("moe_align_jax._simt.emulator.windows")

    def body(t, r):
        with t.if_(t.thread_id().eq(0)):
            put(t, 1 - t.rank())
        t.device_begun()
        t.device_wait()
        with t.if_(t.thread_id().eq(0)):
            found = take(t)
            t.store(r.out, 0, found[0][-1] if found else 7)

    one = Kernel(
        name="k", body=body, inputs={}, outputs={"out": (1,)}, num_warpgroups=1,
        devices=Devices(2), inbox=4,
    )  # fmt: skip
    launches = [(one, [[], []])] * 3  # in both halves
    got = emulated.run_in_window(launches, emulated.Schedule(0), num_bytes=BYTES)
    return [int(out[0]) for launch in got for [out] in launch]


LAST = window.TAGGED - 1


def tagged(index, *words, rank=0):
    return lambda t, peer: t.put_tagged(peer + rank, t.const(index), *words)


@pytest.mark.parametrize(
    ("put", "take"),
    [
        (tagged(LAST, 5), lambda t: t.take_tagged([(t.const(LAST), 1)])),
        (tagged(LAST - 1, 4, 5), lambda t: t.take_tagged([(t.const(LAST - 1), 2)])),
        (lambda t, peer: t.put(peer, 3, t.const(5)), lambda t: t.take([(t.const(3), 1)])),
    ],
)
def test_words_are_put_up_to_the_last_place(put, take):
    assert put_and_take(put, take) == [5] * 6


@pytest.mark.parametrize(
    "put",
    [
        tagged(-1, 5),
        tagged(LAST + 1, 5),  # in the first half: the other half's staged arrays
        tagged(LAST, 4, 5),
        tagged(1, 4, 5),  # two by one access, of 16 bytes, from 8 bytes on
        tagged(0, 5, rank=1),
        tagged(0, 5, rank=-2),
        lambda t, peer: t.put(peer, -1, t.const(5)),
        lambda t, peer: t.put(peer, 4, t.const(5)),
    ],
)
def test_a_word_is_put_where_one_of_its_kind_stands(put):
    with pytest.raises(faults.OutOfBounds, match="puts"):
        put_and_take(put)


def test_a_word_is_put_once_in_a_launch():
    with pytest.raises(faults.RaceError, match="put once"):
        put_and_take(lambda t, peer: [t.put_tagged(peer, t.const(6), word) for word in (5, 5)])


def test_a_word_is_taken_where_one_of_its_kind_stands():
    for index in (-1, LAST + 1):
        with pytest.raises(faults.OutOfBounds, match="takes"):
            put_and_take(tagged(LAST, 5), lambda t, at=index: t.take_tagged([(t.const(at), 1)]))


# -- what is lowered ---------------------------------------------------------------------------------------


BY_XLA = "uses_xla_collective_metadata = true"


def step_over(mesh, initialize=False, **options):
    experts = 4 * mesh.shape["ep"]

    def step(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=experts, transport="nvlink_window",
            initialize=initialize, **options,
        )  # fmt: skip
        return maj.combine(got.x.astype(jnp.bfloat16), got.handle)

    # Under check_vma x is the same along "dp": that the kernel's windows are not must not show.
    spec, tokens = P("ep"), 3 * mesh.shape["ep"]
    shapes = [((tokens, 256), jnp.bfloat16), ((tokens, 5), jnp.int32), ((tokens, 5), jnp.float32)]
    program = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))
    return program, [jax.ShapeDtypeStruct(*one) for one in shapes]


def lowered(program, structs) -> str:
    return program.trace(*structs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def given_windows(monkeypatch):
    """As on a machine with GPUs, with windows where no memory is; the (kernel, mesh) that want one."""
    wanted = []

    def for_kernel(kernel, mesh):
        wanted.append((kernel, mesh))
        return window.Window(windows.FIRST_ADDRESS, windows.SIZES[0])

    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    monkeypatch.setattr(windows, "for_kernel", for_kernel)
    return wanted


@pytest.mark.parametrize(
    ("shape", "names", "initialize"), [((8,), ("ep",), True), ((2, 4), ("dp", "ep"), False)]
)
def test_a_step_lowers_to_ordinary_kernels(given_windows, shape, names, initialize):
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    text = lowered(*step_over(mesh, initialize))
    assert text.count("@mosaic_gpu_v2") == 2 and BY_XLA not in text
    for what in ("all_to_all", "all_gather", "permute_to_masked", "zeros"):
        assert what not in text
    assert [kernel.name for kernel, _ in given_windows] == ["moe_dispatch", "moe_combine"]
    for kernel, found in given_windows:
        assert found == mesh and kernel.devices == Devices(mesh.shape["ep"], 1)


def test_what_has_no_window_goes_by_xla(given_windows, monkeypatch):
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    program, structs = step_over(mesh)
    # A program for another process must not hold an address of this one.
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(program, platforms=("cuda",), disabled_checks=checks)(*structs)
    assert exported.mlir_module().count(BY_XLA) == 2 and not given_windows
    # The kernel clears boxes in windows alone, so that a selection of XLA's stands behind it here.
    program, structs = step_over(mesh, initialize=True, payload="fp8")
    cleared = jax.export.export(program, platforms=("cuda",), disabled_checks=checks)(*structs)
    assert cleared.mlir_module().count(BY_XLA) == 2 and not given_windows
    for kept, module in ((2, cleared), (0, exported)):  # of codes and scales
        assert module.mlir_module().count("stablehlo.select") == kept
    # Mode "normal" moves many rows, which windows have no room for.
    assert BY_XLA in lowered(*step_over(mesh, mode="normal")) and not given_windows
    monkeypatch.undo()  # these devices are CPUs of this process
    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    assert lowered(*step_over(mesh)).count(BY_XLA) == 2


def test_boxes_that_no_window_has_cleared_are_cleared_behind_the_kernel(monkeypatch):
    """Whatever lies in rows that are not in use; the rest is as the kernel gave it."""
    codes = np.dtype(jnp.float8_e4m3fn)
    send = Send(3, 2, (Field(256, BF16),), Devices(2), 4, routing=True, quantise=codes)
    problem = Dispatch(send, 5, initialize=True)
    rng = np.random.default_rng(0)
    gave = {n: rng.integers(0, 256, (*s, d.itemsize), np.uint8).view(d)[..., 0]
            for n, (s, d) in (problem.outputs | problem.staged).items()}  # fmt: skip
    gave["masked_m"] = np.array([0, 5, 2, 1], np.int32)
    built = []

    def launcher(kernel):
        built.append(kernel)
        return lambda *operands: list(map(jnp.asarray, gave.values()))

    monkeypatch.setattr(mosaic, "launcher", launcher)
    got = nvlink._clearing_behind(problem)()
    [kernel] = built
    assert kernel.name == "moe_dispatch" and len(got) == len(problem.outputs)
    assert "boxes0" in kernel.partial  # rows that are not in use it leaves alone
    for (name, want), found in zip(gave.items(), got, strict=False):
        if name.startswith("boxes"):
            want = want.copy()
            for expert, used in enumerate(gave["masked_m"]):
                want[expert, used:] = 0
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), want.view(np.uint8), name)


# -- the memory --------------------------------------------------------------------------------------------


class Driver:
    """Of CUDA: remembers what it was asked; `failing` names what fails."""

    def __init__(self, failing=""):
        self.calls, self.failing, self.handles = [], failing, 100

    def __getattr__(self, name):
        return functools.partial(self.call, name)

    def call(self, name, *arguments):
        plain = [a.value if isinstance(a, ctypes._SimpleCData) else a for a in arguments]
        self.calls.append((name, *plain))
        if name == self.failing:
            return 2
        if name == "cuMemAddressReserve":
            arguments[0]._obj.value = plain[3]  # as hinted
        elif name == "cuMemCreate":
            self.handles += 1
            arguments[0]._obj.value = self.handles
            asked = arguments[2]._obj
            self.calls[-1] = (name, plain[1], asked.type, asked.location.type, asked.location.id)
        elif name == "cuDeviceGet":
            arguments[0]._obj.value = plain[1]
        elif name == "cuDevicePrimaryCtxRetain":
            arguments[0]._obj.value = 7 + plain[1]
        return 0

    def of(self, *names):
        return [call for call in self.calls if call[0] in names]


class FakeMesh:
    devices: np.ndarray


class Gpu:
    platform = "gpu"

    def __init__(self, number):
        self.local_hardware_id = number


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(windows, "_windows", {})
    monkeypatch.setattr(windows, "_next_address", windows.FIRST_ADDRESS)
    made = Driver()
    monkeypatch.setattr(peer_access, "library", lambda: made)
    return made


def test_a_window_is_made_once(driver):
    gpus, size, first = [Gpu(0), Gpu(3)], windows.SIZES[0], windows.FIRST_ADDRESS
    found = windows.find(gpus, Devices(2), 1)
    assert found == window.Window(first, size)
    # cuda.h: pinned memory (1) on a device (1) by its number; each at its place; for all to read and write.
    assert driver.of("cuMemCreate") == [("cuMemCreate", size, 1, 1, n) for n in (0, 3)]
    assert [c[1:5] for c in driver.of("cuMemMap")] == [
        (first, size, 0, 101),
        (first + size, size, 0, 102),
    ]
    [(_, address, num_bytes, access, count)] = driver.of("cuMemSetAccess")
    assert (address, num_bytes, count) == (first, 2 * size, 2)
    assert [(a.location.type, a.location.id, a.flags) for a in access] == [(1, 0, 3), (1, 3, 3)]
    cleared = [c[1:] for c in driver.of("cuMemsetD32_v2")]
    assert cleared == [(first, 0, size // 4), (first + size, 0, size // 4)]
    contexts = [c[1:] for c in driver.of("cuCtxPushCurrent_v2")]
    assert contexts == [(7,), (10,)] and len(driver.of("cuCtxPopCurrent_v2")) == 2

    asked = len(driver.calls)
    assert windows.find(gpus, Devices(2), size) == found and len(driver.calls) == asked
    # Others where sizes, groups or the order of devices differ, none of which has what another one has.
    others = [
        windows.find(gpus, Devices(2), size + 1),
        windows.find(gpus, Devices(1, 2), 1),
        windows.find(gpus[::-1], Devices(2), 1),
    ]
    ends = [one.address + 2 * one.num_bytes for one in (found, *others)]
    assert [one.address for one in others] == ends[:3]
    with pytest.raises(ValueError, match="at most"):
        windows.find(gpus, Devices(2), windows.SIZES[-1] + 1)


@pytest.mark.parametrize("name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD32_v2"])
def test_memory_that_cannot_be_had_is_given_back(driver, name, monkeypatch):
    driver.failing = name
    gpus = [Gpu(0), Gpu(1)]
    with pytest.raises(OSError, match=rf"{name} failed \(CUDA driver error 2\)"):
        windows.find(gpus, Devices(2), 1)
    first, size = windows.FIRST_ADDRESS, windows.SIZES[0]
    mapped = 2 * size if name in ("cuMemSetAccess", "cuMemsetD32_v2") else 0
    assert [c[1:] for c in driver.of("cuMemUnmap")] == [(first, mapped)] * bool(mapped)
    assert [c[1:] for c in driver.of("cuMemAddressFree")] == [(first, 2 * size)]
    created = len(driver.of("cuMemCreate")) - (name == "cuMemCreate")
    assert len(driver.of("cuMemRelease")) == created
    assert len(driver.of("cuCtxPushCurrent_v2")) == len(driver.of("cuCtxPopCurrent_v2"))
    driver.failing = ""
    assert windows.find(gpus, Devices(2), 1) == window.Window(first, size)


def test_a_program_without_memory_for_windows_says_so(driver, monkeypatch):
    """And takes the other way, in which it needs none."""
    kernel, _ = dispatch(np.random.default_rng(0), 2, 3, 2, 2, 4, 8)
    gpus = [Gpu(0), Gpu(1)]
    mesh = FakeMesh()
    mesh.devices = np.array(gpus)
    monkeypatch.setattr(jax.sharding, "Mesh", FakeMesh)
    monkeypatch.setattr(jax, "local_devices", lambda: gpus)
    driver.failing = "cuMemCreate"
    with pytest.warns(RuntimeWarning, match="cuMemCreate failed"):
        assert windows.for_kernel(kernel, mesh) is None
    driver.failing = ""
    assert windows.for_kernel(kernel, mesh) == window.Window(
        windows.FIRST_ADDRESS, windows.SIZES[0]
    )
    monkeypatch.setattr(jax, "local_devices", lambda: gpus[:1])  # one is another process's
    assert windows.for_kernel(kernel, mesh) is None


def test_windows_missing(driver, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu(0), Gpu(1)])
    missing = windows.missing.__wrapped__  # not what an earlier call has found
    assert "GPU 0 cannot map memory" in missing()  # the driver says 0
    driver.failing = "cuDeviceGetAttribute"
    assert "CUDA driver error 2" in missing()
    monkeypatch.setattr(peer_access, "library", object)  # a driver of long ago
    assert "it has no cuInit" in missing()
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu(0)])
    assert missing() is None


ORDER = "--xla_gpu_command_buffer_scheduling_mode"


@pytest.mark.parametrize(
    "flags",
    [f"{ORDER}=CONCURRENT", f"{ORDER}=LHS {ORDER}=CONCURRENT_REGIONS --xla_gpu_autotune_level=0"],
)
def test_kernels_side_by_side_are_refused(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_autotune_level=0 {flags}")
    choice = maj.select_transport(8, top_k=2, num_ranks=2, platform="gpu")
    assert "must not run together" in choice.reasons["nvlink_window"]
    options = {"platform": "gpu", "transport": "nvlink_window"}
    with pytest.raises(NotImplementedError, match="must not run together"):
        maj.select_transport(8, top_k=2, num_ranks=2, **options)
    # What stands last counts.
    for order in ("LHS", "SERIALIZE"):
        monkeypatch.setenv("XLA_FLAGS", f"{flags} {ORDER}={order}")
        chosen = maj.select_transport(8, top_k=2, num_ranks=2, **options)
        assert chosen.transport == "nvlink_window"
