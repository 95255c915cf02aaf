"""Tables of forms and sizes: what is read, which one is picked, what it chooses, and the buckets over it."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

import moe_align_jax
from moe_align_jax._align import kernels, tables
from moe_align_jax._core import checks
from moe_align_jax._lowering import select
from moe_align_jax._simt.language import check_launch
from moe_align_jax.types import AlignProblem, BatchedAlignProblem

FOLDER = pathlib.Path(moe_align_jax.__file__).parent / "data" / "tuning"
TABLES = sorted(path.stem for path in FOLDER.glob("*.json"))
EVERY = [*TABLES, tables.HEURISTIC]
EXPERTS = (1, 8, 256, 1000, 4096, 4097, 65_535)


def problem(n, num_experts, block_size, tuning=""):
    rows = checks.capacity(n, block_size=block_size, num_experts=num_experts, pad_sorted_ids=False)
    return AlignProblem(n, num_experts, block_size, rows, tuning=tuning)


# -- the file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_what_it_was_made_on_and_survives_a_round_trip(name):
    text = (FOLDER / f"{name}.json").read_text()
    table = tables.parse_table(text)
    assert table.gpu.startswith("NVIDIA") and table.date[:2] == "20" and table.jax[0].isdigit()
    assert tables.stem_of(table.gpu).startswith(name)
    assert tables.format_table(table) == text
    # A line per row, so that a diff shows what changed.
    assert text.count('"num_pairs"') == len(table.rows) == text.count("\n  {")


def test_the_wheel_takes_every_file_of_the_package():
    """hatchling packs whole packages: nothing in pyproject.toml leaves the tables out."""
    import tomllib

    build = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text())["tool"]["hatch"]
    wheel = build["build"]["targets"]["wheel"]
    assert "moe_align_jax" in wheel["packages"] and set(wheel) == {"packages"}


def content(**changes):
    config = {"form": "block", "num_warpgroups": 1}
    rows = [
        {"num_experts": [1, 64], "num_pairs": 32, "config": config},
        {"num_experts": [1, 64], "num_pairs": None, "config": config},
        {"num_experts": [65, None], "num_pairs": None, "config": {**config, "form": "radix"}},
    ]
    batched = {"form": "batched", "num_warpgroups": 4}
    facts = {"gpu": "NVIDIA X", "jax": "1", "date": "2026-01-01", "made_by": "a test"}
    return json.loads(json.dumps({**facts, "batched": batched, "rows": rows} | changes))


def broken(edit):
    made = content()
    edit(made)
    return made


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (content(more=1), "must have the fields"),
        (broken(lambda t: t.pop("date")), "must have the fields"),
        (broken(lambda t: t["rows"][0].update(speed=1)), "row 0: the fields must be"),
        (broken(lambda t: t["rows"][1]["config"].update(warps=2)), r"row 1.*got \['warps'\]"),
        (broken(lambda t: t["rows"][1]["config"].pop("form")), "row 1: .*form"),
        (broken(lambda t: t["batched"].update(x=2)), "batched: a config has the fields"),
        (broken(lambda t: t["rows"].pop()), "every num_experts once"),
        (broken(lambda t: t["rows"][2].update(num_experts=[66, None])), "every num_experts once"),
        (broken(lambda t: t.update(rows=[])), "every num_experts once"),
        (broken(lambda t: t["rows"].pop(1)), "must ascend to null"),
        (broken(lambda t: t["rows"][0].update(num_pairs=None)), "must ascend to null"),
        (broken(lambda t: t["rows"][0]["config"].update(form="warp")), ""),
        (broken(lambda t: t["rows"][1]["config"].update(form="warp")), "'warp' must end at 32"),
        (broken(lambda t: t["rows"][2]["config"].update(form="grid")), "must end at 4096 experts"),
        (broken(lambda t: t["rows"][2]["config"].update(form="cluster")), "end at 4096 experts"),
        (broken(lambda t: t["rows"][2]["config"].update(form="sorted")), "must end at 16384 pairs"),
        (broken(lambda t: t["rows"][1]["config"].update(form="gird")), "row 1: the form must be"),
    ],
)
def test_a_bad_table_is_refused_with_its_place(made, says):
    if not says:
        assert len(tables.parse_table(json.dumps(made)).rows) == 3
        return
    with pytest.raises(ValueError, match=says):
        tables.parse_table(json.dumps(made), "a.json")


# -- which table ------------------------------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A user's folder of tables, ahead of the package's."""
    monkeypatch.setenv(tables.FOLDER_VARIABLE, str(tmp_path))
    caches = (tables._paths, tables.table, tables.table_name)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def test_the_longest_name_that_begins_the_kind_counts(own_folder):
    for stem in ("nvidia_b1", "nvidia_b1_pcie"):
        (own_folder / f"{stem}.json").write_text(json.dumps(content(gpu=stem)))
    names = {
        "NVIDIA B1": "nvidia_b1",
        "NVIDIA B1 80GB HBM3": "nvidia_b1",
        "NVIDIA B1 PCIe": "nvidia_b1_pcie",
        "NVIDIA B100": tables.HEURISTIC,  # not B1
        "NVIDIA H200": "nvidia_h200",
        "AMD": tables.HEURISTIC,
        None: "",
    }
    assert {kind: tables.table_name(kind) for kind in names} == names
    assert tables.table("nvidia_b1").gpu == "nvidia_b1"
    assert tables.table("") is tables.table("") and tables.table("").gpu == "NVIDIA H200"
    assert tables.table(tables.HEURISTIC) is None


def test_a_users_table_comes_before_the_packages(own_folder):
    (own_folder / "nvidia_h200.json").write_text(json.dumps(content(gpu="mine")))
    assert tables.table("nvidia_h200").gpu == "mine"
    assert tables.config_for(problem(20, 8, 4)).form == "block"


def test_the_gpu_of_the_process_chooses_and_is_named(monkeypatch):
    """What is lowered for CUDA, and what select_implementation says, follow the device's table."""
    size = {"block_size": 16, "num_experts": 64, "platform": "cuda"}
    real = jax.devices

    def on(*kinds):
        def devices(backend=None):
            if backend != "cuda":
                return real(backend)
            if not kinds:
                raise RuntimeError("Unknown backend cuda")
            return [types.SimpleNamespace(compute_capability="9.0", device_kind=k) for k in kinds]

        monkeypatch.setattr(jax, "devices", devices)

    asked = []
    config_for = tables.config_for
    monkeypatch.setattr(tables, "config_for", lambda p: asked.append(p.tuning) or config_for(p))
    ids = jax.ShapeDtypeStruct((512,), jnp.int32)
    for kinds, name, says in (
        ((), "", "no GPU here, so the default: the table of NVIDIA H200"),
        (("NVIDIA H200",), "nvidia_h200", "sizes: the table of NVIDIA H200"),
        (("NVIDIA B7", "NVIDIA H200"), tables.HEURISTIC, "has no table"),
    ):
        on(*kinds)
        assert says in moe_align_jax.select_implementation((512,), **size).reasons["xla"]
        function = jax.jit(
            lambda x: moe_align_jax.moe_align_block_size(x, block_size=16, num_experts=64)
        )
        function.trace(ids).lower(lowering_platforms=("cuda",))
        assert asked == [name, name], kinds  # asked once, lowered once
        asked.clear()
    assert select.gpu_kind() == "NVIDIA B7"


# -- what it chooses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "config"),
    [
        # By hand from the sweeps in docs/notebook/2026-11.md.
        ((8, 256, 16), ("warp", 1, 1, 1, False)),
        ((32, 65_535, 4), ("warp", 1, 7, 1, False)),
        ((512, 64, 16), ("block", 2, 2, 1, False)),
        ((1024, 256, 64), ("block", 4, 16, 1, False)),
        ((2048, 4096, 16), ("block", 2, 16, 1, False)),
        ((8192, 64, 128), ("grid", 2, 32, 1, False)),
        ((32_768, 256, 64), ("grid", 2, 64, 2, True)),
        ((524_288, 256, 128), ("grid", 8, 128, 4, True)),
        ((524_288, 4096, 128), ("grid", 2, 128, 4, True)),
        ((300, 9000, 16), ("sorted", 4, 9, 1, False)),
        ((513, 9000, 1), ("sorted", 8, 8, 1, False)),
        ((5000, 65_535, 4), ("sorted", 8, 64, 1, False)),
        ((16_384, 60_000, 16), ("sorted", 8, 64, 1, False)),
        ((17_000, 65_535, 4), ("radix", 2, 67, 1, False)),
    ],
)
def test_h200_choices_before_it_is_tuned_anew(size, config):
    """Also that `fit` lowers CTAs, rounds and warpgroups, on rows written down here."""
    rows = {
        "warp": dict(num_warpgroups=1, num_ctas=64, cells_per_cta=8192),
        "block": dict(num_warpgroups=2 if size[0] <= 512 else 4, num_ctas=16, cells_per_cta=1024),
        "grid": dict(
            num_warpgroups=8 if size[0] > 131_072 else 2,
            num_ctas={8192: 32, 32_768: 64}.get(size[0], 128),
            rounds=4,
            local_sort=True,
        ),
        "sorted": dict(
            num_warpgroups=8, num_ctas=64, cluster=8 if size[0] > 512 else 1, cells_per_cta=1024
        ),
        "radix": dict(num_warpgroups=2, num_ctas=128, rounds=8),
    }
    row = tables.BlockAlignMosaicConfig(form=config[0], **rows[config[0]])
    got = tables.fit(row, problem(*size))
    assert (got.form, got.num_warpgroups, got.num_ctas, got.rounds, got.local_sort) == config


@pytest.mark.parametrize("tuning", EVERY)
@pytest.mark.parametrize("num_experts", EXPERTS)
def test_every_choice_is_a_program_that_can_be_launched(tuning, num_experts):
    """Also the forms' own limits, and shared memory at the largest E."""
    for n in (1, 31, 32, 33, 64, 65, 512, 2048, 2049, 5000, 8192, 70_000, 140_000, 2_000_000):
        one = problem(n, num_experts, 16, tuning)
        config = tables.config_for(one)
        assert config.form != "warp" or n <= tables.MAX_WARP_PAIRS
        program = kernels.build(one, config)
        for kernel in program.kernels:
            check_launch(kernel)
    batched = BatchedAlignProblem(num_experts, 512, 64, tuning)
    for kernel in kernels.build(batched, tables.config_for(batched)).kernels:
        check_launch(kernel)


def test_experts_too_many_for_one_word_with_the_lane_are_compared():
    """ "warp" sorts words of expert and lane; "pairs" takes any number of experts."""
    for num_experts, form in ((2**26 - 1, "warp"), (2**26, "pairs"), (2**31 - 1, "pairs")):
        one = problem(8, num_experts, 16)
        config = tables.config_for(one)
        assert config.form == form
        for kernel in kernels.build(one, config).kernels:
            check_launch(kernel)


def test_heuristic_gives_every_thread_work_before_more_threads():
    for num_experts in (8, 256):
        for k in range(6, 23):
            config = tables.config_for(problem(2**k, num_experts, 16, tables.HEURISTIC))
            threads = config.num_warpgroups * 128
            ctas = config.num_ctas if config.form == "grid" else 1
            assert 2**k >= ctas * threads // 2
            assert config.rounds <= 8 and config.num_ctas <= 128


# -- buckets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", EVERY)
@pytest.mark.parametrize(("num_experts", "block_size"), [(1, 1), (64, 16), (4096, 64), (9000, 4)])
def test_a_bucket_is_served_by_one_row_and_there_are_few(tuning, num_experts, block_size):
    most = 1 << 21
    ends = [tables.size_bucket(1, num_experts, block_size, tuning)]
    while ends[-1] < most:
        ends.append(tables.size_bucket(ends[-1] + 1, num_experts, block_size, tuning))
    assert ends == sorted(set(ends)) and len(ends) <= 32
    start = 1
    for end in ends:
        row = tables.row_for(end, num_experts, tuning)
        for n in {start, (start + end) // 2, end}:
            assert tables.size_bucket(n, num_experts, block_size, tuning) == end
            assert tables.row_for(n, num_experts, tuning).config == row.config
        # No size does more than twice the work of its own.
        assert end <= max(8, 2 * start) or row.config.form in ("block", "grid")
        start = end + 1


def test_buckets_follow_rows_that_end_anywhere(own_folder):
    config = {"form": "block", "num_warpgroups": 1}
    ends = [5, 33, 100, 1000, None]
    rows = [{"num_experts": [1, 4096], "num_pairs": end, "config": config} for end in ends]
    grid = {"form": "radix", "num_warpgroups": 1}
    rows.append({"num_experts": [4097, None], "num_pairs": None, "config": grid})
    (own_folder / "x.json").write_text(json.dumps(content(rows=rows)))
    got = sorted({tables.size_bucket(n, 64, 16, "x") for n in range(1, 5000)})
    assert {5, 33, 100, 1000} <= set(got)
    for n in range(1, 5000):
        end = next(e for e in got if e >= n)
        assert tables.size_bucket(n, 64, 16, "x") == end
        assert tables.row_for(n, 64, "x") == tables.row_for(end, 64, "x")


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"])
def test_a_gpu_with_the_same_chip_takes_its_table(kind):
    assert tables.table_name(kind) == "nvidia_h200"
    assert tables.table_name("NVIDIA B200") == tables.HEURISTIC
