"""Makes an installed vLLM call ours: at `vllm._custom_ops`, through which its Python layer calls its aligned
ops and its router's, and at `TritonExperts.apply`, the expert layer itself.

vLLM's layers import the Python function by name, so that function cannot be replaced for them. The op that it
calls can be, because it is looked up in the module at each call.
"""

import contextlib
import importlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moe_align_jax._core import checks
from torch_bridge import _vllm_aligned, _vllm_experts, _vllm_ops, _vllm_router

# Releases whose ops have the signatures below, by their first two numbers.
KNOWN_VERSIONS = ("0.33",)
_PARAMETERS = {
    "moe_align_block_size": (
        *("topk_ids", "num_experts", "block_size", "sorted_token_ids", "experts_ids"),
        *("num_tokens_post_pad", "expert_map", "scatter_idx"),
    ),
    "batched_moe_align_block_size": (
        *("max_tokens_per_batch", "block_size", "expert_num_tokens", "sorted_ids", "expert_ids"),
        "num_tokens_post_pad",
    ),
    "fused_globalize_align_block_size": (
        *("topk_idx", "psum", "rank_expert_offset", "global_num_experts", "local_num_experts"),
        *("block_size", "sorted_ids", "expert_ids", "num_tokens_post_pad", "scatter_idx"),
    ),
    "moe_lora_align_block_size": (
        *("topk_ids", "token_lora_mapping", "num_experts", "block_size", "max_loras"),
        *("max_num_tokens_padded", "max_num_m_blocks", "sorted_token_ids", "experts_ids"),
        *("num_tokens_post_pad", "adapter_enabled", "lora_ids", "expert_map"),
    ),
    "topk_softmax": (
        *("topk_weights", "topk_ids", "token_expert_indices", "gating_output", "renormalize"),
        *("e_score_correction_bias", "is_padding"),
    ),
    "topk_sigmoid": (
        *("topk_weights", "topk_ids", "token_expert_indices", "gating_output", "renormalize"),
        *("e_score_correction_bias", "routed_scaling_factor", "is_padding"),
    ),
    "topk_hash_softplus_sqrt": (
        *("topk_weights", "topk_indices", "token_expert_indices", "gating_output", "renormalize"),
        *("routed_scaling_factor", "e_score_correction_bias", "input_tokens"),
        *("hash_indices_table", "is_padding", "bias_vl", "image_sentinel_lo"),
    ),
    "grouped_topk": (
        *("scores", "num_expert_group", "topk_group", "topk", "renormalize"),
        *("routed_scaling_factor", "bias", "scoring_func"),
    ),
}


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """`patch_for_good` for the length of a `with` block.

    Raises:
        ImportError, NotImplementedError: as `patch_for_good`.
    """
    undo = patch_for_good()
    try:
        yield
    finally:
        undo()


def patch_for_good() -> Callable[[], None]:
    """Makes this process's vLLM route and align with ours, until the function that it returns is called.

    Replaces, in `vllm._custom_ops`, through which vLLM's layers call, every aligned op
    (`moe_align_block_size`, `batched_moe_align_block_size`, `fused_globalize_align_block_size`,
    `moe_lora_align_block_size`) and every op of its router (`topk_softmax`, `topk_sigmoid`,
    `topk_hash_softplus_sqrt`, `grouped_topk`). And the method `apply` of its `TritonExperts`, the layer
    of experts that are not quantised: ours runs where it can be launched directly, and vLLM's own elsewhere,
    with one warning for each reason.

    Call it in each process that runs layers, before vLLM captures CUDA graphs: a graph that has
    been captured keeps what it holds. Patches may nest or overlap: vLLM's own functions, the very
    objects, come back when the last one is undone; to undo one twice does nothing more.

    Returns:
        The function that undoes it.

    Raises:
        ImportError: vLLM is not installed.
        NotImplementedError: a vLLM other than 0.33, or with other signatures. Nothing is replaced.

    Source: names and signatures of vllm 0.33 `_custom_ops.py` (Apache-2.0); no code taken.
    """
    _active.enter(_known_places())
    undone = False

    def undo() -> None:
        nonlocal undone
        with _active.lock:
            first, undone = not undone, True
        if first:
            _active.leave()

    return undo


# A function of vLLM's: what holds it, its name there, and what we call it.
type _Place = tuple[Any, str, str]
_EXPERTS_MODULE = "vllm.model_executor.layers.fused_moe.experts.triton_moe"


def _known_places() -> list[_Place]:
    """What is replaced, of a release that we know."""
    remedy = "Install vllm 0.33, or call torch_bridge.vllm's functions yourself."
    try:
        import vllm  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        what = checks.message("patch", "vllm", "be installed", "no such module", remedy)
        raise ImportError(what) from error
    version = str(getattr(vllm, "__version__", "none"))
    known = ", ".join(f"{release}.x" for release in KNOWN_VERSIONS)
    if ".".join(version.split(".")[:2]) not in KNOWN_VERSIONS:
        rule = f"be a release whose ops are known: {known}"
        raise NotImplementedError(
            checks.message("patch", "vllm.__version__", rule, version, remedy)
        )
    from vllm import _custom_ops  # type: ignore[import-not-found]

    places: list[_Place] = [(_custom_ops, name, f"vllm._custom_ops.{name}") for name in _PARAMETERS]
    try:
        experts = importlib.import_module(_EXPERTS_MODULE).TritonExperts
        places.append((experts, "apply", "vllm's TritonExperts.apply"))
    except (ModuleNotFoundError, AttributeError) as error:
        if not str(getattr(error, "name", "vllm")).startswith(("vllm", "TritonExperts")):
            raise
        rule = f"hold TritonExperts, as in {known}"
        what = str(error)
        raise NotImplementedError(
            checks.message("patch", _EXPERTS_MODULE, rule, what, remedy)
        ) from None
    for owner, name, argument in places:
        expected = _PARAMETERS.get(name, _vllm_experts.APPLY_PARAMETERS)
        function = getattr(owner, name, None)
        found = tuple(inspect.signature(function).parameters) if callable(function) else None
        if found != expected:
            rule = f"take ({', '.join(expected)}), as in {known}"
            what = "no such function" if found is None else f"({', '.join(found)})"
            raise NotImplementedError(checks.message("patch", argument, rule, what, remedy))
    return places


def _batched_moe_align_block_size(
    max_tokens_per_batch: int,
    block_size: int,
    expert_num_tokens: torch.Tensor,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
) -> None:
    """`ops_batched_moe_align_block_size` with the names of vLLM's Python wrapper."""
    _vllm_ops.ops_batched_moe_align_block_size(
        max_tokens_per_batch,
        block_size,
        expert_num_tokens,
        sorted_ids,
        expert_ids,
        num_tokens_post_pad,
    )


def _replacements() -> dict[str, Callable[..., Any]]:
    return {
        "moe_align_block_size": _vllm_ops.ops_moe_align_block_size,
        "batched_moe_align_block_size": _batched_moe_align_block_size,
        "fused_globalize_align_block_size": _vllm_aligned.fused_globalize_align_block_size,
        "moe_lora_align_block_size": _vllm_aligned.moe_lora_align_block_size,
        "topk_softmax": _vllm_router.topk_softmax,
        "topk_sigmoid": _vllm_router.topk_sigmoid,
        "topk_hash_softplus_sqrt": _vllm_router.topk_hash_softplus_sqrt,
        "grouped_topk": _vllm_router.grouped_topk,
    }


class _Active:
    """How many patches are in force, and what they replaced."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._count = 0
        # For each place, vLLM's own function and ours.
        self._replaced: list[tuple[_Place, object, object]] = []

    def enter(self, places: list[_Place]) -> None:
        with self.lock:
            if self._count == 0:
                ours = _replacements()
                replaced = []
                for place in places:
                    owner, name, _ = place
                    original = (
                        vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)
                    )
                    new = ours.get(name) or _vllm_experts.apply_instead(original, owner)
                    replaced.append((place, original, new))
                try:
                    for (owner, name, _), _, new in replaced:
                        setattr(owner, name, new)
                except BaseException:
                    _restore(replaced)
                    raise
                self._replaced = replaced
            self._count += 1

    def leave(self) -> None:
        with self.lock:
            self._count -= 1
            if self._count:
                return
            replaced, self._replaced = self._replaced, []
            foreign = [one for one in replaced if getattr(one[0][0], one[0][1], None) is not one[2]]
            _restore([one for one in replaced if one not in foreign])
        if foreign:
            names = ", ".join(place[2] for place, _, _ in foreign)
            warnings.warn(
                f"torch_bridge: {names} was replaced by someone else since the patch; "
                "it is left as it is.",
                stacklevel=3,
            )


def _restore(replaced: list[tuple[_Place, object, object]]) -> None:
    for (owner, name, _), original, _ in replaced:
        setattr(owner, name, original)


_active = _Active()
