"""What no program can be compiled for is tried once per process and device."""

import json
import warnings

import pytest
import torch

import torch_bridge
from tests.bridge.fake_cuda import assert_results, want_of
from tests.bridge.helpers import ids_of, sized
from torch_bridge import _ops, _specs
from torch_bridge._direct import compile_pool, disk_cache, store

SMALL, LARGE = (sized(n, 16, 8) for n in (5, 100))


class Worker:
    """A compiling process that answers what it is told to, and is counted."""

    def __init__(self, folder):
        self.script, self._count = folder / "python", folder / "count"
        self.script.write_text(f"#!/bin/sh\necho 1 >> {self._count}\ncat {folder}/answer\n")
        self.script.chmod(0o755)
        self._answer = folder / "answer"

    def says(self, **answer):
        self._answer.write_text(json.dumps(answer) + "\n")

    @property
    def spawns(self):
        return len(self._count.read_text().split()) if self._count.exists() else 0


@pytest.fixture
def worker(fake, monkeypatch, tmp_path):
    made = tmp_path / "worker"
    made.mkdir()
    worker = Worker(made)
    worker.says(error="no plugin here", for_every_program=True)
    monkeypatch.setenv("TORCH_BRIDGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compile_pool.sys, "executable", str(worker.script))
    fake.compile = compile_pool.compile_all
    return worker


def refused(*wanted, index=-1):
    with pytest.raises(store.Unavailable) as caught:
        store.here.prepare(index, list(wanted))
    return str(caught.value)


def next_process():
    store.here = store.Store(store.here.machine)


def test_two_buckets_cost_one_process(worker):
    assert refused(SMALL) == refused(LARGE) == "no plugin here"
    assert worker.spawns == 1
    assert store.here.failure(-1, LARGE) == "no plugin here"


def test_next_process_tries_once_more_and_keeps_nothing_on_disk(worker):
    for spawns in (1, 2):
        assert refused(SMALL) == refused(LARGE) == "no plugin here"
        assert worker.spawns == spawns and not list(disk_cache.folder().glob("*"))
        next_process()


def test_explain_knows_after_the_first_call_and_auto_falls_back(worker):
    array, ids = ids_of(torch.int32)
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    assert torch_bridge.explain(ids, 16, 8).path == "direct"  # nobody has tried
    refused(SMALL)
    explained = torch_bridge.explain(ids, 16, 8)
    assert explained.path == "dlpack" and explained.reasons["direct"] == "no plugin here"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = _ops.run(problem, {"topk_ids": ids})
    assert_results(problem, results, want_of(problem, array, {}))
    assert worker.spawns == 1


def test_programs_on_disk_are_loaded_all_the_same(worker, fake):
    disk_cache.store(disk_cache.key_of(SMALL, "fake sm_90"), fake.entry(SMALL))
    refused(LARGE)
    for _ in range(2):
        assert store.here.failure(-1, SMALL) is None
        store.here.prepare(-1, [SMALL])
    assert worker.spawns == 1


def test_code_that_the_driver_does_not_load_is_a_reason(fake, monkeypatch):
    """Compiled, but no memory for it on the GPU: the call takes DLPack, with one warning."""
    array, ids = ids_of(torch.int32)
    problem = _specs.AlignSpec(ids.numel(), 16, 8)
    monkeypatch.setattr(fake, "cuModuleLoadData", lambda *arguments: 2)
    for expected in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = _ops.run(problem, {"topk_ids": ids})
        assert_results(problem, results, want_of(problem, array, {}))
        assert len(caught) == expected
        assert all(
            "loading" in str(one.message) and "error 2" in str(one.message) for one in caught
        )
    assert not fake.launched and "error 2" in torch_bridge.explain(ids, 16, 8).reasons["direct"]
    with pytest.raises(NotImplementedError, match="error 2"):
        _ops.run(problem, {"topk_ids": ids}, path="direct")


@pytest.mark.parametrize("passing", ["memory", "crash"])
def test_what_may_pass_holds_for_its_programs_alone(passing, worker):
    if passing == "memory":
        worker.says(error="DriverError: out of memory")
    else:
        worker.script.write_text(worker.script.read_text() + "exit 3\n")
        worker._answer.write_text("")
    refused(SMALL)
    refused(SMALL)
    assert worker.spawns == 1
    refused(LARGE)
    assert worker.spawns == 2 and not list(disk_cache.folder().glob("*"))


@pytest.mark.parametrize("kind", ["sources", "timeout", "no process", "no folder"])
def test_what_holds_for_this_process_is_not_on_disk(kind, worker, monkeypatch, tmp_path):
    if kind == "sources":
        worker.says(error="the sources were changed", for_every_program=True)
        expected = "were changed"
    elif kind == "timeout":
        worker.script.write_text(worker.script.read_text().replace("cat", "exec sleep 5; cat"))
        monkeypatch.setattr(compile_pool, "_COMPILE_SECONDS", 0.5)
        expected = "over 0.5 s"
    elif kind == "no process":
        worker.script.chmod(0o644)
        expected = "no process to compile in"
    else:
        monkeypatch.setattr(compile_pool.tempfile, "tempdir", str(tmp_path / "missing"))
        expected = "no process to compile in.*missing"
    with pytest.raises(store.Unavailable, match=expected):
        store.here.prepare(-1, [SMALL])
    spawns = worker.spawns
    with pytest.raises(store.Unavailable, match=expected):
        store.here.prepare(-1, [LARGE])
    assert worker.spawns == spawns and not list(disk_cache.folder().glob("*"))


def test_a_python_without_a_name_and_bytes_that_are_no_text_are_reasons(worker, monkeypatch):
    worker.script.write_text("#!/bin/sh\nprintf '\\377\\376' >&2\nexit 3\n")
    assert "status 3" in refused(SMALL)
    monkeypatch.setattr(compile_pool.sys, "executable", None)
    assert "no process to compile in" in refused(LARGE)


def test_warmup_tries_again(worker, fake):
    sizes = {"num_experts": 16, "block_size": 8, "max_tokens": 4, "device": "cpu"}
    refused(LARGE, index=0)
    with pytest.raises(NotImplementedError, match="No plugin here"):
        torch_bridge.warmup(**sizes)
    assert worker.spawns > 1  # it did try
    assert refused(LARGE, index=0) == "no plugin here"

    fake.compile = lambda index, wanted: [fake.entry(p) for p in wanted]
    torch_bridge.warmup(**sizes)
    store.here.prepare(0, [LARGE])  # the device's reason is gone, which had kept this one from it
    assert store.here.programs.get((0, LARGE))


def test_reasons_are_of_a_device(worker):
    worker.says(error="the sources were changed", for_every_program=True)
    refused(SMALL, index=0)
    assert store.here.failure(1, SMALL) is None
    refused(SMALL, index=1)
    assert worker.spawns == 2
