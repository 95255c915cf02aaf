"""DeepGEMM beside our grouped products: how it is loaded, and its contiguous layout.

`python -m benchmarks.fetch deep_gemm` keeps the package out of vLLM's wheel, as .peers/deep_gemm. Its library
uses torch's stable ABI (torch >= 2.11, CUDA 13). A kernel is built by nvcc (12.9 or later, of CUDA_HOME or of
the PATH) in the first call of its sizes, and kept in DG_JIT_CACHE_DIR, else in ~/.deep_gemm.
"""

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 128  # rows of a block of the contiguous layout, on Hopper


def is_in(folder: str) -> bool:
    """Whether a folder holds the package."""
    return Path(folder, "deep_gemm", "__init__.py").is_file()


@functools.cache
def load(folder: str) -> Any:
    """The module `deep_gemm`, out of the folder that holds it.

    Raises:
        ImportError: there is no such package, or it cannot be loaded.
    """
    if not is_in(folder):
        raise ImportError(f"{folder} holds no deep_gemm: python -m benchmarks.fetch deep_gemm")
    toolkit = Path("/usr/local/cuda")
    if "CUDA_HOME" not in os.environ and (toolkit / "bin" / "nvcc").exists():
        os.environ["CUDA_HOME"] = str(toolkit)
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        return importlib.import_module("deep_gemm")
    finally:
        sys.path.pop(0)


def contiguous_layout(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of experts with so many each, in whole blocks.

    Returns:
        `(source, expert)`, int32 `[P]`: for each row of the layout, which of the rows in the order of experts
        it holds, and whose it is. Of padding: row 0, and -1, as DeepGEMM's own tests have it.
    """
    padded = -(-counts // ALIGNMENT) * ALIGNMENT
    source = np.zeros(padded.sum(), np.int32)
    expert = np.full(padded.sum(), -1, np.int32)
    at = start = 0
    for e, (count, rows) in enumerate(zip(counts.tolist(), padded.tolist(), strict=True)):
        source[at : at + count] = np.arange(start, start + count)
        expert[at : at + count] = e
        at, start = at + rows, start + count
    return source, expert
