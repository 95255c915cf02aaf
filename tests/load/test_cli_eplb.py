"""`moe-align eplb`, run as its users run it, on files of every kind."""

import json
import shutil
import sys
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
    done = eplb("loads.json", *OPTIONS)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    rows = [[cell for cell in line if cell != "│"] for line in lines if len(line) > 10]
    assert ["0", "10", "(17.7%)", "2", "0.4800", "0.8277"] in rows
    assert ["1", "5", "(17.0%)", "2", "0.4201", "0.8050"] in rows
    assert "mean of 2 layers: trivial 0.4500, EPLB 0.8164" in done.output
    assert "worst layer: 0.4201, 0.8050" in done.output

    document = json.loads((tmp_path / "placement.json").read_text())
    want = maj.rebalance_experts(README, 16, 4, 2, 8).physical_to_logical_map.tolist()
    assert document["physical_to_logical_map"] == want
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
    held = eplb("held.npz", *options)
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
        (b"", (), "file must be readable"),
        (b"PAR1 and no table", (), "No placement"),
        (b'{"x": 1}', (), "hold logical_count; got x"),
        (b'{"logical_count": [[1, 2, 3]]}', ("--num-gpus", "2"), "multiple of num_gpus"),
        (b'{"logical_count": [[1, 2]]}', ("--previous", "none.json"), "none.json"),
        (b'{"logical_count": [[1, 2]]}', ("--previous", "loads"), "hold a physical_to_logical_map"),
        (
            b'{"logical_count": [[1, 2]], "physical_to_logical_map": [[0, 0]]}',
            ("--previous", "loads"),
            "none for expert 1",
        ),
        (b'{"logical_count": [[1, 2]]}', ("--out", "loads/x.json"), "Not written"),
    ],
)
def test_refusals_are_one_line(eplb, tmp_path, contents, options, words):
    (tmp_path / "loads").write_bytes(contents)
    options = options if "--num-gpus" in options else ("--num-gpus", "1", *options)
    done = eplb("loads", *options)
    assert done.exit_code == 1
    assert words in " ".join(done.output.split())
    assert not (tmp_path / "placement.json").exists()


def test_unknown_algorithm_and_missing_gpus_are_usage_errors(eplb, tmp_path):
    (tmp_path / "loads").write_text('{"logical_count": [[1]]}')
    assert "none of auto" in eplb("loads", "--num-gpus", "1", "--algorithm", "best").output
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
    done = eplb(*names, *PLACED, "--algorithm", "deepseek_vec")
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "placement.json").read_text())
    want = maj.rebalance_experts(total, 16, 1, 1, 4, algorithm="deepseek_vec")
    assert document["physical_to_logical_map"] == want.physical_to_logical_map.tolist()
    assert document["loads"] == ", ".join(names)
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
        ({"logical_count": np.full((4, 2, 12), -1)}, "logical_count must be finite and at least 0"),
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
