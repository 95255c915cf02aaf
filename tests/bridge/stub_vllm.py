"""An installed vLLM in sys.modules: its names and versions, and on top of them its own real file.

The engine does not install everywhere; benchmarks/vllm_file.py stands in for what that one file imports.
"""

import pathlib
import sys
import types

from benchmarks import vllm_file
from tests.bridge import peer_files

ROOT = pathlib.Path(__file__).parents[2]


def unreplaced(*arguments, **options):
    raise AssertionError("the patch left vLLM's own op in place")


def make(monkeypatch, version=vllm_file.RELEASE) -> types.ModuleType:
    """Puts the stubs into sys.modules for one test; returns `vllm._custom_ops`."""
    ops = vllm_file.custom_ops(unreplaced, unreplaced)
    ops["moe_sum"] = lambda: "its own"
    modules = vllm_file.stand_ins(ops, version)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["vllm._custom_ops"]


def real_file() -> types.ModuleType:
    """vLLM's own moe_align_block_size.py, on the stubs; skips where it is not there."""
    return vllm_file.load(peer_files.path_of(vllm_file.NAME))
