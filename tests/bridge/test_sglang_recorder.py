"""SGLang's recorder for PyTorch: every mode and hook against NumPy, files, capture, ranks."""

import errno
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.graphs import capture
from torch_bridge import sglang
from torch_bridge.sglang import recorder as sglang_recorder

LAYERS, PHYSICAL, LOGICAL, RANKS, TOP_K = 2, 8, 6, 4, 2
MODES = ("stat", "per_pass", "per_token")


def random_map(seed=0):
    rng = np.random.default_rng(seed)
    slots = np.array([*range(LOGICAL), 0, 1])
    return np.stack([rng.permutation(slots) for _ in range(LAYERS)])


def placement(maps=None, ranks=RANKS):
    maps = torch.from_numpy(random_map() if maps is None else maps)
    return SimpleNamespace(physical_to_logical_map=maps, num_logical_experts=LOGICAL, ep_size=ranks)


def make(mode="stat", where=None, rank=0, **options):
    if mode == "per_token":
        options = {"max_tokens": 9, "top_k": TOP_K} | options
    return sglang.ExpertDistributionRecorder.init_new(
        where or placement(), rank, mode=mode, **options
    )


def random_ids(seed, tokens=9):
    rng = np.random.default_rng(seed)
    return rng.integers(-2, PHYSICAL + 2, (LAYERS, tokens, TOP_K))


def bincount(ids):
    return np.stack([np.bincount(i[(i >= 0) & (i < PHYSICAL)], minlength=PHYSICAL) for i in ids])


def by_logical(counts, maps=None):
    maps = random_map() if maps is None else maps
    return np.stack([np.bincount(m, c, LOGICAL) for m, c in zip(maps, counts, strict=True)])


def forward(recorder, ids, number=0, batch=None, dtype=torch.int32):
    with recorder.with_forward_pass(number, batch) as outputs:
        for layer, one in enumerate(ids):
            with recorder.with_current_layer(layer):
                recorder.on_select_experts(torch.from_numpy(one).to(dtype))
    return outputs


def batch_of(tokens):
    return SimpleNamespace(
        input_ids=torch.arange(tokens) + 100,
        positions=torch.arange(tokens),
        extend_seq_lens_cpu=[tokens],
        forward_mode=SimpleNamespace(value=1),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_stat_counts_equal_bincount_by_logical_expert(dtype):
    recorder = make(buffer_size=4)
    recorder.start_record()
    for seed, tokens in ((0, 9), (1, 1), (2, 0)):
        forward(recorder, random_ids(seed, tokens), dtype=dtype)
    dump = recorder.dump_record("object")
    assert list(dump) == ["rank", "logical_count", "average_utilization_rate_over_window"]
    want = [by_logical(bincount(random_ids(s, t))) for s, t in ((0, 9), (1, 1), (2, 0))]
    assert dump["logical_count"].dtype == torch.int64
    np.testing.assert_array_equal(dump["logical_count"], [*want, np.zeros((LAYERS, LOGICAL))])
    assert dump["rank"] == 0 and dump["average_utilization_rate_over_window"] is None


@pytest.mark.parametrize("passes", [3, 4, 5, 12, 13])
def test_ring_keeps_the_last_passes_in_order(passes):
    recorder = make(buffer_size=4)
    recorder.start_record()
    for seed in range(passes):
        forward(recorder, random_ids(seed))
    got = recorder.dump_record("object")["logical_count"]
    want = [by_logical(bincount(random_ids(s))) for s in range(max(0, passes - 4), passes)]
    np.testing.assert_array_equal(got[: len(want)], want)
    assert got.shape == (4, LAYERS, LOGICAL) and not got[len(want) :].any()
    assert not recorder.dump_record("object")["logical_count"].any(), "a dump clears"


def test_a_growing_buffer_keeps_all_passes():
    recorder = make(buffer_size=-1)
    recorder.start_record()
    for seed in range(300):
        with torch.inference_mode(seed % 2 == 0):
            forward(recorder, random_ids(seed % 7))
    got = recorder.dump_record("object")["logical_count"]
    want = [by_logical(bincount(random_ids(s % 7))) for s in range(300)]
    np.testing.assert_array_equal(got, want)


def test_counts_follow_the_placement_of_their_own_pass():
    where = placement()
    recorder = make(where=where, buffer_size=3)
    recorder.start_record()
    for seed in range(3):
        where.physical_to_logical_map.copy_(torch.from_numpy(random_map(seed)))  # in place
        forward(recorder, random_ids(seed))
    got = recorder.dump_record("object")["logical_count"]
    want = [by_logical(bincount(random_ids(s)), random_map(s)) for s in range(3)]
    np.testing.assert_array_equal(got, want)


def test_int32_rows_sum_beyond_int32():
    recorder = make("stat", buffer_size=3)
    recorder.start_record()
    for _ in range(3):
        with recorder.with_forward_pass(0, None), recorder.with_current_layer(1):
            recorder.get_current_pass_count_buffer(1)[2] = 2**31 - 1
    total = recorder.dump_record("object")["logical_count"].sum(0)
    assert total[1, random_map()[1, 2]] == 3 * (2**31 - 1)


@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_detailed_records(mode):
    where = placement()
    recorder = make(mode, where, rank=2)
    recorder.start_record()
    tokens = {7: 9, 8: 4}
    for number, count in tokens.items():
        forward(recorder, random_ids(number, count), number, batch_of(count))
    dump = recorder.dump_record("object")
    assert list(dump) == ["records", "last_physical_to_logical_map"]
    np.testing.assert_array_equal(dump["last_physical_to_logical_map"], random_map())
    for record, (number, count) in zip(dump["records"], tokens.items(), strict=True):
        ids = random_ids(number, count)
        assert record["forward_pass_id"] == number and record["rank"] == 2
        assert record["gatherer_key"] == "primary"
        np.testing.assert_array_equal(record["global_physical_count"], bincount(ids))
        np.testing.assert_array_equal(record["global_logical_count"], by_logical(bincount(ids)))
        if mode == "per_token":
            np.testing.assert_array_equal(record["topk_ids_of_layer"], ids)
            assert record["input_ids"] == list(range(100, 100 + count))
            assert record["positions"] == list(range(count))
            assert record["extend_seq_lens"] == [count] and record["forward_mode"] == 1
            assert record["misc_objects"] == []


def test_per_token_takes_any_top_k_and_keeps_each_pass_its_own_objects():
    recorder = make("per_token", moe_a2a_backend="deepep", top_k=5, max_tokens=4)
    recorder.start_record()
    ids = torch.arange(15).reshape(3, 5) % PHYSICAL
    for number in range(2):
        with recorder.with_forward_pass(number, None), recorder.with_current_layer(1):
            recorder.on_select_experts(ids + number)
            layout = torch.tensor([number, 5])
            recorder.on_deepep_dispatch_normal([1] * 2, layout, None, layout + 1)
            layout.zero_()  # the engine's buffer is used again
    records = recorder.dump_record("object")["records"]
    for number, record in enumerate(records):
        assert record["topk_ids_of_layer"].shape == (LAYERS, 3, 5)
        assert record["topk_ids_of_layer"][1].tolist() == (ids + number).tolist()
        assert (record["topk_ids_of_layer"][0] == -1).all()
        assert record["misc_objects"] == [
            {
                "layer_id": 1,
                "num_tokens_per_rank": [number, 5],
                "num_tokens_per_rdma_rank": None,
                "num_tokens_per_expert": [number + 1, 6],
            }
        ]


def test_low_latency_counts_of_all_ranks_sum_to_those_of_select_experts():
    ids = np.abs(random_ids(0, tokens=40)) % PHYSICAL
    counts = bincount(ids)
    total: Any = 0
    for rank in range(RANKS):
        recorder = make(
            rank=rank, moe_a2a_backend="deepep", deepep_mode="low_latency", buffer_size=1
        )
        recorder.start_record()
        with recorder.with_forward_pass(0, None):
            for layer in range(LAYERS):
                mine = torch.from_numpy(counts[layer, 2 * rank : 2 * rank + 2])
                with recorder.with_current_layer(layer):
                    # Two micro-batches; what another dispatch would report is not counted twice.
                    recorder.on_deepep_dispatch_low_latency(mine // 2)
                    recorder.on_deepep_dispatch_low_latency(mine - mine // 2)
                    recorder.on_select_experts(torch.from_numpy(ids[layer]))
        total = total + recorder.dump_record("object")["logical_count"]
    np.testing.assert_array_equal(total[0], by_logical(counts))


def test_stat_approx_takes_the_aligned_counts():
    recorder = make("stat_approx", moe_a2a_backend="deepep", rank=1, buffer_size=1)
    recorder.start_record()
    with recorder.with_forward_pass(0, None), recorder.with_current_layer(1):
        for _ in range(2):
            recorder.on_deepep_dispatch_normal([128, 256], None, None, None)
    want = np.zeros((LAYERS, PHYSICAL))
    want[1, 2:4] = [256, 512]
    got = recorder.dump_record("object")["logical_count"][0]
    np.testing.assert_array_equal(got, by_logical(want))


def test_counts_that_exist_already_and_a_fused_buffer():
    ids, recorder = random_ids(3), make(buffer_size=1)
    assert recorder.get_current_pass_count_buffer(0) is None
    recorder.start_record()
    counts = torch.from_numpy(bincount(ids))
    with recorder.with_forward_pass(0, None):
        with recorder.with_current_layer(0):
            recorder.on_tokens_per_expert(counts[0])
        recorder.get_current_pass_count_buffer(1).add_(counts[1])
    got = recorder.dump_record("object")["logical_count"][0]
    np.testing.assert_array_equal(got, by_logical(bincount(ids)))


def test_start_stop_disable(caplog):
    recorder = make(buffer_size=4)
    forward(recorder, random_ids(0))
    recorder.stop_record()
    recorder.start_record()
    assert "off already" in caplog.text and recorder.recording
    forward(recorder, random_ids(1))
    with recorder.disable_this_region(), recorder.disable_this_region():
        with recorder.with_forward_pass(0, None), recorder.with_current_layer(0):
            recorder.on_select_experts(torch.zeros(2, 2, dtype=torch.int32))
            assert recorder.get_current_pass_count_buffer(0) is None
    with recorder.with_debug_name("child_a"):
        forward(recorder, random_ids(2))
    recorder.stop_record()
    forward(recorder, random_ids(3))
    got = recorder.dump_record("object")["logical_count"]
    want = [by_logical(bincount(random_ids(s))) for s in (1, 2)]
    np.testing.assert_array_equal(got[0], want[0])
    assert not got[1].any()
    np.testing.assert_array_equal(got[2], want[1])
    recorder.start_record()
    recorder.start_record()
    assert "discarded" in caplog.text


def test_a_pass_that_raises_is_not_recorded():
    recorder = make(buffer_size=2)
    recorder.start_record()
    with pytest.raises(KeyError), recorder.with_forward_pass(0, None):
        with recorder.with_current_layer(0):
            recorder.on_select_experts(torch.zeros(1, 2, dtype=torch.int32))
        raise KeyError
    forward(recorder, random_ids(1))
    got = recorder.dump_record("object")["logical_count"]
    np.testing.assert_array_equal(got[0], by_logical(bincount(random_ids(1))))
    assert not got[1].any()


# -- capture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_hooks_run_while_a_graph_is_captured_into_buffers_that_stay(mode, monkeypatch):
    """The replay of a captured hook is its kernels alone, on the addresses seen in the capture."""
    recorder, seen = make(mode, buffer_size=2), []
    data = recorder._gatherer._ids if mode == "per_token" else recorder._gatherer._data
    static = torch.zeros(9, TOP_K, dtype=torch.int64)

    def replay():
        with recorder.with_current_layer(1):
            recorder.on_select_experts(static)

    before = data.clone()
    replay()
    assert torch.equal(data, before), "neither recording nor capturing"
    with monkeypatch.context() as patch:
        patch.setattr(sglang_recorder.gather, "capturing", lambda: True)
        replay()
        assert not torch.equal(data, before)
        seen.append(data.data_ptr())
    recorder.start_record()
    for seed in (4, 5):
        static.copy_(torch.from_numpy(random_ids(seed)[1]))
        with recorder.with_forward_pass(seed, batch_of(9)):
            replay()
        seen.append(data.data_ptr())
    assert len(set(seen)) == 1
    dump = recorder.dump_record("object")
    for row, seed in enumerate((4, 5)):
        want = bincount(random_ids(seed))
        want[0] = 0
        if mode == "stat":
            np.testing.assert_array_equal(dump["logical_count"][row], by_logical(want))
        else:
            np.testing.assert_array_equal(dump["records"][row]["global_physical_count"], want)


@pytest.mark.parametrize("mode", MODES)
def test_no_pass_reads_a_value_on_the_host(mode, monkeypatch):
    """Everything that makes a CUDA tensor wait is an error during the passes."""
    recorder = make(mode, buffer_size=2, enable_metrics=True)

    def refuse(*_, **__):
        raise AssertionError("the host reads a tensor")

    with monkeypatch.context() as patch:
        for name in (
            "item",
            "tolist",
            "cpu",
            "numpy",
            "nonzero",
            "__bool__",
            "__int__",
            "__float__",
        ):
            patch.setattr(torch.Tensor, name, refuse)
        for seed in range(3):
            forward(recorder, random_ids(seed), seed, batch_of(9))
    assert recorder.dump_record("object")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch warns of its own check
@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph_replays_record(mode):
    """On a GPU: captured once with recording off, then replayed with new ids."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    torch.cuda.set_sync_debug_mode(0)
    where = placement()
    where.physical_to_logical_map = where.physical_to_logical_map.cuda()
    recorder = make(mode, where, buffer_size=4)
    fresh = [torch.from_numpy(random_ids(seed)).int().pin_memory() for seed in range(3)]
    static = torch.zeros(LAYERS, 9, TOP_K, dtype=torch.int32, device="cuda")

    def layers():
        for layer in range(LAYERS):
            with recorder.with_current_layer(layer):
                recorder.on_select_experts(static[layer])

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        layers()
    recorder.start_record()
    torch.cuda.set_sync_debug_mode(2)  # a wait is an error
    try:
        for seed in range(3):
            static.copy_(fresh[seed], non_blocking=True)
            with recorder.with_forward_pass(seed, None):
                graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode(0)
    dump = recorder.dump_record("object")
    for seed in range(3):
        want = bincount(random_ids(seed))
        if mode == "stat":
            got = dump["logical_count"][seed].cpu()
            np.testing.assert_array_equal(got, by_logical(want))
        else:
            np.testing.assert_array_equal(dump["records"][seed]["global_physical_count"], want)


# -- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_file_loads_with_weights_only(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", str(tmp_path / "made"))
    paths = []
    for rank in range(2):
        recorder = make(mode, rank=rank, buffer_size=2)
        recorder.start_record()
        forward(recorder, random_ids(rank), 5, batch_of(9))
        paths.append(recorder.dump_record())
    if mode == "stat":
        assert paths[1] is None and paths[0].name.count("_") == 3
        paths = paths[:1]
    else:
        assert paths[1].stem.endswith("_1") and paths[0].stem.endswith("_0")
    assert sorted((tmp_path / "made").iterdir()) == sorted(paths)
    for rank, path in enumerate(paths):
        assert path.name.startswith("expert_distribution_recorder_") and path.suffix == ".pt"
        data = torch.load(path, weights_only=True)
        want = bincount(random_ids(rank))
        if mode == "stat":
            assert set(data) == {"rank", "logical_count", "average_utilization_rate_over_window"}
            np.testing.assert_array_equal(data["logical_count"][0], by_logical(want))
        else:
            assert set(data) == {"records", "last_physical_to_logical_map"}
            [record] = data["records"]
            np.testing.assert_array_equal(record["global_physical_count"], want)
            assert record["rank"] == rank and record["forward_pass_id"] == 5


def test_full_disk_leaves_nothing_and_keeps_the_data(tmp_path, monkeypatch):
    recorder = make(buffer_size=2, directory=tmp_path)
    recorder.start_record()
    forward(recorder, random_ids(0))

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            recorder.dump_record()
    assert list(tmp_path.iterdir()) == []
    data = torch.load(recorder.dump_record(), weights_only=True)
    np.testing.assert_array_equal(data["logical_count"][0], by_logical(bincount(random_ids(0))))


# -- metrics and ranks --------------------------------------------------------------------------------


def test_metrics_of_each_pass_and_their_average(tmp_path):
    recorder = make(buffer_size=2, enable_metrics=True, directory=tmp_path)
    assert recorder.recording
    each = []
    for seed in range(13):
        metrics = forward(recorder, random_ids(seed), seed)["metrics"]
        per_gpu = bincount(random_ids(seed)).reshape(LAYERS, RANKS, -1).sum(-1)
        rate = np.mean((per_gpu.mean(-1) + 1e-5) / (per_gpu.max(-1) + 1e-5))
        each.append(rate)
        np.testing.assert_allclose(metrics.eplb_balancedness, rate, rtol=1e-6)
        assert metrics.forward_pass_id == seed
        assert metrics.gpu_physical_count_sum == per_gpu.sum()
    average = recorder.average_balancedness()
    np.testing.assert_allclose(average[10], np.mean(each[-10:]), rtol=1e-6)
    np.testing.assert_allclose(average[1000], np.mean(each), rtol=1e-6)
    data = torch.load(recorder.dump_record(), weights_only=True)
    np.testing.assert_allclose(
        data["average_utilization_rate_over_window"], np.mean(each), rtol=1e-6
    )
    assert recorder.average_balancedness() == {}


TWO_RANKS = """
    import sys, torch
    import torch.distributed as dist
    from types import SimpleNamespace
    from torch_bridge.sglang import ExpertDistributionRecorder
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    location = SimpleNamespace(
        physical_to_logical_map=torch.tensor([[0, 1, 2, 0]]), num_logical_experts=3, ep_size=2)
    for replicated in (False, True):
        recorder = ExpertDistributionRecorder.init_new(
            location, rank, mode="stat", buffer_size=1, enable_metrics=True,
            replicated_tokens=replicated)
        with recorder.with_forward_pass(0, None) as outputs, recorder.with_current_layer(0):
            recorder.on_select_experts(torch.tensor([[rank, 3]]))
        out = recorder.dump_record("object")
        print(out["logical_count"].tolist(), round(out["average_utilization_rate_over_window"], 4),
              "metrics" in outputs)
    dist.destroy_process_group()
"""


def test_two_ranks_are_summed_unless_they_see_the_same_tokens(tmp_path):
    code = textwrap.dedent(TWO_RANKS)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    lines = []
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        lines.append(out.splitlines())
    # Slots 0 and 3 are expert 0, slot 1 is expert 1; both GPUs get two tokens: even.
    assert lines[0][0] == "[[[3, 1, 0]]] 1.0 True"
    assert lines[1][0] == "[[[3, 1, 0]]] 1.0 False"
    assert lines[0][1] == "[[[2, 0, 0]]] 1.0 True"
    assert lines[1][1] == "[[[1, 1, 0]]] 1.0 True"


# -- no mode, misuse, the recorder of the process -------------------------------------------------------


def test_without_a_mode_hooks_pass_and_control_raises():
    recorder = make(None)
    forward(recorder, random_ids(0))
    with recorder.disable_this_region(), recorder.with_debug_name("x"):
        recorder.on_deepep_dispatch_low_latency(torch.ones(2))
        recorder.on_deepep_dispatch_normal([1, 2], None, None, None)
        recorder.on_tokens_per_expert(torch.ones(PHYSICAL))
    assert not recorder.recording and recorder.get_current_pass_count_buffer(0) is None
    for call in (recorder.start_record, recorder.stop_record, recorder.dump_record):
        with pytest.raises(RuntimeError, match="Set expert_distribution_recorder_mode"):
            call()


def test_the_recorder_of_the_process(monkeypatch):
    monkeypatch.setattr(sglang_recorder, "_global", sglang_recorder._global)
    assert not sglang.get_global_expert_distribution_recorder().recording
    recorder = make()
    sglang.set_global_expert_distribution_recorder(recorder)
    assert sglang.get_global_expert_distribution_recorder() is recorder


def hook_without_layer():
    recorder = make()
    recorder.start_record()
    recorder.on_select_experts(torch.zeros(1, 1, dtype=torch.int32))


def clear_within_a_layer(call):
    recorder = make()
    with recorder.with_current_layer(0):
        getattr(recorder, call)()


def too_many_tokens():
    recorder = make("per_token", max_tokens=3)
    recorder.start_record()
    forward(recorder, random_ids(0))


def wrong_dispatch_list():
    recorder = make("stat_approx", moe_a2a_backend="deepep")
    with recorder.with_current_layer(0):
        recorder._recording = True
        recorder.on_deepep_dispatch_normal([1], None, None, None)


BAD = {
    "mode": (ValueError, lambda: make("all"), "mode must be one of stat"),
    "buffer": (ValueError, lambda: make(buffer_size=0), "buffer_size must not be 0"),
    "rank": (ValueError, lambda: make(rank=4), "rank must be below ep_size"),
    "ranks": (ValueError, lambda: make(where=placement(ranks=3)), "rank must be below ep_size"),
    "map": (
        TypeError,
        lambda: make(where=placement(np.ones((2, 8)))),
        "physical_to_logical_map .L, Ep. of integers",
    ),
    "tokens": (TypeError, lambda: make("per_token", max_tokens=None), "max_tokens"),
    "top_k": (TypeError, lambda: make("per_token", top_k=None), "top_k"),
    "approx": (NotImplementedError, lambda: make("stat_approx"), 'mode must be "stat" unless'),
    "auto": (
        NotImplementedError,
        lambda: make(moe_a2a_backend="deepep", deepep_mode="auto"),
        "deepep_mode must be",
    ),
    "output": (ValueError, lambda: make().dump_record("disk"), "output_mode must be"),
    "layer": (RuntimeError, hook_without_layer, "in with_current_layer"),
    "start": (RuntimeError, lambda: clear_within_a_layer("start_record"), "between forward passes"),
    "dump": (RuntimeError, lambda: clear_within_a_layer("dump_record"), "between forward passes"),
    "many": (ValueError, too_many_tokens, r"topk_ids must fit into \[3, 2\]"),
    "list": (ValueError, wrong_dispatch_list, "have 2 counts"),
}


@pytest.mark.parametrize("name", BAD)
def test_misuse_is_a_clear_error(name):
    kind, call, text = BAD[name]
    with pytest.raises(kind, match=text):
        call()
