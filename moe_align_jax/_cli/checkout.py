"""Commands that live outside the wheel: benchmarks/ exists in a checkout only."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import moe_align_jax

MISSING = (
    "moe-align bench needs a checkout of the repository: benchmarks/ is not part of the installed "
    "package. Clone it, install it with pip install -e '.[cli]', and run moe-align bench there."
)


def find() -> Path | None:
    """The checkout that this package is imported from, None when it is an installed wheel."""
    root = Path(moe_align_jax.__file__).resolve().parent.parent
    return root if (root / "benchmarks" / "run.py").is_file() else None


def run(root: Path, module: str, arguments: Sequence[str]) -> int:
    """`module.main(arguments)` with `root` first on the path; the working folder stays."""
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module(module).main(list(arguments))
    finally:
        sys.path.remove(str(root))
