"""benchmarks.tune without a GPU: the search on made-up times, its table, and its answer by NumPy."""

import json
import re

import numpy as np
import pytest

from benchmarks import tune
from moe_align_jax._align import kernels, tables
from moe_align_jax._cli.demo import plain_loop
from moe_align_jax._simt import emulator
from tests.helpers import unwritable

Config = tables.BlockAlignMosaicConfig
GPU = "NVIDIA Z9 80GB"  # of no table


def block(groups, ctas=4, **more):
    return Config(form="block", num_warpgroups=groups, num_ctas=ctas, **more)


def measured(time_of):
    """A machine on which `time_of(config)` is the time; every cell and config it was asked for."""
    asked = []

    def measure(cell, configs):
        asked.extend((cell, config) for config in configs)
        return [time_of(config) for config in configs]

    measure.asked = asked
    return measure


CELL = tune.Cell(512, 64, 16)


def test_search_climbs_to_the_best_and_asks_for_each_program_once():
    """The best is two doublings of warpgroups and two of CTAs away."""

    def time_of(config):
        if config.form != "block":
            return 100.0
        return 1.0 + abs(np.log2(config.num_warpgroups / 4)) + abs(np.log2(config.num_ctas / 8))

    measure = measured(time_of)
    winner = tune.search(CELL, [block(2, ctas=4)], measure)
    assert (winner.config.num_warpgroups, winner.config.num_ctas, winner.us) == (4, 8, 1.0)
    configs = [config for _, config in measure.asked]
    assert len(configs) == len(set(configs))
    assert all(tables.fit(config, CELL.problem) == config for config in configs)


def test_search_prefers_the_first_within_two_percent():
    def time_of(config):
        return {1: 1.0, 2: 1.019, 4: 1.03}.get(config.num_warpgroups, 5.0) + 9 * (
            config.form != "block"
        )

    first, second = block(2), block(1)
    assert tune.search(CELL, [first, second], measured(time_of)) == (first, 1.019)
    first = block(4)
    winner = tune.search(CELL, [first], measured(time_of))
    assert winner.config.num_warpgroups == 1 and winner.us == 1.0


def test_search_leaves_out_what_is_wrong_and_what_a_form_cannot_do():
    def time_of(config):
        return "wrong expert_ids" if config.num_warpgroups == 2 else float(config.num_warpgroups)

    measure = measured(time_of)
    assert tune.search(CELL, [block(2)], measure).config.num_warpgroups == 1
    assert "warp" not in {c.form for _, c in measure.asked}
    many = tune.Cell(512, 9000, 16)
    measure = measured(lambda c: 1.0)
    assert tune.search(many, [block(1)], measure).config.form == "sorted"
    assert {c.form for _, c in measure.asked} == {"sorted"}
    many = tune.Cell(1 << 17, 9000, 16)
    measure = measured(lambda c: 1.0)
    assert tune.search(many, [block(1)], measure).config.form == "radix"
    assert {c.form for _, c in measure.asked} == {"radix"}
    assert tune.search(CELL, [block(2)], measured(lambda c: "no GPU")) is None


def test_search_tries_one_cluster_and_none_that_is_too_large():
    def time_of(config):
        return 1.0 if config.form == "cluster" else 3.0

    cell = tune.Cell(2048, 64, 16)
    measure = measured(time_of)
    assert tune.search(cell, [block(4)], measure).config.form == "cluster"
    clusters = [c for _, c in measure.asked if c.form == "cluster"]
    assert {c.num_ctas for c in clusters} == {8} and all(c.cluster <= 8 for _, c in measure.asked)
    too_large = Config(form="cluster", num_warpgroups=1, num_ctas=16, rounds=1)
    assert not tune.allowed(too_large, cell)
    assert not tune.allowed(clusters[0], tune.Cell(2048, 9000, 16))
    assert not tune.allowed(clusters[0], tune.Cell(1 << 20, 64, 16))  # more than one tile
    # A smaller size's cluster is not preferred where it cannot serve: what is written can be read.
    winners = tune.tune(tune.cells_of((64,), 2**17), measured(time_of), tuning="")
    made = tune.table_of(winners, gpu=GPU, jax_version="1", tuning="", date="2026-01-02")
    assert tables.parse_table(tables.format_table(made)) == made
    assert {"cluster", "grid"} <= {row.config.form for row in made.rows}


def test_neighbours_change_every_field_by_one_step():
    config = Config(form="grid", num_warpgroups=8, num_ctas=16, rounds=2, local_sort=True)
    found = tune.neighbours(config)
    assert len(found) == len(set(found)) and config not in found
    changes = [{k: v for k, v in vars(other).items() if v != getattr(config, k)} for other in found]
    assert all(len(change) == 1 for change in changes)
    assert {"num_warpgroups": 4} in changes and {"num_warpgroups": 16} not in changes
    for change in ({"num_ctas": 8}, {"num_ctas": 32}, {"rounds": 4}, {"local_sort": False}):
        assert change in changes
    assert not any("form" in change for change in changes)


def test_budget_ends_the_run_and_order_follows_the_experts():
    cells = tune.cells_of((256, 8), max_pairs=512)
    assert [c.num_experts for c in cells] == [256] * 6 + [8] * 6
    assert [c.num_pairs for c in cells[:6]] == [8, 32, 64, 128, 256, 512]
    assert {c.block_size for c in cells} == {16}
    assert tune.cells_of((8,), 2**21, block_size=7)[-1] == (2**21, 8, 7)
    now = iter(range(100))
    winners = tune.tune(
        cells, measured(lambda c: 1.0), tuning="", seconds=3.5, clock=lambda: float(next(now))
    )
    assert list(winners) == cells[:3]


def test_table_holds_winners_and_todays_choice_elsewhere(tmp_path):
    """By hand: at E = 256 two sizes were measured; all else is what the default table says."""
    fast, other = block(8, cells_per_cta=512), block(4, cells_per_cta=512)
    winners = {
        tune.Cell(128, 256, 16): tune.Winner(fast, 1.234),
        tune.Cell(256, 256, 16): tune.Winner(fast, 1.5),
        tune.Cell(512, 256, 16): tune.Winner(other, 2.0),
    }
    made = tune.table_of(winners, gpu=GPU, jax_version="1", tuning="", date="2026-01-02")
    text = tables.format_table(made)
    assert tables.parse_table(text) == made and json.loads(text)["gpu"] == GPU
    rows = {(r.first_expert, r.last_expert, r.num_pairs): r for r in made.rows}
    mine = [e.last_expert for e in tables.table("").rows if (e.last_expert or 256) < 256]
    first = max(mine, default=0) + 1  # E = 256 stands for today's range up to there
    assert rows[first, 256, 256].config == fast and rows[first, 256, 256].us == 1.5
    assert (first, 256, 128) not in rows  # the same row
    assert rows[first, 256, 512].config == other
    measured_rows = ((first, 256), (first, 512))
    for first, last, pairs in rows:
        if (first, pairs) in measured_rows:
            continue
        n, num_experts = pairs or 2**21, last or 65_535
        assert rows[first, last, pairs].config == tables.row_for(n, num_experts).config
        assert rows[first, last, pairs].us is None
    ends = {row.last_expert for row in tables.table("").rows} | {256}
    assert {key[1] for key in rows} == ends


def test_equal_ranges_of_experts_are_one():
    config = Config(form="radix", num_warpgroups=1, num_ctas=2)
    winners = {
        tune.Cell(n, e, 16): tune.Winner(config, 1.0)
        for n in tune.SIZES
        for e in (8, 64, 4096, 65_535)
    }
    made = tune.table_of(
        winners, gpu=GPU, jax_version="1", tuning=tables.HEURISTIC, date="2026-01-02"
    )
    assert [row[:3] for row in made.rows] == [(1, None, None)]
    del winners[tune.Cell(64, 64, 16)]
    made = tune.table_of(
        winners, gpu=GPU, jax_version="1", tuning=tables.HEURISTIC, date="2026-01-02"
    )
    assert {row[:2] for row in made.rows} == {(1, 8), (9, 64), (65, None)}


def test_run_writes_a_table_that_is_then_used(tmp_path, monkeypatch):
    out = tmp_path / "nvidia_z9.json"
    lines = []
    sizes = {"experts": (64,), "max_pairs": 512, "block_size": None, "seconds": None, "out": out}
    wanted = {"num_warpgroups": 1, "form": "block"}

    def time_of(config):
        return 1.0 if all(getattr(config, k) == v for k, v in wanted.items()) else 2.0

    assert tune.run(lines.append, **sizes, measure=measured(time_of), gpu=GPU) == 0
    said = "\n".join(lines)
    assert "has no table" in said and "6 of 6 sizes measured" in said and str(out) in said
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    monkeypatch.setenv(tables.FOLDER_VARIABLE, str(tmp_path))
    caches = (tables._paths, tables.table, tables.table_name)
    try:
        for cache in caches:
            cache.cache_clear()
        name = tables.table_name(GPU)
        assert name == "nvidia_z9"
        assert tables.config_for(CELL.problem._replace(tuning=name)).num_warpgroups == 1
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()
    before = out.read_text()
    assert tune.run(lines.append, **sizes, measure=measured(lambda c: "broken"), gpu=GPU) == 1
    assert out.read_text() == before and "nothing is written" in lines[-1]


def test_tune_says_before_it_measures_that_its_folder_cannot_be_written(tmp_path):
    def measure(cell, configs):
        pytest.fail("it measured")

    sizes = {"experts": [8], "max_pairs": 8, "block_size": None, "seconds": None}
    for folder in unwritable(tmp_path):
        with pytest.raises(OSError):
            out = folder / "table.json"
            tune.run(**sizes, out=out, measure=measure, gpu="NVIDIA H200")


def test_a_failing_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    tune.write(path, "old")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(tune.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tune.write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [(24, 5, 4), (64, 3, 8), (96, 40, 16), (8, 256, 16)])
def test_answer_is_that_of_a_plain_loop(size):
    cell = tune.Cell(*size)
    ids = np.random.default_rng(1).integers(0, cell.num_experts, cell.num_pairs, dtype=np.int32)
    loop = plain_loop(ids, cell.block_size, cell.num_experts)
    for name, array in zip(cell.problem.outputs, tune.answer(cell, ids), strict=True):
        np.testing.assert_array_equal(array, getattr(loop, name))


def test_what_is_tried_gives_the_answer():
    """Configs that a search asks for, run by the emulator: the heuristic's and their neighbours."""
    cell = tune.Cell(64, 40, 4)
    ids = np.random.default_rng(2).integers(0, 40, 64, dtype=np.int32)
    forms = set()

    def run(cell, configs):
        for config in configs[:6]:
            program = kernels.build(cell.problem, config)
            results = emulator.run(program, [ids])
            for got, want in zip(results, tune.answer(cell, ids), strict=True):
                np.testing.assert_array_equal(got, want)
            forms.add(config.form)
        return [1.0] * len(configs)

    assert tune.search(cell, [block(1, ctas=2)], run) is not None
    assert "block" in forms


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    import jax

    if jax.default_backend() == "gpu":
        pytest.skip("this machine has one")
    monkeypatch.chdir(tmp_path)
    assert tune.main(["--budget", "1"]) == 1
    assert "Tables are made on the GPU that they are for" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad",
    [["--experts", "x"], ["--experts", "0"], ["--experts", ""], ["--max-pairs", "7"]]
    + [["--block-size", "0"]],
)
def test_sizes_that_are_none_are_refused(bad, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(bad)
    assert stopped.value.code == 2 and bad[0] in capsys.readouterr().err


@pytest.mark.gpu
def test_gpu_tunes_one_small_size(tmp_path):
    """On the GPU itself: candidates are verified and timed, and the table can be read."""
    out, lines = tmp_path / "x.json", []
    sizes = {"experts": (64,), "max_pairs": 32, "block_size": 16, "seconds": 60}
    assert tune.run(lines.append, **sizes, out=out) == 0
    made = tables.parse_table(out.read_text())
    # Of what it says: a row of the table has no time where the next size's took the same choice.
    best = re.search(r"32x64x16 +([\d.]+) µs, (\w+)", "\n".join(lines))
    assert best and 0.5 < float(best[1]) < 50
    serves = (row for row in made.rows if row.first_expert <= 64 and row.num_pairs >= 32)
    assert next(serves).config.form == best[2]
