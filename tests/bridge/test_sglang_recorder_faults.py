"""SGLang's recorder for PyTorch: padding, micro-batches, layers, threads, scaling; its file as the oracle."""

import dataclasses
import inspect
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.bridge import sglang_file
from tests.bridge.test_sglang_recorder import (
    LAYERS,
    LOGICAL,
    PHYSICAL,
    TOP_K,
    batch_of,
    bincount,
    by_logical,
    forward,
    make,
    placement,
    random_ids,
    random_map,
)
from tests.gpu.graphs import capture
from torch_bridge import sglang
from torch_bridge.sglang import gather
from torch_bridge.sglang import recorder as sglang_recorder

PADDED = np.array([[0, 1], [1, 2], [0, 3], [3, 3]])  # three tokens, and a row of padding


def hook(recorder, layer, ids, name=None):
    with recorder.with_current_layer(layer), recorder.with_debug_name(name):
        recorder.on_select_experts(torch.as_tensor(ids))


def records(recorder):
    return recorder.dump_record("object")["records"]


# -- padding and micro-batches --------------------------------------------------------------------------


def test_padding_behind_the_tokens_of_the_batch_does_not_count():
    recorder = make("per_token", max_tokens=4)
    recorder.start_record()
    with recorder.with_forward_pass(0, batch_of(3)):
        hook(recorder, 1, PADDED)
    [record] = records(recorder)
    assert record["global_physical_count"][1].tolist() == [2, 2, 1, 1, 0, 0, 0, 0]
    assert record["topk_ids_of_layer"].shape == (LAYERS, 3, TOP_K)
    np.testing.assert_array_equal(record["topk_ids_of_layer"][1], PADDED[:3])
    want = by_logical([np.zeros(PHYSICAL), [2, 2, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(record["global_logical_count"], want)


@pytest.mark.parametrize("tokens", [0, 3, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_per_token_equals_sglangs_own_file(monkeypatch, tokens, dtype):
    where = placement(ranks=1)
    theirs = sglang_file.recorder(sglang_file.load(monkeypatch, mode="per_token"), where)
    ours = make("per_token", where, max_tokens=16, top_k=8)
    for recorder in (theirs, ours):
        recorder.start_record()
        for number in range(2):
            with recorder.with_forward_pass(number, batch_of(tokens)):
                for layer in range(LAYERS):
                    with recorder.with_current_layer(layer):
                        ids = torch.as_tensor((PADDED + layer + number) % PHYSICAL)
                        recorder.on_select_experts(topk_ids=ids.to(dtype))
    got, want = records(ours), theirs._accumulator._records
    assert len(got) == len(want) == 2
    if tokens == 3:
        assert want[0]["global_physical_count"][0].tolist() == [2, 2, 1, 1, 0, 0, 0, 0]
    for mine, yours in zip(got, want, strict=True):
        assert set(mine) == {*yours, "global_logical_count"}
        for name, value in yours.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(mine[name], value), name
            else:
                assert mine[name] == value, name


def test_micro_batches_of_a_layer_are_both_recorded():
    """SGLang 0.5.23 keeps the ids of the second alone."""
    ids = random_ids(0)
    recorder = make("per_token")
    recorder.start_record()
    for number, batch in enumerate((batch_of(9), None)):
        with recorder.with_forward_pass(number, batch):
            for layer in range(LAYERS):
                hook(recorder, layer, ids[layer, :4], "child_a")
                hook(recorder, layer, ids[layer, 4:], "child_b")
    for record in records(recorder):
        np.testing.assert_array_equal(record["topk_ids_of_layer"], ids)
        np.testing.assert_array_equal(record["global_physical_count"], bincount(ids))


@pytest.mark.parametrize("mode", ["stat", "per_pass"])
def test_micro_batches_are_summed_as_in_sglangs_own_file(monkeypatch, mode):
    where = placement(ranks=1)
    theirs = sglang_file.recorder(sglang_file.load(monkeypatch, mode=mode), where)
    ours = make(mode, where, buffer_size=4)
    ids = random_ids(1)
    for recorder in (theirs, ours):
        recorder.start_record()
        with recorder.with_forward_pass(0, None):
            for layer in range(LAYERS):
                for part, name in ((ids[layer, :4], "child_a"), (ids[layer, 4:], "child_b")):
                    with recorder.with_current_layer(layer), recorder.with_debug_name(name):
                        recorder.on_select_experts(torch.from_numpy(part))
    if mode == "stat":
        want = theirs.dump_record("object")["logical_count"]
        np.testing.assert_array_equal(ours.dump_record("object")["logical_count"], want)
    else:
        [want] = theirs._accumulator._records
        [got] = records(ours)
        assert torch.equal(got["global_physical_count"], want["global_physical_count"])


def test_padded_micro_batches_are_refused_and_not_recorded():
    recorder = make("per_token")
    recorder.start_record()
    with pytest.raises(ValueError, match="3 tokens of the pass in all.*2 . 2 rows in layer 1"):
        with recorder.with_forward_pass(0, batch_of(3)):
            hook(recorder, 1, PADDED[:2])
            hook(recorder, 1, PADDED[2:])
    assert records(recorder) == []
    with pytest.raises(ValueError, match=r"fit into \[9, 2\]; got \[4, 2\] after 8 rows"):
        with recorder.with_forward_pass(0, None):
            for _ in range(3):
                hook(recorder, 0, PADDED)
    with pytest.raises(ValueError, match="forward_batch must have at most max_tokens = 9"):
        with recorder.with_forward_pass(0, batch_of(10)):
            pass
    assert records(recorder) == []


def test_ids_beyond_int32_stay_out_of_range():
    for mode in ("per_token", "per_pass"):
        recorder = make(mode)
        recorder.start_record()
        with recorder.with_forward_pass(0, None):
            hook(recorder, 0, np.array([[2**32 + 1, 3], [-(2**40), 2**31]]))
        [record] = records(recorder)
        assert record["global_physical_count"][0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("batched", [True, False])
def test_replays_of_padded_batches_and_micro_batches(batched):
    """On a GPU: graphs of 16 rows for 6 tokens, in one call a layer and in two."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    where = placement()
    where.physical_to_logical_map = where.physical_to_logical_map.cuda()
    recorder = make("per_token", where, max_tokens=16)
    static = torch.zeros(LAYERS, 16, TOP_K, dtype=torch.int64, device="cuda")

    def layers(*cuts):
        for layer in range(LAYERS):
            for first, last in zip((0, *cuts), (*cuts, 16), strict=True):
                hook(recorder, layer, static[layer, first:last])

    graphs = []
    for cuts in ((), (4,)):
        layers(*cuts)
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with capture(graphs[-1]):
            layers(*cuts)
    recorder.start_record()
    batch = batch_of(6)
    for name in ("input_ids", "positions"):
        setattr(batch, name, getattr(batch, name).cuda())
    for number in range(4):
        static.copy_(torch.from_numpy(random_ids(number, 16)))
        with recorder.with_forward_pass(number, batch if batched else None):
            graphs[number % 2].replay()
    found = records(recorder)
    assert len(found) == 4
    for number, record in enumerate(found):
        want = random_ids(number, 16)[:, : 6 if batched else 16]
        np.testing.assert_array_equal(record["topk_ids_of_layer"], want)
        np.testing.assert_array_equal(record["global_physical_count"], bincount(want))
    # The graphs write into these buffers: a larger placement needs another recorder.
    where.physical_to_logical_map = torch.zeros(LAYERS, 12, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="buffers that a CUDA graph captured"):
        with recorder.with_forward_pass(4, None):
            pass


# -- passes, layers, threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
def test_nested_passes_are_refused_and_the_outer_one_is_kept(mode):
    recorder = make(mode, buffer_size=2)
    recorder.start_record()
    ids = random_ids(0)
    with recorder.with_forward_pass(1, None):
        hook(recorder, 0, ids[0])
        with pytest.raises(RuntimeError, match="with_forward_pass: passes must not nest"):
            with recorder.with_forward_pass(2, None):
                raise AssertionError("not reached")
        hook(recorder, 1, ids[1])
    dump = recorder.dump_record("object")
    if mode == "stat":
        np.testing.assert_array_equal(dump["logical_count"][0], by_logical(bincount(ids)))
        assert not dump["logical_count"][1].any()
    else:
        [record] = dump["records"]
        assert record["forward_pass_id"] == 1
        np.testing.assert_array_equal(record["global_physical_count"], bincount(ids))


LAYER = {
    "negative": (-1, ValueError, r"layer_idx must be in \[0, 2\); got -1"),
    "beyond": (LAYERS, ValueError, r"layer_idx must be in \[0, 2\); got 2"),
    "bool": (True, TypeError, "layer_idx must be an int; got bool True"),
    "float": (1.0, TypeError, "layer_idx must be an int; got float"),
    "numpy bool": (np.bool_(True), TypeError, "layer_idx must be an int"),
    "none": (None, TypeError, "layer_idx must be an int; got NoneType"),
}


@pytest.mark.parametrize("name", LAYER)
def test_layers_that_are_none(name):
    layer, kind, text = LAYER[name]
    recorder = make(buffer_size=1)
    recorder.start_record()
    with recorder.with_forward_pass(0, None):
        with pytest.raises(kind, match=f"with_current_layer: {text}"):
            with recorder.with_current_layer(layer):
                recorder.on_select_experts(torch.zeros(1, 1, dtype=torch.int32))
        with pytest.raises(kind, match=f"get_current_pass_count_buffer: {text}"):
            recorder.get_current_pass_count_buffer(layer)
        with recorder.with_current_layer(np.int64(1)):
            recorder.on_select_experts(torch.zeros(1, 1, dtype=torch.int32))
    got = recorder.dump_record("object")["logical_count"][0]
    assert got.sum() == 1 and got[1, random_map()[1, 0]] == 1


@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_buffer_size_limits_records(mode):
    for size, kept in ((3, [4, 5, 6]), (-1, list(range(7)))):
        recorder = make(mode, buffer_size=size)
        recorder.start_record()
        for number in range(7):
            forward(recorder, random_ids(number), number)
        found = records(recorder)
        assert [record["forward_pass_id"] for record in found] == kept
        for record in found:
            want = bincount(random_ids(record["forward_pass_id"]))
            np.testing.assert_array_equal(record["global_physical_count"], want)


def in_thread(call):
    """What the call raises in another thread, or None."""
    found = []

    def run():
        try:
            call()
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return found[0] if found else None


def test_another_thread_gets_an_error_during_a_pass_and_is_welcome_between():
    recorder = make(buffer_size=3)
    ids = random_ids(0)
    assert in_thread(recorder.start_record) is None
    calls = {
        "with_forward_pass": lambda: forward(recorder, ids),
        "with_current_layer": lambda: hook(recorder, 0, ids[0]),
        "dump_record": lambda: recorder.dump_record("object"),
        "start_record": recorder.start_record,
        "stop_record": recorder.stop_record,
    }
    with recorder.with_forward_pass(0, None):
        hook(recorder, 0, ids[0])
        for name, call in calls.items():
            error = in_thread(call)
            assert isinstance(error, RuntimeError)
            assert str(error).startswith(f"{name}: a recorder must be used by one thread at a time")
        hook(recorder, 1, ids[1])
    assert in_thread(lambda: forward(recorder, ids)) is None
    got = recorder.dump_record("object")["logical_count"]
    want = by_logical(bincount(ids))
    np.testing.assert_array_equal(got, [want, want, np.zeros_like(want)])


# -- elastic scaling ------------------------------------------------------------------------------------


def larger():
    maps = np.concatenate([random_map(), random_map(1)[:, :4]], axis=1)
    return maps, placement(maps, ranks=6)


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
def test_a_placement_may_grow_between_passes(mode):
    where = placement()
    recorder = make(mode, where, buffer_size=3, enable_metrics=True)
    ids = [random_ids(0), random_ids(1) + 3, random_ids(2)]
    forward(recorder, ids[0], 0)
    maps, grown = larger()
    where.physical_to_logical_map, where.ep_size = grown.physical_to_logical_map, 6
    metrics = forward(recorder, ids[1], 1)["metrics"]
    counts = [np.bincount(i[(i >= 0) & (i < 12)], minlength=12) for i in ids[1]]
    per_gpu = np.stack(counts).reshape(LAYERS, 6, 2).sum(-1)
    rate = np.mean((per_gpu.mean(-1) + 1e-5) / (per_gpu.max(-1) + 1e-5))
    np.testing.assert_allclose(metrics.eplb_balancedness, rate, rtol=1e-6)
    # Two GPUs die: their slots hold no expert.
    dead = random_map()
    dead[:, 4:] = -1
    where.physical_to_logical_map, where.ep_size = torch.from_numpy(dead), 4
    forward(recorder, ids[2], 2)
    last = np.stack(
        [
            np.bincount(m[m >= 0], c[m >= 0], LOGICAL)
            for m, c in zip(dead, bincount(ids[2]), strict=True)
        ]
    )
    want = [by_logical(bincount(ids[0])), by_logical(counts, maps), last]
    dump = recorder.dump_record("object")
    if mode == "stat":
        np.testing.assert_array_equal(dump["logical_count"], want)
    else:
        for record, logical in zip(dump["records"], want, strict=True):
            np.testing.assert_array_equal(record["global_logical_count"], logical)


def test_a_placement_that_the_buffers_cannot_follow_is_a_clear_error(monkeypatch):
    where = placement()
    recorder = make(where=where, buffer_size=1)
    recorder.start_record()
    with pytest.raises(RuntimeError, match="must keep its size within a pass"):
        with recorder.with_forward_pass(0, None):
            where.physical_to_logical_map, where.ep_size = larger()[1].physical_to_logical_map, 6
    where.physical_to_logical_map = torch.zeros(LAYERS + 1, PHYSICAL, dtype=torch.int64)
    where.ep_size = 4
    with pytest.raises(RuntimeError, match="init_new"):
        forward(recorder, random_ids(0))
    where.physical_to_logical_map = torch.from_numpy(random_map())
    monkeypatch.setattr(sglang_recorder.gather, "capturing", lambda: True)
    hook(recorder, 0, np.zeros((1, 2), int))
    monkeypatch.undo()
    forward(recorder, random_ids(0))
    where.physical_to_logical_map, where.ep_size = larger()[1].physical_to_logical_map, 6
    with pytest.raises(RuntimeError, match="buffers that a CUDA graph captured"):
        forward(recorder, random_ids(0))
    got = recorder.dump_record("object")["logical_count"][0]
    np.testing.assert_array_equal(got, by_logical(bincount(random_ids(0))))


# -- SGLang's interface ---------------------------------------------------------------------------------


def test_metrics_have_what_sglang_asks_of_them():
    recorder = make(enable_metrics=True, buffer_size=4)
    flags = [
        forward(recorder, random_ids(n), n)["metrics"].reset_server_log_history for n in (0, 1)
    ]
    assert flags == [True, False]
    average = recorder.average_balancedness()[10]
    recorder.dump_record("object")
    metrics = forward(recorder, random_ids(0), 2)["metrics"]
    assert metrics.reset_server_log_history is True
    seen = []
    values = metrics.eplb_balancedness, metrics.gpu_physical_count_sum
    metrics.map_device_tensors(lambda tensor: seen.append(tensor) or tensor.clone())
    assert [id(t) for t in seen] == [id(t) for t in values]
    assert metrics.eplb_balancedness is not values[0] and metrics.eplb_balancedness == values[0]
    metrics.eplb_balancedness.zero_()
    assert recorder.average_balancedness()[10] == pytest.approx(float(values[0])) and average > 0
    metrics.gpu_physical_count_sum = None
    metrics.map_device_tensors(torch.clone)


def test_interface_is_that_of_sglangs_own_file(monkeypatch):
    module = sglang_file.load(monkeypatch, mode="stat")
    theirs = sglang_file.interface(module.ExpertDistributionRecorder)
    ours = sglang_file.interface(sglang.ExpertDistributionRecorder)
    assert set(theirs) <= set(ours)
    for name, parameters in theirs.items():
        got = ours[name]
        assert got[: len(parameters)] == parameters if parameters else got == parameters, name
    extra = inspect.signature(sglang.ExpertDistributionRecorder.init_new).parameters
    assert all(extra[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours["init_new"][2:])
    for kind in (sglang.ExpertDistributionRecorder, type(make())):
        assert set(theirs) <= set(sglang_file.interface(kind))
    names = [
        [f.name for f in dataclasses.fields(kind.ExpertDistributionMetrics)]
        for kind in (module, sglang)
    ]
    assert names[0] == names[1]
    metrics = sglang_file.interface(module.ExpertDistributionMetrics)
    assert metrics == sglang_file.interface(sglang.ExpertDistributionMetrics)


def test_metrics_equal_those_of_sglangs_own_file(monkeypatch):
    where = placement()
    theirs = sglang_file.recorder(sglang_file.load(monkeypatch, mode="stat", metrics=True), where)
    ours = make(where=where, enable_metrics=True, buffer_size=4)
    assert theirs.recording and ours.recording
    for number in (3, 4, 5):
        ids = random_ids(number)
        if number == 4:
            ids[0] = -1  # an idle layer
        got, want = (forward(recorder, ids, number)["metrics"] for recorder in (ours, theirs))
        for name, value in dataclasses.asdict(want).items():
            assert float(getattr(got, name)) == pytest.approx(float(value), rel=1e-6), name


# -- arguments ------------------------------------------------------------------------------------------


def started(mode="stat", **options):
    recorder = make(mode, **options)
    recorder.start_record()
    return recorder


def call(method, *values, **options):
    recorder = started(**options)
    with recorder.with_forward_pass(0, None), recorder.with_current_layer(0):
        getattr(recorder, method)(*values)


LOW = {"moe_a2a_backend": "deepep", "deepep_mode": "low_latency"}
BAD = {
    "pass 1.5": (TypeError, lambda: forward(make(), [], 1.5), "forward_pass_id must be an int"),
    "pass None": (TypeError, lambda: forward(make(), [], None), "forward_pass_id must be an int"),
    "pass True": (TypeError, lambda: forward(make(), [], True), "forward_pass_id must be an int"),
    "rank True": (TypeError, lambda: make(rank=True), "rank must be an int"),
    "rank 1.0": (TypeError, lambda: make(rank=1.0), "rank must be an int"),
    "buffer True": (TypeError, lambda: make(buffer_size=True), "buffer_size must be an int"),
    "buffer 2.5": (TypeError, lambda: make(buffer_size=2.5), "buffer_size must be an int"),
    "metrics": (
        TypeError,
        lambda: make(enable_metrics="no"),
        "enable_metrics must be a Python bool",
    ),
    "same": (
        TypeError,
        lambda: make(replicated_tokens=1),
        "replicated_tokens must be a Python bool",
    ),
    "backend": (TypeError, lambda: make(moe_a2a_backend=None), "moe_a2a_backend must be a str"),
    "folder": (TypeError, lambda: make(directory=3), "directory must be a path"),
    "float ids": (
        TypeError,
        lambda: call("on_select_experts", torch.tensor([[1.9]])),
        "topk_ids must be an integer torch.Tensor",
    ),
    "float ids per token": (
        TypeError,
        lambda: call("on_select_experts", torch.tensor([[1.9]]), mode="per_token"),
        "topk_ids must be an integer torch.Tensor",
    ),
    "bool ids": (
        TypeError,
        lambda: call("on_select_experts", torch.tensor([[True]])),
        "topk_ids must be an integer torch.Tensor",
    ),
    "one dimension": (
        ValueError,
        lambda: call("on_select_experts", torch.tensor([1]), mode="per_token"),
        r"topk_ids must fit into \[9, 2\]",
    ),
    "one count": (
        ValueError,
        lambda: call("on_tokens_per_expert", torch.tensor([1])),
        r"tokens_per_expert must have shape \[8\]; got",
    ),
    "float counts": (
        TypeError,
        lambda: call("on_tokens_per_expert", torch.ones(PHYSICAL)),
        "tokens_per_expert must be an integer torch.Tensor",
    ),
    "low latency": (
        ValueError,
        lambda: call("on_deepep_dispatch_low_latency", torch.tensor([1]), **LOW),
        r"local_physical_count_of_layer must have shape \[2\]",
    ),
    "list of floats": (
        TypeError,
        lambda: call(
            *("on_deepep_dispatch_normal", [1.5, 2], None, None, None),
            mode="stat_approx",
            moe_a2a_backend="deepep",
        ),
        "local_physical_count_of_layer must be ints",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_of_a_wrong_kind_are_refused(name):
    kind, bad, text = BAD[name]
    with pytest.raises(kind, match=text):
        bad()


def test_a_bool_map_is_no_placement():
    where = SimpleNamespace(
        physical_to_logical_map=torch.ones(1, 2, dtype=torch.bool), num_logical_experts=2, ep_size=1
    )
    with pytest.raises(TypeError, match="of integers; got torch.bool"):
        gather.sizes_of("f", where, 0)
