"""vLLM's own expert layer, `TritonExperts`, without the engine around it.

`python -m benchmarks.fetch vllm vllm_layer` gets its files out of the wheel: the folder of the fused layer
with its tuned sizes, the wrappers of the compiled ops, and the library of those. Of the modules that these
import, the ones in `_REAL` are the wheel's own; the rest of vLLM is stood in for by names without a meaning,
but for what a layer that is not quantised asks on one GPU. The activation's op is in a library of 93 MB: a
Triton kernel that moves the same bytes stands in for it.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

RELEASE = "0.33.0"
FOLDER = "vllm_layer"  # of the fused layer, within the peers'
_LAYER = "vllm.model_executor.layers.fused_moe"
# Modules that are read from the wheel's files, by the file below the peers' folder.
_REAL = {
    "vllm._custom_ops": "vllm_custom_ops.py",
    **{
        f"{_LAYER}.{name}": f"{FOLDER}/{name.replace('.', '/')}.py"
        for name in (
            *("fused_moe", "moe_align_block_size", "utils", "activation", "modular_kernel"),
            *("config", "topk_weight_and_reduce", "moe_output"),
            *("experts.triton_moe", "experts.lora_experts_mixin"),
        )
    },
}


class _Nothing(type):
    """A name of vLLM's that is imported, annotated with, or inherited from. A module may call it, or ask
    whether it is true, while it is imported; a layer that runs gets an error instead of a silent answer."""

    importing = False

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(f"{cls.__name__}.{name}")

    def __call__(cls, *given: Any, **named: Any) -> Any:
        if "stands_for" not in vars(cls):
            return super().__call__(*given, **named)  # of a class of vLLM's that inherits from one
        cls._refuse("called")
        return object.__new__(cls)

    def __bool__(cls) -> bool:
        if "stands_for" in vars(cls):
            cls._refuse("asked whether it is true")
        return True

    def _refuse(cls, what: str) -> None:
        if not _Nothing.importing:
            raise AssertionError(f"nothing stands in for {cls.__name__} of vLLM, which was {what}")


def _nothing(name: str) -> Any:
    return _Nothing(name, (), {"stands_for": name})


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if full in _REAL or full in _known():  # `from package import module` asks here first
            return importlib.import_module(full)
        return _nothing(full)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, folder: Path, known: dict[str, dict[str, Any]]):
        self.folder, self.known = folder, known

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "vllm" and not fullname.startswith("vllm."):
            return None
        if file := _REAL.get(fullname):
            return importlib.util.spec_from_file_location(fullname, self.folder / file)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        module = _Module(spec.name)
        vars(module).update(self.known.get(spec.name, {}))
        return module

    def exec_module(self, module: Any) -> None:
        pass


class _Logger(logging.Logger):
    """vLLM's has `info_once` and the like."""

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_once"):
            return getattr(self, name.removesuffix("_once"))
        raise AttributeError(name)


def _platform() -> Any:
    """One CUDA GPU."""
    import torch

    def capability() -> int:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    no, yes = (lambda *given: False), (lambda *given: True)
    names = ("is_rocm", "is_xpu", "is_cpu", "is_tpu")
    return types.SimpleNamespace(
        **dict.fromkeys(names, no),
        **dict.fromkeys(("is_cuda", "is_cuda_alike", "supports_fp8"), yes),
        has_device_capability=lambda least: capability() >= least,
        fp8_dtype=lambda: torch.float8_e4m3fn,
        device_type="cuda",
        simple_compile_backend="inductor",
        import_kernels=lambda: None,
    )


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    """What stands in for modules around the layer and is used."""
    import torch
    import triton
    import triton.language as tl

    def name_of_device() -> str:
        name = torch.cuda.get_device_name().replace(" ", "_")
        return "NVIDIA_H200" if "H200" in name.split("_") else name

    unset: dict[str, Any] = {"VLLM_TUNED_CONFIG_FOLDER": None, "VLLM_TRITON_USE_TD": None}
    unset["VLLM_BATCH_INVARIANT"] = False
    return {
        "vllm": {"__version__": RELEASE},
        "vllm.envs": unset,
        "vllm.logger": {"init_logger": _Logger},
        "vllm.platforms": {"current_platform": _platform()},
        "vllm.triton_utils": {"triton": triton, "tl": tl, "HAS_TRITON": True},
        "vllm.triton_utils.allocation": {"set_triton_allocator": lambda device: None},
        "vllm.utils.math_utils": {
            "cdiv": lambda a, b: -(-a // b),
            "round_up": lambda a, b: -(-a // b) * b,
            "next_power_of_2": lambda n: 1 << max(n - 1, 0).bit_length(),
        },
        "vllm.utils.platform_utils": {"get_device_name_as_file_name": name_of_device},
        "vllm.utils.torch_utils": {
            "direct_register_custom_op": lambda *given, **named: None,
            "PIN_MEMORY": False,
        },
        # No operand here is quantised.
        "vllm.model_executor.layers.quantization.utils.ocp_mx_utils": {
            "OCP_MX_Scheme": types.SimpleNamespace(from_quant_dtype=lambda *dtypes: None),
        },
        _LAYER: {"get_config": lambda: None},  # nobody has set the kernel's sizes by hand
        "vllm.scalar_type": {},
    }


@contextlib.contextmanager
def imported(peers: str | Path) -> Iterator[types.ModuleType]:
    """`vllm...experts.triton_moe` of the files in a folder, importable as vLLM while the block lasts.

    Raises:
        FileNotFoundError: the folder lacks a file.
    """
    folder = Path(peers).resolve()
    for file in _REAL.values():
        if not (folder / file).is_file():
            remedy = "python -m benchmarks.fetch vllm vllm_layer"
            raise FileNotFoundError(f"{folder} lacks {file}: {remedy}")
    finder = _Finder(folder, _known())
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_vllms(name)}
    sys.meta_path.insert(0, finder)
    try:
        # Shapes for torch.compile may be told of an op once in a process, and nobody asks for them here.
        def unasked(*given: Any) -> Any:
            return lambda function: function

        shapes = mock.patch("torch.library.register_fake", unasked)
        with shapes, mock.patch.object(_Nothing, "importing", True):
            module = importlib.import_module(f"{_LAYER}.experts.triton_moe")
        yield module
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_vllms(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


def _is_vllms(name: str) -> bool:
    return name == "vllm" or name.startswith("vllm.")


@functools.cache
def load_ops(peers: str) -> None:
    """The compiled ops of the layer, and what stands in for the activation's."""
    import torch

    from benchmarks import vllm_moe

    torch.ops.load_library(str(Path(peers, vllm_moe.LIBRARY).resolve()))
    library = torch.library.Library("_C", "FRAGMENT")
    library.define("silu_and_mul(Tensor(a!) out, Tensor input) -> ()")

    def silu_and_mul(out: Any, x: Any) -> None:
        vllm_moe.silu_and_mul(peers, x, out)

    library.impl("silu_and_mul", silu_and_mul, "CUDA")
    _kept.append(library)


_kept: list[Any] = []  # an op is gone with its library


class Layer:
    """A `TritonExperts` of a layer that is not quantised, with its workspaces: `run(x, w13, w2, weights, ids,
    out)`, as vLLM's modular kernel calls it behind the router.

    Args:
        module: of `imported`.
        peers: the folder of vLLM's files.
        tokens, top_k, experts, hidden, ffn: the sizes.
        dtype: of x and the weights; a torch dtype.
        expert_map: of global to local experts, or None.
        device: of the workspaces.
    """

    def __init__(
        self,
        module: Any,
        peers: str,
        *sizes: int,
        dtype: Any = None,
        expert_map: Any = None,
        device: str = "cuda",
    ):
        import torch

        load_ops(str(peers))
        tokens, top_k, experts, hidden, ffn = sizes
        config = importlib.import_module(f"{_LAYER}.config")
        self.silu = importlib.import_module(f"{_LAYER}.activation").MoEActivation.SILU
        names = ("swiglu_limit", "swiglu_alpha", "swiglu_beta", "activation_situ_beta")
        names += ("activation_situ_linear_beta",)
        of_model = types.SimpleNamespace(**dict.fromkeys(names))
        self.experts = module.TritonExperts(of_model, config.FUSED_MOE_UNQUANTIZED_CONFIG)
        given = (tokens, 2 * ffn, hidden, top_k, experts, experts, None, self.silu)
        first, second, _ = self.experts.workspace_shapes(*given)
        self.workspaces = [
            torch.empty(shape, dtype=dtype or torch.bfloat16, device=device)
            for shape in (first, second)
        ]
        self.num_experts = experts if expert_map is None else len(expert_map)
        self.expert_map = expert_map

    def run(
        self,
        x: Any,
        w13: Any,
        w2: Any,
        weights: Any,
        ids: Any,
        out: Any,
        weights_on_input: bool = False,
    ) -> None:
        if weights_on_input:  # as `MoEPrepareAndFinalizeNoDPEP.prepare`, for one expert a token
            x = x * weights.to(x.dtype)
        self.experts.apply(
            output=out,
            hidden_states=x,
            w1=w13,
            w2=w2,
            topk_weights=weights,
            topk_ids=ids,
            activation=self.silu,
            global_num_experts=self.num_experts,
            expert_map=self.expert_map,
            a1q_scale=None,
            a2_scale=None,
            workspace13=self.workspaces[0],
            workspace2=self.workspaces[1],
            expert_tokens_meta=None,
            apply_router_weight_on_input=weights_on_input,
        )
