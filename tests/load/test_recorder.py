"""ExpertDistributionRecorder: control, dumps in every format, full disks, metrics."""

import concurrent.futures
import errno
import functools
import io
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import expert_load
from moe_align_jax._expert_load import files, metrics

LAYERS, EXPERTS, LOGICAL, TOP_K = 2, 8, 6, 2
STAT = {"num_layers": LAYERS, "num_physical_experts": EXPERTS, "buffer_size": 4}


def random_ids(seed, tokens=9):
    rng = np.random.default_rng(seed)
    return rng.integers(-2, EXPERTS + 2, (LAYERS, tokens, TOP_K)).astype(np.int32)


def bincount(ids):
    return np.stack(
        [np.bincount(i[(i >= 0) & (i < EXPERTS)].ravel(), minlength=EXPERTS) for i in ids]
    )


@functools.partial(jax.jit, donate_argnums=1)
def step(ids, load, maps=None):
    """An engine's own program."""
    counts = [
        maj.moe_align_block_size(one, block_size=4, num_experts=EXPERTS).tokens_per_expert
        for one in ids
    ]
    return maj.record_expert_load(load, None, counts, topk_ids=ids, physical_to_logical_map=maps)


def serve(recorder, seeds, **options):
    for seed in seeds:
        recorder.state = step(random_ids(seed), recorder.state, **options)


def test_start_stop_dump():
    recorder = maj.ExpertDistributionRecorder("stat", **STAT)
    serve(recorder, [0])
    assert not recorder.recording
    recorder.start_record()
    serve(recorder, [1, 2])
    recorder.stop_record()
    serve(recorder, [3])
    dump = recorder.dump_record("object")
    np.testing.assert_array_equal(dump["logical_count"], [bincount(random_ids(i)) for i in (1, 2)])
    assert not recorder.recording and dump["mode"] == "stat" and dump["rank"] == 0
    assert recorder.dump_record("object")["logical_count"].shape == (0, LAYERS, EXPERTS)
    recorder.start_record()
    serve(recorder, range(4, 10))
    got = recorder.dump_record("object")["logical_count"]
    np.testing.assert_array_equal(got, [bincount(random_ids(i)) for i in range(6, 10)])
    assert recorder.recording, "a dump leaves recording on"
    serve(recorder, [11])
    assert len(recorder.dump_record("object")["logical_count"]) == 1


def test_start_and_stop_twice_warn_and_start_clears(caplog):
    recorder = maj.ExpertDistributionRecorder("stat", **STAT)
    recorder.stop_record()
    assert "off already" in caplog.text
    recorder.start_record()
    serve(recorder, [0])
    recorder.start_record()
    assert "discarded" in caplog.text
    assert not recorder.dump_record("object")["forward_pass_id"].size


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
def test_hooks_count_what_they_are_shown(mode):
    sizes = {"max_tokens": 9, "top_k": TOP_K} if mode == "per_token" else {}
    recorder = maj.ExpertDistributionRecorder(mode, **STAT, **sizes)
    recorder.start_record()
    for number in (5, 6):
        with recorder.with_forward_pass(number, metadata={"batch": number}):
            for layer, ids in enumerate(random_ids(number)):
                with recorder.with_current_layer(layer):
                    recorder.on_select_experts(ids.astype(np.int64))
    with recorder.with_forward_pass(7), recorder.with_current_layer(1):
        aligned = maj.moe_align_block_size(random_ids(7)[1], block_size=4, num_experts=EXPERTS)
        recorder.on_align(aligned, random_ids(7)[1])
    dump = recorder.dump_record("object")
    want = [bincount(random_ids(number)) for number in (5, 6, 7)]
    want[2][0] = 0
    np.testing.assert_array_equal(dump["physical_count"], want)
    assert dump["forward_pass_id"].tolist() == [5, 6, 7]
    assert dump["metadata"] == {5: {"batch": 5}, 6: {"batch": 6}}
    if mode == "per_token":
        ids = random_ids(6)
        want_ids = np.where((ids < 0) | (ids >= EXPERTS), -1, ids)
        np.testing.assert_array_equal(dump["topk_ids"][1, 0], want_ids)


def test_a_pass_that_raises_leaves_no_row():
    recorder = maj.ExpertDistributionRecorder("stat", **STAT)
    recorder.start_record()
    with pytest.raises(KeyError), recorder.with_forward_pass(1), recorder.with_current_layer(0):
        recorder.on_select_experts(random_ids(0)[0])
        raise KeyError
    with recorder.with_forward_pass(2), recorder.with_current_layer(0):
        recorder.on_select_experts(random_ids(1)[0])
    dump = recorder.dump_record("object")
    assert dump["forward_pass_id"].tolist() == [2]
    np.testing.assert_array_equal(dump["logical_count"][0, 0], bincount(random_ids(1))[0])


def test_disabled_region_records_nothing_and_nests():
    recorder = maj.ExpertDistributionRecorder("stat", **STAT)
    recorder.start_record()
    with recorder.disable_this_region():
        with recorder.disable_this_region():
            serve(recorder, [0])
        serve(recorder, [1])
        with recorder.with_forward_pass(0), recorder.with_current_layer(0):
            recorder.on_select_experts(random_ids(0)[0])
    serve(recorder, [2])
    got = recorder.dump_record("object")["logical_count"]
    np.testing.assert_array_equal(got, [bincount(random_ids(2))])


def test_mode_none_does_nothing_and_says_so():
    recorder = maj.ExpertDistributionRecorder(None, **STAT)
    with recorder.with_forward_pass(0), recorder.with_current_layer(0):
        recorder.on_select_experts(random_ids(0)[0])
    serve(recorder, [0])
    assert jax.tree.leaves(recorder.state) == []
    for call in (recorder.start_record, recorder.stop_record, recorder.dump_record):
        with pytest.raises(RuntimeError, match="mode must be one of stat"):
            call()


MISUSE = {
    "format": (ValueError, lambda r: make(file_format="csv"), "file_format must be one of npz"),
    "gpus": (ValueError, lambda r: make(num_gpus=3), "num_gpus must divide"),
    "output": (ValueError, lambda r: r.dump_record("disk"), "output_mode must be"),
    "metrics": (ValueError, lambda r: r.metrics(), "num_gpus must be given"),
    "no layer": (
        RuntimeError,
        lambda r: r.on_select_experts(random_ids(0)[0]),
        "with_current_layer",
    ),
    "traced": (
        TypeError,
        lambda r: jax.jit(lambda ids: in_layer(r, ids))(random_ids(0)[0]),
        "must run outside jit",
    ),
    "floats": (TypeError, lambda r: in_layer(r, np.ones((2, 2))), "topk_ids must be an integer"),
    "clear": (RuntimeError, lambda r: in_layer(r, None, r.dump_record), "between forward passes"),
    "nested": (RuntimeError, lambda r: in_layer(r, None, lambda: in_layer(r, 0)), "must not nest"),
}


def make(**options):
    return maj.ExpertDistributionRecorder("stat", **STAT | options)


def in_layer(recorder, ids, call=None):
    with recorder.with_forward_pass(0), recorder.with_current_layer(0):
        call() if call else recorder.on_select_experts(ids)


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_a_clear_error(name, tmp_path):
    kind, call, text = MISUSE[name]
    recorder = make(directory=tmp_path)
    recorder.start_record()
    with pytest.raises(kind, match=text):
        call(recorder)
    assert list(recorder.state.pending) == []


def test_every_refusal_of_the_recorder_ends_with_what_to_do(tmp_path):
    """Three of them had nothing behind "got"."""
    recorder = make(num_gpus=2)
    for call in (
        lambda: make(file_format="csv"),
        lambda: make(name=1),
        lambda: recorder.metrics((0,)),
    ):
        with pytest.raises(
            (TypeError, ValueError), match=r"^\w+: \w+ must .+; got .+\. [A-Z].+\.$"
        ):
            call()


# -- dumps ------------------------------------------------------------------------------------------


def random_map(seed):
    rng = np.random.default_rng(seed)
    slots = np.array([*range(LOGICAL), 0, 1])
    return np.stack([rng.permutation(slots) for _ in range(LAYERS)]).astype(np.int32)


def recorded(tmp_path, mode="per_pass", **options):
    sizes = {"max_tokens": 9, "top_k": TOP_K} if mode == "per_token" else {}
    recorder = make_mapped(mode, tmp_path, **sizes, **options)
    recorder.start_record()
    for seed in range(6):
        with recorder.with_forward_pass(None, {"seed": seed}):
            recorder.state = step(random_ids(seed), recorder.state, random_map(seed // 4))
    return recorder


def make_mapped(mode, tmp_path, **options):
    return maj.ExpertDistributionRecorder(
        mode, **STAT, num_logical_experts=LOGICAL, num_gpus=4, directory=tmp_path / "new", **options
    )


def read(path):
    if path.suffix != ".npz":
        return files.read_table(path)
    with np.load(path) as archive:
        return {name: archive[name][()] for name in archive.files}


@pytest.mark.parametrize("file_format", ["npz", "arrow", "parquet"])
@pytest.mark.parametrize("mode", ["stat", "per_token"])
def test_file_holds_what_the_object_holds(tmp_path, mode, file_format):
    if file_format != "npz":
        pytest.importorskip("pyarrow", reason="the extra arrow is not installed")
    want = recorded(tmp_path, mode).dump_record("object")
    path = recorded(tmp_path, mode, file_format=file_format).dump_record()
    assert path.parent == tmp_path / "new" and path.suffix == f".{file_format}"
    assert path.name.startswith("expert_distribution_recorder_")
    assert [p.name for p in path.parent.iterdir()] == [path.name], "temporary files are left"
    got = read(path)
    metadata = json.loads(str(got.pop("metadata")))
    assert metadata == {str(k): v for k, v in want.pop("metadata").items()}
    assert metadata == {str(seed): {"seed": seed} for seed in range(2, 6)}
    want = {name: value for name, value in want.items() if value is not None}
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    assert got["map_of_pass"].tolist() == [0, 0, 1, 1]
    for row, seed in enumerate(range(2, 6)):
        maps = random_map(seed // 4)
        np.testing.assert_array_equal(got["physical_to_logical_maps"][row // 2], maps)
        counts = bincount(random_ids(seed))
        for layer in range(LAYERS):
            logical = np.bincount(maps[layer], counts[layer], LOGICAL)
            np.testing.assert_array_equal(got["logical_count"][row, layer], logical)


def test_npz_needs_no_pickle_and_keeps_counts_beyond_int32(tmp_path):
    recorder = make(directory=tmp_path, num_shards=1)
    recorder.start_record()
    big = np.full((LAYERS, EXPERTS), 2**31 - 1, np.int32)
    recorder.state = maj.record_expert_load(recorder.state, None, big)
    with np.load(recorder.dump_record(), allow_pickle=False) as archive:
        assert archive["logical_count"].dtype == np.int32  # it fits
    dump = {"logical_count": np.full((1, 1, 2), 2**40)}
    path = files.write_dump(tmp_path / "wide.npz", dump, "npz")
    with np.load(path) as archive:
        assert archive["logical_count"].tolist() == [[[2**40] * 2]]


@pytest.mark.parametrize("file_format", ["npz", "arrow", "parquet"])
def test_full_disk_is_an_error_and_leaves_no_file(tmp_path, monkeypatch, file_format):
    if file_format != "npz":
        pytest.importorskip("pyarrow", reason="the extra arrow is not installed")
    real = open

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 100:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def almost_full(file, mode="r", *rest, **options):
        return Full(file, mode) if mode == "wb" else real(file, mode, *rest, **options)

    recorder = recorded(tmp_path, file_format=file_format)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", almost_full)
        with pytest.raises(OSError, match="No space left on device while writing"):
            recorder.dump_record()
    assert list((tmp_path / "new").iterdir()) == []
    # Nothing was cleared: the next dump has it all.
    assert read(recorder.dump_record())["forward_pass_id"].tolist() == [2, 3, 4, 5]


def test_file_size_limit_leaves_the_old_file(tmp_path):
    """The kernel's own refusal, in a process of its own."""
    target = tmp_path / "dump.npz"
    target.write_bytes(b"old")
    code = f"""
        import resource, signal, numpy as np
        from moe_align_jax._expert_load import files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            files.write_dump({str(target)!r}, {{"x": np.zeros((10, 10, 100))}}, "npz")
        except OSError as error:
            print(type(error).__name__, error.errno, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.stdout.startswith(f"OSError {errno.EFBIG}"), done.stderr
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    assert hasattr(resource, "RLIMIT_FSIZE") and hasattr(signal, "SIGXFSZ")


def test_killed_while_writing_leaves_the_old_file(tmp_path):
    target = tmp_path / "dump.npz"
    target.write_bytes(b"old")
    code = f"""
        import os, signal
        from moe_align_jax._expert_load import files
        def write(file):
            file.write(b"half"); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
        files.write_atomically({str(target)!r}, write)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == -signal.SIGKILL and target.read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    recorder = make(directory=tmp_path / "file" / "deeper")
    recorder.start_record()
    with pytest.raises(OSError):
        recorder.dump_record()


@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_damaged_tables_are_a_clear_error(tmp_path, file_format):
    arrow = pytest.importorskip("pyarrow", reason="the extra arrow is not installed")
    data = recorded(tmp_path, file_format=file_format).dump_record().read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", b"PAR1", data[: len(data) // 2], data[:-5], data[40:]]
    for _ in range(30):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(broken))
    path, refused = tmp_path / "damaged", 0
    for one in damaged:
        path.write_bytes(one)
        try:
            files.read_table(path)  # a flipped bit among the counts reads as another count
        except ValueError as error:
            refused += 1
            assert "read_table: file must be an Arrow or Parquet dump" in str(error)
    assert refused >= 5
    foreign = io.BytesIO()
    table = arrow.table({"x": [1]})
    with arrow.ipc.new_file(foreign, table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(foreign.getvalue())
    with pytest.raises(ValueError, match="that the recorder wrote"):
        files.read_table(path)


# -- metrics ----------------------------------------------------------------------------------------


def plain_balancedness(counts, gpus):
    """One layer of one pass, in plain Python."""
    share = len(counts) // gpus
    load = [sum(counts[g * share : (g + 1) * share]) for g in range(gpus)]
    return (sum(load) / gpus + 1e-5) / (max(load) + 1e-5)


def test_metrics_equal_plain_python():
    recorder = make(num_gpus=4, buffer_size=150)
    recorder.start_record()
    rng, counts = np.random.default_rng(0), []
    for _ in range(120):
        counts.append(rng.zipf(1.5, (LAYERS, EXPERTS)).clip(max=10**6) - 1)
        recorder.state = maj.record_expert_load(recorder.state, None, counts[-1].astype(np.int32))
    found = recorder.metrics()
    assert found.passes == 120
    for window in (10, 100, 1000):
        each = [
            [plain_balancedness(layer, 4) for layer in one.tolist()] for one in counts[-window:]
        ]
        np.testing.assert_allclose(found.balancedness[window], np.mean(each, axis=0), rtol=1e-5)
    total = np.sum(counts, axis=0)
    want = [[int(layer[2 * g : 2 * g + 2].sum()) for g in range(4)] for layer in total]
    assert found.tokens_per_gpu.tolist() == want
    dump = recorder.dump_record("object")
    np.testing.assert_allclose(dump["average_utilization_rate_over_window"], found.average(1000))


@pytest.mark.parametrize("mode", ["stat", "per_token"])
def test_metrics_bring_the_last_rows_alone(mode, monkeypatch):
    """Of a ring that wrapped: no map, no older pass, no more than the next power of two."""
    sizes = {"max_tokens": 9, "top_k": TOP_K} if mode == "per_token" else {}
    sizes |= STAT | {"buffer_size": 30, "num_logical_experts": LOGICAL, "num_gpus": 4}
    recorder = maj.ExpertDistributionRecorder(mode, **sizes)
    moved, bodies = [], expert_load._bodies

    def gather(*arguments):
        moved.append(bodies(*arguments))
        return moved[-1]

    def refuse(array):
        assert array.size <= 2, "the whole ring went to the host"
        return np.asarray(array)

    monkeypatch.setattr(expert_load, "_bodies", gather)
    monkeypatch.setattr(expert_load, "_on_host", refuse)
    recorder.start_record()
    slots = np.tile(np.arange(EXPERTS) % LOGICAL, (LAYERS, 1))
    serve(recorder, range(44), maps=slots)
    counts = np.array([bincount(random_ids(i)) for i in range(44)])
    width = TOP_K * 9 if mode == "per_token" else EXPERTS
    for windows, rows in (((1, 3), 4), ((10,), 16), ((1, 29), 30), ((30, 7), 30), ((1000,), 30)):
        found = recorder.metrics(windows)
        assert moved.pop().shape == (1, rows, LAYERS, width) and not moved
        want = metrics.load_metrics(counts[-30:], 4, windows)
        assert found.passes == want.passes == 30
        for window in windows:
            np.testing.assert_array_equal(found.balancedness[window], want.balancedness[window])
        np.testing.assert_array_equal(found.tokens_per_gpu, want.tokens_per_gpu)
    for windows in ((), (0,)):
        with pytest.raises(ValueError, match="metrics: windows must be passes >= 1"):
            recorder.metrics(windows)


@pytest.mark.parametrize("local", [False, True])
def test_metrics_of_shards(local):
    """Each on its device, and all on one, which has no mesh."""
    mesh = jax.make_mesh((4,), ("ep",), devices=jax.devices("cpu")[:4])
    sharding = NamedSharding(mesh, P("ep"))
    rng = np.random.default_rng(3)
    width = EXPERTS // 4 if local else EXPERTS
    counts = rng.integers(0, 99, (7, 4, LAYERS, width)).astype(np.int32)
    recorder = make(num_gpus=4, num_shards=4, local_experts=local, sharding=sharding, buffer_size=5)
    one = jax.shard_map(
        lambda state, part: maj.record_expert_load(state, None, part[0]),
        mesh=mesh,
        in_specs=(P("ep"), P("ep")),
        out_specs=P("ep"),
    )
    recorder.start_record()
    for part in counts:
        recorder.state = jax.jit(one)(recorder.state, jax.device_put(part, sharding))
    want = counts.swapaxes(1, 2).reshape(7, LAYERS, EXPERTS) if local else counts.sum(axis=1)
    for state in (recorder.state, jax.device_put(recorder.state, jax.devices("cpu")[0])):
        recorder.state = state
        found = recorder.metrics((2, 4))
        plain = metrics.load_metrics(want[-5:], 4, (2, 4))
        np.testing.assert_array_equal(found.tokens_per_gpu, plain.tokens_per_gpu)
        np.testing.assert_array_equal(found.balancedness[2], plain.balancedness[2])


def test_metrics_without_a_pass_are_nan():
    found = make(num_gpus=2).metrics()
    assert np.isnan(found.average(10)) and found.tokens_per_gpu.tolist() == [[0, 0]] * LAYERS


def test_metrics_reach_prometheus():
    client = pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")
    registry = client.CollectorRegistry()
    recorder = make(num_gpus=2, registry=registry)
    recorder.start_record()
    counts = jnp.array([[3, 0, 0, 0, 1, 0, 0, 0], [0] * 8], jnp.int32)
    recorder.state = maj.record_expert_load(recorder.state, None, counts)
    recorder.metrics()
    text = client.generate_latest(registry).decode()
    assert 'moe_align_expert_tokens{gpu="0",layer="0",name=""} 3.0' in text
    assert 'moe_align_expert_tokens{gpu="1",layer="0",name=""} 1.0' in text
    assert 'moe_align_recorded_passes{name=""} 1.0' in text
    assert balancedness_of(registry, "", 0) == pytest.approx(2 / 3, abs=1e-5)


def balancedness_of(registry, name, layer, window=100):
    labels = {"name": name, "layer": str(layer), "window": str(window)}
    return registry.get_sample_value("moe_align_expert_balancedness", labels)


def idle_of(registry, name, window=100):
    labels = {"name": name, "window": str(window)}
    return registry.get_sample_value("moe_align_idle_layers", labels)


def record(recorder, *layers):
    counts = jnp.asarray([[*layer, *[0] * (EXPERTS - len(layer))] for layer in layers], jnp.int32)
    recorder.state = maj.record_expert_load(recorder.state, None, counts)


def test_means_and_gauges_skip_idle_layers_and_say_how_many():
    client = pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")
    registry = client.CollectorRegistry()
    recorder = make(num_gpus=2, registry=registry)
    recorder.start_record()
    found = recorder.metrics()
    assert np.isnan(found.average(10)) and found.idle_layers(10) == LAYERS
    assert balancedness_of(registry, "", 0) is None and idle_of(registry, "") == LAYERS
    record(recorder, [3, 0, 0, 0, 1], [])  # the second layer is not recorded
    record(recorder, [], [])  # an idle pass is no even one
    found = recorder.metrics((1, 2))
    assert found.idle_layers(1) == 2 and found.idle_layers(2) == 1
    assert np.isnan(found.balancedness[2][1]) and np.isnan(found.average(1))
    assert found.balancedness[2][0] == found.average(2) == pytest.approx(2 / 3, abs=1e-5)
    assert balancedness_of(registry, "", 0, 2) == pytest.approx(2 / 3, abs=1e-5)
    assert balancedness_of(registry, "", 1, 2) is None and idle_of(registry, "", 2) == 1
    with pytest.raises(ValueError, match="LoadMetrics: window must be one of 1, 2; got 10"):
        found.average(10)
    dump = recorder.dump_record("object")
    assert dump["average_utilization_rate_over_window"] == pytest.approx(2 / 3, abs=1e-5)
    record(recorder, [], [5])
    recorder.metrics((1, 2))
    assert balancedness_of(registry, "", 0, 2) is None, "the value of before is gone"
    assert balancedness_of(registry, "", 1, 2) == pytest.approx(1 / 2, abs=1e-5)
    recorder.dump_record("object")
    record(recorder, [], [])
    assert recorder.dump_record("object")["average_utilization_rate_over_window"] is None


def test_recorders_share_a_registry_by_name(caplog):
    client = pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")
    registry = client.CollectorRegistry()
    options = {"num_gpus": 2, "registry": registry}
    main, draft = make(name="main", **options), make(name="draft", **options)
    unnamed, other = make(**options), make(**options)
    for recorder, busy in ((main, 4), (draft, 3), (unnamed, 2), (other, 1)):
        recorder.start_record()
        record(recorder, [busy, 0, 0, 0, 1], [1])
        recorder.metrics()
    for name, busy in (("main", 4), ("draft", 3), ("", 2), ("2", 1)):
        want = (busy + 1) / 2 / busy
        assert balancedness_of(registry, name, 0) == pytest.approx(want, abs=1e-5)
    assert not caplog.text
    again = make(name="main", **options)
    assert "have the name 'main'" in caplog.text and again is not main
    make(num_gpus=2, registry=client.CollectorRegistry(), name="main")
    with pytest.raises(TypeError, match="name must be a str or None; got int 3"):
        make(name=3)
    with pytest.raises(TypeError, match="registry must be a prometheus_client.CollectorRegistry"):
        make(registry={})


@pytest.mark.parametrize("module", ["pyarrow", "prometheus_client"])
def test_a_missing_extra_is_named(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'moe-align-jax\[(arrow|metrics)\]'"):
        if module == "pyarrow":
            recorder = make(directory=tmp_path, file_format="parquet")
            recorder.start_record()
            recorder.dump_record()
        else:
            metrics.Gauges(None)
    assert list(tmp_path.iterdir()) == []


# -- what lands where ---------------------------------------------------------------------------------


def hooked(recorder, number, metadata, seed=None):
    with recorder.with_forward_pass(number, metadata):
        for layer in range(LAYERS if seed is not None else 0):
            with recorder.with_current_layer(layer):
                recorder.on_select_experts(random_ids(seed)[layer])


@pytest.mark.parametrize("numbers", [(None,) * 5, (7, 8, 9, 10, 11)])
def test_metadata_stays_with_the_rows_of_its_own_pass(numbers):
    recorder = make()
    recorder.start_record()
    serve(recorder, [0] if numbers[0] is None else [])  # a row of no pass
    for number, (name, seed) in zip(
        numbers, (("empty", None), ("a", 1), ("none", None), ("b", 2), ("none", None)), strict=True
    ):
        hooked(recorder, number, name, seed)
    dump = recorder.dump_record("object")
    first = dump["forward_pass_id"].tolist()[-2:]
    assert first == ([1, 2] if numbers[0] is None else [8, 10])
    assert dump["metadata"] == {first[0]: "a", first[1]: "b"}
    for _ in range(9):  # more passes without a row than the ring has
        hooked(recorder, None, "none")
    hooked(recorder, None, "c", 3)
    for _ in range(9):
        hooked(recorder, None, "none")
        with recorder.with_forward_pass(None, "disabled"), recorder.disable_this_region():
            serve(recorder, [4])
    assert recorder.dump_record("object")["metadata"] == {0: "c"}


def test_metadata_of_a_pass_with_several_rows_and_of_a_start_within():
    recorder = make()
    recorder.start_record()
    with recorder.with_forward_pass(None, "both"):
        serve(recorder, [0, 1])
    with recorder.with_forward_pass(None, "third"):
        serve(recorder, [2])
    assert recorder.dump_record("object")["metadata"] == {0: "both", 1: "both", 2: "third"}
    with recorder.with_forward_pass(None, "restarted"):
        recorder.start_record()
        serve(recorder, [3])
    dump = recorder.dump_record("object")
    assert dump["metadata"] == {0: "restarted"} and dump["forward_pass_id"].tolist() == [0]


ITSELF: list = []
ITSELF.append(ITSELF)
REFUSED = {
    "pass 1.5": (TypeError, {"forward_pass_id": 1.5}, "forward_pass_id must be an int or None"),
    "pass True": (TypeError, {"forward_pass_id": True}, "forward_pass_id must be an int or None"),
    "pass text": (TypeError, {"forward_pass_id": "7"}, "forward_pass_id must be an int or None"),
    "tuple key": (TypeError, {"metadata": {(1, 2): 3}}, "metadata must be what JSON can hold"),
    "deep key": (TypeError, {"metadata": [{"a": {(1,): 2}}]}, "metadata must be what JSON can"),
    "circle": (ValueError, {"metadata": ITSELF}, "metadata must be what JSON can hold"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_dump_could_not_write_is_refused_when_it_is_given(name, tmp_path):
    kind, options, text = REFUSED[name]
    recorder = make(directory=tmp_path)
    recorder.start_record()
    hooked(recorder, 0, {"kept": 1}, 1)
    with pytest.raises(kind, match=f"with_forward_pass: {text}"):
        with recorder.with_forward_pass(**options):
            raise AssertionError("not reached")
    got = read(recorder.dump_record())
    assert json.loads(str(got["metadata"])) == {"0": {"kept": 1}}
    np.testing.assert_array_equal(got["logical_count"], [bincount(random_ids(1))])


def test_metadata_that_changes_later_does_not_stop_the_dump(tmp_path):
    recorder = make(directory=tmp_path)
    recorder.start_record()
    metadata = {"batch": 3, "shape": np.int64(4)}
    hooked(recorder, 5, metadata, 1)
    metadata[(1, 2)] = 3
    got = read(recorder.dump_record())
    assert json.loads(str(got["metadata"])) == {"5": {"batch": 3, "shape": "4"}}


BAD_ARGUMENTS = {
    "layer True": (
        TypeError,
        lambda r: layer_of(r, True),
        "with_current_layer: layer must be a Pyth",
    ),
    "layer 1.0": (
        TypeError,
        lambda r: layer_of(r, 1.0),
        "with_current_layer: layer must be a Python",
    ),
    "layer -1": (ValueError, lambda r: layer_of(r, -1), r"layer must be in \[0, 2\); got -1"),
    "layer 2": (ValueError, lambda r: layer_of(r, 2), r"layer must be in \[0, 2\); got 2"),
    "window 1.5": (TypeError, lambda r: r.metrics((1.5,)), "metrics: windows must be ints"),
    "window True": (TypeError, lambda r: r.metrics((True,)), "metrics: windows must be ints"),
    "windows 10": (TypeError, lambda r: r.metrics(10), "metrics: windows must be ints"),
    "buffer True": (TypeError, lambda r: make(buffer_size=True), "buffer_size must be a static"),
    "buffer 1.5": (TypeError, lambda r: make(buffer_size=1.5), "buffer_size must be a static"),
    "gpus True": (TypeError, lambda r: make(num_gpus=True), "num_gpus must be a static Python int"),
    "layers": (
        TypeError,
        lambda r: make(num_layers=2.0, num_gpus=2),
        "num_layers must be a static",
    ),
    "experts": (TypeError, lambda r: make(num_physical_experts="8", num_gpus=2), "num_physical"),
    "folder": (
        TypeError,
        lambda r: make(directory=3),
        "directory must be a path or None; got int 3",
    ),
    "local": (TypeError, lambda r: make(local_experts="no"), "local_experts must be a Python bool"),
    "torch": (
        TypeError,
        lambda r: in_layer(r, pytest.importorskip("torch").zeros(2, 2).long()),
        r"topk_ids must be an integer array of jax or NumPy; got a torch.Tensor torch.int64 \[2, 2\]",
    ),
    "on": (TypeError, lambda r: r.state.recording("no"), "on must be a Python bool; got str"),
}


def layer_of(recorder, layer):
    with recorder.with_current_layer(layer):
        raise AssertionError("not reached")


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_arguments_of_a_wrong_kind_are_refused(name):
    kind, call, text = BAD_ARGUMENTS[name]
    recorder = make(num_gpus=2)
    recorder.start_record()
    with pytest.raises(kind, match=text):
        call(recorder)
    hooked(recorder, None, None, 0)
    assert len(recorder.dump_record("object")["forward_pass_id"]) == 1


def test_a_format_without_its_extra_is_refused_when_it_is_given(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for file_format in ("arrow", "parquet"):
        with pytest.raises(
            ImportError, match=f"file_format must .*'{file_format}' without pyarrow"
        ):
            make(file_format=file_format)
    (tmp_path / "x.arrow").write_bytes(b"ARROW1")
    with pytest.raises(ImportError, match=r"read_table: file must .*x\.arrow.*\[arrow\]"):
        files.read_table(tmp_path / "x.arrow")


@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_no_flipped_bit_reads_as_other_counts(tmp_path, file_format):
    pytest.importorskip("pyarrow", reason="the extra arrow is not installed")
    path = recorded(tmp_path, "per_token", file_format=file_format).dump_record()
    want, data = files.read_table(path), path.read_bytes()
    damaged, refused = tmp_path / "damaged", 0
    for place in range(0, len(data), max(1, len(data) // 800)):
        broken = bytearray(data)
        broken[place] ^= 1 << (place % 8)
        damaged.write_bytes(broken)
        try:
            got = files.read_table(damaged)
        except ValueError as error:
            refused += 1
            assert str(damaged) in str(error)
            continue
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value)
            assert getattr(got[name], "dtype", None) == getattr(value, "dtype", None)
    assert refused > 300
    column = data.find(np.ascontiguousarray(want["logical_count"]).tobytes()[:64])
    if file_format == "arrow":
        assert column > 0
        broken = bytearray(data)
        broken[column] ^= 1
        damaged.write_bytes(broken)
        with pytest.raises(ValueError, match="its checksum is another"):
            files.read_table(damaged)


def test_threads_have_passes_of_their_own():
    recorder = make(buffer_size=64)
    recorder.start_record()
    meet = threading.Barrier(4, timeout=20)

    def run(thread):
        for number in range(8):
            seed = 8 * thread + number
            with recorder.with_forward_pass(seed, {"seed": seed}):
                for layer, ids in enumerate(random_ids(seed)):
                    meet.wait()  # all threads are within a pass, at one layer
                    with recorder.with_current_layer(layer):
                        recorder.on_select_experts(ids)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    dump = recorder.dump_record("object")
    assert dump["forward_pass_id"].tolist() == list(range(32))
    np.testing.assert_array_equal(
        dump["logical_count"], [bincount(random_ids(i)) for i in range(32)]
    )
    assert dump["metadata"] == {i: {"seed": i} for i in range(32)}


def test_dumps_from_another_thread_lose_and_double_nothing():
    recorder = make(buffer_size=500)
    recorder.start_record()
    dumps, done = [], threading.Event()

    def dump():
        while not done.is_set():
            dumps.append(recorder.dump_record("object"))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(dump)
        try:
            for number in range(60):
                hooked(recorder, number, {"n": number}, number)
        finally:
            done.set()
        other.result()
    dumps.append(recorder.dump_record("object"))
    ids = np.concatenate([one["forward_pass_id"] for one in dumps]).tolist()
    assert ids == list(range(60))
    counts = np.concatenate([one["logical_count"] for one in dumps])
    np.testing.assert_array_equal(counts, [bincount(random_ids(i)) for i in range(60)])
    metadata = {k: v for one in dumps for k, v in one["metadata"].items()}
    assert metadata == {i: {"n": i} for i in range(60)}


def test_metadata_has_the_ids_that_its_rows_have(tmp_path):
    """Rows keep 32 bits of an id: so do the keys, or nobody finds the metadata of a row."""
    recorder = maj.ExpertDistributionRecorder("stat", **STAT, directory=tmp_path)
    recorder.start_record()
    hooked(recorder, -2, {"n": 0}, 0)
    hooked(recorder, 5, {"n": 1}, 1)
    hooked(recorder, 2**32 + 5, {"n": 2}, 2)  # the row of pass 5
    got = dict(np.load(recorder.dump_record()))
    assert json.loads(str(got["metadata"])) == {str(2**32 - 2): {"n": 0}, "5": {"n": 2}}
    assert got["forward_pass_id"].tolist() == [2**32 - 2, 5]
    assert (got["logical_count"] == [bincount(random_ids(seed)) for seed in (0, 2)]).all()


def test_what_is_no_state_is_refused_before_it_replaces_one():
    recorder = maj.ExpertDistributionRecorder("stat", **STAT)
    recorder.start_record()
    serve(recorder, [1])
    with pytest.raises(TypeError, match="state must be an ExpertLoad with values; got tuple"):
        recorder.state = recorder.state, "output"

    @jax.jit
    def inside(ids):
        recorder.state = step(ids, recorder.state)

    with pytest.raises(TypeError, match="got one that jit traces. Assign .* outside of jit"):
        inside(random_ids(2))
    assert (recorder.dump_record("object")["logical_count"] == bincount(random_ids(1))).all()


def test_a_state_of_the_host_goes_on():
    recorder = maj.ExpertDistributionRecorder("stat", **STAT, num_gpus=2)
    recorder.start_record()
    serve(recorder, [1])
    recorder.state = jax.device_get(recorder.state)
    hooked(recorder, None, "second", 2)
    assert recorder.metrics().passes == 2
    dump = recorder.dump_record("object")
    assert (dump["logical_count"] == [bincount(random_ids(seed)) for seed in (1, 2)]).all()
    assert dump["metadata"] == {1: "second"}


def test_files_have_the_mode_of_new_files_and_the_umask_is_left_alone(tmp_path, monkeypatch):
    """It is the whole process': two threads that set it to read it may leave it at 0."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
            files.write_atomically(tmp_path / "new", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new").read_bytes() == b"x" and len(list(tmp_path.iterdir())) == 1


def test_a_file_in_a_folder_that_cannot_be_synced_is_written_all_the_same(tmp_path, monkeypatch):
    """Some file systems cannot sync a folder, and some folders may be written and not read."""
    sync = os.fsync

    def refuses_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    assert files.write_atomically(tmp_path / "new", lambda file: file.write(b"x"))
    assert (tmp_path / "new").read_bytes() == b"x" and len(list(tmp_path.iterdir())) == 1
