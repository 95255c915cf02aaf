"""Compiles the kernels of several modules of this folder, one module after the other.

    python -m tests.no_gpu.several [--sample N] MODULE...

As `python -m tests.no_gpu.MODULE` does for each, without starting Python twice and importing jax for each of
them: the modules run in processes forked from one that has imported jax and called nothing of it. Stops at
the first module with a fault; exit code 1 then.
"""

import argparse
import importlib
import os
import sys

from tests.no_gpu import script


def check_each(plugin: str, runtime: str, sample: str, *names: str) -> int:
    """Each module's check in a process of its own, forked from this one."""
    for name in names:
        module = importlib.import_module(f"tests.no_gpu.{name}")
        print(f"{module.__name__}:", flush=True)
        child = os.fork()
        if not child:
            script.run_inside(module.__name__, module.check, [plugin, runtime, "--sample", sample])
        if os.waitpid(child, 0)[1]:
            return 1
    return 0


def inside(plugin: str, runtime: str, *given: str) -> int:
    import jax.experimental.mosaic.gpu
    import jax.experimental.pallas.mosaic_gpu  # noqa: F401

    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = runtime  # in place of what the first import has set
    return check_each(plugin, runtime, *given)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.no_gpu.several")
    parser.add_argument("--sample", default="1", metavar="N", help="compile one in N")
    parser.add_argument("modules", nargs="+", metavar="MODULE", help="rows, router, matmul, ...")
    given = parser.parse_args()
    return script.start_inside("tests.no_gpu.several", [given.sample, *given.modules])


if __name__ == "__main__":
    sys.exit(inside(*sys.argv[2:]) if sys.argv[1:2] == [script.INSIDE] else main())
