"""ExpertDistributionRecorder: control, dumps in every format, full disks, metrics."""

import errno
import functools
import io
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import expert_load
from moe_align_jax._recorder import files, metrics

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
        from moe_align_jax._recorder import files
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
        from moe_align_jax._recorder import files
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
    assert 'moe_align_expert_tokens{gpu="0",layer="0"} 3.0' in text
    assert 'moe_align_expert_tokens{gpu="1",layer="0"} 1.0' in text
    assert "moe_align_recorded_passes 1.0" in text
    value = registry.get_sample_value(
        "moe_align_expert_balancedness", {"layer": "0", "window": "100"}
    )
    assert value == pytest.approx(2 / 3, abs=1e-5)


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
