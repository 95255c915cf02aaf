"""Every error of the contract: its type, its format and what it says."""

import functools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj

ids = np.zeros((4, 2), np.int32)
align = functools.partial(maj.moe_align_block_size, ids, block_size=4, num_experts=8)
batched = functools.partial(
    maj.batched_moe_align_block_size, np.zeros(8, np.int32), max_tokens_per_batch=4, block_size=2
)
capacity = functools.partial(maj.max_num_tokens_padded, 8, block_size=4, num_experts=8)
select = functools.partial(maj.select_implementation, (4, 2), block_size=4, num_experts=8)
aligned = align()
groups = functools.partial(maj.padded_group_sizes, aligned)


def given(value, **options):
    return functools.partial(
        maj.moe_align_block_size, value, **{"block_size": 4, "num_experts": 8} | options
    )


def counts_of(value, **options):
    return functools.partial(
        maj.batched_moe_align_block_size,
        value,
        **{"max_tokens_per_batch": 4, "block_size": 2} | options,
    )


class Spec:
    """Stands for an array so large that it is only described: a size over the int32 limit."""

    def __new__(cls, *shape, dtype="int8"):
        return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, (0,) * len(shape))


FLOAT = "be an integer array; got"
NAMES = "be None or one of 'mosaic_gpu', 'xla', 'emulator'"
INT = "be a static Python int; got"
LIMIT = "give a padded length P of at most 2**31 - 1; got"

# call, changed argument, error, argument named, rule and what was got
CASES = [
    (
        given(np.zeros((4, 2), np.float32)),
        {},
        TypeError,
        "topk_ids",
        f"{FLOAT} float32 [4, 2]. Pass the",
    ),
    (given(jnp.zeros(3, jnp.bfloat16)), {}, TypeError, "topk_ids", f"{FLOAT} bfloat16 [3]."),
    (given(np.zeros(3, bool)), {}, TypeError, "topk_ids", f"{FLOAT} bool [3]."),
    (given([[1, 2], [3, 4]]), {}, TypeError, "topk_ids", f"{FLOAT} list [[1, 2], [3, 4]]."),
    (given(None), {}, TypeError, "topk_ids", f"{FLOAT} NoneType None."),
    (given(3), {}, TypeError, "topk_ids", f"{FLOAT} int 3."),
    (align, {"block_size": 0}, ValueError, "block_size", "be at least 1; got 0."),
    (align, {"block_size": -4}, ValueError, "block_size", "be at least 1; got -4."),
    (align, {"block_size": 4.0}, TypeError, "block_size", f"{INT} float 4.0."),
    (align, {"block_size": True}, TypeError, "block_size", f"{INT} bool True."),
    (align, {"block_size": None}, TypeError, "block_size", f"{INT} NoneType None."),
    (align, {"block_size": "4"}, TypeError, "block_size", f"{INT} str '4'."),
    (align, {"num_experts": 0}, ValueError, "num_experts", "be at least 1; got 0."),
    (align, {"num_experts": 8.0}, TypeError, "num_experts", f"{INT} float 8.0."),
    (align, {"num_experts": np.array([8, 8])}, TypeError, "num_experts", f"{INT} int64 [2]."),
    (
        align,
        {"expert_map": np.zeros(7, np.int32)},
        ValueError,
        "expert_map",
        "have shape [8]; got int32 [7].",
    ),
    (
        align,
        {"expert_map": np.zeros((8, 1), int)},
        ValueError,
        "expert_map",
        "have shape [8]; got int64 [8, 1].",
    ),
    (align, {"expert_map": np.zeros(8)}, TypeError, "expert_map", f"{FLOAT} float64 [8]."),
    (align, {"expert_map": [0] * 8}, TypeError, "expert_map", f"{FLOAT} list"),
    (align, {"num_valid_pairs": 1.5}, TypeError, "num_valid_pairs", "be an integer"),
    (
        align,
        {"num_valid_pairs": True},
        TypeError,
        "num_valid_pairs",
        "be an integer; got bool True.",
    ),
    (align, {"num_valid_pairs": "3"}, TypeError, "num_valid_pairs", "be an integer"),
    (
        align,
        {"num_valid_pairs": np.float32(1)},
        TypeError,
        "num_valid_pairs",
        "be an integer array; got float32 [].",
    ),
    (
        align,
        {"num_valid_pairs": np.zeros(2, int)},
        ValueError,
        "num_valid_pairs",
        "be a scalar; got int64 [2].",
    ),
    (
        align,
        {"num_valid_pairs": np.zeros(0, int)},
        ValueError,
        "num_valid_pairs",
        "be a scalar; got int64 [0].",
    ),
    (
        align,
        {"ignore_invalid_experts": 1},
        TypeError,
        "ignore_invalid_experts",
        "be a Python bool; got int 1.",
    ),
    (
        align,
        {"pad_sorted_ids": None},
        TypeError,
        "pad_sorted_ids",
        "be a Python bool; got NoneType None.",
    ),
    (
        align,
        {"return_inverse": "yes"},
        TypeError,
        "return_inverse",
        "be a Python bool; got str 'yes'.",
    ),
    (align, {"implementation": "triton"}, ValueError, "implementation", f"{NAMES}; got 'triton'."),
    (align, {"implementation": 3}, ValueError, "implementation", f"{NAMES}; got int 3."),
    (align, {"implementation": ["xla"]}, ValueError, "implementation", "be None or one of"),
    (align, {"block_size": 2**28 + 1}, ValueError, "topk_ids", f"{LIMIT} 2147483656."),
    (
        given(Spec(2**31)),
        {"num_experts": 1, "block_size": 1},
        ValueError,
        "topk_ids",
        f"{LIMIT} 2147483648.",
    ),
    (given(Spec(2**40, 4)), {"num_experts": 1}, ValueError, "topk_ids", f"{LIMIT} {2**42 + 3}."),
    (
        given(Spec(2**31 - 3)),
        {"num_experts": 1, "pad_sorted_ids": True},
        ValueError,
        "topk_ids",
        f"{LIMIT} 2147483648.",
    ),
    (
        counts_of(np.zeros((2, 4), int)),
        {},
        ValueError,
        "expert_num_tokens",
        "have shape [num_experts] with at least one expert; got int64 [2, 4].",
    ),
    (
        counts_of(np.zeros(0, int)),
        {},
        ValueError,
        "expert_num_tokens",
        "with at least one expert; got int64 [0].",
    ),
    (counts_of(np.zeros(3)), {}, TypeError, "expert_num_tokens", f"{FLOAT} float64 [3]."),
    (counts_of([1, 2]), {}, TypeError, "expert_num_tokens", f"{FLOAT} list [1, 2]."),
    (
        batched,
        {"max_tokens_per_batch": 0},
        ValueError,
        "max_tokens_per_batch",
        "be at least 1; got 0.",
    ),
    (
        batched,
        {"max_tokens_per_batch": 4.5},
        TypeError,
        "max_tokens_per_batch",
        f"{INT} float 4.5.",
    ),
    (batched, {"block_size": 0}, ValueError, "block_size", "be at least 1; got 0."),
    (batched, {"implementation": "cuda"}, ValueError, "implementation", "be None or one of"),
    (
        batched,
        {"max_tokens_per_batch": 2**28},
        ValueError,
        "max_tokens_per_batch",
        f"{LIMIT} 2147483648.",
    ),
    (capacity, {"block_size": 0}, ValueError, "block_size", "be at least 1; got 0."),
    (capacity, {"num_experts": -1}, ValueError, "num_experts", "be at least 1; got -1."),
    (
        functools.partial(maj.max_num_tokens_padded, -1, block_size=4, num_experts=8),
        {},
        ValueError,
        "num_pairs",
        "be at least 0; got -1.",
    ),
    (
        functools.partial(maj.max_num_tokens_padded, 8.0, block_size=4, num_experts=8),
        {},
        TypeError,
        "num_pairs",
        "be a static Python int; got float 8.0.",
    ),
    (
        functools.partial(maj.max_num_tokens_padded, True, block_size=4, num_experts=8),
        {},
        TypeError,
        "num_pairs",
        "be a static Python int; got bool True.",
    ),
    (
        functools.partial(maj.max_num_tokens_padded, 2**31 - 8, block_size=2, num_experts=8),
        {},
        ValueError,
        "num_pairs",
        f"{LIMIT} 2147483648.",
    ),
    (groups, {"block_size": 0}, ValueError, "block_size", "be at least 1; got 0."),
    (groups, {"block_size": 2.0}, TypeError, "block_size", f"{INT} float 2.0."),
    (select, {"block_size": 0}, ValueError, "block_size", "be at least 1; got 0."),
    (select, {"num_experts": None}, TypeError, "num_experts", f"{INT} NoneType None."),
    (select, {"implementation": "best"}, ValueError, "implementation", "be None or one of"),
    (
        functools.partial(maj.select_implementation, "4", block_size=4, num_experts=8),
        {},
        TypeError,
        "topk_ids_or_shape",
        "be an array or a shape; got str '4'.",
    ),
    (
        select,
        {"implementation": "mosaic_gpu", "platform": "cpu"},
        NotImplementedError,
        "implementation",
        "be one that can run here; got 'mosaic_gpu'. Mosaic GPU kernels run on NVIDIA GPUs only",
    ),
    (
        select,
        {"implementation": "emulator", "platform": "cuda"},
        NotImplementedError,
        "implementation",
        "be one that can run here; got 'emulator'. The emulator runs",
    ),
]


def name_of(case):
    call, options, error, argument, _ = case
    return f"{call.func.__name__}-{argument}-{error.__name__}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_error_names_call_argument_rule_and_remedy(case):
    call, options, error, argument, text = case
    function = call.func.__name__
    with pytest.raises(error) as caught:
        call(**options)
    assert type(caught.value) is error
    message = str(caught.value)
    # One sentence of the rule and what was got, then what to do about it.
    assert re.fullmatch(rf"{function}: {argument} must [^;]+; got .+\. [A-Z].*\.", message), message
    assert text in message, message


@pytest.mark.parametrize("argument", ["block_size", "num_experts"])
def test_traced_size_is_a_type_error(argument):
    def function(value):
        return align(**{argument: value})

    with pytest.raises(
        TypeError, match=f"moe_align_block_size: {argument} must be a static Python int"
    ):
        jax.jit(function)(4)


def test_float_ids_under_jit_are_the_same_error():
    with pytest.raises(TypeError, match=r"topk_ids must be an integer array; got float32 \[3\]"):
        jax.jit(lambda x: maj.moe_align_block_size(x, block_size=4, num_experts=8))(
            jnp.zeros(3, jnp.float32)
        )


def test_torch_tensor_is_sent_to_the_bridge():
    tensor = types.new_class("Tensor", (), {}, lambda space: space.update(__module__="torch"))()
    with pytest.raises(TypeError, match="Call torch_bridge for PyTorch tensors"):
        given(tensor)()


def test_limit_itself_is_accepted():
    """The largest P that fits int32 passes the checks; one more does not (see CASES)."""
    assert maj.max_num_tokens_padded(2**31 - 8, block_size=2, num_experts=7) == 2**31 - 1
    shape = jax.ShapeDtypeStruct((2**31 - 8,), jnp.int32)
    out = jax.eval_shape(
        functools.partial(maj.moe_align_block_size, block_size=2, num_experts=7), shape
    )
    assert out.sorted_token_ids.shape == (2**31 - 1,)
    out = jax.eval_shape(
        functools.partial(
            maj.batched_moe_align_block_size, max_tokens_per_batch=2**28 - 1, block_size=1
        ),
        jax.ShapeDtypeStruct((8,), jnp.int32),
    )
    assert out.sorted_token_ids.shape == (2**31 - 8,)


def test_error_comes_before_anything_is_traced(monkeypatch):
    from moe_align_jax import block_align

    ran = []
    monkeypatch.setattr(block_align, "align", lambda *a: ran.append(a))
    for call, options, error, _, _ in CASES:
        with pytest.raises(error):
            call(**options)
    assert not ran


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moe_align_jax' has no attribute 'aling'"):
        _ = maj.aling
    assert set(maj.__all__) <= set(dir(maj))
    assert all(getattr(maj, name) is not None for name in maj.__all__)


def test_eager_mosaic_gpu_on_a_cpu_says_why():
    with jax.default_device(jax.devices("cpu")[0]):
        with pytest.raises(NotImplementedError, match="run on NVIDIA GPUs only, not on 'cpu'"):
            align(implementation="mosaic_gpu")
        with pytest.raises(
            NotImplementedError, match="batched_moe_align_block_size: implementation"
        ):
            batched(implementation="mosaic_gpu")


def test_import_needs_no_jax():
    """The package resolves its names lazily: the leaves and the version are there without jax."""
    import subprocess

    code = (
        "import sys; sys.modules['jax'] = None; import moe_align_jax, moe_align_jax.types;"
        "print(moe_align_jax.max_num_tokens_padded(8192, block_size=128, num_experts=64))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "16320\n", done.stderr


IDS = np.zeros((4, 1), np.int32)
SIZES = {
    "moe_align_block_size": lambda **s: maj.moe_align_block_size(
        IDS, **({"num_experts": 4, "block_size": 4} | s)
    ),
    "batched_moe_align_block_size": lambda **s: maj.batched_moe_align_block_size(
        IDS[:, 0], **({"max_tokens_per_batch": 4, "block_size": 4} | s)
    ),
    "max_num_tokens_padded": lambda **s: maj.max_num_tokens_padded(
        4, **({"num_experts": 4, "block_size": 4} | s)
    ),
    "select_implementation": lambda **s: maj.select_implementation(
        (4,), **({"num_experts": 4, "block_size": 4} | s)
    ),
    "permute_to_masked": lambda **s: maj.permute_to_masked(IDS, IDS, **({"num_experts": 4} | s)),
    "permute_to_contiguous": lambda **s: maj.permute_to_contiguous(
        IDS, IDS, **({"num_experts": 4} | s)
    ),
    "init_expert_load": lambda **s: maj.init_expert_load(
        "stat", **({"num_layers": 2, "num_physical_experts": 4} | s)
    ),
    "padded_group_sizes": lambda **s: maj.padded_group_sizes(
        maj.moe_align_block_size(IDS, num_experts=4, block_size=4), **({"block_size": 4} | s)
    ),
    "moe_align_block_size of no pairs": lambda **s: maj.moe_align_block_size(
        IDS[:0], **({"num_experts": 4, "block_size": 4} | s)
    ),
}
ARGUMENTS = {
    **dict.fromkeys(SIZES, ("num_experts", "block_size")),
    "batched_moe_align_block_size": ("max_tokens_per_batch", "block_size"),
    "permute_to_masked": ("num_experts", "max_tokens_per_expert"),
    "permute_to_contiguous": ("num_experts", "expert_alignment"),
    "init_expert_load": ("num_layers", "num_physical_experts"),
    "padded_group_sizes": ("block_size",),
}


@pytest.mark.parametrize("size", [2**31, 2**32 + 4, 10**30, np.uint64(2**63)], ids=str)
@pytest.mark.parametrize("call, argument", [(c, a) for c in SIZES for a in ARGUMENTS[c]])
def test_sizes_beyond_int32_are_refused_by_name(call, argument, size):
    function = call.split()[0]
    with pytest.raises(ValueError) as raised:
        SIZES[call](**{argument: size})
    begin = f"{function}: {argument} must be at most 2**31 - 1; got {size}. "
    assert str(raised.value).startswith(begin)
