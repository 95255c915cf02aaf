"""Tests of torch_bridge. Without PyTorch each module is skipped, with this reason."""

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'moe-align-jax[torch]'")
