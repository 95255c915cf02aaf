"""torch_bridge.grouped_matmul and fused_moe against float64: on a machine without a GPU, and through jax."""

import re

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import torch_bridge
from moe_align_jax._moe_layer.plan import block_sizes
from moe_align_jax.types import AlignedBlocks
from tests.bridge.helpers import assert_format, misaligned
from tests.moe_layer import oracle
from torch_bridge import moe
from torch_bridge._direct import store
from torch_bridge._moe import programs, run
from torch_bridge._moe.calls import ALIGNED

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E, K, H, N = 6, 2, 128, 64


@pytest.fixture
def gpu(fake):
    """A machine on which calls on CPU tensors are launched directly."""
    fake.launches_directly = True
    run.forget_all()
    yield fake
    run.forget_all()


def tensors(T=9, dtype=BF16, *, ids=torch.int64, transposed=True, gated=True, experts=E, seed=0):
    """(x, w_gate_up, w_down, topk_weights, topk_ids), some ids outside of the experts."""
    rng = torch.Generator().manual_seed(seed)
    width = 2 * N if gated else N
    x = torch.randn(T, H, generator=rng).to(dtype)
    up = (torch.randn(experts, width, H, generator=rng) / 8).to(dtype)
    down = (torch.randn(experts, H, N, generator=rng) / 8).to(dtype)
    if not transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    shares = torch.rand(T, K, generator=rng)
    topk_ids = torch.randint(-1, experts + 1, (T, K), generator=rng).to(ids)
    shares[(topk_ids < 0) | (topk_ids >= experts)] = torch.nan  # not used
    return [lain(t) for t in (x, up, down, shares, topk_ids)]


def lain(tensor):
    """The same on a boundary of 256 bytes, as torch's allocator of a GPU gives it."""
    return store.here.machine.empty(tuple(tensor.shape), (1,), tensor.dtype).copy_(tensor)


def plain(*values):
    """As NumPy reads them; tensors may stand in pairs."""
    found = []
    for value in values:
        if isinstance(value, tuple):
            found.append(tuple(plain(*value)))
        else:
            found.append(value.double().numpy() if value.is_floating_point() else value.numpy())
    return found


def assert_near(got, want, most=5e-3):
    off = np.linalg.norm(got.double().numpy() - want) / max(np.linalg.norm(want), 1e-30)
    assert off < most, off


def test_vmap_of_any_operand(fake):
    """It was "Batching rule not implemented for moe_align_jax::fused_moe_dlpack"."""
    one, two = tensors(dtype=F32, transposed=False), tensors(dtype=F32, transposed=False, seed=1)
    both = [torch.stack(pair, -1) for pair in zip(one, two, strict=True)]
    options = {"return_tokens_per_expert": True}

    def layer(*operands):
        return torch_bridge.fused_moe(*operands, **options)

    found = torch.func.vmap(layer, in_dims=-1)(*both)
    x, up, down, shares, ids = one
    of_x = torch.func.vmap(lambda x: layer(x, (up[:, :, :N], up[:, :, N:]), down, shares, ids))
    shared = of_x(both[0].movedim(-1, 0))
    for index, given in enumerate((one, two)):
        want, counts = torch_bridge.fused_moe(*given, **options)
        assert torch.equal(found[0][index], want) and torch.equal(found[1][index], counts)
        want, _ = layer(given[0], (up[:, :, :N], up[:, :, N:]), down, shares, ids)
        assert torch.equal(shared[0][index], want)

    def product(x, ids):
        blocks = torch_bridge.align_blocks(ids, block_size=4, num_experts=E)
        return torch_bridge.grouped_matmul(x, up, blocks, block_size=4, top_k=K)

    got = torch.func.vmap(product)(torch.stack([one[0], two[0]]), torch.stack([one[4], two[4]]))
    assert torch.equal(got[0], product(one[0], one[4]))
    assert torch.equal(got[1], product(two[0], two[4]))
    assert torch.func.vmap(product)(x[None][:0], ids[None][:0]).shape == (0, *got.shape[1:])
    with pytest.raises(NotImplementedError, match="fused_moe: what it writes must be one tensor;"):
        torch.func.vmap(lambda x, out: torch_bridge.fused_moe(x, *one[1:], out=out))(
            torch.stack([x, x]), torch.zeros(2, *x.shape)
        )


LAUNCHES = ["grouped_matmul", "grouped_matmul", "sum_rows"]


def assert_launched(gpu, align=True):
    """An alignment, unless it was brought along, then two products and a sum, all on torch's stream."""
    names = [re.sub("_(m|n|swap)$", "", name) for name, _ in gpu.launched]
    assert names[-3:] == LAUNCHES and bool(names[:-3]) == align
    assert {stream for _, stream in gpu.launched} == {gpu.stream}
    assert all(name.startswith("moe_align") for name in names[:-3])


LAYERS = {
    "transposed": ({}, {"transpose_rhs": True}),
    "not transposed, int32 ids": ({"transposed": False, "ids": torch.int32}, {}),
    "float16, int16 ids": ({"dtype": F16, "ids": torch.int16}, {"transpose_rhs": True}),
    "relu2 without gate": ({"gated": False}, {"activation": "relu2", "gated": False}),
    "gpt-oss, valid tokens on the device": (
        {},
        {
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
            "interleaved": True,
            "num_valid_tokens": torch.tensor(5),
        },
    ),
    "float32 result": ({}, {"preferred_element_type": F32}),
    "weights on input": ({}, {"weights_on_input": True}),
    "five valid tokens": ({}, {"num_valid_tokens": 5}),
    "blocks of 24": ({"T": 40}, {"block_size": 24}),
    "blocks of 128 by 64": ({"T": 80}, {"block_size": 128}),
}


def of_the_oracle(options):
    """The options that say what is computed."""
    found = {name: value for name, value in options.items() if name not in NOT_THE_ORACLES}
    return found | ({"num_valid_tokens": 5} if "num_valid_tokens" in options else {})


NOT_THE_ORACLES = ("preferred_element_type", "block_size", "return_tokens_per_expert")
# A jax program takes seconds to compile: one call's goes through it, here and below.
BY_JAX = ("gpt-oss, valid tokens on the device",)


@pytest.mark.parametrize(
    "name, path", [*((name, "direct") for name in LAYERS), *((name, "dlpack") for name in BY_JAX)]
)
def test_layer_is_the_oracles(name, path, gpu):
    sizes, options = LAYERS[name]
    if sizes.get("transposed", True):
        options = {"transpose_rhs": True} | options
    given = tensors(**sizes)
    got, counts = torch_bridge.fused_moe(
        *given, **options, path=path, return_tokens_per_expert=True
    )
    want, tokens_per_expert = oracle.layer(*plain(*given), **of_the_oracle(options))
    assert got.dtype == options.get("preferred_element_type", given[0].dtype)
    assert_near(got, want)
    assert counts.dtype == torch.int32 and counts.tolist() == tokens_per_expert.tolist()
    if path == "direct":
        assert_launched(gpu)
    else:
        assert not gpu.launched


@pytest.mark.parametrize("interleaved", [False, True])
def test_biases_and_a_pair_of_weights(interleaved, gpu):
    x, up, down, shares, ids = tensors()
    biases = torch.randn(E, 2 * N), torch.randn(E, H).to(BF16)
    options = {"interleaved": interleaved, "transpose_rhs": True}
    given = up if interleaved else tuple(lain(t) for t in up.chunk(2, 1))
    got = torch_bridge.fused_moe(
        *(x, given, down, shares, ids),
        **options,
        bias_gate_up=biases[0],
        bias_down=biases[1],
        path="direct",
    )
    first, second = plain(*biases)
    more = {"bias_gate_up": first, "bias_down": second}
    want, _ = oracle.layer(*plain(x, up, down, shares, ids), **options, **more)
    assert_near(got, want)
    assert_launched(gpu)


def test_expert_map_says_which_experts_are_here(gpu):
    x, up, down, shares, _ = tensors()
    ids = lain(torch.randint(-1, 17, (9, K)))
    expert_map = torch.full((16,), -1, dtype=torch.int32)
    expert_map[[1, 3, 4, 9, 10, 15]] = torch.randperm(E, dtype=torch.int32)
    shares = lain(torch.rand(9, K))
    given = (x, up, down, shares, ids)
    options = {"transpose_rhs": True, "expert_map": lain(expert_map)}
    got = torch_bridge.fused_moe(*given, **options)
    want, _ = oracle.layer(*plain(*given), transpose_rhs=True, expert_map=expert_map.tolist())
    assert_near(got, want)


@pytest.mark.parametrize("on_input", [False, True])
def test_pairs_of_local_ids_that_no_expert_has_are_dropped(on_input, gpu):
    """An expert_map may name local ids of E or more; the weights of their pairs may be NaN."""
    x, up, down, shares, _ = tensors(24)
    ids = lain(torch.arange(24 * K).reshape(24, K) % 12)
    expert_map = torch.tensor(
        [0, 7, -1, 6, 3, 11, 1, 2**31 - 1, 5, -(2**31), 2, 4], dtype=torch.int32
    )
    here = (expert_map >= 0) & (expert_map < E)
    shares = lain(torch.rand(24, K)).masked_fill_(~here[ids], torch.nan)
    given = (x, up, down, shares, ids)
    options = {"transpose_rhs": True, "weights_on_input": on_input}
    for _ in range(2):  # the second call is known by the first
        gpu.launched.clear()
        got = torch_bridge.fused_moe(*given, **options, expert_map=lain(expert_map))
        want, counts = oracle.layer(*plain(*given), **options, expert_map=expert_map.tolist())
        assert_near(got, want)
        assert_launched(gpu)
    _, got = torch_bridge.fused_moe(
        *given, **options, expert_map=expert_map, return_tokens_per_expert=True
    )
    assert got.tolist() == counts.tolist() == [4] * E


def test_a_number_of_valid_tokens_beyond_int64_is_all_of_them(gpu):
    given, limit = tensors(), torch.tensor([2**63 + 5], dtype=torch.uint64)
    got = torch_bridge.fused_moe(*given, transpose_rhs=True, num_valid_tokens=limit)
    assert_near(got, oracle.layer(*plain(*given), transpose_rhs=True)[0])


def test_an_alignment_that_was_made_before_is_taken(gpu):
    given = tensors()
    aligned = torch_bridge.align_blocks(
        given[-1], block_size=16, num_experts=E, return_inverse=True
    )
    gpu.launched.clear()
    options = {"transpose_rhs": True, "aligned": aligned, "block_size": 16}
    got, counts = torch_bridge.fused_moe(*given, **options, return_tokens_per_expert=True)
    want, tokens_per_expert = oracle.layer(*plain(*given), transpose_rhs=True)
    assert_near(got, want)
    assert counts.tolist() == tokens_per_expert.tolist()
    assert_launched(gpu, align=False)


@pytest.mark.parametrize("on_input", [False, True])
def test_weights_of_pairs_of_other_devices_may_be_nan(on_input, gpu):
    """Where the alignment keeps them, in blocks of expert -1."""
    given, expert_map = tensors(), torch.tensor([-1, 2, 0, -1, 1, 3], dtype=torch.int32)
    aligned = torch_bridge.align_blocks(
        given[4], block_size=16, num_experts=E, expert_map=expert_map, return_inverse=True
    )
    remote = (given[4] == 0) | (given[4] == 3)
    assert remote.any()
    given[3][remote] = torch.nan
    options = {"transpose_rhs": True, "weights_on_input": on_input}
    got = torch_bridge.fused_moe(*given, **options, aligned=aligned, block_size=16)
    want, _ = oracle.layer(*plain(*given), **options, expert_map=expert_map.tolist())
    assert_near(got, want)
    assert_launched(gpu)


MATMULS = {
    "gathered": {"top_k": K},
    "rows": {},
    "gated, row weights": {"top_k": K, "activation": "silu", "row_weights": True},
    "no gate": {"activation": "relu2", "gated": False, "bias": True},
    "gate and up in turn": {"activation": "silu", "interleaved": True, "bias": True},
}


@pytest.mark.parametrize(
    "name, block_size, path",
    [
        *((name, size, "direct") for name in MATMULS for size in (8, 24, 64)),
        ("gated, row weights", 24, "dlpack"),
    ],
)
def test_matmul_is_row_by_row(name, block_size, path, gpu):
    options = dict(MATMULS[name])
    x, up, _, _, ids = tensors(T=30)
    aligned = torch_bridge.align_blocks(ids, block_size=block_size, num_experts=E)
    rows = aligned.sorted_token_ids.shape[0]
    if "top_k" not in options:
        x = lain(torch.randn(rows, H).to(BF16))
    if options.pop("bias", False):
        options["bias"] = torch.randn(E, 2 * N)
    if options.pop("row_weights", False):
        options["row_weights"] = torch.rand(rows)
    gpu.launched.clear()
    got = torch_bridge.grouped_matmul(
        x, up, aligned, block_size=block_size, transpose_rhs=True, path=path, **options
    )
    assert [name for name, _ in gpu.launched] == [] or path == "direct"
    used, width = int(aligned.num_tokens_post_padded), got.shape[1]
    want = np.zeros((used, width))
    for row in range(used):
        expert, pair = (
            int(aligned.expert_ids[row // block_size]),
            int(aligned.sorted_token_ids[row]),
        )
        if pair >= ids.numel():
            continue
        source = x[pair // K] if "top_k" in options else x[row]
        product = up[expert].double() @ source.double()
        if "bias" in options:
            product = product + options["bias"][expert].double()
        if options.get("gated", True) and "activation" in options:
            interleaved = options.get("interleaved", False)
            gate, other = (product[0::2], product[1::2]) if interleaved else product.chunk(2)
            product = torch.nn.functional.silu(gate) * other
        elif "activation" in options:
            product = product.clamp(min=0) ** 2
        if "row_weights" in options:
            product = product * options["row_weights"][row].double()
        want[row] = product.numpy()
    assert got.shape == (rows, width) and got.dtype == BF16
    assert_near(got[:used], want)


# -- calls like earlier ones -------------------------------------------------------------------------


def test_a_repeated_call_is_launched_without_checks_and_finds_its_tensors(gpu, monkeypatch):
    """Other tensors of the same shapes, other weights, and ids off the boundary."""
    torch_bridge.fused_moe(*tensors(), transpose_rhs=True)

    def refuse(*_, **__):
        raise AssertionError("the call was checked again")

    monkeypatch.setattr(moe.checks, "check_layer", refuse)
    for seed in range(1, 4):
        given = tensors(seed=seed)
        given[4] = misaligned(given[4])
        gpu.launched.clear()
        got = torch_bridge.fused_moe(*given, transpose_rhs=True)
        assert_near(got, oracle.layer(*plain(*given), transpose_rhs=True)[0])
        assert_launched(gpu)
    for other in (
        lambda: torch_bridge.fused_moe(*given, transpose_rhs=1),
        lambda: torch_bridge.fused_moe(*given, transpose_rhs=True, activation="gelu"),
        lambda: torch_bridge.fused_moe(*given[:3], given[3].double(), given[4], transpose_rhs=True),
        lambda: torch_bridge.fused_moe(given[0].float(), *given[1:], transpose_rhs=True),
        lambda: torch_bridge.fused_moe(given[0][:8], *given[1:], transpose_rhs=True),
    ):
        with pytest.raises(AssertionError, match="checked again"):
            other()


def test_a_known_call_still_refuses_a_gradient(gpu):
    """What torch.no_grad() let through is asked again outside of it."""
    x, up, down, shares, ids = tensors()
    up.requires_grad_()
    with torch.no_grad():
        for _ in range(3):
            torch_bridge.fused_moe(x, up, down, shares, ids, transpose_rhs=True)
    with pytest.raises(NotImplementedError, match="w_gate_up must need no gradient") as caught:
        torch_bridge.fused_moe(x, up, down, shares, ids, transpose_rhs=True)
    assert_format(caught.value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_known_call_still_refuses_a_tangent(gpu):
    """Which torch.no_grad() lets through, and requires_grad does not tell of."""
    given = tensors()
    for _ in range(3):
        torch_bridge.fused_moe(*given, transpose_rhs=True)
    with forward_ad.dual_level(), torch.no_grad():
        x = forward_ad.make_dual(given[0], torch.ones_like(given[0]))
        with pytest.raises(NotImplementedError, match="x must need no gradient; got a tangent"):
            torch_bridge.fused_moe(x, *given[1:], transpose_rhs=True)
        assert_near(
            torch_bridge.fused_moe(*given, transpose_rhs=True),
            oracle.layer(*plain(*given), transpose_rhs=True)[0],
        )


def test_a_repeated_product_is_launched_without_checks(gpu, monkeypatch):
    def given(seed):
        x, up, _, _, ids = tensors(seed=seed)
        aligned = torch_bridge.align_blocks(ids, block_size=8, num_experts=E)
        lying = {n: lain(t) for n, t in zip(ALIGNED[:3], aligned[:3], strict=True)}
        return x, up, aligned._replace(**lying)

    options = {"block_size": 8, "top_k": K, "transpose_rhs": True}
    for out in (
        None,
        lain(torch.empty((given(0)[2].sorted_token_ids.shape[0], 2 * N), dtype=BF16)),
    ):
        every = [given(seed) for seed in range(3)]
        want = [torch_bridge.grouped_matmul(*one, **options, path="direct") for one in every]
        torch_bridge.grouped_matmul(*every[0], **options, out=out)
        with monkeypatch.context() as patched:
            patched.setattr(moe.checks, "check_matmul", None)
            gpu.launched.clear()
            for one, expect in zip(every, want, strict=True):
                got = torch_bridge.grouped_matmul(*one, **options, out=out)
                used = int(one[2].num_tokens_post_padded)
                assert torch.equal(got[:used], expect[:used]) and (out is None or got is out)
            assert len(gpu.launched) == 3
            x, up, aligned = every[0]
            for other in (
                (misaligned(x), up, aligned),
                (x.half(), up, aligned),
                (x, up, aligned._replace(expert_ids=misaligned(aligned.expert_ids))),
                (x, up, aligned._replace(expert_ids=aligned.expert_ids.long())),
            ):
                with pytest.raises(TypeError, match="not callable"):  # it would be checked
                    torch_bridge.grouped_matmul(*other, **options, out=out)
    with pytest.raises(ValueError, match="out must not overlap"):
        torch_bridge.grouped_matmul(
            x, up, aligned, **options, out=up.view(-1, 2 * N)[: out.shape[0]]
        )


def test_calls_with_lists_are_told_from_calls_with_tensors(gpu):
    """A list of weights, or of an alignment's parts, is valid. A tuple of one array of weights is not."""
    x, up, down, shares, ids = tensors()
    halves = [lain(half) for half in up.chunk(2, 1)]
    want = oracle.layer(*plain(x, up, down, shares, ids), transpose_rhs=True)[0]
    for w in (halves, halves, up, halves, up, tuple(halves)):
        got = torch_bridge.fused_moe(x, w, down, shares, ids, transpose_rhs=True)
        assert_near(got, want)
    with pytest.raises(ValueError, match="w_gate_up must be a tensor or a pair"):
        torch_bridge.fused_moe(x, (up,), down, shares, ids, transpose_rhs=True)
    aligned = torch_bridge.align_blocks(ids, block_size=8, num_experts=E, return_inverse=True)
    parts = [lain(part) for part in aligned[:3]]
    options = {"block_size": 8, "top_k": K, "transpose_rhs": True}
    used, want = int(aligned.num_tokens_post_padded), None
    for where in (parts, parts, tuple(parts), parts):
        got = torch_bridge.grouped_matmul(x, up, where, **options)[:used]
        want = got if want is None else want
        assert torch.equal(got, want)
    named = dict(zip(ALIGNED, parts, strict=False))
    other = aligned._replace(**named, row_of_pair=aligned.row_of_pair[:-1])
    with pytest.raises(ValueError, match="x must give 17 pairs"):
        torch_bridge.grouped_matmul(x, up, other, **options)


def test_rows_of_no_pair_are_zero_where_all_rows_are_in_use():
    """Four experts of a pair each in blocks of 4 use all that there is: padding was multiplied."""
    ids = torch.arange(4)[:, None]
    aligned = torch_bridge.align_blocks(ids, block_size=4, num_experts=4)
    assert int(aligned.num_tokens_post_padded) == aligned.sorted_token_ids.numel() == 16
    x, w = torch.ones(16, 8), torch.ones(4, 8, 8)
    for given in (aligned, tuple(aligned[:3])):
        got = torch_bridge.grouped_matmul(x, w, given, block_size=4)
        assert got[:, 0].tolist() == [8, 0, 0, 0] * 4


def test_the_only_row_of_no_pair_is_zero():
    """One pair in a block of two: no other row shows that the last one is padding."""
    aligned = torch_bridge.align_blocks(
        torch.zeros(1, 1, dtype=torch.int32), block_size=2, num_experts=1
    )
    assert aligned.sorted_token_ids.tolist() == [0, 1]
    x = torch.tensor([[1.0] * 8, [float("nan")] * 8])
    for given in (aligned, tuple(aligned[:3])):
        got = torch_bridge.grouped_matmul(x, torch.ones(1, 8, 8), given, block_size=2)
        assert got[:, 0].tolist() == [8, 0]


def test_blocks_of_one_row_hold_pairs_alone():
    aligned = torch_bridge.align_blocks(torch.tensor([[1], [0], [1]]), block_size=1, num_experts=2)
    x, w = torch.arange(3.0)[:, None].expand(3, 8).contiguous(), torch.ones(2, 8, 8)
    got = torch_bridge.grouped_matmul(x, w, tuple(aligned[:3]), block_size=1)
    assert got[:, 0].tolist() == [0, 8, 16]


@pytest.mark.parametrize("top_k", [None, 1])
def test_padding_ahead_of_a_pair_is_refused(top_k):
    x, w = torch.ones(2 if top_k else 4, 8), torch.ones(1, 8, 8)
    parts = [
        torch.tensor(part, dtype=torch.int32) for part in ([0, 2, 1, 2], [0], [4], [2], [0, 2])
    ]
    rule = "grouped_matmul: aligned.sorted_token_ids must have the pairs of each block ahead"
    with pytest.raises(ValueError, match=rule):
        torch_bridge.grouped_matmul(x, w, AlignedBlocks(*parts), block_size=4, top_k=top_k)


def test_descriptors_of_a_repeated_call_are_encoded_once(gpu):
    given = tensors()
    out = lain(torch.empty(given[0].shape, dtype=BF16))
    memory = gpu.empty((1 << 20,), (1,), torch.int32)
    held = gpu.empty
    gpu.empty = lambda size, stride, dtype: (
        memory if dtype is torch.int32 else held(size, stride, dtype)
    )
    for _ in range(3):
        torch_bridge.fused_moe(*given, transpose_rhs=True, out=out)
        first = len(gpu.described)
    torch_bridge.fused_moe(*given, transpose_rhs=True, out=out)
    assert len(gpu.described) == first == 5  # w and hidden; hidden, w_down and y


def test_out_is_written_where_it_lies_and_nowhere_else(gpu):
    given = tensors()
    want = torch_bridge.fused_moe(*given, transpose_rhs=True)
    for _ in range(3):
        held = lain(torch.full((11, H), 7.0, dtype=BF16))
        out = held[1:10]
        assert torch_bridge.fused_moe(*given, transpose_rhs=True, out=out) is out
        assert torch.equal(out, want) and (held[[0, 10]] == 7).all()
    off = misaligned(out)
    assert torch_bridge.fused_moe(*given, transpose_rhs=True, out=off) is off
    assert torch.equal(off, want)
    for taken in (given[0], given[1].view(-1)[: 9 * H].view(9, H)):
        with pytest.raises(ValueError, match="out must not overlap") as caught:
            torch_bridge.fused_moe(*given, transpose_rhs=True, out=taken)
        assert_format(caught.value)


@pytest.mark.parametrize("launched", [False, True])
def test_out_and_counts_of_a_call_through_torchs_dispatcher(launched, gpu, fresh_dynamo):
    """Eagerly on a CPU, and in a compiled graph."""
    gpu.launches_directly = launched
    given, options = tensors(), {"transpose_rhs": True, "return_tokens_per_expert": True}
    want, counts = oracle.layer(*plain(*given), transpose_rhs=True)

    def layer(out, *arguments):
        y, found = torch_bridge.fused_moe(*arguments, **options, out=out)
        return y, found + 1

    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if launched else layer
    out = torch.empty(given[0].shape, dtype=BF16)
    got, found = call(out, *given)
    assert_near(out, want)
    assert torch.equal(got, out) and (found - 1).tolist() == counts.tolist()
    if not launched:
        x = given[0].clone()
        with pytest.raises(ValueError, match="out must not overlap x"):
            torch_bridge.fused_moe(x, *given[1:], **options, out=x)
        assert torch.equal(x, given[0])


def test_what_lies_otherwise_is_copied_and_explain_says_so(gpu):
    given = tensors()
    want = torch_bridge.fused_moe(*given, transpose_rhs=True)
    x = misaligned(given[0])
    strided = torch.stack([given[2], given[2]], 1)[:, 0]
    other = [x, given[1], strided, torch._neg_view(-given[3]), given[4].t().contiguous().t()]
    copies = torch_bridge.explain_fused_moe(*other, transpose_rhs=True).copies
    assert set(copies) == {"x", "w_down", "topk_weights", "topk_ids"}
    assert "256-byte boundary" in copies["x"] and "negation" in copies["topk_weights"]
    for _ in range(2):
        assert torch.equal(torch_bridge.fused_moe(*other, transpose_rhs=True), want)


# -- programs -----------------------------------------------------------------------------------------


def test_few_programs_serve_all_numbers_of_tokens(gpu):
    """With the tiles that the layer has for each number under jit, but that no cluster shares them."""
    from moe_align_jax._grouped_matmul.choose_tiles import config_for
    from moe_align_jax._grouped_matmul.config import unshared

    E_, K_ = 128, 8
    up = torch.empty((E_, 2 * 768, 2048), dtype=BF16, device="meta")
    found, tiles = set(), {}
    for tokens in [*range(1, 200, 3), *range(200, 3000, 97), 8192, 40_000]:
        x = torch.empty((tokens, 2048), dtype=BF16, device="meta")
        ids = torch.empty((tokens, K_), dtype=torch.int32, device="meta")
        operands = {"x": x, "w": up, "topk_ids": ids}
        call = moe.checked_layer(
            *(x, up, torch.empty((E_, 2048, 768), dtype=BF16, device="meta")),
            *(torch.empty((tokens, K_), device="meta"), ids),
            transpose_rhs=True,
        )[0]
        one = programs.layer_programs(call, operands, "NVIDIA H200", "")
        assert one.refusal is None
        found |= {one.first, one.second, one.total}
        exact = one.first.problem._replace(num_tokens=tokens, num_rows=one.num_rows)
        assert one.first.tiles == unshared(config_for(exact, "NVIDIA H200")), tokens
        assert one.block_size == one.first.tiles.bm
        tiles.setdefault(one.block_size, []).append(tokens)
        assert one.num_rows % one.block_size == 0
        # The most rows that a launch has are not those in use.
        assert not (one.first.problem.all_rows or one.second.problem.all_rows)
        assert one.num_rows <= one.first.problem.num_rows
    assert sorted(tiles) == [rows for _, rows in block_sizes(E_)]
    assert len(found) <= 2 * 6 + 4


@pytest.mark.parametrize(
    "options",
    [
        {"transpose_rhs": True},
        {"num_global_experts": 40, "pair": True, "num_valid_tokens": True, "bias_down": True},
        {"block_size": 16, "return_tokens_per_expert": True, "gated": False, "bias_gate_up": True},
    ],
    ids=["plain", "map", "block size"],
)
def test_warmup_loads_what_calls_of_every_size_need(options, gpu, monkeypatch):
    loaded = []
    monkeypatch.setattr(store.here, "prepare", lambda index, wanted, again: loaded.extend(wanted))
    sizes = {"num_experts": 20, "topk": 3, "hidden": 256, "ffn": 128, "max_tokens": 700}
    assert torch_bridge.warmup_fused_moe(**sizes, device="cpu", **options) == len(loaded)
    transposed, gated = "transpose_rhs" in options, options.get("gated", True)
    up = torch.empty((20, 256, 256) if gated else (20, 256, 128), dtype=BF16, device="meta")
    if "pair" in options:
        up = (up[..., :128],) * 2
    down = torch.empty((20, 256, 128) if transposed else (20, 128, 256), dtype=BF16, device="meta")
    given = {name: options[name] for name in options if name in ("transpose_rhs", "gated")}
    for tokens in [*range(1, 60), *range(61, 701, 7), 700]:
        for dtype in (torch.int32, torch.int64):
            meta = {"device": "meta"}
            call, operands = moe.checked_layer(
                *(torch.empty((tokens, 256), dtype=BF16, **meta), up, down),
                torch.empty((tokens, 3), **meta),
                torch.empty((tokens, 3), dtype=dtype, **meta),
                **given,
                block_size=options.get("block_size"),
                return_tokens_per_expert=options.get("return_tokens_per_expert", False),
                num_valid_tokens=5 if "num_valid_tokens" in options else None,
                expert_map=torch.empty(40, dtype=dtype, **meta) if "pair" in options else None,
                bias_down=torch.empty((20, 256), **meta) if "bias_down" in options else None,
                bias_gate_up=torch.empty((20, 128), **meta) if not gated else None,
            )
            one = programs.layer_programs(call, operands, run.gpu_kind(0), "")
            assert set(one.each) <= set(loaded), tokens


def test_a_warmup_that_is_not_possible_says_why(gpu):
    sizes = {"num_experts": 20, "topk": 3, "hidden": 250, "ffn": 128, "max_tokens": 7}
    with pytest.raises(NotImplementedError, match="K must be a positive multiple of 8") as caught:
        torch_bridge.warmup_fused_moe(**sizes, device="cpu")
    assert_format(caught.value)
    with pytest.raises(ValueError, match="topk must") as caught:
        torch_bridge.warmup_fused_moe(**sizes | {"topk": 0})
    assert_format(caught.value)


def test_a_capture_needs_the_programs_loaded(gpu):
    given = tensors()
    gpu.capturing = True
    with pytest.raises(torch_bridge.Miss, match="fused_moe: .* Call it once") as caught:
        torch_bridge.fused_moe(*given, transpose_rhs=True)
    assert_format(caught.value)
    gpu.capturing = False
    want = torch_bridge.fused_moe(*given, transpose_rhs=True)
    gpu.capturing = True
    assert torch.equal(torch_bridge.fused_moe(*given, transpose_rhs=True), want)
    total = programs.sum_bucket(17, K, H, "bfloat16", "bfloat16")
    assert "got none for sums of up to 128 tokens." in store._miss_text("fused_moe", total, None)


def test_a_program_that_cannot_be_had_costs_one_warning_and_jax_computes(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "compile", lambda index, problems: ["no compiler"] * len(problems))
    given, options = tensors(), {"transpose_rhs": True} | LAYERS[BY_JAX[0]][1]
    options["return_tokens_per_expert"] = True
    want, _ = oracle.layer(*plain(*given), **of_the_oracle(options))
    with pytest.warns(UserWarning, match="DLPack is used: no compiler"):
        assert_near(torch_bridge.fused_moe(*given, **options)[0], want)
    assert_near(torch_bridge.fused_moe(*given, **options)[0], want)
    plan = torch_bridge.explain_fused_moe(*given, **options)
    assert plan.path == "dlpack" and plan.reasons["direct"] == "no compiler"
    with pytest.raises(NotImplementedError, match="No compiler. Pass path='auto'"):
        torch_bridge.fused_moe(*given, **options, path="direct")


# -- arguments ----------------------------------------------------------------------------------------

X, UP, DOWN = torch.zeros(3, 8), torch.zeros(2, 8, 16), torch.zeros(2, 8, 8)
SHARES, IDS = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32)
WRONG = {
    "x": (TypeError, (X.double(), UP, DOWN, SHARES, IDS), {}),
    "x must have shape": (ValueError, (X[0], UP, DOWN, SHARES, IDS), {}),
    "w_gate_up must have the dtype": (TypeError, (X, UP.half(), DOWN, SHARES, IDS), {}),
    "w_gate_up must have shape": (ValueError, (X, UP[:, :7], DOWN, SHARES, IDS), {}),
    "w_down must have shape": (ValueError, (X, UP, DOWN[:, :7], SHARES, IDS), {}),
    "w_gate_up must be a tensor or a pair": (ValueError, (X, (UP,), DOWN, SHARES, IDS), {}),
    "topk_ids must be an integer": (TypeError, (X, UP, DOWN, SHARES, SHARES), {}),
    "topk_ids must have shape": (ValueError, (X, UP, DOWN, SHARES, IDS[:2]), {}),
    "topk_weights must have the shape": (ValueError, (X, UP, DOWN, SHARES[:, :1], IDS), {}),
    "activation": (ValueError, (X, UP, DOWN, SHARES, IDS), {"activation": "tanh"}),
    "swiglu_limit": (ValueError, (X, UP, DOWN, SHARES, IDS), {"swiglu_limit": -1.0}),
    "weights_on_input": (TypeError, (X, UP, DOWN, SHARES, IDS), {"weights_on_input": 1}),
    "bias_down": (ValueError, (X, UP, DOWN, SHARES, IDS), {"bias_down": torch.zeros(8)}),
    "expert_map": (ValueError, (X, UP, DOWN, SHARES, IDS), {"expert_map": IDS[0, :1]}),
    "num_valid_tokens": (TypeError, (X, UP, DOWN, SHARES, IDS), {"num_valid_tokens": 1.0}),
    "block_size": (ValueError, (X, UP, DOWN, SHARES, IDS), {"block_size": 0}),
    "preferred": (TypeError, (X, UP, DOWN, SHARES, IDS), {"preferred_element_type": torch.int8}),
    "out must be contiguous": (ValueError, (X, UP, DOWN, SHARES, IDS), {"out": torch.zeros(2, 8)}),
    "out must be torch.float32": (TypeError, (X, UP, DOWN, SHARES, IDS), {"out": X.half()}),
    "preferred_element_type must": (
        TypeError,
        (X, UP, DOWN, SHARES, IDS),
        {"preferred_element_type": [F32]},
    ),
    "aligned.tokens_per_expert must": (
        TypeError,
        (X, UP, DOWN, SHARES, IDS),
        {
            "aligned": AlignedBlocks(IDS[:, 0], IDS[:, 0], IDS[0, :1], SHARES[0], IDS.view(-1)),
            "block_size": 1,
            "return_tokens_per_expert": True,
        },
    ),
    "path": (ValueError, (X, UP, DOWN, SHARES, IDS), {"path": "fast"}),
    "need no gradient": (
        NotImplementedError,
        (X.clone().requires_grad_(), UP, DOWN, SHARES, IDS),
        {},
    ),
    "aligned must be an": (TypeError, (X, UP, DOWN, SHARES, IDS), {"aligned": 3, "block_size": 4}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    kind, arguments, options = WRONG[name]
    with pytest.raises(kind, match=name) as caught:
        torch_bridge.fused_moe(*arguments, **options)
    assert_format(caught.value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("transform", [torch.func.jvp, torch.func.jacfwd])
@pytest.mark.parametrize("name", ["x", "w", "topk_weights", "bias"])
def test_forward_mode_is_refused(transform, name):
    """Its tangents would be zeros."""
    aligned = torch_bridge.align_blocks(IDS, block_size=4, num_experts=2)

    def run(value):
        if name == "bias":
            options = {"block_size": 4, "top_k": IDS.shape[1]}
            return torch_bridge.grouped_matmul(X, UP, aligned, **options, bias=value)
        x, w, shares = (given | {name: value}).values()
        return torch_bridge.fused_moe(x, w, DOWN, shares, IDS)

    given = {"x": X, "w": UP, "topk_weights": SHARES}
    primal = given.get(name, UP[:, 0])
    wanted = pytest.raises(NotImplementedError, match="must need no gradient; got a tangent")
    with wanted as caught:
        if transform is torch.func.jvp:
            torch.func.jvp(run, (primal,), (torch.ones_like(primal),))
        else:
            torch.func.jacfwd(run)(primal)
    assert_format(caught.value)


def test_wrong_row_weights_are_told_what_they_belong_to():
    aligned = torch_bridge.align_blocks(IDS, block_size=4, num_experts=2)
    options = {"block_size": 4, "top_k": IDS.shape[1], "row_weights": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"row_weights must have .* One for each row") as caught:
        torch_bridge.grouped_matmul(X, UP, aligned, **options)
    assert_format(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_named():
    with pytest.raises(TypeError, match="x must be a dense tensor; got a nested") as caught:
        torch_bridge.fused_moe(torch.nested.nested_tensor([X]), UP, DOWN, SHARES, IDS)
    assert_format(caught.value)


def test_tokens_that_were_not_aligned_are_refused(gpu):
    x, up, _, _, ids = tensors()
    for inverse in (True, False):
        aligned = torch_bridge.align_blocks(
            ids, block_size=1, num_experts=E, return_inverse=inverse
        )
        for wrong, top_k in ((x, 3), (torch.cat([x, x]), K)):
            with pytest.raises(ValueError, match=r"x must give .* pairs") as caught:
                torch_bridge.grouped_matmul(
                    wrong, up, aligned, block_size=1, top_k=top_k, transpose_rhs=True
                )
            assert_format(caught.value)
    with pytest.raises(ValueError, match="x must have a row for each") as caught:
        torch_bridge.grouped_matmul(x[:2], up, aligned, block_size=1, transpose_rhs=True)
    assert_format(caught.value)


def test_nothing_to_compute_is_zeros(gpu):
    x, up, down, shares, ids = tensors()
    for given in ((x[:0], up, down, shares[:0], ids[:0]), (x, up, down, shares[:, :0], ids[:, :0])):
        got, counts = torch_bridge.fused_moe(
            *given, transpose_rhs=True, return_tokens_per_expert=True
        )
        assert got.shape == given[0].shape and not got.float().abs().sum()
        assert counts.tolist() == [0] * E
    assert not gpu.launched


# -- torch's compiler ----------------------------------------------------------------------------------


def test_whole_graphs_are_compiled(gpu, fresh_dynamo):
    given = tensors()
    bias = torch.randn(E, 2 * N)
    expert_map = torch.tensor([0, 1, 2, 3, 4, 5, -1, -1], dtype=torch.int32)
    aligned = torch_bridge.align_blocks(
        given[-1], block_size=8, num_experts=8, expert_map=expert_map, return_inverse=True
    )

    def both(x, up, down, shares, ids):
        y, counts = torch_bridge.fused_moe(
            *(x, up, down, shares, ids),
            transpose_rhs=True,
            bias_gate_up=bias,
            swiglu_limit=2.0,
            return_tokens_per_expert=True,
        )
        z = torch_bridge.grouped_matmul(
            x, up, aligned, block_size=8, top_k=K, transpose_rhs=True, activation="silu"
        )
        options = {"transpose_rhs": True, "aligned": aligned, "block_size": 8}
        _, of_aligned = torch_bridge.fused_moe(
            *(x, up, down, shares, ids), **options, return_tokens_per_expert=True
        )
        return y + 1, counts, z, of_aligned.shape[0] + of_aligned

    want = both(*given)
    gpu.launched.clear()
    got = torch.compile(both, fullgraph=True, backend="aot_eager")(*given)
    used = int(aligned.num_tokens_post_padded)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(got[2][:used], want[2][:used]) and torch.equal(got[3], want[3])
    assert gpu.launched


def test_eager_calls_do_not_make_torch_compile_again(gpu, fresh_dynamo):
    """What eager calls are known by is nothing that a compiled graph depends on."""
    from torch._dynamo.testing import CompileCounter

    counter, given = CompileCounter(), tensors()
    options = {"transpose_rhs": True}
    compiled = torch.compile(
        lambda *arguments: torch_bridge.fused_moe(*arguments, **options) + 1,
        fullgraph=True,
        backend=counter,
    )
    torch_bridge.fused_moe(*given, **options)
    compiled(*given)
    torch_bridge.fused_moe(*tensors(5), **options)
    compiled(*given)
    assert counter.frame_count == 1
