"""What no program can be compiled for is tried once: per device in memory, by other processes from disk."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

import torch_bridge
from tests.bridge.fake_cuda import assert_results, want_of
from tests.bridge.helpers import ids_of
from torch_bridge import _ops, _specs
from torch_bridge._direct import call, compile_pool, disk_cache, program

SMALL, LARGE = (call.sized(n, 16, 8, torch.int32) for n in (5, 100))
COMPILE, PYTHON = program._compile, sys.executable  # not the fakes


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
    worker.says(error="no plugin here", until="changed")
    monkeypatch.setenv("TORCH_BRIDGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compile_pool.sys, "executable", str(worker.script))
    monkeypatch.setattr(program, "_compile", COMPILE)
    return worker


def refused(*wanted, index=None):
    with pytest.raises(program.Unavailable) as caught:
        program.prepare(index, list(wanted))
    return str(caught.value)


def next_process():
    for held in (program._programs, program._failures, program._verdicts):
        held.clear()


def test_two_buckets_cost_one_process(worker):
    assert refused(SMALL) == refused(LARGE) == "no plugin here"
    assert worker.spawns == 1
    assert program.failure(None, LARGE) == "no plugin here"


def test_next_process_starts_none_and_says_where_the_verdict_is(worker):
    refused(SMALL)
    next_process()
    reason = refused(LARGE)
    [file] = disk_cache.folder().glob("*.why")
    assert worker.spawns == 1
    assert reason.startswith("no plugin here (") and str(file) in reason and "warmup" in reason


def test_explain_knows_before_any_call_and_auto_falls_back(worker):
    array, ids = ids_of(torch.int32)
    problem = _specs.AlignProblem(ids.numel(), 16, 8)
    assert torch_bridge.explain(ids, 16, 8).path == "direct"  # nobody has tried
    refused(SMALL)
    next_process()
    explained = torch_bridge.explain(ids, 16, 8)
    assert explained.path == "dlpack" and "kept in" in explained.reasons["direct"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = _ops.run(problem, {"topk_ids": ids})
    assert_results(problem, results, want_of(problem, array, {}))
    assert worker.spawns == 1


@pytest.mark.parametrize("changed", ["gpu or driver", "versions", "compute mode", "python"])
def test_another_key_tries_again(changed, worker, fake, monkeypatch, tmp_path):
    refused(SMALL)
    next_process()
    if changed == "gpu or driver":
        monkeypatch.setattr(program, "_gpu", lambda index: "fake sm_90 driver 13000 580.1")
    elif changed == "versions":
        monkeypatch.setattr(disk_cache, "source_digest", lambda: "1" * 64)
    elif changed == "compute mode":
        fake.compute_mode = 3
    else:
        other = tmp_path / "other"
        other.symlink_to(worker.script)
        monkeypatch.setattr(compile_pool.sys, "executable", str(other))
    assert program.failure(None, SMALL) is None
    assert refused(SMALL) == "no plugin here" and worker.spawns == 2


def test_programs_on_disk_are_loaded_all_the_same(worker, fake):
    disk_cache.store(disk_cache.key_of(SMALL, "fake sm_90"), fake.entry(SMALL))
    refused(LARGE)
    for _ in range(2):
        assert program.failure(None, SMALL) is None
        program.prepare(None, [SMALL])
        next_process()
    assert worker.spawns == 1


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
        worker.says(error="the sources were changed", until="restart")
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
    with pytest.raises(program.Unavailable, match=expected):
        program.prepare(None, [SMALL])
    spawns = worker.spawns
    with pytest.raises(program.Unavailable, match=expected):
        program.prepare(None, [LARGE])
    assert worker.spawns == spawns and not list(disk_cache.folder().glob("*"))


def test_a_python_without_a_name_and_bytes_that_are_no_text_are_reasons(worker, monkeypatch):
    worker.script.write_text("#!/bin/sh\nprintf '\\377\\376' >&2\nexit 3\n")
    assert "status 3" in refused(SMALL)
    monkeypatch.setattr(compile_pool.sys, "executable", None)
    assert "no process to compile in" in refused(LARGE)


def test_warmup_tries_again(worker, fake, monkeypatch):
    sizes = {"num_experts": 16, "block_size": 8, "max_tokens": 4, "device": "cpu"}
    refused(LARGE, index=0)
    next_process()
    refused(LARGE, index=0)  # from disk
    with pytest.raises(NotImplementedError, match="No plugin here"):
        torch_bridge.warmup(**sizes)
    assert worker.spawns > 1  # it did try; and what it found is kept anew
    assert list(disk_cache.folder().glob("*.why"))

    monkeypatch.setattr(program, "_compile", lambda index, wanted: [fake.entry(p) for p in wanted])
    torch_bridge.warmup(**sizes)
    assert not list(disk_cache.folder().glob("*.why"))
    program.prepare(0, [LARGE])  # another's verdict is gone with it
    assert program.loaded(0, LARGE)


def test_verdicts_are_of_a_device(worker):
    worker.says(error="the sources were changed", until="restart")
    refused(SMALL, index=0)
    assert program.failure(1, SMALL) is None
    refused(SMALL, index=1)
    assert worker.spawns == 2


def test_a_second_process_reads_it(worker):
    """A real one, by the module alone."""
    refused(SMALL)
    [file] = disk_cache.folder().glob("*.why")
    code = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('modules', {disk_cache.__file__!r})\n"
        "modules = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(modules)\n"
        f"print(modules.load_verdict({file.stem!r}))\n"
    )
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("no plugin here (found by an earlier process"), done.stderr
