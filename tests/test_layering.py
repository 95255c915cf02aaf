"""Who may import whom, read from the source: an AST walk over every module of the packages."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("moe_align_jax", "torch_bridge", "benchmarks", "examples")

# What a module, or every module under a package, may import of ours. The longest name that fits counts.
# "lazily": inside a function only, so that importing the module does not import the other.
ALLOWED: dict[str, set[str]] = {
    "moe_align_jax": set(),  # __init__: names are resolved on first use
    "moe_align_jax.types": set(),
    "moe_align_jax._checks": set(),
    "moe_align_jax._fits": {"moe_align_jax.types"},
    "moe_align_jax._tuning": {"moe_align_jax._fits", "moe_align_jax.types"},
    "moe_align_jax._files": {"moe_align_jax._checks"},
    "moe_align_jax._eplb": {"moe_align_jax._checks", "moe_align_jax._eplb"},
    "moe_align_jax.eplb": {"moe_align_jax._checks", "moe_align_jax._eplb"},
    "moe_align_jax.expert_location": {
        f"moe_align_jax.{m}" for m in ("_checks", "_eplb", "_files", "eplb")
    },
    "moe_align_jax.expert_weights": {"moe_align_jax._checks", "moe_align_jax._eplb"},
    "moe_align_jax.expert_dispatch": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_eplb", "block_align", "expert_location")),
        "moe_align_jax._reference.replicas",
    },
    "moe_align_jax.block_align": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_dispatch", "types")),
        "lazily moe_align_jax.expert_dispatch",
    },
    "moe_align_jax._dispatch": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_tuning", "types")),
        *(f"lazily moe_align_jax.{m}" for m in ("_kernels", "_reference", "_simt")),
    },
    "moe_align_jax._quant": set(),
    "moe_align_jax.masked_quant": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_dispatch", "_quant", "types")),
        *(f"lazily moe_align_jax.{m}.masked_quant" for m in ("_kernels", "_reference")),
    },
    "moe_align_jax._reference.masked_quant": {"moe_align_jax._quant"},
    "moe_align_jax._reference": {"moe_align_jax.types", "moe_align_jax._reference.replicas"},
    "moe_align_jax._kernels": {
        *(f"moe_align_jax.{m}" for m in ("_fits", "_simt", "_tuning", "types")),
        *(
            f"moe_align_jax._kernels.block_align.{shared}"
            for shared in ("common", "counting", "placing")
        ),
    },
    "moe_align_jax._kernels.masked_quant": {
        *(f"moe_align_jax.{m}" for m in ("_quant", "_simt.collectives", "_simt.language")),
        *("moe_align_jax._kernels.masked_quant", "lazily moe_align_jax._simt.mosaic"),
    },
    "moe_align_jax._kernels.rows": {
        *(f"moe_align_jax.{m}" for m in ("_simt.collectives", "_simt.language", "_kernels.rows")),
        "lazily moe_align_jax._simt.mosaic",
    },
    "moe_align_jax._kernels.peer_rows": {
        *("moe_align_jax._kernels.peer_rows", "moe_align_jax._simt.language"),
    },
    "moe_align_jax._simt": {"moe_align_jax._simt"},
    "moe_align_jax.expert_load": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_recorder.arguments", "_recorder.rows")),
    },
    "moe_align_jax.recorder": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_recorder", "expert_load")),
    },
    "moe_align_jax._recorder": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_recorder", "eplb.balancedness")),
    },
    "moe_align_jax.masked_layout": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_expert_parallel", "block_align")),
    },
    "moe_align_jax.expert_parallel": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_expert_parallel", "masked_layout")),
    },
    "moe_align_jax._expert_parallel": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_dispatch", "_expert_parallel")),
        *(f"moe_align_jax.{m}" for m in ("_kernels.peer_rows", "_simt.language", "block_align")),
        *("moe_align_jax._quant", "moe_align_jax._reference.masked_quant"),
        "lazily moe_align_jax._simt.mosaic",
    },
    "moe_align_jax._expert_parallel.row_primitives": {
        *(f"moe_align_jax.{m}" for m in ("_dispatch", "_expert_parallel", "_kernels.rows")),
    },
    "moe_align_jax.matmul": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_dispatch", "_grouped_matmul", "types")),
    },
    "moe_align_jax._grouped_matmul": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_grouped_matmul")),
    },
    "moe_align_jax._grouped_matmul.problem": set(),
    "moe_align_jax._grouped_matmul.primitive": {
        *(f"moe_align_jax.{m}" for m in ("_dispatch", "_grouped_matmul.config")),
        *(f"moe_align_jax._grouped_matmul.{m}" for m in ("problem", "reference")),
        "lazily moe_align_jax._grouped_matmul.launch",
    },
    "moe_align_jax._grouped_matmul.launch": {
        "moe_align_jax._grouped_matmul",
        *("lazily moe_align_jax._simt.mosaic", "lazily moe_align_jax._simt.emulator"),
    },
    "moe_align_jax._grouped_matmul.tile_list": {
        *("moe_align_jax._grouped_matmul.problem", "moe_align_jax._simt.collectives"),
        "moe_align_jax._simt.language",
    },
    "moe_align_jax.moe_layer": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_dispatch", "_grouped_matmul", "_moe_layer")),
        *("moe_align_jax.block_align", "moe_align_jax.types"),
        "lazily moe_align_jax.expert_dispatch",
    },
    "moe_align_jax._moe_layer": {
        *(f"moe_align_jax.{m}" for m in ("_checks", "_dispatch", "_grouped_matmul", "_moe_layer")),
    },
    "moe_align_jax._moe_layer.plan": {"moe_align_jax._grouped_matmul.problem"},
    "moe_align_jax._moe_layer.combine": set(),
    "moe_align_jax._moe_layer.checkpoints": {"moe_align_jax._checks"},
    "moe_align_jax.cli": {"lazily moe_align_jax._cli"},
    "moe_align_jax._cli": {"moe_align_jax", "lazily torch_bridge"},
    "torch_bridge": {
        *("torch_bridge", "moe_align_jax._checks", "moe_align_jax._tuning", "moe_align_jax.types"),
        *(f"moe_align_jax.{name}" for name in ("moe_align_block_size", "select_implementation")),
        *("moe_align_jax.batched_moe_align_block_size", "moe_align_jax._recorder.files"),
        *("moe_align_jax._quant", "lazily moe_align_jax.silu_and_mul_masked_quant"),
    },
    # A process of its own that compiles: it imports no torch, and reaches the kernels themselves.
    "torch_bridge.launch": {
        *(f"lazily moe_align_jax.{m}" for m in ("_checks", "_quant", "_tuning", "types")),
        *("lazily moe_align_jax._kernels", "lazily moe_align_jax._simt"),
    },
    "torch_bridge.trials": {"lazily moe_align_jax._checks"},
    "torch_bridge.driver": set(),
    "torch_bridge.modules": {"lazily moe_align_jax"},
    "benchmarks": {"benchmarks", "moe_align_jax", "torch_bridge"},
    "examples": {"moe_align_jax"},
}

# Which of our modules may import these, and at which depth.
FOREIGN: dict[str, set[str]] = {
    "torch": {"torch_bridge", "lazily benchmarks", "lazily moe_align_jax._cli"},
    "jaxlib.mlir": {
        *("moe_align_jax._simt.mlir", "moe_align_jax._simt.mosaic"),
        "moe_align_jax._grouped_matmul.inline",
    },
    "jax.experimental.mosaic": {
        *("moe_align_jax._simt.mlir", "moe_align_jax._simt.mosaic"),
        "moe_align_jax._grouped_matmul.inline",
    },
    "jax.experimental.pallas": {
        *("moe_align_jax._simt.mosaic", "moe_align_jax._kernels.masked_quant.kernel"),
        *("moe_align_jax._kernels.rows.weighted_sum", "lazily benchmarks.grouped_matmul"),
        *(f"moe_align_jax._grouped_matmul.{m}" for m in ("kernel", "epilogue", "inline", "loads")),
    },
    "jaxlib.version": {"lazily moe_align_jax._cli", "lazily torch_bridge.launch"},
    "jaxlib": {
        *("moe_align_jax._simt.mlir", "moe_align_jax._simt.mosaic"),
        "moe_align_jax._grouped_matmul.inline",
    },
    "jax._src": set(),
    "typer": {"moe_align_jax._cli", "lazily moe_align_jax.cli"},
    "rich": {"moe_align_jax._cli", "lazily moe_align_jax.cli", "lazily benchmarks"},
    "vllm": {"lazily benchmarks.peers", "lazily torch_bridge.vllm_patch"},
    "sglang": {"lazily benchmarks.peers"},
    "sgl_kernel": {"lazily benchmarks.peers"},
    "tests": set(),
}
# These may be imported where jax is not installed.
JAX_FREE = (
    "moe_align_jax",
    "moe_align_jax.types",
    "moe_align_jax._checks",
    "moe_align_jax._fits",
    "moe_align_jax._tuning",
    "moe_align_jax._quant",
    "moe_align_jax._grouped_matmul.problem",
    "moe_align_jax._grouped_matmul.config",
    "moe_align_jax._grouped_matmul.shape",
    "moe_align_jax._files",
    "moe_align_jax.eplb",
)


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(tree: ast.AST, lazily: bool = False):
    """(name, whether inside a function) of each import; those for type checkers only are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazily) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((f"{node.module}.{alias.name}", lazily) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, lazily or inside)


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def permitted(name: str, lazily: bool, entries: set[str]) -> bool:
    return any(
        under(name, entry.removeprefix("lazily ")) and (lazily or not entry.startswith("lazily "))
        for entry in entries
    )


def violations(module: str, source: str) -> list[str]:
    rule = max((r for r in ALLOWED if under(module, r)), key=len)
    if rule == "moe_align_jax" != module:
        return [f"{module}: no rule in ALLOWED"]
    entries = ALLOWED[rule]
    found = []
    for name, lazily in imports(ast.parse(source)):
        if any(under(name, package) for package in PACKAGES):
            ok = permitted(name, lazily, entries)
        else:
            owners = [f for f in FOREIGN if under(name, f)]
            ok = not owners or permitted(module, lazily, FOREIGN[max(owners, key=len)])
        if not ok:
            found.append(f"{module} imports {name}{' lazily' if lazily else ''}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_it_may(module):
    assert violations(module, MODULES[module].read_text()) == []


BROKEN = [
    ("moe_align_jax.block_align", "import torch"),
    ("moe_align_jax.block_align", "def f():\n    import torch"),
    ("moe_align_jax.block_align", "from moe_align_jax._kernels import block_align"),
    ("moe_align_jax._dispatch", "from moe_align_jax._simt import mosaic"),
    ("moe_align_jax._kernels.block_align.grid", "from moe_align_jax._reference import block_align"),
    ("moe_align_jax._kernels.block_align.grid", "from jaxlib.mlir.dialects import arith"),
    ("moe_align_jax._kernels.block_align.grid", "import moe_align_jax._kernels.block_align.radix"),
    ("moe_align_jax._simt.language", "from moe_align_jax import types"),
    ("moe_align_jax._simt.language", "import jax.experimental.pallas.mosaic_gpu"),
    ("moe_align_jax._tuning", "from moe_align_jax import _checks"),
    ("moe_align_jax.types", "from moe_align_jax import _checks"),
    ("moe_align_jax._checks", "def f():\n    from tests import oracle"),
    ("moe_align_jax.unknown", "import numpy"),
    ("torch_bridge.ops", "from moe_align_jax import _dispatch"),
    ("torch_bridge.vllm", "import vllm"),
    ("torch_bridge.ops", "from jax._src import core"),
    ("benchmarks.run", "def f():\n    import vllm"),
]


@pytest.mark.parametrize(("module", "source"), BROKEN)
def test_the_walk_sees_a_forbidden_import(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize("module", JAX_FREE)
def test_leaf_imports_without_jax(module):
    code = f"import sys; sys.modules['jax'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_and_calling_the_library_never_imports_torch():
    code = (
        "import sys, numpy as np, moe_align_jax as m;"
        "m.moe_align_block_size(np.zeros(4, 'int32'), block_size=4, num_experts=2);"
        "print('torch' in sys.modules, 'torch_bridge' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is_and_stays_readable(module):
    source = MODULES[module].read_text()
    limit = 400 if "_kernels" in module else 500
    assert len(source.splitlines()) <= limit
    assert ast.get_docstring(ast.parse(source)), "no module docstring"


@pytest.mark.parametrize("module", [m for m in MODULES if not under(m, "benchmarks")])
def test_library_has_no_assert_for_its_user(module):
    """An assert may state a fact of ours; argument checks raise errors that name a remedy."""
    tree = ast.parse(MODULES[module].read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
            public = module.rsplit(".", 1)[-1] in (
                "block_align",
                "align",
                "vllm",
                "sglang",
                "dlpack",
            )
            asserts = [n for n in ast.walk(function) if isinstance(n, ast.Assert)]
            assert not (public and asserts), f"{function.name}, line {function.lineno}"
