"""Files of placements and loads: what torch and NumPy write is read; damaged ones are clear errors."""

import io
import json
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe_align_jax as maj
from moe_align_jax._core import files as _files
from moe_align_jax._eplb import loads

torch = pytest.importorskip("torch")

MAP = np.array([[0, 1, 2, 0], [2, 1, 0, 2]], np.int32)
COUNT = np.array([[[5, 1, 0], [2, 2, 9]], [[4, 0, 0], [3, 1, 7]]])
CONTENTS = {"logical_count": COUNT, "physical_to_logical_map": MAP}


def write(path, contents):
    if path.suffix == ".npz":
        np.savez(path, **contents)
    elif path.suffix == ".json":
        lists = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in contents.items()}
        path.write_text(json.dumps(lists))
    else:
        tensors = {
            k: torch.from_numpy(np.array(v)) if isinstance(v, np.ndarray) else v
            for k, v in contents.items()
        }
        torch.save(tensors, path)
    return path


@pytest.fixture(params=[".npz", ".json", ".pt"])
def suffix(request):
    return request.param


def same(a, b):
    return isinstance(a, np.ndarray) and a.shape == b.shape and np.array_equal(a, b)


def test_arrays_and_plain_values_of_each_kind(tmp_path, suffix):
    got = _files.read_file(write(tmp_path / f"x{suffix}", CONTENTS | {"mode": "stat", "B": 3}))
    assert set(got) == {*CONTENTS, "mode", "B"} and got["mode"] == "stat" and got["B"] == 3
    assert same(got["logical_count"], COUNT) and same(got["physical_to_logical_map"], MAP)


def test_the_kind_is_read_from_the_contents(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", CONTENTS).rename(tmp_path / "x.bin")
    assert same(_files.read_file(path)["logical_count"], COUNT)


@pytest.mark.parametrize(
    "dtype", ["int64", "int32", "int16", "int8", "uint8", "bool", "float64", "float32", "float16"]
)
def test_torch_dtypes(tmp_path, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    torch.save({"x": tensor}, tmp_path / "x.pt")
    got = _files.read_file(tmp_path / "x.pt")["x"]
    assert got.dtype == dtype and same(got, tensor.numpy())


def test_torch_bfloat16_is_widened(tmp_path):
    tensor = torch.tensor([1.5, -3.0e38, 2**-120]).bfloat16()
    torch.save({"x": tensor}, tmp_path / "x.pt")
    got = _files.read_file(tmp_path / "x.pt")["x"]
    assert got.dtype == np.float32 and same(got, tensor.float().numpy())


def test_torch_views_share_a_storage(tmp_path):
    base = torch.arange(24).reshape(2, 3, 4)
    views = {
        "turned": base.transpose(0, 2)[1:],
        "part": base[1, 1:, ::2],
        "row": base[1, 2],
        "scalar": base[0, 0, 3],
        "wide": torch.ones(1).expand(5),
        "empty": torch.zeros(0, 3),
        "list": [{"deep": base[1]}],
    }
    torch.save(views, tmp_path / "x.pt")
    got = _files.read_file(tmp_path / "x.pt")
    assert same(got.pop("list")[0]["deep"], views.pop("list")[0]["deep"].numpy())
    assert got.keys() == views.keys()
    for name, tensor in views.items():
        assert same(got[name], tensor.numpy()), name


def test_big_endian_torch_file(tmp_path):
    torch.save({"x": torch.arange(5)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("byteorder"):
                data = b"big"
            elif name.endswith("data/0"):
                data = np.frombuffer(data, "<i8").astype(">i8").tobytes()
            new.writestr(name, data)
    assert _files.read_file(tmp_path / "y.pt")["x"].tolist() == [0, 1, 2, 3, 4]


# -- what is no plain data --------------------------------------------------------------------------------


class Runs:
    """What a hostile pickle does: call something."""

    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"x": Runs()}, "print, which is no plain tensor"),
        ({"x": torch.nn.Linear(1, 1)}, "no plain tensor"),
        ([torch.ones(2)], "holds a list, not a dict"),
        ({3: torch.ones(2)}, "names are not strings"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, "no plain tensor"),
    ],
)
def test_pt_that_holds_more_than_tensors_is_refused(tmp_path, capsys, value, words):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=words):
        _files.read_file(tmp_path / "x.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        (0, (3,), (2,)),  # reaches element 4 of 4
        (4, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (1 << 40,), (0,)),
        (0, (2, 2), (1,)),
        (0, (1,) * 40, (1,) * 40),
        (0.0, (1,), (1,)),
    ],
)
def test_tensor_beyond_its_storage_is_refused(arguments):
    storage = np.arange(4)
    with pytest.raises(ValueError, match="a tensor"):
        _files._Rebuild()(storage, *arguments, False, None)
    assert _files._Rebuild()(storage, 0, (2, 2), (2, 1)).tolist() == [[0, 1], [2, 3]]


def test_stand_ins_of_the_unpickler_cannot_be_changed():
    """BUILD may set attributes of what GLOBAL gives; nothing here must keep them."""
    code = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__call__K\x01s\x86b."
    with pytest.raises(Exception, match="__call__|attribute"):
        _files._Unpickler(code, None).load()


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def test_npz_with_objects_or_other_members_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([Runs()], object))
    with pytest.raises(ValueError, match="pickled objects"):
        _files.read_file(path)
    for name, data, words in (
        ("x.txt", b"", "neither .npy arrays nor one data.pkl"),
        ("x.npy", npy(np.arange(4))[:-1], "does not fit its data"),
        ("x.npy", npy(np.arange(4)).replace(b"(4,)", b"(9,)"), "does not fit its data"),
        ("x.npy", b"\x93NUMPY\x09\x00", "format 9"),
        ("data.pkl", pickle.dumps({"x": 1})[:-1], "x.npz"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, data)
        with pytest.raises(ValueError, match=words):
            _files.read_file(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "MAX_BYTES", 1000)
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros(1000))
    with pytest.raises(ValueError, match="more than 1000"):
        _files.read_file(tmp_path / "x.npz")


def test_a_small_pt_that_expands_to_gigabytes_is_refused(tmp_path):
    """One element, expanded; no tensor alone is beyond the limit of a file."""
    one = torch.zeros(1)
    cases = {
        "one": {"logical_count": one.expand(2**29)},
        "several": {str(i): one.expand(2**24) for i in range(64)},
        "nested": {
            "records": [{"global_physical_count": one.expand(2**13, 2**13)} for _ in range(9)]
        },
    }
    for name, contents in cases.items():
        path = tmp_path / f"{name}.pt"
        torch.save(contents, path)
        assert path.stat().st_size < 20_000
        with pytest.raises(
            ValueError, match=rf"{name}\.pt.*expand to many times the data of the file"
        ):
            _files.read_file(path)


def test_records_that_share_one_storage_are_read(tmp_path):
    """Views of a large storage are no expansion: together they hold what it holds."""
    base = torch.arange(2**21, dtype=torch.float64).reshape(64, -1)
    torch.save({"records": [{"x": row} for row in base], "base": base}, tmp_path / "x.pt")
    got = _files.read_file(tmp_path / "x.pt")
    assert same(got["base"], base.numpy()) and same(got["records"][63]["x"], base[63].numpy())


def test_bfloat16_loads(tmp_path):
    """Read from a .pt and placed; NumPy's own file has lost the dtype, and the error says so."""
    bfloat16 = jnp.bfloat16
    load = np.array([[5, 1, 2, 2], [9, 1, 1, 1]], np.float32)
    want = maj.rebalance_experts(load, 6, 1, 1, 2).physical_to_logical_map
    for loads_given in (load.astype(bfloat16), jnp.asarray(load, bfloat16)):
        got = maj.rebalance_experts(loads_given, 6, 1, 1, 2).physical_to_logical_map
        assert np.array_equal(got, want)
    torch.save({"logical_count": torch.from_numpy(load).bfloat16()}, tmp_path / "x.pt")
    location = maj.ExpertLocation.from_file(tmp_path / "x.pt", num_physical_experts=6, num_gpus=2)
    assert np.array_equal(location.physical_to_logical_map, want)
    np.savez(tmp_path / "x.npz", logical_count=load.astype(bfloat16))
    with pytest.raises(ValueError, match=r"x\.npz.*as NumPy writes bfloat16.*save it as float32"):
        maj.ExpertLocation.from_file(tmp_path / "x.npz", num_physical_experts=6, num_gpus=2)


@pytest.mark.parametrize(
    "contents",
    [
        {"x": np.ones(2)},
        {"logical_count": "many"},
        {"logical_count": np.full((2, 2), -1)},
        {"physical_count": np.ones((1, 2, 4))},
        {"physical_to_logical_map": np.ones((2, 2))},
        {"physical_to_logical_map": np.array([[0, 7]])},
        {"logical_count": np.ones((2, 6))},  # more experts than slots
        {"records": [3]},
    ],
)
def test_errors_about_a_file_name_it(tmp_path, contents):
    path = write(tmp_path / "this one.json", contents)
    with pytest.raises((TypeError, ValueError), match=r"this one\.json'"):
        maj.ExpertLocation.from_file(path, num_physical_experts=4, num_gpus=2)
    read = _files.read_file(path)
    if "physical_to_logical_map" not in contents and contents.get("x") is not None:
        for files in ({"a.npz": read}, {"a.npz": {"logical_count": COUNT}, "b.npz": read}):
            with pytest.raises((TypeError, ValueError), match=f"'{list(files)[-1]}'"):
                loads.sum_of_files(files, function="f")


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "{", "nothing", "[" * 100_000, '{"a": 1', "\x00\x01"]
)
def test_text_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"read_file: file must be readable; got .*x\.json"):
        _files.read_file(path)
    with pytest.raises(ValueError, match="text must be a JSON object"):
        _files.parse_json(text)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        _files.read_file(tmp_path / "none.npz")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    contents = CONTENTS | {"mode": "stat"}
    return [write(folder / f"x{s}", contents).read_bytes() for s in (".npz", ".json", ".pt")]


@given(data=st.data())
def test_damaged_files_are_clear_errors_or_valid_placements(tmp_path, originals, data):
    """Bytes changed, cut out or doubled, anywhere: never anything but an error that names the file."""
    original = bytearray(data.draw(st.sampled_from(originals)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(original) - 1))
        how = data.draw(st.sampled_from(["change", "cut", "drop", "double"]))
        if how == "change":
            original[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del original[at + 1 :]
        else:
            size = data.draw(st.integers(1, 40))
            piece = original[at : at + size]
            original[at : at + size] = b"" if how == "drop" else piece * 2
            original = original or bytearray(b"{")
    path = tmp_path / "damaged"
    path.write_bytes(original)
    try:
        location = maj.ExpertLocation.from_file(path, num_physical_experts=4, num_gpus=2)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(("ExpertLocation.from_", "rebalance_experts: "))
    else:
        physical = np.asarray(location.physical_to_logical_map)
        assert (physical >= 0).all() and (location.num_replicas.min() >= 1)


@given(
    st.dictionaries(
        st.sampled_from(
            ["logical_count", "physical_count", "physical_to_logical_map", "records", "x"]
        ),
        st.recursive(
            st.none() | st.integers(-2, 5) | st.floats() | st.text(max_size=2),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=12,
        ),
    )
)
def test_json_of_any_shape_is_a_clear_error_or_a_valid_placement(contents):
    try:
        location = maj.ExpertLocation.from_file(
            json.dumps(contents, indent=1), num_physical_experts=4, num_gpus=2
        )
    except (ValueError, TypeError) as error:
        assert str(error).startswith(("ExpertLocation.from_", "rebalance_experts: "))
    else:
        assert location.num_replicas.min() >= 1


# -- locations and loads from files -----------------------------------------------------------------------


def test_location_from_a_file_with_a_map(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", CONTENTS)
    location = maj.ExpertLocation.from_file(path, num_gpus=2, dispatch="static")
    assert np.array_equal(location.physical_to_logical_map, MAP)
    assert location.static_dispatch_map.shape == (2, 2, 3)


def test_location_from_inline_json():
    location = maj.ExpertLocation.from_file('{"physical_to_logical_map": [[0, 1, 1]]}')
    assert location.num_replicas.tolist() == [[1, 2]]


def test_location_from_a_file_with_counts_is_rebalanced(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", {"logical_count": COUNT})
    location = maj.ExpertLocation.from_file(path, num_physical_experts=4, num_gpus=2)
    want = maj.rebalance_experts(COUNT, 4, 1, 1, 2).physical_to_logical_map
    assert np.array_equal(location.physical_to_logical_map, want)
    with pytest.raises(TypeError, match="num_physical_experts .* a placement must be made"):
        maj.ExpertLocation.from_file(path)


def physical_counts(logical):
    """All tokens of an expert on its first slot."""
    out = np.zeros((*logical.shape[:2], MAP.shape[1]), int)
    for layer, row in enumerate(MAP.tolist()):
        for expert in range(3):
            out[:, layer, row.index(expert)] = logical[:, layer, expert]
    return out


@pytest.mark.parametrize("per_pass", [False, True])
def test_our_recording_is_rebalanced_not_taken_as_a_placement(tmp_path, per_pass):
    maps = np.stack([MAP, MAP]) if per_pass else MAP
    recording = {
        "logical_count": COUNT,
        "physical_count": physical_counts(COUNT),
        "physical_to_logical_map": maps,
        "mode": "stat",
    }
    contents = _files.read_file(write(tmp_path / "x.npz", recording))
    assert same(loads.recorded_load(contents, function="f"), COUNT)
    assert same(loads.map_in_force(contents), MAP)
    location = maj.ExpertLocation.from_file(tmp_path / "x.npz", num_physical_experts=6, num_gpus=2)
    assert location.num_physical_experts == 6
    del contents["logical_count"]
    if not per_pass:
        assert same(loads.recorded_load(contents, function="f"), COUNT)


@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_sglang_detail_records_are_summed_over_ranks(tmp_path, mode):
    """Two ranks' records of each pass, as its recorder writes them."""
    physical = physical_counts(COUNT)
    records = []
    for number, count in enumerate(physical):
        for rank in range(2):
            record = {"forward_pass_id": number + 7, "rank": rank, "gatherer_key": "primary"}
            if mode == "per_pass":
                share = count // 2 if rank else count - count // 2
                record["global_physical_count"] = torch.from_numpy(share)
            else:
                ids = np.full((2, 30, 1), -1)
                for layer in range(2):
                    mine = np.repeat(np.arange(4), count[layer])[rank::2]
                    ids[layer, : len(mine), 0] = mine
                record["topk_ids_of_layer"] = torch.from_numpy(ids)
            records.append(record)
    dump = {"records": records, "last_physical_to_logical_map": torch.from_numpy(MAP)}
    torch.save(dump, tmp_path / "x.pt")
    contents = _files.read_file(tmp_path / "x.pt")
    assert same(loads.recorded_load(contents, function="f"), COUNT)


@pytest.mark.parametrize(
    ("contents", "error", "words"),
    [
        ({"x": np.ones(2)}, ValueError, "hold logical_count; got x"),
        ({"logical_count": "many"}, TypeError, "be numbers"),
        ({"logical_count": np.ones(3)}, ValueError, "have shape"),
        ({"logical_count": np.ones((2, 0))}, ValueError, "have shape"),
        ({"logical_count": -np.ones((2, 2))}, ValueError, "at least 0"),
        ({"logical_count": np.full((2, 2), np.nan)}, ValueError, "finite"),
        ({"physical_count": np.ones((1, 2, 4))}, ValueError, "come with physical counts"),
        (
            {"physical_count": np.ones((1, 2, 4)), "physical_to_logical_map": MAP[:1]},
            ValueError,
            "experts of shape",
        ),
        (
            {"physical_count": np.ones((1, 2, 4)), "physical_to_logical_map": MAP + 9},
            ValueError,
            "experts of shape",
        ),
        ({"records": [3]}, ValueError, r"records\[0\] must hold"),
        ({"records": []}, ValueError, "hold logical_count; got records"),
        (
            {"records": [{"global_physical_count": np.ones((n, 2))} for n in (1, 2)]},
            ValueError,
            "one shape",
        ),
    ],
)
def test_loads_that_do_not_fit_are_refused(contents, error, words):
    with pytest.raises(error, match=words):
        loads.recorded_load(contents, function="f")


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_location_from_a_table_of_the_recorder(tmp_path, suffix):
    pytest.importorskip("pyarrow")
    recorder = maj.ExpertDistributionRecorder(
        "stat", num_layers=1, num_physical_experts=4, directory=tmp_path, file_format=suffix
    )
    recorder.start_record()
    counts = np.array([[9, 1, 4, 2]], np.int32)
    recorder.state = maj.record_expert_load(recorder.state, None, counts)
    path = recorder.dump_record()
    got = maj.ExpertLocation.from_file(path, num_physical_experts=6, num_gpus=2)
    want = maj.rebalance_experts(counts, 6, 1, 1, 2).physical_to_logical_map
    assert got.physical_to_logical_map.tolist() == want.tolist()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"dump; got '{path}'"):
        maj.ExpertLocation.from_file(path, num_physical_experts=6, num_gpus=2)
