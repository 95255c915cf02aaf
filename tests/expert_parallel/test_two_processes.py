"""Expert parallelism over several processes, a device each: on CPUs over gloo, on two GPUs over NCCL."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_port():
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]
    except OSError as error:
        pytest.skip(f"no sockets here: {error}")


def run_together(command, environments, timeout):
    """What the processes print; `command(number)` of each."""
    address = f"127.0.0.1:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, *command(address, number)],
            env=os.environ | changes,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, changes in enumerate(environments)
    ]
    texts = []
    try:
        for process in running:
            out, err = process.communicate(timeout=timeout)
            assert process.returncode == 0, err[-4000:]
            texts.append(out)
    finally:
        for process in running:
            process.kill()
    return texts


def checks(address, number):
    return ["-m", "tests.expert_parallel.process", address, "2", str(number)]


def test_two_cpu_processes_over_gloo():
    """Values, gradients, a placement's exchange, the recorder's sums and the choice of a transport."""
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    texts = run_together(checks, [quick, quick], timeout=240)
    assert all(f"process {number} of 2: right" in text for number, text in enumerate(texts))


CHECK = """
x, gate_up, down = (
    multihost_utils.process_allgather(a, tiled=True).astype(np.float64) for a in (x, gate_up, down)
)
ids, weights = (multihost_utils.process_allgather(a, tiled=True) for a in (topk_ids, topk_weights))
want = np.zeros(x.shape)
for t, k in np.ndindex(ids.shape):
    gate, up = np.split(x[t] @ gate_up[ids[t, k]], 2)
    want[t] += weights[t, k] * ((gate / (1 + np.exp(-gate)) * up) @ down[ids[t, k]])
assert np.abs(everyone.astype(np.float64) - want).max() < 0.03 * np.abs(want).max()
np.testing.assert_array_equal(mine, everyone[process * tokens :][:tokens])
"""


def test_code_of_the_docs_as_two_processes(tmp_path):
    """What each prints is in the docs' sense, and y is what NumPy computes a pair at a time."""
    text = (ROOT / "docs" / "expert_parallel.md").read_text()
    section = text.partition("## One process per GPU")[2]
    [code] = re.findall(r"```python3\n(.*?)```", section, re.DOTALL)
    script = tmp_path / "layer.py"
    script.write_text(code + CHECK)
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    quick |= {"COORDINATOR": f"127.0.0.1:{free_port()}", "PROCESSES": "2"}
    quick["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    texts = run_together(
        lambda address, number: [str(script)],
        [quick | {"PROCESS": str(number)} for number in range(2)],
        timeout=240,
    )
    for number, text in enumerate(texts):
        assert f"{number} (16, 256) (32, 256) all_to_all " in text


def test_fp8_example_as_two_processes():
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}

    def example(address, number):
        script = str(ROOT / "examples" / "fp8_expert_parallel_layer.py")
        sizes = ["--tokens", "4", "--experts", "4", "--hidden", "128", "--devices", "1"]
        return [
            script,
            "--coordinator",
            address,
            "--processes",
            "2",
            "--process",
            str(number),
            *sizes,
        ]

    texts = run_together(example, [quick, quick], timeout=240)
    for text in texts:
        assert float(re.search(r"float32 (\S+) ", text)[1]) < 3e-3
        # Of every process's tokens: the recorder's sums are those of all.
        assert "in 2 process(es)" in text and "; 16 pairs" in text


@pytest.mark.gpu
@pytest.mark.alone
def test_two_gpu_processes_over_nccl():
    """Each sees one GPU. "nvlink" by name is refused, in our words."""
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1"
    environments = [shared | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in seen.split(",")[:2]]
    texts = run_together(checks, environments, timeout=300)
    assert all(
        f"process {number} of 2: right, on NVIDIA" in text for number, text in enumerate(texts)
    )


def connecting(*failing):
    """Commands of two processes, in which these calls of the driver fail."""
    module = "tests.expert_parallel.windows_process"
    return lambda address, number: ["-m", module, address, "2", str(number), *failing[number:][:1]]


def cpu_devices(count):
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
    }


@pytest.mark.parametrize("each", [1, 2])
def test_processes_map_the_memory_of_each_other(each):
    """At the same addresses, in the order of the devices."""
    want = [f"of process {process}" for process in range(2) for _ in range(each)]
    for text in run_together(connecting(), [cpu_devices(each)] * 2, timeout=120):
        assert "said None" in text and f"mapped {want}" in text


@pytest.mark.parametrize(
    "call",
    [
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemImportFromShareableHandle",
        "cuMemSetAccess",
    ],
)
def test_where_one_process_fails_all_have_no_windows(call):
    """And all say the same."""
    for text in run_together(connecting("", call), [cpu_devices(1)] * 2, timeout=120):
        assert f"said process 1: {call} failed (CUDA driver error 801)" in text
        assert "mapped [None, None]" in text


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("size", "process 0: process 1 asked for other windows"),
        ("error", "process 1: ValueError: not of the driver"),
    ],
)
def test_other_arguments_and_errors_are_no_windows_either(what, reason):
    """No process waits for one that had an error, and all can call once more."""
    for text in run_together(connecting("", what), [cpu_devices(1)] * 2, timeout=120):
        assert f"said {reason}" in text and "mapped [None, None]" in text
