"""Weights of experts as checkpoints keep them, and as `fused_moe` takes them."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._grouped_matmul.problem import E4M3

_SCALES = "_scale_inv"  # behind the name of an e4m3 array: its scales, which multiply (DeepSeek-V3)
# What Hugging Face calls an expert's three matrices: (gate, up, down).
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FLAG_REMEDY = "It says how the weights lie."


def _is_float_array(array: Any) -> bool:
    """Of NumPy or jax, or the shape and dtype of one; bfloat16 and e4m3 are no floats of NumPy's."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or not hasattr(array, "shape") or not hasattr(array, "ndim"):
        return False
    if isinstance(array, np.ma.MaskedArray):
        return False
    import jax.numpy as jnp

    try:
        return bool(jnp.issubdtype(dtype, jnp.floating))
    except TypeError:  # a dtype of another library
        return False


def _library(array: Any) -> Any:
    """NumPy for its arrays, so that a checkpoint on the host stays there; jax.numpy for the rest."""
    if isinstance(array, np.ndarray):
        return np
    _check_has_values(array)
    import jax.numpy as jnp

    return jnp


def _check_has_values(array: Any) -> None:
    """Shapes and dtypes alone are enough for what moves nothing."""
    if not checks.is_array(array):
        rule, remedy = "be arrays where they are moved", "Move them under jax.eval_shape."
        checks.refuse(TypeError, "ExpertWeights", "weights", rule, array, remedy)


def _is_quantized(weights: Any) -> bool:
    """Whether they are (values, scales)."""
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        return False
    first, second = (getattr(each, "dtype", None) for each in weights)
    return str(first) == E4M3 and second is not None and str(second) != E4M3


def _check_array(function: str, argument: str, value: Any, ndim: int) -> None:
    if not _is_float_array(value):
        rule, remedy = "be a float array of NumPy or jax", "Convert it, e.g. by jnp.asarray."
        checks.refuse(TypeError, function, argument, rule, value, remedy)
    if value.ndim != ndim:
        remedy = "See ExpertWeights for the shapes of checkpoints."
        checks.refuse(ValueError, function, argument, f"have {ndim} dimensions", value, remedy)


def _values(weights: Any) -> Any:
    return weights[0] if _is_quantized(weights) else weights


@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """Weights of the experts of one layer, and how they lie: `fused_moe(x, *weights, ..., **options)`.

    Arrays are NumPy's or jax's, and stay what they are. E experts, H hidden, N within an expert; gated, as
    the experts of all these checkpoints are. Each of the arrays may be (e4m3 values, float32 scales), as
    `quantize_blockwise` makes them: a scale for each 128 x 128, whose axes follow those of the values, or one
    for each expert.

    Attributes:
        w_gate_up: `[E, H, 2 N]`, transposed `[E, 2 N, H]`; or a pair (gate, up) of `[E, H, N]` or
            `[E, N, H]`.
        w_down: `[E, N, H]`, transposed `[E, H, N]`.
        bias_gate_up: `[E, 2 N]`, in the order of w_gate_up's columns, or None.
        bias_down: `[E, H]`, or None.
        transpose_rhs: whether they are transposed.
        interleaved: whether columns of gate and up take turns, in place of all of gate, then all of up.

    Example:
        >>> import numpy as np
        >>> vllm = ExpertWeights.from_vllm(np.zeros((4, 96, 64)), np.zeros((4, 64, 48)))
        >>> vllm.options
        {'transpose_rhs': True, 'interleaved': False}
        >>> gate, up = vllm.laid_out(transpose_rhs=False, pair=True).w_gate_up
        >>> gate.shape, up.shape
        ((4, 64, 48), (4, 64, 48))
    """

    w_gate_up: Any
    w_down: Any
    bias_gate_up: Any = None
    bias_down: Any = None
    transpose_rhs: bool = False
    interleaved: bool = False

    def __post_init__(self) -> None:
        function = "ExpertWeights"
        flags = {"transpose_rhs": self.transpose_rhs, "interleaved": self.interleaved}
        checks.check_bools(function, flags, _FLAG_REMEDY)
        if self.pair and (len(self.w_gate_up) != 2 or self.interleaved):
            got = f"{len(self.w_gate_up)} arrays" + ", interleaved" * self.interleaved
            rule, remedy = "be an array or a pair (gate, up)", "A pair is not interleaved."
            checks.refuse(ValueError, function, "w_gate_up", rule, got, remedy)
        first = [_values(each) for each in (self.w_gate_up if self.pair else (self.w_gate_up,))]
        down = _values(self.w_down)
        named = [*(("w_gate_up", each) for each in first), ("w_down", down)]
        named += [
            (n, b) for n in ("bias_gate_up", "bias_down") if (b := getattr(self, n)) is not None
        ]
        for name, array in named:
            if not _is_float_array(array):
                rule, remedy = (
                    "be a float array of NumPy or jax",
                    "Convert it, e.g. by jnp.asarray.",
                )
                checks.refuse(TypeError, function, name, rule, array, remedy)
        if down.ndim != 3:
            checks.refuse(
                ValueError,
                function,
                "w_down",
                "have shape [E, N, H]",
                down,
                "One matrix for each expert.",
            )
        experts, a, b = down.shape
        hidden, ffn = (a, b) if self.transpose_rhs else (b, a)
        width = ffn if self.pair else 2 * ffn
        want = (experts, width, hidden) if self.transpose_rhs else (experts, hidden, width)
        for each in first:
            if each.shape != want:
                rule = f"have shape {list(want)} beside w_down {list(down.shape)}"
                remedy = f"Is transpose_rhs={self.transpose_rhs} right?"
                checks.refuse(ValueError, function, "w_gate_up", rule, each, remedy)
        _check_scales("w_down", self.w_down)
        for each in self.w_gate_up if self.pair else (self.w_gate_up,):
            _check_scales("w_gate_up", each)
        for name, bias, shape in (
            ("bias_gate_up", self.bias_gate_up, (experts, 2 * ffn)),
            ("bias_down", self.bias_down, (experts, hidden)),
        ):
            if bias is not None and bias.shape != shape:
                rule = f"have shape {list(shape)}"
                checks.refuse(
                    ValueError,
                    function,
                    name,
                    rule,
                    bias,
                    "One value for each column of the weights.",
                )

    def __iter__(self) -> Any:
        """(w_gate_up, w_down): the two that `fused_moe` takes by position."""
        return iter((self.w_gate_up, self.w_down))

    @property
    def pair(self) -> bool:
        return isinstance(self.w_gate_up, (tuple, list)) and not _is_quantized(self.w_gate_up)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `fused_moe` that say how the weights lie, and the biases that there are."""
        options = {"transpose_rhs": self.transpose_rhs, "interleaved": self.interleaved}
        biases = {"bias_gate_up": self.bias_gate_up, "bias_down": self.bias_down}
        return options | {name: bias for name, bias in biases.items() if bias is not None}

    def laid_out(
        self,
        *,
        transpose_rhs: bool | None = None,
        interleaved: bool | None = None,
        pair: bool | None = None,
    ) -> "ExpertWeights":
        """The same weights in another layout; None leaves that part as it is.

        vLLM's is `laid_out(transpose_rhs=True, interleaved=False, pair=False)`, MaxText's
        `laid_out(transpose_rhs=False, pair=True)`. An array whose layout changes is copied.

        Args:
            transpose_rhs: as for `fused_moe`.
            interleaved: as for `fused_moe`. A pair is not.
            pair: gate and up as two arrays.

        Raises:
            TypeError: an argument is neither None nor a bool.
            ValueError: a pair is to be interleaved; or scales of blocks would not be of blocks any more: gate
                and up of an N that is no multiple of 128 are to be joined, parted or interleaved.
        """
        flags = {"transpose_rhs": transpose_rhs, "interleaved": interleaved, "pair": pair}
        given = {name: flag for name, flag in flags.items() if flag is not None}
        checks.check_bools("laid_out", given, _FLAG_REMEDY)
        transpose_rhs = self.transpose_rhs if transpose_rhs is None else transpose_rhs
        pair = self.pair if pair is None else pair
        if interleaved is None:
            interleaved = self.interleaved and not pair
        if pair and interleaved:
            remedy = "Pass interleaved=False."
            checks.refuse(
                ValueError, "laid_out", "interleaved", "be False for a pair", "True", remedy
            )
        w_gate_up, bias = self.w_gate_up, self.bias_gate_up
        if pair != self.pair or interleaved != self.interleaved:
            axis = 1 if self.transpose_rhs else 2
            parts = w_gate_up if self.pair else _parted(w_gate_up, axis, self.interleaved)
            w_gate_up = tuple(parts) if pair else _joined(parts, axis, interleaved)
        if bias is not None and interleaved != self.interleaved:
            bias = _joined(_parted(bias, 1, self.interleaved), 1, interleaved)
        w_down = self.w_down
        if transpose_rhs != self.transpose_rhs:
            w_down = _transposed(w_down)
            w_gate_up = tuple(map(_transposed, w_gate_up)) if pair else _transposed(w_gate_up)
        return ExpertWeights(w_gate_up, w_down, bias, self.bias_down, transpose_rhs, interleaved)

    @classmethod
    def from_hugging_face(
        cls, tensors: Mapping[str, Any], prefix: str = "", *, interleaved: bool = False
    ) -> "ExpertWeights":
        """Of one layer of a Hugging Face checkpoint. Arrays that experts share are not copied.

        Two kinds of checkpoint: with an array for all experts, `gate_up_proj` and `down_proj` (transformers
        5, GPT-OSS, Llama 4, with their biases), in either orientation, which the shapes tell; and with
        matrices `[N, H]` and `[H, N]` per expert, `{i}.gate_proj.weight`, `{i}.up_proj.weight`,
        `{i}.down_proj.weight` (Qwen3, DeepSeek-V3) or `{i}.w1.weight`, `{i}.w3.weight`, `{i}.w2.weight`
        (Mixtral), which are stacked. e4m3 arrays become (values, scales), with what stands under their name
        and `_scale_inv`: `{i}.gate_proj.weight_scale_inv`.

        Args:
            tensors: by name, NumPy's or jax's.
            prefix: of the names, such as "model.layers.0.mlp.experts.".
            interleaved: columns of gate and up take turns: GPT-OSS. Nothing in a checkpoint tells.

        Raises:
            TypeError: `tensors` is no mapping to arrays, `prefix` no string or `interleaved` no bool.
            ValueError: the names or the shapes are not those of experts, or single experts have biases.

        Example:
            >>> import numpy as np
            >>> shapes = {"gate_proj": (48, 64), "up_proj": (48, 64), "down_proj": (64, 48)}
            >>> tensors = {
            ...     f"experts.{i}.{name}.weight": np.zeros(shape)
            ...     for i in range(4)
            ...     for name, shape in shapes.items()
            ... }
            >>> weights = ExpertWeights.from_hugging_face(tensors, "experts.")
            >>> weights.w_gate_up.shape, weights.w_down.shape, weights.transpose_rhs
            ((4, 96, 64), (4, 64, 48), True)
        """
        function = "from_hugging_face"
        if not isinstance(tensors, Mapping):
            rule, remedy = (
                "be a mapping from names to arrays",
                "Pass the tensors of a file, by name.",
            )
            checks.refuse(TypeError, function, "tensors", rule, checks.describe(tensors), remedy)
        _check_prefix(function, prefix)
        checks.check_bool(function, "interleaved", interleaved, _FLAG_REMEDY)
        named = {name: t for name, t in tensors.items() if isinstance(name, str)}
        mine = {name[len(prefix) :]: t for name, t in named.items() if name.startswith(prefix)}
        if "gate_up_proj" not in mine:
            return cls._from_matrices(mine, prefix, interleaved)
        first, down = mine["gate_up_proj"], mine.get("down_proj")
        if down is None:
            checks.refuse(
                ValueError,
                function,
                "tensors",
                f"hold {prefix}down_proj",
                "none",
                "See the prefix.",
            )
        for name, array in (("gate_up_proj", first), ("down_proj", down)):
            _check_array(function, f"tensors[{prefix + name!r}]", array, 3)
        # [E, 2 N, H] beside [E, H, N], or [E, H, 2 N] beside [E, N, H]: no sizes fit both.
        transposed = first.shape[1:] == (2 * down.shape[2], down.shape[1])
        biases = mine.get("gate_up_proj_bias"), mine.get("down_proj_bias")
        first, down = (_with_scales(mine, prefix, name) for name in ("gate_up_proj", "down_proj"))
        return cls(first, down, *biases, transposed, interleaved)

    @classmethod
    def from_safetensors(
        cls, path: Any, prefix: str = "", *, interleaved: bool = False
    ) -> "ExpertWeights":
        """`from_hugging_face` of a checkpoint's files, which are read where they are needed.

        Args:
            path: a safetensors file, or the folder of a checkpoint, with or without its index.
            prefix: of the names, such as "model.layers.3.mlp.experts." of DeepSeek-V3.
            interleaved: as for `from_hugging_face`.

        Returns:
            The weights as NumPy arrays, e4m3 and bfloat16 in ml_dtypes' dtypes.

        Raises:
            TypeError: `path` is no path, or as `from_hugging_face`.
            ValueError: there is no such file, it is none of safetensors, or as `from_hugging_face`.
        """
        function = "from_safetensors"
        if not isinstance(path, (str, os.PathLike)):
            rule, remedy = "be a path", "Pass a file, or the folder of a checkpoint."
            checks.refuse(TypeError, function, "path", rule, checks.describe(path), remedy)
        _check_prefix(function, prefix)
        checks.check_bool(function, "interleaved", interleaved, _FLAG_REMEDY)
        from moe_align_jax._moe_layer import safetensors

        return cls.from_hugging_face(
            safetensors.read(path, prefix), prefix, interleaved=interleaved
        )

    @classmethod
    def _from_matrices(cls, mine: dict[str, Any], prefix: str, interleaved: bool) -> Any:
        function = "from_hugging_face"
        names = next((n for n in _NAMES if f"0.{n[0]}.weight" in mine), None)
        if names is None or interleaved:
            rule = f"hold {prefix}gate_up_proj, or {prefix}0.gate_proj.weight"
            got = "matrices per expert, interleaved" if names else f"{sorted(mine)[:3]}"
            remedy = "Pass the prefix of one layer's experts; matrices of an expert stand apart."
            checks.refuse(ValueError, function, "tensors", rule, got, remedy)
        # By any of the three matrices: an expert of whom one is missing must not be left out.
        kinds = {f"{name}.weight" for name in names}
        parts = [name.partition(".") for name in mine]
        count = len({i for i, _, kind in parts if kind in kinds and i.isdecimal()})
        biases = (f"{i}.{name}.bias" for i in range(count) for name in names)
        if biased := next((name for name in biases if name in mine), None):  # not left out silently
            rule, got = "hold no biases of single experts", f"{prefix}{biased}"
            remedy = "Stack weights and biases, and pass them to ExpertWeights."
            checks.refuse(ValueError, function, "tensors", rule, got, remedy)
        rows = []
        for i in range(count):
            wanted = [f"{i}.{name}.weight" for name in names]
            if missing := [name for name in wanted if name not in mine]:
                rule, remedy = f"hold {prefix}{missing[0]}", "Every expert has three matrices."
                checks.refuse(ValueError, function, "tensors", rule, "none", remedy)
            for name, like in zip(wanted, (names[0], names[0], names[2]), strict=True):
                argument = f"tensors[{prefix + name!r}]"
                _check_array(function, argument, mine[name], 2)
                shape = mine[f"0.{like}.weight"].shape
                if mine[name].shape != shape:
                    rule = f"have the shape of {prefix}0.{like}.weight, {list(shape)}"
                    remedy = "All experts of a layer have one size."
                    checks.refuse(ValueError, function, argument, rule, mine[name], remedy)
            rows.append([_with_scales(mine, prefix, name) for name in wanted])
        gate, up, down = (_stacked(list(column)) for column in zip(*rows, strict=True))
        first: Any = (gate, up)
        # Scales of blocks that begin at 128 rows stay what they are where up follows gate.
        of_blocks = all(_is_quantized(each) and each[1].ndim == 3 for each in first)
        if not _is_quantized(gate) or (of_blocks and gate[0].shape[1] % GROUP == 0):
            first = _joined(first, 1, False)
        return cls(first, down, transpose_rhs=True)

    @classmethod
    def from_vllm(
        cls,
        w13_weight: Any,
        w2_weight: Any,
        w13_bias: Any = None,
        w2_bias: Any = None,
        *,
        interleaved: bool = False,
    ) -> "ExpertWeights":
        """Of one of vLLM's `FusedMoE` layers, as its Triton kernels take the weights.

        Args:
            w13_weight, w2_weight: `[E, 2 N, H]`, gate then up, and `[E, H, N]`: float arrays of NumPy or jax;
                or each with its scales, as `(w13_weight, w13_weight_scale_inv)`.
            w13_bias, w2_bias: `[E, 2 N]` and `[E, H]`, or None.
            interleaved: whether gate and up are columns in turn, as in gpt-oss.

        Raises:
            TypeError: an argument is no float array, or `interleaved` no bool.
            ValueError: the shapes do not fit each other.
        """
        weights = {"w13_weight": w13_weight, "w2_weight": w2_weight}
        for name, value in weights.items():
            _check_array("from_vllm", name, _values(value), 3)
        for name, value in {"w13_bias": w13_bias, "w2_bias": w2_bias}.items():
            if value is not None:
                _check_array("from_vllm", name, value, 2)
        return cls(w13_weight, w2_weight, w13_bias, w2_bias, True, interleaved)

    @classmethod
    def from_maxtext(
        cls,
        wi_0: Any,
        wi_1: Any,
        wo: Any,
        *,
        layer: int | None = None,
        layer_axis: int = 1,
        bias_gate: Any = None,
        bias_up: Any = None,
        bias_down: Any = None,
    ) -> "ExpertWeights":
        """Of a MaxText MoE block: gate and up `[E, H, N]` apart, `wo` `[E, N, H]`.

        Args:
            wi_0, wi_1, wo: gate, up and down. With scanned layers they have one more axis.
            layer: which of the scanned layers; None where they are of one layer.
            layer_axis: where the scanned layers are, MaxText's `param_scan_axis`.
            bias_gate, bias_up, bias_down: `[E, N]`, `[E, N]` and `[E, H]`, or None.

        Raises:
            TypeError: an argument is no float array, or `layer` or `layer_axis` no int.
            ValueError: there is no such layer, or the shapes do not fit each other.
        """
        function = "from_maxtext"
        arrays = [wi_0, wi_1, wo]
        biases = [bias_gate, bias_up, bias_down]
        given = dict(zip(("wi_0", "wi_1", "wo"), arrays, strict=True))
        names = ("bias_gate", "bias_up", "bias_down")
        given |= {n: b for n, b in zip(names, biases, strict=True) if b is not None}
        for name, array in given.items():
            ndim = (2 if name in names else 3) + (layer is not None)
            _check_array(function, name, array, ndim)
        if layer is not None:
            remedy = "Pass the axis of the scanned layers, MaxText's param_scan_axis."
            layer_axis = checks.check_int(function, "layer_axis", layer_axis, 0, remedy)
            layer = checks.check_int(function, "layer", layer, 0, "Layers count from 0.")
            for name, array in given.items():
                if layer_axis >= array.ndim:
                    rule = f"be an axis of {name}, below {array.ndim}"
                    checks.refuse(ValueError, function, "layer_axis", rule, layer_axis, remedy)
                if layer >= array.shape[layer_axis]:
                    rule = f"be below {array.shape[layer_axis]}, the layers of {name}"
                    checks.refuse(ValueError, function, "layer", rule, layer, remedy)
            arrays, biases = (
                [None if a is None else a.take(layer, axis=layer_axis) for a in some]
                for some in (arrays, biases)
            )
        gate, up, down = biases
        if (gate is None) != (up is None):
            remedy = "Pass both, or none."
            checks.refuse(
                ValueError,
                function,
                "bias_up",
                "be there with bias_gate",
                "one of them",
                remedy,
            )
        first: Any = arrays[0]
        shape = first.shape[0], first.shape[2]
        for name, bias in (("bias_gate", gate), ("bias_up", up)):
            if bias is not None and bias.shape != shape:
                rule = f"have shape {list(shape)} beside wi_0"
                remedy = "One value for each column of the weights."
                checks.refuse(ValueError, function, name, rule, bias, remedy)
            if bias is not None and not checks.is_array(bias):  # they are joined: no mere shapes
                rule, remedy = "be an array of NumPy or jax", "Leave biases of shapes alone out."
                checks.refuse(TypeError, function, name, rule, bias, remedy)
        both = None if gate is None else _library(gate).concatenate([gate, up], axis=1)
        return cls((arrays[0], arrays[1]), arrays[2], both, down)


def _check_prefix(function: str, prefix: Any) -> None:
    if not isinstance(prefix, str):
        remedy = 'Pass for example "model.layers.0.mlp.experts.".'
        got = checks.describe(prefix)
        checks.refuse(TypeError, function, "prefix", "be a string", got, remedy)


def _check_scales(name: str, weights: Any) -> None:
    if not _is_quantized(weights):
        return
    values, scales = weights
    experts, *sizes = values.shape
    blocks = (experts, *(checks.cdiv(size, GROUP) for size in sizes))
    if scales.shape not in (blocks, (experts,), ()):
        rule = f"have scales of shape {list(blocks)} or [{experts}] beside {list(values.shape)}"
        remedy = "A scale belongs to 128 x 128 values, or to an expert."
        checks.refuse(ValueError, "ExpertWeights", name, rule, scales, remedy)


def _with_scales(mine: Mapping[str, Any], prefix: str, name: str) -> Any:
    """An array; of e4m3, (values, float32 scales)."""
    values = mine[name]
    scales = mine.get(name + _SCALES)
    if str(values.dtype) != E4M3:
        if scales is not None:  # not left out silently
            rule = f"hold {E4M3} {prefix}{name} beside {prefix}{name}{_SCALES}"
            remedy = "Multiply the values by their scales, or quantise them: quantize_blockwise."
            checks.refuse(ValueError, "from_hugging_face", "tensors", rule, values, remedy)
        return values
    if scales is None:
        rule = f"hold {prefix}{name}{_SCALES} beside {E4M3} {prefix}{name}"
        remedy = (
            "Scales of another name or kind are not known: pass ExpertWeights (values, scales)."
        )
        checks.refuse(ValueError, "from_hugging_face", "tensors", rule, "none", remedy)
    argument = f"tensors[{prefix + name + _SCALES!r}]"
    if not _is_float_array(scales):  # exponents in integers would be taken for the scales
        rule, remedy = "be a float array of NumPy or jax", "Convert it to the scales as floats."
        checks.refuse(TypeError, "from_hugging_face", argument, rule, scales, remedy)
    if values.ndim == 2:
        blocks = tuple(checks.cdiv(size, GROUP) for size in values.shape)
        if scales.shape not in (blocks, ()):
            rule = f"have shape {list(blocks)} or [] beside {list(values.shape)}"
            remedy = "A scale belongs to 128 x 128 values, or to the matrix."
            checks.refuse(ValueError, "from_hugging_face", argument, rule, scales, remedy)
    return values, scales.astype(np.float32)


def _stacked(matrices: list[Any]) -> Any:
    """Of each expert, one after the other."""
    if any(map(_is_quantized, matrices)):
        if not all(map(_is_quantized, matrices)):
            rule, remedy = "hold e4m3 matrices of all experts, or of none", "Convert some of them."
            checks.refuse(ValueError, "from_hugging_face", "tensors", rule, "both", remedy)
        if len({scales.ndim for _, scales in matrices}) > 1:
            rule, remedy = (
                "hold scales of blocks for all experts, or for none",
                "Quantise them anew.",
            )
            checks.refuse(ValueError, "from_hugging_face", "tensors", rule, "both", remedy)
        return tuple(_stacked([matrix[i] for matrix in matrices]) for i in range(2))
    return _library(matrices[0]).stack(matrices)


def _transposed(array: Any) -> Any:
    if _is_quantized(array):
        values, scales = array
        return _transposed(values), scales if scales.ndim < 3 else _transposed(scales)
    _check_has_values(array)
    return array.swapaxes(1, 2)


def _check_blocks(interleaved: bool, size: int) -> None:
    """That gate and up of so many rows have blocks of their own."""
    if interleaved or size % GROUP:
        rule = "keep gate and up in blocks of 128 of their own, where scales are of blocks"
        got = "interleaved" if interleaved else f"N = {size}"
        remedy = "Leave gate and up as they are, or quantise them anew: quantize_blockwise."
        checks.refuse(ValueError, "laid_out", "the layout", rule, got, remedy)


def _parted(array: Any, axis: int, interleaved: bool) -> list[Any]:
    """Gate and up along an axis."""
    if _is_quantized(array):
        values, scales = array
        parts = _parted(values, axis, interleaved)
        if scales.ndim < 3:
            return [(part, scales) for part in parts]
        _check_blocks(interleaved, parts[0].shape[axis])
        return list(zip(parts, _parted(scales, axis, False), strict=True))
    if not interleaved:
        return _library(array).split(array, 2, axis=axis)
    index = (slice(None),) * axis
    return [array[(*index, slice(start, None, 2))] for start in (0, 1)]


def _joined(parts: Any, axis: int, interleaved: bool) -> Any:
    if _is_quantized(parts[0]):
        values, scales = zip(*parts, strict=True)
        if any(each.ndim < 3 for each in scales):
            if not all(np.array_equal(each, scales[0]) for each in scales):
                rule, remedy = "stay a pair, where each has a scale of its own", "Pass pair=True."
                checks.refuse(ValueError, "laid_out", "gate and up", rule, "to be joined", remedy)
            return _joined(values, axis, interleaved), scales[0]
        _check_blocks(interleaved, values[0].shape[axis])
        return _joined(values, axis, interleaved), _joined(scales, axis, False)
    xp = _library(parts[0])
    if not interleaved:
        return xp.concatenate(list(parts), axis=axis)
    shape = list(parts[0].shape)
    shape[axis] *= 2
    return xp.stack(list(parts), axis=axis + 1).reshape(shape)
