"""Files out of the peers' wheels, which `python -m benchmarks.fetch` puts into `.peers`."""

import os
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / ".peers"
REQUIRE = "MOE_ALIGN_REQUIRE_PEERS"


def path_of(name: str, peer: str = "vllm") -> pathlib.Path:
    """The file; where it is not there, the test is skipped, or fails if MOE_ALIGN_REQUIRE_PEERS is set."""
    path = FOLDER / name
    if not path.is_file():
        reason = f"no .peers/{name}: `python -m benchmarks.fetch {peer}` gets it"
        if os.environ.get(REQUIRE, "") not in ("", "0"):
            pytest.fail(f"{reason}, and {REQUIRE} is set", pytrace=False)
        pytest.skip(f"{reason} ({REQUIRE}=1 makes this a failure)")
    return path
