"""`moe-align eplb`, run as its users run it, on files of every kind."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import moe_align_jax as maj
from moe_align_jax._cli import heatmap
from moe_align_jax._cli.app import app
from moe_align_jax._eplb import loads
from moe_align_jax._expert_load import files
from tests.load.test_eplb import README, zipf

matplotlib_image = pytest.importorskip("matplotlib.image")
LOADS = np.array([README])


@pytest.fixture
def eplb(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def call(*arguments):
        return runner.invoke(app, ["eplb", *map(str, arguments)], catch_exceptions=False)

    return call


OPTIONS = ("--num-gpus", "8", "--num-redundant", "4", "--num-nodes", "2", "--num-groups", "4")


def test_readme_example_from_file_to_placement(eplb, tmp_path):
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    done = eplb("loads.json", *OPTIONS, "--report", "report.json")
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    rows = [[cell for cell in line if cell != "│"] for line in lines if len(line) > 10]
    assert ["0", "10", "(17.7%)", "2", "0.4800", "0.8277"] in rows
    assert ["1", "5", "(17.0%)", "2", "0.4201", "0.8050"] in rows
    assert "mean of 2 layers: trivial 0.4500, EPLB 0.8164" in done.output
    assert "worst layer: 0.4201, 0.8050" in done.output

    document = json.loads((tmp_path / "placement.json").read_text())
    want = maj.rebalance_experts(README, 16, 4, 2, 8).physical_to_logical_map.tolist()
    assert document == {"physical_to_logical_map": want}
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["num_gpus"] == 8 and document["idle_layers"] == 0
    assert document["balancedness_before"] == pytest.approx([0.4800, 0.4201], abs=5e-5)
    assert document["balancedness_after"] == pytest.approx([0.8277, 0.8050], abs=5e-5)
    location = maj.ExpertLocation.from_file(tmp_path / "placement.json")
    assert location.physical_to_logical_map.tolist() == want


def test_picture_shows_the_load_of_each_gpu(tmp_path):
    """Two layers, four GPUs: the busiest tile of a map is its brightest."""
    before = np.array([[1.0, 1, 1, 5], [2, 2, 2, 2]])
    after = np.full((2, 4), 2.0)
    heatmap.draw(before, after, tmp_path / "x.png", ("before", "after"))
    image = matplotlib_image.imread(tmp_path / "x.png")[:, :, :3]
    height, width = image.shape[:2]
    assert height > 200 and width > 800
    left, right = (
        image[:, int(a * width) : int(b * width)] for a, b in ((0.08, 0.42), (0.5, 0.85))
    )
    # Yellow, viridis' upper end, is on the left alone.
    yellow = [
        ((part[..., 0] > 0.9) & (part[..., 1] > 0.8) & (part[..., 2] < 0.3))
        for part in (left, right)
    ]
    assert yellow[0].sum() > 500 and yellow[1].sum() == 0
    # In the right quarter of the left map, in its upper half.
    rows, columns = np.nonzero(yellow[0])
    assert rows.max() < height * 0.6 and columns.min() > left.shape[1] * 0.6


def test_command_writes_the_picture_where_it_is_told(eplb, tmp_path):
    np.savez(tmp_path / "loads.npz", logical_count=LOADS)
    done = eplb("loads.npz", *OPTIONS, "--heatmap", "here.png", "--out", "there.json")
    assert done.exit_code == 0
    assert "heat map: here.png" in done.output and "placement: there.json" in done.output
    assert matplotlib_image.imread(tmp_path / "here.png").ndim == 3
    assert not (tmp_path / "placement.json").exists()


def test_without_matplotlib_the_placement_is_still_written(eplb, tmp_path, monkeypatch):
    np.savez(tmp_path / "loads.npz", logical_count=LOADS)
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    done = eplb("loads.npz", *OPTIONS)
    assert done.exit_code == 0 and "moe-align-jax[plot]" in done.output
    assert (tmp_path / "placement.json").exists() and not (tmp_path / "placement.png").exists()


@pytest.mark.parametrize("file_format", ["npz", "arrow", "parquet"])
def test_dumps_of_our_recorder(eplb, tmp_path, file_format):
    if file_format != "npz":
        pytest.importorskip("pyarrow")
    recorder = maj.ExpertDistributionRecorder(
        "stat", num_layers=2, num_physical_experts=12, directory=tmp_path, file_format=file_format
    )
    recorder.start_record()
    for part in (np.array(README) // 3, np.array(README) - np.array(README) // 3):
        recorder.state = maj.record_expert_load(recorder.state, None, part)
    done = eplb(recorder.dump_record("file"), *OPTIONS)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "placement.json").read_text())
    want = maj.rebalance_experts(README, 16, 4, 2, 8).physical_to_logical_map.tolist()
    assert document["physical_to_logical_map"] == want
    assert "pass by pass, mean of 2: " in done.output


def test_sglang_dump(eplb, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"rank": 0, "logical_count": torch.tensor(LOADS)}, tmp_path / "loads.pt")
    done = eplb("loads.pt", *OPTIONS)
    assert done.exit_code == 0
    assert "mean of 2 layers: trivial 0.4500, EPLB 0.8164" in done.output


def test_placement_in_force_moves_few_experts(eplb, tmp_path):
    rng = np.random.default_rng(1)
    load = zipf(rng, 2, 32, tokens=5000)
    np.savez(tmp_path / "first.npz", logical_count=load)
    later = rng.poisson(load * rng.uniform(0.7, 1.4, load.shape))
    np.savez(tmp_path / "later.npz", logical_count=later)
    assert eplb("first.npz", "--num-gpus", "8", "--num-redundant", "8").exit_code == 0
    old = json.loads((tmp_path / "placement.json").read_text())["physical_to_logical_map"]
    options = ("--num-gpus", "8", "--num-redundant", "8", "--out", "new.json")
    done = eplb("later.npz", *options, "--previous", "placement.json")
    assert done.exit_code == 0
    new = json.loads((tmp_path / "new.json").read_text())["physical_to_logical_map"]
    want = maj.rebalance_experts(later, 40, 1, 1, 8, previous=old).physical_to_logical_map
    assert new == want.tolist()
    moves = maj.plan_expert_moves(old, new, num_gpus=8)
    unchanged = int((np.array(old) == np.array(new)).sum())
    assert f"moves of 80 slots: unchanged {unchanged}, local copy " in done.output
    assert f"same node {int((moves.kind == 3).sum())}, other node 0" in done.output
    before = maj.balancedness(maj.expected_physical_count(later, old), 8).mean()
    assert f"mean of 2 layers: in force {before:.4f}" in done.output

    # The same where the recording itself holds the map.
    np.savez(tmp_path / "held.npz", logical_count=later, physical_to_logical_map=old)
    held = eplb("held.npz", *options, "--overwrite")
    assert f"moves of 80 slots: unchanged {unchanged}, " in held.output


def test_windowed_algorithm(eplb, tmp_path):
    steps = zipf(np.random.default_rng(2), 4, 2, 12, tokens=300)
    np.savez(tmp_path / "loads.npz", logical_count=steps)
    done = eplb(
        "loads.npz", "--num-gpus", "4", "--num-redundant", "4", "--algorithm", "deepseek_vec"
    )
    assert done.exit_code == 0
    want = maj.rebalance_experts(steps, 16, 1, 1, 4, algorithm="deepseek_vec")
    document = json.loads((tmp_path / "placement.json").read_text())
    assert document["physical_to_logical_map"] == want.physical_to_logical_map.tolist()


@pytest.mark.parametrize(
    ("contents", "options", "words"),
    [
        (b"", (), "file must be readable; got 'loads' (it is empty)"),
        (b'{"logical_count": [[2, 1e400]]}', (), "finite and at least 0; got inf."),  # it said 2.0
        (b'{"logical_count": [[1, 2]]}', ("--out", "."), "--out must be a file; got the folder ."),
        (b'{"logical_count": [[1, 2]]}', ("--heatmap", "."), "--heatmap must be a file; got the"),
        (b'{"logical_count": [[1, 2]]}', ("--report", "."), "--report must be a file; got the"),
        (b"PAR1 and no table", (), "No placement"),
        (b'{"x": 1}', (), "hold logical_count; got x"),
        (b'{"logical_count": [[1, 2, 3]]}', ("--num-gpus", "2"), "fill 2 GPUs (--num-gpus)"),
        (b'{"logical_count": [[1, 2]]}', ("--previous", "none.json"), "none.json"),
        (b'{"logical_count": [[1, 2]]}', ("--previous", "loads"), "hold a physical_to_logical_map"),
        (
            b'{"logical_count": [[1, 2]], "physical_to_logical_map": [[0, 0]]}',
            ("--previous", "loads"),
            "none for expert 1",
        ),
        (
            b'{"logical_count": [[1, 2]]}',
            ("--out", "loads/x.json"),
            "while writing: 'loads/x.json'",
        ),
    ],
)
def test_refusals_are_one_line(eplb, tmp_path, contents, options, words):
    (tmp_path / "loads").write_bytes(contents)
    options = options if "--num-gpus" in options else ("--num-gpus", "1", *options)
    done = eplb("loads", *options)
    assert done.exit_code == 1
    assert words in " ".join(done.output.split())
    assert not (tmp_path / "placement.json").exists()


@pytest.mark.parametrize("option", ["--report", "--heatmap"])
def test_what_was_written_before_a_file_that_cannot_be_is_said(eplb, tmp_path, option):
    pytest.importorskip("matplotlib")
    (tmp_path / "loads").write_text('{"logical_count": [[1, 2]]}')
    done = eplb("loads", "--num-gpus", "1", option, "loads/x")
    said = " ".join(done.output.split())
    assert done.exit_code == 1 and "placement: placement.json Not written: " in said
    assert said.endswith("while writing: 'loads/x'")
    assert {path.name for path in tmp_path.iterdir()} == {"loads", "placement.json"}


def test_a_heat_map_makes_its_folder_as_a_placement_does(eplb, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "loads").write_text('{"logical_count": [[1, 2]]}')
    done = eplb("loads", "--num-gpus", "1", "--heatmap", "pictures/load.png")
    assert done.exit_code == 0 and (tmp_path / "pictures/load.png").read_bytes()[:4] == b"\x89PNG"


def test_unknown_algorithm_and_missing_gpus_are_usage_errors(eplb, tmp_path):
    (tmp_path / "loads").write_text('{"logical_count": [[1]]}')
    said = eplb("loads", "--num-gpus", "1", "--algorithm", "best").output
    assert "Invalid value for '--algorithm': 'best' is none of auto" in said
    said = eplb("loads", "--num-gpus", "1", "--format", "vllm").output
    assert "Invalid value for '--format': 'vllm' is none of sglang" in said
    assert eplb("loads").exit_code == 2


# -- files of several processes ----------------------------------------------------------------------------

PLACED = ("--num-gpus", "4", "--num-redundant", "4")


def of_ranks(tmp_path, file_format="npz", ranks=3):
    """Dumps of one recording by several processes, and their sum `[S, L, El]`."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(zipf(rng, ranks, 4, 2, 12, tokens=300) + 1.0)
    names = []
    for rank, part in enumerate(counts):
        dump = {"rank": rank, "forward_pass_id": np.arange(7, 11), "logical_count": part}
        names.append(files.write_dump(tmp_path / f"{rank}.{file_format}", dump, file_format).name)
    return names, counts.sum(axis=0)


@pytest.mark.parametrize("file_format", ["npz", "arrow"])
def test_files_of_several_processes_are_added_up(eplb, tmp_path, file_format):
    if file_format != "npz":
        pytest.importorskip("pyarrow")
    names, total = of_ranks(tmp_path, file_format)
    report = ("--report", "report.json")
    done = eplb(*names, *PLACED, "--algorithm", "deepseek_vec", *report)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "placement.json").read_text())
    want = maj.rebalance_experts(total, 16, 1, 1, 4, algorithm="deepseek_vec")
    assert document["physical_to_logical_map"] == want.physical_to_logical_map.tolist()
    assert json.loads((tmp_path / "report.json").read_text())["loads"] == ", ".join(names)
    one = maj.rebalance_experts(total * 0 + 1, 16, 1, 1, 4).physical_to_logical_map
    assert document["physical_to_logical_map"] != one.tolist()


def test_sums_of_files_go_beyond_int32(tmp_path):
    contents = {str(i): {"logical_count": np.full((1, 2), 2**31 - 1, np.int32)} for i in range(3)}
    assert loads.sum_of_files(contents, function="f").tolist() == [[[3 * (2**31 - 1)] * 2]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"logical_count": np.ones((3, 2, 12))},
            "1.npz must hold passes, layers and experts [4, 2, 12], as",
        ),
        ({"logical_count": np.ones((4, 2, 13))}, "got [4, 2, 13]. Several files must be those of"),
        ({"forward_pass_id": np.arange(8, 12)}, "1.npz must be of the passes of '0.npz'"),
        ({"rank": 0}, "1.npz must be of another rank than '0.npz'; got rank 0"),
        (
            {"logical_count": np.full((4, 2, 12), -1)},
            "logical_count must be finite and at least 0; got -1. Pass loads: a recorder's dump, or JSON "
            "with logical_count. A placement in force goes to --previous. The file is '1.npz'.",
        ),
        ({"last_physical_to_logical_map": 1}, "1.npz must have the physical_to_logical_map of"),
    ],
)
def test_files_that_do_not_fit_are_refused(eplb, tmp_path, change, words):
    maps = np.tile(np.arange(16) % 12, (2, 1))
    for rank in range(2):
        dump = {"rank": rank, "forward_pass_id": np.arange(7, 11)}
        dump |= {
            "logical_count": np.ones((4, 2, 12), np.int64),
            "last_physical_to_logical_map": maps,
        }
        if rank:
            dump |= change
        if isinstance(dump["last_physical_to_logical_map"], int):
            dump["last_physical_to_logical_map"] = maps[:, ::-1]
        np.savez(tmp_path / f"{rank}.npz", **dump)
    done = eplb("0.npz", "1.npz", *PLACED)
    assert done.exit_code == 1 and words in " ".join(done.output.split())
    assert not (tmp_path / "placement.json").exists()


# -- what SGLang's recorder of torch_bridge writes ---------------------------------------------------------


@pytest.mark.parametrize("mode", ["stat", "stat_approx", "per_pass", "per_token"])
def test_files_that_the_recorder_for_pytorch_wrote(eplb, tmp_path, mode):
    """Two ranks, each with tokens of its own; "stat" sums them itself, so one writes, and "stat_approx" takes
    the aligned counts of a rank's own slots. The placement changes before the last pass."""
    torch = pytest.importorskip("torch")
    from torch_bridge import sglang

    rng = np.random.default_rng(5)
    old, maps = (
        np.stack([rng.permutation([*range(12), 0, 3, 3, 5]) for _ in range(2)]) for _ in range(2)
    )
    placement = SimpleNamespace(
        physical_to_logical_map=torch.from_numpy(old), num_logical_experts=12, ep_size=4
    )
    options = {
        "per_token": {"max_tokens": 50, "top_k": 3},
        "stat_approx": {"moe_a2a_backend": "deepep"},
    }.get(mode, {})
    sums = mode.startswith("stat")
    want, names = np.zeros((3, 2, 12), np.int64), []
    for rank in range(1 if sums else 2):
        folder = tmp_path / str(rank)
        recorder = sglang.ExpertDistributionRecorder.init_new(
            placement, rank, mode=mode, buffer_size=3, directory=folder, **options
        )
        recorder.start_record()
        for number in range(3):
            now = old if number < 2 else maps
            placement.physical_to_logical_map = torch.from_numpy(now)
            batch = SimpleNamespace(
                input_ids=torch.arange(50),
                positions=torch.arange(50),
                extend_seq_lens_cpu=[50],
                forward_mode=SimpleNamespace(value=1),
            )
            with recorder.with_forward_pass(number, batch):
                for layer in range(2):
                    ids = rng.zipf(1.5, (50, 3)) - 2  # from -1 on, also beyond the slots
                    with recorder.with_current_layer(layer):
                        if mode == "stat_approx":
                            counts = rng.integers(0, 5, 4) * 128
                            ids = np.repeat(np.arange(4), counts)
                            recorder.on_deepep_dispatch_normal(counts.tolist(), None, None, None)
                        else:
                            recorder.on_select_experts(torch.from_numpy(ids))
                    kept = ids[(ids >= 0) & (ids < 16)]
                    want[number, layer] += np.bincount(now[layer][kept], minlength=12)
        recorder.dump_record("file")
        [file] = folder.iterdir()
        names.append(file)
    done = eplb(*names, *PLACED, "--algorithm", "deepseek_vec")
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "placement.json").read_text())
    previous = None if sums else maps
    placed = maj.rebalance_experts(want, 16, 1, 1, 4, algorithm="deepseek_vec", previous=previous)
    assert document["physical_to_logical_map"] == placed.physical_to_logical_map.tolist()
    if not sums:
        assert "be given once; got one twice" in eplb(names[0], names[0], *PLACED).output
        shutil.copy(names[0], tmp_path / "copy.pt")
        again = eplb(names[0], "copy.pt", *PLACED)
        assert again.exit_code == 1 and "must be of another rank than" in again.output


# -- placements in the files of engines -------------------------------------------------------------------


def sglang_init_by_mapping(model_config, physical_to_logical_map, moe_ep_rank=None):
    """The signature of SGLang 0.5.23's loader, which is called with the file's names as arguments."""
    return np.array(physical_to_logical_map)


def vllm_ascend_map(slots, gpus):
    """`expert_map.json` of a map, by plain loops."""
    layers = []
    for number, row in enumerate(slots):
        size = len(row) // gpus
        devices = [
            {"device_id": d, "device_expert": [int(e) for e in row[d * size : (d + 1) * size]]}
            for d in range(gpus)
        ]
        layers.append({"layer_id": number, "device_count": gpus, "device_list": devices})
    return {"moe_layer_count": len(slots), "layer_list": layers}


def tensorrt_llm_map(slots):
    rows = {number: [int(e) for e in row] for number, row in enumerate(slots)}
    return {
        "num_slots": len(slots[0]),
        "initial_global_assignments": rows,
        "layer_updates_per_iter": 0,
    }


README_PLACED = maj.rebalance_experts(README, 16, 4, 2, 8).physical_to_logical_map


def test_placement_is_what_the_loader_of_sglang_takes(eplb, tmp_path):
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    assert eplb("loads.json", *OPTIONS).exit_code == 0
    contents = json.loads((tmp_path / "placement.json").read_text())
    got = sglang_init_by_mapping(None, **contents, moe_ep_rank=0)
    assert np.array_equal(got, README_PLACED)
    again = eplb("loads.json", *OPTIONS, "--previous", "placement.json", "--out", "again.json")
    assert "moves of 32 slots: unchanged 32, " in again.output


@pytest.mark.parametrize("file_format", ["vllm-ascend", "tensorrt-llm"])
def test_formats_of_other_engines_out_and_in(eplb, tmp_path, file_format):
    yaml = pytest.importorskip("yaml")
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    done = eplb("loads.json", *OPTIONS, "--format", file_format)
    assert done.exit_code == 0, done.output
    if file_format == "vllm-ascend":
        name = "placement.json"
        got = json.loads((tmp_path / name).read_text())
        assert got == vllm_ascend_map(README_PLACED, 8)
    else:
        name = "placement.yaml"
        got = yaml.safe_load((tmp_path / name).read_text())
        assert got == tensorrt_llm_map(README_PLACED)
    again = eplb("loads.json", *OPTIONS, "--previous", name, "--out", "b.json")
    assert "moves of 32 slots: unchanged 32, " in again.output
    location = maj.ExpertLocation.from_file(tmp_path / name)
    assert np.array_equal(location.physical_to_logical_map, README_PLACED)


def test_files_of_other_engines_in_any_order_of_layers_and_devices(eplb, tmp_path):
    """Layers are numbered as the model's are: here from 3 on."""
    yaml = pytest.importorskip("yaml")
    ascend = vllm_ascend_map(README_PLACED, 8)
    for layer in ascend["layer_list"]:
        layer["layer_id"] += 3
        layer["device_list"].reverse()
    ascend["layer_list"].reverse()
    (tmp_path / "map.json").write_text(json.dumps(ascend))
    rows = tensorrt_llm_map(README_PLACED)
    rows["initial_global_assignments"] = {
        layer + 3: row for layer, row in reversed(rows["initial_global_assignments"].items())
    }
    (tmp_path / "map.yml").write_text(yaml.safe_dump(rows, sort_keys=False))
    for name in ("map.json", "map.yml"):
        location = maj.ExpertLocation.from_file(tmp_path / name)
        assert np.array_equal(location.physical_to_logical_map, README_PLACED)
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    options = ("--format", "tensorrt-llm", "--first-layer", "3", "--previous", "map.json")
    assert eplb("loads.json", *OPTIONS, *options).exit_code == 0
    got = yaml.safe_load((tmp_path / "placement.yaml").read_text())
    assert list(got["initial_global_assignments"]) == [3, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_list": 3}, "layer_list must be a list of layers"),
        ({"moe_layer_count": 3}, "hold moe_layer_count (3) layers"),
        ({"layer_list": [{"layer_id": True}]}, "layer_id must be an integer"),
        ({"device_count": 7}, "hold device_count (7) devices"),
        ({"device_id": 1}, "hold each device once; got 1 twice"),
        ({"device_expert": [0, 1.5]}, "device_expert of device 0 in layer 0 must be a list"),
        ({"device_expert": [0, True]}, "device_expert of device 0 in layer 0 must be a list"),
        ({"device_expert": [0]}, "hold as many devices in each layer"),
    ],
)
def test_broken_expert_maps_are_refused(eplb, tmp_path, change, words):
    document = vllm_ascend_map(README_PLACED, 8)
    first = document["layer_list"][0]
    for name, value in change.items():
        for place in (document, first, first["device_list"][0]):
            if name in place:
                place[name] = value
                break
    (tmp_path / "map.json").write_text(json.dumps(document))
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    done = eplb("loads.json", *OPTIONS, "--previous", "map.json")
    assert done.exit_code == 1 and words in " ".join(done.output.split())
    assert "map.json" in done.output and not (tmp_path / "placement.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it holds a NoneType, not a mapping"),
        ("[1, 2]", "it holds a list"),
        ("a: [1", "file must be readable"),
        ("num_slots: 2\ninitial_global_assignments: 3", "map layers to experts"),
        ("num_slots: 3\ninitial_global_assignments: {0: [0, 1]}", "each of num_slots (3) slots"),
        ("initial_global_assignments: {0: [0, 1], x: [0, 1]}", "must be an integer of at least 0"),
        ("!!python/object/apply:os.system ['true']", "file must be readable"),
        ("physical_to_logical_map: [[0, 1], [1]]", "lists of different lengths"),
    ],
)
def test_broken_yaml_is_refused(eplb, tmp_path, text, words):
    pytest.importorskip("yaml")
    (tmp_path / "map.yaml").write_text(text)
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    done = eplb("loads.json", *OPTIONS, "--previous", "map.yaml")
    assert done.exit_code == 1 and words in " ".join(done.output.split()), done.output
    with pytest.raises(ValueError):
        maj.ExpertLocation.from_file(tmp_path / "map.yaml")


def test_without_pyyaml_the_extra_is_named(eplb, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "map.yaml").write_text("num_slots: 2")
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    done = eplb("loads.json", *OPTIONS, "--previous", "map.yaml")
    assert done.exit_code == 1 and "moe-align-jax[yaml]" in done.output


# -- other GPUs than before --------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [False, True])
def test_placement_in_force_is_of_other_gpus(eplb, tmp_path, dead):
    rng = np.random.default_rng(3)
    load = zipf(rng, 2, 12, tokens=5000)
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": load.tolist()}))
    old = maj.rebalance_experts(load, 24, 1, 1, 8).physical_to_logical_map
    if dead:
        old[:, 6:9] = -1
    held = {*old[0].tolist()} & {*old[1].tolist()}
    (tmp_path / "old.json").write_text(json.dumps(vllm_ascend_map(old, 8)))
    options = ("--num-gpus", "4", "--num-redundant", "4", "--previous", "old.json")
    done = eplb("loads.json", *options)
    assert done.exit_code == 0, done.output
    got = json.loads((tmp_path / "placement.json").read_text())["physical_to_logical_map"]
    want = maj.rebalance_experts(load, 16, 1, 1, 4, previous=old, previous_num_gpus=8)
    assert got == want.physical_to_logical_map.tolist()
    if held >= {*range(12)}:
        moves = maj.plan_expert_moves(old, got, num_gpus=4, old_num_gpus=8)
        assert f"moves of 32 slots: unchanged {moves.count(maj.MoveKind.UNCHANGED)}" in done.output
    else:
        lost = sum(12 - len({*row.tolist()} - {-1}) for row in old)
        assert f"experts that no slot in force holds: {lost}" in done.output
    bad = eplb("loads.json", *options, "--previous-num-gpus", "6", "--out", "x.json")
    assert "be for --previous-num-gpus 6; got 8 devices" in " ".join(bad.output.split())


# -- layers without tokens ---------------------------------------------------------------------------------


def test_layers_without_tokens_are_not_called_balanced(eplb, tmp_path):
    """Three layers of five are idle in all passes, another in the second: plain means over the rest."""
    counts = np.zeros((2, 5, 12), int)
    counts[0, :2], counts[1, 0] = README, README[0]
    np.savez(tmp_path / "loads.npz", logical_count=counts)
    done = eplb("loads.npz", *OPTIONS, "--report", "report.json")
    assert done.exit_code == 0, done.output
    assert "mean of 2 layers (3 without tokens left out): trivial 0.4500, " in done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["idle_layers"] == 3 and report["balancedness_before"][2:] == [None] * 3
    after = report["balancedness_after"][:2]
    assert report["mean_balancedness_after"] == pytest.approx(sum(after) / 2, abs=1e-6)
    # The first pass has 0.4800 and 0.4201, the second 0.4800 alone.
    assert f"pass by pass, mean of 2: trivial {(0.45005 + 0.48) / 2:.4f}" in done.output


def test_loads_without_any_token_say_so(eplb, tmp_path):
    np.savez(tmp_path / "loads.npz", logical_count=np.zeros((2, 3, 12), int))
    done = eplb("loads.npz", *OPTIONS, "--report", "report.json")
    assert done.exit_code == 0 and "no layer has tokens" in done.output
    assert json.loads((tmp_path / "report.json").read_text())["mean_balancedness_after"] is None


# -- what is written over, and what errors say -------------------------------------------------------------


@pytest.mark.parametrize("name", ["placement.json", "placement.png", "report.json"])
def test_no_file_is_written_over_unasked(eplb, tmp_path, name):
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    (tmp_path / name).write_text("mine")
    done = eplb("loads.json", *OPTIONS, "--report", "report.json")
    assert done.exit_code == 1 and "pass --overwrite" in " ".join(done.output.split())
    assert {p.name for p in tmp_path.iterdir()} == {"loads.json", name}
    assert (tmp_path / name).read_text() == "mine"
    assert eplb("loads.json", *OPTIONS, "--report", "report.json", "--overwrite").exit_code == 0
    assert (tmp_path / name).read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "loads.json", "--overwrite"), "--out must be another file than FILE"),
        (("--report", "placement.json"), "--report must be another file than --out"),
        (("--num-redundant", "3"), "--num-redundant must fill 8 GPUs (--num-gpus) evenly"),
        # Such a placement would be computed for minutes, of slots that serve nobody.
        (("--num-redundant", "100000004"), "--num-redundant must be at most 84"),
        (("--num-groups", "5", "--num-nodes", "1"), "--num-groups must divide the 12 experts"),
        (("--num-nodes", "4", "--num-gpus", "2"), "--num-gpus must be a multiple of --num-nodes"),
        (
            ("--num-nodes", "3", "--algorithm", "deepseek_hierarchical"),
            "--num-groups must be a multiple of --num-nodes (3)",
        ),
    ],
)
def test_errors_name_options(eplb, tmp_path, options, words):
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    done = eplb("loads.json", *OPTIONS, *options)
    text = " ".join(done.output.split())
    assert done.exit_code == 1 and words in text
    assert not any(name in text for name in ("rebalance_experts", "num_replicas", "num_gpus"))


def test_a_placement_given_as_loads_is_not_asked_for_again(eplb, tmp_path):
    (tmp_path / "p.json").write_text('{"physical_to_logical_map": [[0, 1]]}')
    text = " ".join(eplb("p.json", "--num-gpus", "1").output.split())
    assert "file must hold logical_count; got physical_to_logical_map. Pass loads" in text
    assert text.endswith("The file is 'p.json'.")


def test_loads_of_files_do_not_wrap():
    big = {str(i): {"logical_count": np.full((1, 2), 2**62)} for i in range(3)}
    assert loads.sum_of_files(big, function="f").tolist() == [[[3 * 2.0**62] * 2]]
    slots = {
        "physical_count": np.full((1, 1, 2), 2**31 - 1, np.int32),
        "physical_to_logical_map": np.array([[0, 0]]),
    }
    assert loads.recorded_load(slots, function="f").tolist() == [[[2 * (2**31 - 1)]]]


# -- output that nobody takes, pipes, and links ------------------------------------------------------------


@pytest.mark.parametrize("taker", ["gone", "full"])
def test_files_are_written_where_the_output_is_not_taken(tmp_path, taker):
    """As in `moe-align eplb ... | head -1`."""
    if taker == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    arguments = [sys.executable, "-m", "moe_align_jax.cli", "eplb", "loads.json", *OPTIONS]
    read, write = os.pipe()
    os.close(read)
    full = os.open("/dev/full" if taker == "full" else os.devnull, os.O_WRONLY)
    root = str(pathlib.Path(maj.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*arguments, "--report", "report.json"],
        cwd=tmp_path,
        stdout=full if taker == "full" else write,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        text=True,
        timeout=120,
    )
    os.close(write)
    os.close(full)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    if taker == "full":
        assert "No space left on device" in done.stderr
    want = maj.rebalance_experts(README, 16, 4, 2, 8).physical_to_logical_map.tolist()
    got = json.loads((tmp_path / "placement.json").read_text())
    assert got == {"physical_to_logical_map": want}
    assert json.loads((tmp_path / "report.json").read_text())["num_gpus"] == 8


@pytest.mark.parametrize("option", ["--out", "--report", "--heatmap"])
def test_a_pipe_is_not_replaced_by_a_file(eplb, tmp_path, option):
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    os.mkfifo(tmp_path / "pipe")
    done = eplb("loads.json", *OPTIONS, option, "pipe", "--overwrite")
    said = " ".join(done.output.split())
    assert done.exit_code == 1 and f"{option} must be a file; got the pipe or device pipe" in said
    assert {path.name for path in tmp_path.iterdir()} == {"loads.json", "pipe"}
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match="no regular file while writing"):
        files.write_atomically(tmp_path / "pipe", lambda file: file.write(b"x"))
    assert {path.name for path in tmp_path.iterdir()} == {"loads.json", "pipe"}


def test_a_link_leads_to_the_file_that_is_written(eplb, tmp_path):
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    (tmp_path / "served").mkdir()
    (tmp_path / "served/now.json").write_text("old")
    (tmp_path / "link.json").symlink_to("served/now.json")
    done = eplb("loads.json", *OPTIONS, "--out", "link.json", "--overwrite")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "link.json").is_symlink()
    assert "physical_to_logical_map" in json.loads((tmp_path / "served/now.json").read_text())
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["now.json"]


@pytest.mark.parametrize("option", [None, "--previous", "yaml"])
def test_loads_from_a_pipe_are_refused_and_not_waited_for(eplb, tmp_path, option):
    pipe = tmp_path / ("pipe.yaml" if option == "yaml" else "pipe")
    text = json.dumps({"logical_count": README})
    (tmp_path / "loads.json").write_text(text)
    os.mkfifo(pipe)

    def write():
        try:
            pipe.write_text(text)
        except BrokenPipeError:
            pass

    # A writer that is gone after its text, as `<(command)` is: a second reader would wait for ever.
    threading.Thread(target=write, daemon=True).start()
    arguments = (pipe.name,) if option is None else ("loads.json", "--previous", pipe.name)
    done = eplb(*arguments, *OPTIONS)
    said = " ".join(done.output.split())
    assert done.exit_code == 1 and "file must be a regular file; got " in said
    assert f"{pipe.name}', a pipe or a device. Write it to a file first." in said


def test_gpus_of_a_placement_that_is_not_there(eplb, tmp_path):
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": README}))
    done = eplb("loads.json", *OPTIONS, "--previous-num-gpus", "3")
    said = " ".join(done.output.split())
    assert done.exit_code == 1
    assert "--previous-num-gpus must come with a placement in force of 2 layers on 3 GPUs" in said
    held = {"logical_count": README, "physical_to_logical_map": [[*range(12)]] * 2}
    (tmp_path / "loads.json").write_text(json.dumps(held))
    done = eplb("loads.json", *OPTIONS, "--previous-num-gpus", "5")
    said = " ".join(done.output.split())
    assert done.exit_code == 1 and "got 12 slots in 2 layers. Name it with --previous" in said
    assert not (tmp_path / "placement.json").exists()
    assert eplb("loads.json", *OPTIONS, "--previous-num-gpus", "3").exit_code == 0
