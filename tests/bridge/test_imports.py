"""What an import does, in processes of their own; and the script that must run as it is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_align_jax._align import tables
from tests import forked

SCRIPT = """
import torch
import time
from torch_bridge import moe_align_block_size

num_tokens = 4096
num_experts = 64
topk = 2
block_size = 128
topk_ids = torch.randint(0, num_experts, (num_tokens * topk,), dtype=torch.int32, device='cuda')

torch.cuda.synchronize()
start = time.time()
sorted_ids, expert_ids, num_tokens_post_pad = moe_align_block_size(
    topk_ids, num_experts, block_size, topk
)
torch.cuda.synchronize()
duration = time.time() - start
print(f"Duration: {duration:.4f} seconds")
"""
CPU_SCRIPT = SCRIPT.replace("'cuda'", "'cpu'").replace("torch.cuda.synchronize()\n", "")
# The shapes of vLLM 0.33 (P = 8192 + 64 * 127), and a count that loops over the ids give.
CHECK = """
rows = 0
for expert in range(num_experts):
    pairs = sum(1 for x in topk_ids.tolist() if x == expert)
    rows += -(-pairs // block_size) * block_size
print(tuple(sorted_ids.shape), tuple(expert_ids.shape), num_tokens_post_pad.tolist() == [rows])
"""
# Which way it went; a process that takes "direct" imports no jax, the plan included.
CHECK_PATH = """
import sys, torch_bridge
plan = torch_bridge.explain(topk_ids, num_experts, block_size, topk)
print(plan.path, "jax" in sys.modules)
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def imported():
    """A process that has imported the bridge, and forks for each script."""
    with forked.start("import torch_bridge\n") as process:
        yield process


def check_script(script: str, path: str) -> None:
    result = run(script + CHECK + CHECK_PATH)
    assert result.returncode == 0, result.stderr
    first, second, third = result.stdout.splitlines()
    assert re.fullmatch(r"Duration: \d+\.\d{4} seconds", first)
    assert second == "(16320,) (128,) True"
    assert third == f"{path} {path == 'dlpack'}"


def test_script_on_a_cpu():
    assert "cuda" not in CPU_SCRIPT
    check_script(CPU_SCRIPT, "dlpack")


@pytest.mark.gpu
def test_script_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    check_script(SCRIPT, "direct")


def test_import_fakes_and_errors_need_no_jax(imported):
    result = imported.run(
        "import sys, torch_bridge, torch_bridge.vllm, torch_bridge.sglang\n"
        "print('torch' in sys.modules, 'jax' in sys.modules, 'jaxlib' in sys.modules)\n"
        "import torch\n"
        "ids = torch.zeros(8, 2, dtype=torch.int64, device='meta')\n"
        "sys.modules['jax'] = None\n"
        "got = torch_bridge.moe_align_block_size(ids, 4, 16)\n"
        "try:\n    torch_bridge.moe_align_block_size(ids.float(), 4, 16)\n"
        "except TypeError:\n    print([tuple(x.shape) for x in got])"
    )
    assert result.stdout == "True False False\n[(76,), (5,), (1,)]\n", result.stderr


def test_import_and_the_plugin_import_no_vllm(imported):
    result = imported.run(
        "import os, sys, torch_bridge.vllm_plugin as p\n"
        "os.environ.pop(p.VARIABLE, None)\n"
        "p.register()\nprint('vllm' in sys.modules)"
    )
    assert result.stdout == "False\n", result.stderr


def test_import_does_not_import_the_compiler(imported):
    """It takes 2 s; where a program compiles, it imports it."""
    result = imported.run("import torch, sys, torch_bridge\nprint('torch._dynamo' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


def test_first_call_finds_sources_hashed_and_tables_parsed(imported):
    """What the import has done; the names of tables and their bytes are looked at again."""
    result = imported.run(
        "import torch_bridge\n"
        "from pathlib import Path\n"
        "from moe_align_jax._align import tables as _tuning\n"
        "from torch_bridge._direct import disk_cache as modules\n"
        "read, seen = Path.read_bytes, []\n"
        "Path.read_bytes = lambda path: (seen.append(path.suffix), read(path))[1]\n"
        "_tuning.json = None\n"
        "modules.source_digest()\n"
        "print(set(seen), _tuning.table('nvidia_h200').gpu)"
    )
    assert result.stdout == "{'.json'} NVIDIA H200\n", result.stderr


def test_a_folder_of_tables_may_be_named_after_the_import(imported, tmp_path):
    own = Path(tables.__file__).parents[1] / "data/tuning/nvidia_h200.json"
    table = json.loads(own.read_text()) | {"gpu": "mine"}
    (tmp_path / own.name).write_text(json.dumps(table))
    code = (
        "import os, torch_bridge\n"
        "from moe_align_jax._align import tables as _tuning\n"
        "from torch_bridge._direct import disk_cache as modules\n"
        f"if NAMED: os.environ[_tuning.FOLDER_VARIABLE] = {str(tmp_path)!r}\n"
        "print(_tuning.table('nvidia_h200').gpu, modules.source_digest())"
    )
    named, plain = (
        imported.run(f"NAMED = {flag}\n{code}").stdout.split() for flag in (True, False)
    )
    assert (named[0], plain[:2]) == ("mine", ["NVIDIA", "H200"])
    assert len(named[-1]) == 64 and named[-1] != plain[-1]


def test_import_without_torch_names_the_extra():
    result = run(
        "import sys\nsys.modules['torch'] = None\n"
        "try:\n    import torch_bridge\n"
        "except ImportError as error:\n    print(error)"
    )
    assert "moe-align-jax[torch]" in result.stdout, result.stderr
    assert "pip install -e '.[torch]'" in result.stdout
    assert re.match(r"\w+: .+ must .+; got .+\. .+\.$", result.stdout.strip())


def test_moe_align_jax_never_imports_torch():
    result = run(
        "import sys, jax.numpy as jnp, moe_align_jax\n"
        "moe_align_jax.moe_align_block_size(jnp.arange(4), block_size=2, num_experts=4)\n"
        "print('torch' in sys.modules)"
    )
    assert result.stdout.split() == ["False"], result.stderr


def test_a_call_changes_no_setting_of_jax(imported):
    result = imported.run(
        "import os, torch, torch_bridge, jax\n"
        "before = dict(os.environ), jax.config.values.copy()\n"
        "torch_bridge.moe_align_block_size(torch.arange(8), 8, 4)\n"
        "print(before == (dict(os.environ), jax.config.values))"
    )
    assert result.stdout.split() == ["True"], result.stderr
