"""explain: the plan that it returns is the one that drives the call."""

import jax
import pytest
import torch

import torch_bridge
from tests import oracle
from tests.bridge.helpers import assert_triple, ids_of, misaligned
from torch_bridge import _plan, dlpack
from torch_bridge._dlpack_path import run as dlpack_call


class Spy:
    """Records, beneath the plan, every plan made and executed, copy, import and hand-over."""

    def __init__(self, monkeypatch):
        self.plans, self.executed, self.copied, self.imported = [], [], [], []
        self.implementations, self.out_copies = [], 0
        resolve, execute, import_ = _plan.resolve, dlpack_call.run_in_jax, jax.dlpack.from_dlpack
        compact_copy, copy_all = dlpack.compact_copy, dlpack_call._copy_all
        from torch_bridge._dlpack_path import jax_calls

        run = jax_calls.run

        def spy_plan(*arguments, **options):
            decided = resolve(*arguments, **options)
            self.plans.append(decided.plan)
            return decided

        def spy_execute(decided, *arguments):
            self.executed.append(decided.plan)
            return execute(decided, *arguments)

        def spy_copy(tensor):
            self.copied.append(tensor.data_ptr())
            return compact_copy(tensor)

        def spy_import(tensor, **options):
            array = import_(tensor, **options)
            self.imported.append((tensor.data_ptr(), array.unsafe_buffer_pointer()))
            return array

        def spy_run(problem, implementation, *arguments):
            self.implementations.append(implementation)
            return run(problem, implementation, *arguments)

        def spy_copy_all(targets, sources):
            self.out_copies += 1
            copy_all(targets, sources)

        monkeypatch.setattr(_plan, "resolve", spy_plan)
        monkeypatch.setattr(dlpack_call, "run_in_jax", spy_execute)
        monkeypatch.setattr(dlpack, "compact_copy", spy_copy)
        monkeypatch.setattr(jax.dlpack, "from_dlpack", spy_import)
        monkeypatch.setattr(jax_calls, "run", spy_run)
        monkeypatch.setattr(dlpack_call, "_copy_all", spy_copy_all)


def _cases():
    array, _ = ids_of(torch.int32, "uniform")
    base = torch.from_numpy(array)
    local = torch.arange(16, dtype=torch.int32)
    yield "int32", base.clone(), {}
    yield "int64", base.long(), {}
    yield "flat int64", base.long().flatten(), {}
    yield "misaligned", misaligned(base), {}
    yield "strided", torch.stack([base, base], 1).flatten(0, 1)[::2], {}
    yield "negated", torch._neg_view(-base), {}
    yield "map", base.clone(), {"expert_map": local}
    yield "strided map", base.clone(), {"expert_map": torch.stack([local, local], 1)[:, 0]}
    yield "count", base.clone(), {"num_valid_pairs": torch.tensor(10)}
    yield "misaligned count", base.clone(), {"num_valid_pairs": misaligned(torch.tensor([10]))}


EXPECTED_COPIES = {
    "misaligned": {"topk_ids"},
    "strided": {"topk_ids"},
    "negated": {"topk_ids"},
    "strided map": {"expert_map"},
    "misaligned count": {"num_valid_pairs"},
}


@pytest.mark.parametrize("has_out", [False, True])
@pytest.mark.parametrize("name", [name for name, _, _ in _cases()])
def test_plan_is_what_happens(name, has_out, monkeypatch):
    [(ids, options)] = [(ids, options) for n, ids, options in _cases() if n == name]
    tensors = {"topk_ids": ids} | {k: v for k, v in options.items()}
    plain = {k: v.tolist() for k, v in options.items()}
    if "num_valid_pairs" in plain:
        plain["num_valid_pairs"] = 10
    want = oracle.align(ids.flatten().tolist(), block_size=8, num_experts=16, **plain)
    if has_out:
        options["out"] = tuple(torch.empty(len(x), dtype=torch.int32) for x in want[:3])

    spy = Spy(monkeypatch)
    explained = torch_bridge.explain(ids, 16, 8, **options)
    assert not spy.executed and not spy.copied and not spy.imported  # nothing has run
    assert_triple(torch_bridge.moe_align_block_size(ids, 16, 8, **options), want)

    assert spy.plans == [explained, explained]
    assert spy.executed == [explained] and spy.executed[0] is spy.plans[1]
    assert explained.path == "dlpack" and spy.implementations == [explained.implementation]
    inputs = set(explained.copies) - {"outputs"}
    assert inputs == EXPECTED_COPIES.get(name, set())
    assert set(spy.copied) == {tensors[x].data_ptr() for x in inputs}
    assert len(spy.copied) == len(inputs) and len(spy.imported) == len(tensors)
    assert all(given == shared for given, shared in spy.imported)  # jax itself copied nothing
    shared = {given for given, _ in spy.imported}
    assert {tensors[x].data_ptr() for x in set(tensors) - inputs} <= shared
    assert spy.out_copies == ("outputs" in explained.copies) == has_out
    assert all(reason for reason in explained.copies.values())


def test_plan_drives_the_call(monkeypatch):
    """A plan that asks for more copies gets them: it is obeyed, not only reported."""
    _, ids = ids_of(torch.int32, "uniform")
    want = oracle.align(ids.flatten().tolist(), block_size=8, num_experts=16)
    resolve = _plan.resolve

    def other_plan(*arguments, **options):
        decided = resolve(*arguments, **options)
        copies = {"topk_ids": "a test", "outputs": "a test"}
        return decided._replace(
            plan=decided.plan._replace(copies=copies, implementation="emulator")
        )

    spy = Spy(monkeypatch)
    monkeypatch.setattr(_plan, "resolve", other_plan)
    assert_triple(torch_bridge.moe_align_block_size(ids, 16, 8), want)
    assert spy.copied == [ids.data_ptr()] and spy.out_copies == 1
    assert spy.implementations == ["emulator"]


@pytest.mark.parametrize("path", ["auto", "dlpack"])
def test_plan_names_its_reasons(path):
    explained = torch_bridge.explain(torch.zeros(4, 2, dtype=torch.int32), 8, 16, path=path)
    assert isinstance(explained, torch_bridge.Plan)
    assert explained.path == "dlpack" and explained.implementation == "xla"
    assert explained.copies == {}
    assert set(explained.reasons) == {"direct", "mosaic_gpu", "emulator"}


def test_plan_of_no_pairs_runs_no_jax(monkeypatch):
    ids = torch.zeros(0, 2, dtype=torch.int32)
    spy = Spy(monkeypatch)
    assert torch_bridge.explain(ids, 8, 16).implementation == "none"
    torch_bridge.moe_align_block_size(ids, 8, 16)
    assert not spy.imported and not spy.implementations


def test_plan_refuses_a_tensor_without_data():
    with pytest.raises(TypeError, match="must have data"):
        torch_bridge.explain(torch.zeros(4, 2, dtype=torch.int32, device="meta"), 8, 16)
