"""jax's persistent compilation cache works with our kernels: their bytes depend on nothing but the call."""

import hashlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import moe_align_jax as maj
from tests import forms

# The callers' lines in what is lowered, as without the setting of `make test`: the bytes must not hold them.
LINES = {"JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "10"}
SIZES = ((8, 256, 16), (512, 64, 16), (8192, 64, 128), (100, 5000, 4))

# Its arguments: sizes, in the order in which they are run. Prints jax's own counts of hits and misses.
SCRIPT = """
import collections, json, sys
import jax, numpy as np
import moe_align_jax

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rsplit("/", 1)[-1]]))

{padding}
@jax.jit
def other(x):
    return x * 2 + {other}


def run(sizes):
    for n, num_experts, block_size in sizes:
        ids = np.arange(n, dtype=np.int32) % num_experts
        align = jax.jit(
            lambda ids: moe_align_jax.moe_align_block_size(
                ids, block_size=block_size, num_experts=num_experts, implementation={implementation!r}
            )
        )
        jax.block_until_ready(align(ids))


run(json.loads(sys.argv[1]))
print(json.dumps([counts["cache_hits"], counts["cache_misses"]]))
"""


def process(folder, sizes, implementation, padding=""):
    """[hits, misses] of a fresh process that aligns these sizes."""
    code = SCRIPT.format(padding=padding, other=1, implementation=implementation)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sizes)],
        capture_output=True,
        text=True,
        env=os.environ | LINES | {"JAX_COMPILATION_CACHE_DIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def lowered(size, where="here"):
    """A digest of what is compiled, Mosaic modules included; `where` moves the caller's line."""
    n, num_experts, block_size = size
    scope = {"maj": maj}
    lines = "\n" * len(where) + (
        f"def call(x):\n    return maj.moe_align_block_size(x, block_size={block_size}, "
        f"num_experts={num_experts}, implementation='mosaic_gpu')\n"
    )
    exec(compile(lines, f"{where}.py", "exec"), scope)
    jax.clear_caches()
    ids = jax.ShapeDtypeStruct((n,), jnp.int32)
    program = jax.jit(scope["call"]).trace(ids).lower(lowering_platforms=("cuda",))
    return hashlib.sha256(program.as_text().encode()).hexdigest()


@pytest.fixture
def lines():
    [(name, limit)] = LINES.items()
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update(name.lower(), int(limit))
    yield
    jax.config.update(name.lower(), before)


@pytest.mark.usefixtures("lines")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_bytes_do_not_depend_on_what_was_lowered_before_nor_on_the_caller(size):
    """jaxlib 0.11.2 writes a count of modules into each one, unless it is named before."""
    first = lowered(size)
    lowered((64, 8, 4))
    assert lowered(size) == first
    assert lowered(size, where="somewhere else") == first
    assert lowered((size[0] + 1, *size[1:])) != first


def test_second_process_compiles_nothing_whatever_the_order(tmp_path):
    """On a CPU "xla" shows that the counts below are jax's own, and move when they must."""
    size = [(24, 5, 4), (96, 40, 16)]
    hits, misses = process(tmp_path, size, "xla")
    assert hits == 0 and misses >= 2
    assert process(tmp_path, size[::-1], "xla", padding="# a line") == [misses, 0]
    assert process(tmp_path, [(25, 5, 4)], "xla")[1] >= 1


@pytest.mark.gpu
def test_gpu_second_process_compiles_no_kernel_whatever_the_order(tmp_path):
    sizes = [*SIZES, *((s.num_pairs, s.num_experts, s.block_size) for s in forms.SIZES[3:6])]
    hits, misses = process(tmp_path, sizes, "mosaic_gpu")
    assert hits == 0 and misses >= len(sizes)
    assert process(tmp_path, sizes[::-1], "mosaic_gpu", padding="# a line") == [misses, 0]
