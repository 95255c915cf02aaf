"""Our entry point in vLLM's group of plugins: it patches each process of an engine that is told to.

vLLM's engine and its workers are processes of their own, where a patch of the process that starts them does
nothing. Each loads the plugins of the group `vllm.general_plugins` before it does any work. Imports no vLLM.
"""

import os

VARIABLE = "MOE_ALIGN_PATCH_VLLM"


def register() -> None:
    """`torch_bridge.vllm.patch_for_good()` where MOE_ALIGN_PATCH_VLLM is set (and not 0); else nothing.

    Raises:
        NotImplementedError: it was asked for, and this vLLM is not a release that we know.
    """
    if os.environ.get(VARIABLE, "") not in ("", "0"):
        from torch_bridge import vllm

        vllm.patch_for_good()
