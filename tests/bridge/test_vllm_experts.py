"""torch_bridge.vllm.fused_experts, and what patch() puts in the place of TritonExperts.apply."""

import enum
import functools
import sys
import types
import warnings
from types import SimpleNamespace

import pytest
import torch

from tests.bridge import stub_vllm
from tests.bridge.helpers import assert_format
from tests.bridge.test_moe import assert_launched, assert_near, gpu, lain, plain, tensors
from tests.moe_layer import oracle
from torch_bridge import _vllm_experts, vllm

EXPERTS = "vllm.model_executor.layers.fused_moe.experts.triton_moe"
gpu = gpu  # the fixture


class MoEActivation(enum.Enum):
    """Some of vLLM's."""

    SILU = "silu"
    SWIGLUOAI = "swigluoai"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    RELU2_NO_MUL = "relu2_no_mul"
    SITU = "situ"


PLAIN = SimpleNamespace(quant_dtype=None, weight_quant_dtype=None, w1_scale=None)
PLAIN.w1_bias = PLAIN.w2_bias = None


@pytest.fixture(autouse=True)
def forget():
    _vllm_experts.forget_warnings()
    yield
    _vllm_experts.forget_warnings()


@pytest.mark.parametrize(
    "activation, options",
    [
        (MoEActivation.SILU, {"activation": "silu"}),
        ("silu", {"activation": "silu"}),
        (
            MoEActivation.SWIGLUOAI,
            {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "interleaved": True},
        ),
        (MoEActivation.RELU2_NO_MUL, {"activation": "relu2", "gated": False}),
    ],
)
def test_fused_experts_is_the_oracles(activation, options, gpu):
    given = tensors(gated=options.get("gated", True))
    biases = {"w1_bias": torch.randn(given[1].shape[:2]), "w2_bias": torch.randn(6, 128)}
    config = SimpleNamespace(**vars(PLAIN) | biases)
    got = vllm.fused_experts(*given, activation=activation, quant_config=config)
    named = {"bias_gate_up": plain(biases["w1_bias"])[0], "bias_down": plain(biases["w2_bias"])[0]}
    want, _ = oracle.layer(*plain(*given), transpose_rhs=True, **options, **named)
    assert_near(got, want)
    assert_launched(gpu)


def test_a_tensor_that_is_missing_is_named(gpu):
    given = tensors()
    for argument, text in ((0, "x must be"), (2, "w_down must be")):
        with pytest.raises(TypeError, match=text) as caught:
            vllm.fused_experts(*given[:argument], None, *given[argument + 1 :])
        assert_format(caught.value)


def test_fused_experts_with_a_map_and_weights_on_the_input(gpu):
    given = tensors()
    given[3] = lain(torch.rand(9, 2))
    expert_map = lain(torch.tensor([-1, 2, 0, 1, -1, 3, 5, 4], dtype=torch.int32))
    got = vllm.fused_experts(*given, "silu", True, 8, expert_map)
    want, _ = oracle.layer(
        *plain(*given), transpose_rhs=True, weights_on_input=True, expert_map=expert_map.tolist()
    )
    assert_near(got, want)


REFUSED = {
    "quant_dtype is int8": (MoEActivation.SILU, {"quant_dtype": "int8"}),
    "weight_quant_dtype is int4": ("silu", {"weight_quant_dtype": "int4"}),
    "no activation situ": (MoEActivation.SITU, {}),
    # vLLM gives (x W + bias) * weight; ours would give (weight * x) W + bias.
    "weights multiply w1_bias": ("silu", {"w1_bias": torch.ones(6, 256)}, True),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_ours_cannot_do_is_vllms(reason, gpu, monkeypatch):
    activation, held, *on_input = REFUSED[reason]
    config = SimpleNamespace(**vars(PLAIN) | held)
    options = {"activation": activation, "quant_config": config}
    options["apply_router_weight_on_input"] = bool(on_input)
    given = tensors()
    wanted = f"the layer must be of a kind that our kernels compute; got another: .*{reason}"
    with pytest.raises(NotImplementedError, match=wanted) as caught:
        vllm.fused_experts(*given, **options)
    assert_format(caught.value)
    calls = []
    theirs = types.ModuleType("vllm.model_executor.layers.fused_moe.fused_moe")
    theirs.fused_experts = lambda *arguments: calls.append(arguments) or "theirs"
    stub_vllm.make(monkeypatch)
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    with pytest.warns(UserWarning, match=f"vLLM's own expert layer runs .*{reason}"):
        assert vllm.fused_experts(*given, **options) == "theirs"
    with warnings.catch_warnings():  # each reason once
        warnings.simplefilter("error")
        vllm.fused_experts(*given, **options)
    assert calls[0] == (*given, activation, bool(on_input), -1, None, config) and len(calls) == 2
    assert not gpu.launched


# -- the method ------------------------------------------------------------------------------------------


@pytest.fixture
def experts(monkeypatch):
    """vLLM's class with an `apply` that notes its calls, patched."""
    stub_vllm.make(monkeypatch)
    kind, calls = sys.modules[EXPERTS].TritonExperts, []
    original = kind.apply

    @functools.wraps(original)  # with its signature, which the patch asks for
    def apply(self, *arguments):
        output, hidden_states, *_, apply_router_weight_on_input = arguments
        calls.append((self, output, hidden_states, apply_router_weight_on_input))

    kind.apply, kind.calls = apply, calls
    kind._lora_context, kind.quant_config = None, PLAIN
    kind.activation_config = SimpleNamespace(clamp_limit=None, alpha=1.0, beta=0.0)
    undo = vllm.patch_for_good()
    assert kind.apply is not apply
    yield kind
    undo()
    assert kind.apply is apply and original is not apply


def arguments_of(
    given, output, activation=MoEActivation.SILU, *, expert_map=None, scale=None, weighted=False
):
    """As vLLM's modular kernel passes them."""
    x, up, down, shares, ids = given
    memory = torch.empty(4)
    experts = -1 if expert_map is None else expert_map.numel()
    return (
        *(output, x, up, down, shares, ids, activation, experts, expert_map, scale, None),
        *(memory, memory, None, weighted),
    )


def test_the_method_writes_the_layers_output(experts, gpu):
    one, given = experts(), tensors()
    output = lain(torch.empty(given[0].shape, dtype=given[0].dtype))
    for seed in range(3):
        given = tensors(seed=seed)
        gpu.launched.clear()
        assert one.apply(*arguments_of(given, output)) is None
        assert_near(output, oracle.layer(*plain(*given), transpose_rhs=True)[0])
        assert_launched(gpu)
    assert not experts.calls


def test_the_method_does_not_weight_an_input_that_vllm_has_weighted(experts, gpu):
    """`apply_router_weight_on_input` tells `apply` that its caller has multiplied hidden_states."""
    one, given = experts(), tensors()
    output = lain(torch.empty(given[0].shape, dtype=given[0].dtype))
    one.apply(*arguments_of(given, output, weighted=True))
    given[3] = torch.ones_like(given[3])
    assert_near(output, oracle.layer(*plain(*given), transpose_rhs=True)[0])
    assert_launched(gpu)


def test_the_method_knows_the_clamp_of_the_configuration(experts, gpu):
    one, given = experts(), tensors()
    one.activation_config = SimpleNamespace(clamp_limit=0.5, alpha=1.3, beta=1.0)
    output = lain(torch.empty(given[0].shape, dtype=given[0].dtype))
    one.apply(*arguments_of(given, output))
    want, _ = oracle.layer(*plain(*given), transpose_rhs=True, swiglu_limit=0.5)
    assert_near(output, want)
    one.apply(*arguments_of(given, output, MoEActivation.SWIGLUOAI_UNINTERLEAVE))
    options = {"swiglu_limit": 0.5, "swiglu_alpha": 1.3}
    assert_near(output, oracle.layer(*plain(*given), transpose_rhs=True, **options)[0])
    assert not experts.calls


def broken(one, given):
    """(Its reason, a change that ours cannot follow)."""
    yield "LoRA adapter", lambda: setattr(one, "_lora_context", object())
    yield "have scales", lambda: None
    yield "hook behind", lambda: setattr(one, "_uses_post_gemm2_hook", lambda tokens: True)
    yield "multiply bfloat16", lambda: given.__setitem__(0, given[0].float())
    yield "not contiguous", lambda: given.__setitem__(1, given[1].transpose(0, 1))
    yield "host's memory", lambda: setattr(given[2], "_vllm_is_uva_offloaded", True)
    yield "does more than TritonExperts", lambda: None


@pytest.mark.parametrize("case", range(7))
def test_the_method_leaves_the_rest_to_vllm(case, experts, gpu):
    class Other(experts):
        pass

    given = tensors()
    one = Other() if case == 6 else experts()
    reason, change = list(broken(one, given))[case]
    change()
    output = torch.empty(given[0].shape, dtype=given[0].dtype)
    scale = torch.ones(1) if reason == "have scales" else None
    with pytest.warns(UserWarning, match=reason):
        one.apply(*arguments_of(given, output, scale=scale))
    assert experts.calls == [(one, output, given[0], False)] and not gpu.launched


def test_the_method_leaves_a_machine_without_a_hopper_to_vllm(experts, gpu, monkeypatch):
    """Over DLPack the layer could not be captured."""
    monkeypatch.setattr(gpu, "unavailable", lambda device: "the kernels need Hopper")
    one, given = experts(), tensors()
    output = torch.empty(given[0].shape, dtype=given[0].dtype)
    with pytest.warns(UserWarning, match="the kernels need Hopper"):
        one.apply(*arguments_of(given, output))
    assert len(experts.calls) == 1


def test_the_method_leaves_a_layer_whose_program_fails_to_vllm(experts, gpu, monkeypatch):
    """At its first call too, which tries to compile it, and though another of its shapes has run."""
    one, given = experts(), tensors()
    output = lain(torch.empty(given[0].shape, dtype=given[0].dtype))
    one.apply(*arguments_of(given, output))
    monkeypatch.setattr(gpu, "compile", lambda index, problems: ["no compiler"] * len(problems))
    given[:4] = [lain(tensor.half()) for tensor in given[:4]]
    gpu.launched.clear()
    with pytest.warns(UserWarning, match="vLLM's own expert layer runs .*: no compiler") as caught:
        for _ in range(2):
            one.apply(*arguments_of(given, output.half()))
    assert len(experts.calls) == 2 and len(caught) == 1 and not gpu.launched


def test_the_method_reads_a_configuration_that_was_replaced(experts, gpu):
    one, given = experts(), tensors()
    output = lain(torch.empty(given[0].shape, dtype=given[0].dtype))
    one.apply(*arguments_of(given, output))
    bias = torch.randn(given[1].shape[:2])
    one.quant_config = SimpleNamespace(**vars(PLAIN) | {"w1_bias": bias})
    one.apply(*arguments_of(given, output))
    want, _ = oracle.layer(*plain(*given), transpose_rhs=True, bias_gate_up=plain(bias)[0])
    assert_near(output, want)


def test_another_apply_is_refused_and_nothing_is_replaced(monkeypatch):
    ops = stub_vllm.make(monkeypatch)
    kind, before = sys.modules[EXPERTS].TritonExperts, dict(vars(ops))
    kind.apply = lambda self, output: None
    with pytest.raises(NotImplementedError, match=r"TritonExperts\.apply must take") as caught:
        vllm.patch_for_good()
    assert_format(caught.value)
    assert vars(ops) == before
    monkeypatch.delitem(sys.modules, EXPERTS)
    with pytest.raises(NotImplementedError, match="triton_moe must hold TritonExperts") as caught:
        vllm.patch_for_good()
    assert_format(caught.value)
    assert vars(ops) == before


def test_the_stub_has_vllms_parameters(monkeypatch):
    stub_vllm.make(monkeypatch)
    function = sys.modules[EXPERTS].TritonExperts.apply
    assert function.__code__.co_varnames == _vllm_experts.APPLY_PARAMETERS
