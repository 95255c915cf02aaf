"""torch_bridge.vllm.patch: vLLM's real Python file calls our op; versions, nesting, undoing."""

import ast
import importlib.metadata
import inspect
import re
import sys
import tomllib
import types

import pytest
import torch

from tests import oracle
from tests.bridge import peer_files, stub_vllm
from tests.bridge.helpers import assert_format, assert_triple, ids_of
from tests.bridge.test_vllm import vllm_expected
from torch_bridge import vllm, vllm_patch, vllm_plugin

NAMES = (
    *("moe_align_block_size", "batched_moe_align_block_size"),
    *("fused_globalize_align_block_size", "moe_lora_align_block_size"),
    *("topk_softmax", "topk_sigmoid", "topk_hash_softplus_sqrt", "grouped_topk"),
)
UNTOUCHED = ("moe_sum",)


@pytest.fixture
def custom_ops(monkeypatch):
    return stub_vllm.make(monkeypatch)


def held(module):
    return [getattr(module, name) for name in NAMES]


# -- vLLM's own file -------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("mapped, ignore", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("num_tokens, num_experts, block_size", [(37, 16, 8), (2, 64, 16)])
def test_vllms_own_function_calls_ours(
    custom_ops, pad, mapped, ignore, num_tokens, num_experts, block_size
):
    theirs = stub_vllm.real_file()
    array, ids = ids_of(torch.int32, "outside", num_tokens, 3, num_experts)
    local = oracle.local_map("second", num_experts, 0) if mapped else None
    given = torch.from_numpy(local) if mapped else None
    with pytest.raises(AssertionError, match="left vLLM's own op"):
        theirs.moe_align_block_size(ids, block_size, num_experts, given, pad, ignore)
    rows, experts, count, scatter = vllm_expected(
        array.ravel().tolist(), block_size, num_experts, local, pad, ignore
    )
    if mapped and not ignore:  # it maps the finished ids itself, the -1 of unused blocks too
        used = count[0] // block_size
        experts[used:] = [local[-1]] * (len(experts) - used)
    with_scatter = ignore or not mapped
    with vllm.patch():
        got = theirs.moe_align_block_size(
            ids, block_size, num_experts, given, pad, ignore, with_scatter
        )
    assert_triple(got[:3], oracle.Expected(rows, experts, count, None))
    if with_scatter:
        assert got[3].tolist() == scatter


def test_vllms_own_batched_function_calls_ours(custom_ops):
    theirs = stub_vllm.real_file()
    counts = [3, 0, 13, 1, 7]
    want = oracle.align_batched(counts, max_tokens_per_batch=13, block_size=8)
    with vllm.patch():
        got = theirs.batched_moe_align_block_size(13, 8, torch.tensor(counts, dtype=torch.int32))
    assert_triple(got, want)


def defaults_of(function: ast.FunctionDef) -> list[tuple[str, object]]:
    """Parameters and their defaults, as `inspect` has them."""
    given, empty = function.args, inspect.Parameter.empty
    assert not (given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg)
    defaults = [ast.literal_eval(x) for x in given.defaults]
    defaults = [empty] * (len(given.args) - len(defaults)) + defaults
    return list(zip([x.arg for x in given.args], defaults, strict=True))


def test_vllms_own_signatures_are_those_that_patch_and_the_stubs_know(custom_ops):
    """Read, not run: the file imports the engine."""
    tree = ast.parse(peer_files.path_of("vllm_custom_ops.py").read_text())
    functions = [x for x in tree.body if isinstance(x, ast.FunctionDef)]
    theirs = {x.name: defaults_of(x) for x in functions if x.name in vars(custom_ops)}
    assert set(theirs) == {*NAMES, *UNTOUCHED}
    assert len([x for x in functions if x.name in theirs]) == len(theirs)  # defined once
    # Every aligned op, and every op of the router, is ours.
    others = {
        "biased_topk_cpu",
        "hash_topk_cpu",
        "moe_align_block_size_cpu",
        "topk_transform_512_cpu",
    }
    routing = {
        x.name for x in functions if re.search(r"(^|_)topk_|_topk($|_)|align_block_size", x.name)
    }
    assert routing - others == set(NAMES)
    for name in NAMES:
        stub = inspect.signature(getattr(custom_ops, name)).parameters.values()
        assert [(p.name, p.default) for p in stub] == theirs[name]
        assert vllm_patch._PARAMETERS[name] == tuple(argument for argument, _ in theirs[name])


@pytest.mark.parametrize("required", ["", "1"])
def test_a_missing_file_skips_or_fails_and_says_how_to_get_it(required, monkeypatch, tmp_path):
    monkeypatch.setattr(peer_files, "FOLDER", tmp_path)
    monkeypatch.setenv(peer_files.REQUIRE, required)
    kind = pytest.fail.Exception if required else pytest.skip.Exception
    with pytest.raises(kind, match=r"python -m benchmarks\.fetch vllm.*MOE_ALIGN_REQUIRE_PEERS"):
        stub_vllm.real_file()
    (tmp_path / "vllm_moe.so").touch()
    assert peer_files.path_of("vllm_moe.so") == tmp_path / "vllm_moe.so"


def test_the_ops_take_vllms_keywords(custom_ops):
    """The parameters of vLLM's wrappers, by name and with their defaults."""
    originals = dict(zip(NAMES, held(custom_ops), strict=True))
    with vllm.patch():
        for name, original in originals.items():
            ours = inspect.signature(getattr(custom_ops, name)).parameters.values()
            theirs = inspect.signature(original).parameters.values()
            assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
        buffers = [torch.zeros(size, dtype=torch.int32) for size in (12, 6, 1)]
        named = zip(["sorted_ids", "expert_ids", "num_tokens_post_pad"], buffers, strict=True)
        counts = torch.tensor([1, 0, 3], dtype=torch.int32)
        custom_ops.batched_moe_align_block_size(
            max_tokens_per_batch=4, block_size=2, expert_num_tokens=counts, **dict(named)
        )
    assert_triple(
        tuple(buffers), oracle.align_batched([1, 0, 3], max_tokens_per_batch=4, block_size=2)
    )


PAGE = (stub_vllm.ROOT / "docs" / "pytorch.md").read_text()


def test_lines_of_the_page_switch_it_on_and_off(custom_ops):
    before = held(custom_ops)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    [code] = [block for block in blocks if "patch_for_good" in block]
    on, off = code.split("undo()  #")
    names = {}
    exec(on, names)
    assert custom_ops.moe_align_block_size is vllm.ops_moe_align_block_size
    exec("undo()  #" + off, names)
    assert held(custom_ops) == before


def test_page_installs_what_compiles_and_names_the_plugins_variable():
    section = PAGE.split("\n## vLLM\n")[1].split("\n## ")[0]
    assert "pip install -e '.[cuda13,torch]'" in section
    assert f"{vllm_plugin.VARIABLE}=1 vllm serve" in section
    readme = (stub_vllm.ROOT / "README.md").read_text()
    assert f"{vllm_plugin.VARIABLE}=1 vllm serve" in readme
    contract = (stub_vllm.ROOT / "docs" / "contract.md").read_text()
    assert f"{peer_files.REQUIRE}=1" in contract


# -- the plugin --------------------------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch):
    """What vLLM calls in each of its processes, as pyproject.toml names it."""
    monkeypatch.setattr(vllm_patch, "_active", vllm_patch._Active())  # nobody undoes it
    project = tomllib.loads((stub_vllm.ROOT / "pyproject.toml").read_text())["project"]
    [(name, value)] = project["entry-points"]["vllm.general_plugins"].items()
    assert name == "moe_align_jax"
    entry = importlib.metadata.EntryPoint(name, value, "vllm.general_plugins")
    return entry.load()


@pytest.mark.parametrize("value", [None, "", "0", "1"])
def test_plugin_patches_where_it_is_told_to(value, plugin, custom_ops, monkeypatch):
    before = held(custom_ops)
    monkeypatch.delenv(vllm_plugin.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(vllm_plugin.VARIABLE, value)
    for _ in range(2):  # vLLM may load plugins more than once
        plugin()
    assert (held(custom_ops) == before) == (value != "1")
    assert (custom_ops.moe_align_block_size is vllm.ops_moe_align_block_size) == (value == "1")


def test_plugin_says_that_a_release_is_unknown_only_where_it_is_told_to(plugin, monkeypatch):
    stub_vllm.make(monkeypatch, "0.34.0")
    monkeypatch.delenv(vllm_plugin.VARIABLE, raising=False)
    plugin()
    monkeypatch.setenv(vllm_plugin.VARIABLE, "1")
    with pytest.raises(NotImplementedError, match=r"0\.33\.x"):
        plugin()


# -- in force and undone ---------------------------------------------------------------------------


def test_undo_restores_the_very_objects_and_others_are_never_touched(custom_ops):
    before, others = held(custom_ops), [getattr(custom_ops, name) for name in UNTOUCHED]
    with vllm.patch():
        assert held(custom_ops)[0] is vllm.ops_moe_align_block_size
        assert held(custom_ops)[2:] == [getattr(vllm, name) for name in NAMES[2:]]
        assert all(a is not b for a, b in zip(held(custom_ops), before, strict=True))
        assert others == [getattr(custom_ops, name) for name in UNTOUCHED]
    assert all(a is b for a, b in zip(held(custom_ops), before, strict=True))
    with pytest.raises(KeyError), vllm.patch():
        raise KeyError
    assert held(custom_ops) == before


def test_patches_nest_and_overlap(custom_ops):
    before = held(custom_ops)
    with vllm.patch():
        patched = held(custom_ops)
        undo_first, undo_second = vllm.patch_for_good(), vllm.patch_for_good()
        with vllm.patch():
            assert held(custom_ops) == patched
        undo_first()
        undo_first()  # the second time does nothing more
        assert held(custom_ops) == patched
    assert held(custom_ops) == patched
    undo_first()
    assert held(custom_ops) == patched
    undo_second()
    assert held(custom_ops) == before
    undo_second()
    assert held(custom_ops) == before


def test_what_someone_else_replaced_since_is_left_alone(custom_ops):
    before = held(custom_ops)
    undo = vllm.patch_for_good()
    other = custom_ops.moe_align_block_size = lambda *_: None
    with pytest.warns(UserWarning, match=r"vllm\._custom_ops\.moe_align_block_size was replaced"):
        undo()
    assert held(custom_ops) == [other, *before[1:]]


# -- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.32.9", "0.34.0", "0.34.0rc1", "0.3", "1.33.0", "dev", None])
def test_an_unknown_release_is_refused(monkeypatch, version):
    ops = stub_vllm.make(monkeypatch, version)
    before = held(ops)
    for entry in (vllm.patch_for_good, vllm.patch().__enter__):
        with pytest.raises(NotImplementedError, match=r"0\.33\.x") as caught:
            entry()
        assert_format(caught.value)
        assert (version or "none") in str(caught.value)
    assert held(ops) == before


@pytest.mark.parametrize("version", ["0.33.0", "0.33.1", "0.33.0+cu129", "0.33.1.dev3+gabc"])
def test_a_known_release_is_taken(monkeypatch, version):
    ops = stub_vllm.make(monkeypatch, version)
    with vllm.patch():
        assert ops.moe_align_block_size is vllm.ops_moe_align_block_size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("found", ["absent", "older"])
def test_other_signatures_are_refused(custom_ops, name, found):
    if found == "absent":
        delattr(custom_ops, name)
    else:
        setattr(custom_ops, name, lambda topk_ids, num_experts: None)
    before = dict(vars(custom_ops))
    with pytest.raises(NotImplementedError, match=rf"_custom_ops\.{name} must take") as caught:
        vllm.patch_for_good()
    assert_format(caught.value)
    assert vars(custom_ops) == before


def test_nothing_is_half_patched(monkeypatch, custom_ops):
    class Module(types.ModuleType):
        def __setattr__(self, name, value):
            if name == NAMES[1] and value is vllm_patch._batched_moe_align_block_size:
                raise PermissionError(name)
            super().__setattr__(name, value)

    module = Module("vllm._custom_ops")
    vars(module).update(vars(custom_ops))
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", module)
    monkeypatch.setattr(sys.modules["vllm"], "_custom_ops", module)
    before = held(module)
    with pytest.raises(PermissionError):
        vllm.patch_for_good()
    assert held(module) == before
    monkeypatch.setattr(sys.modules["vllm"], "_custom_ops", custom_ops)
    with vllm.patch():  # and the failed attempt left no count behind
        assert custom_ops.moe_align_block_size is vllm.ops_moe_align_block_size
    assert custom_ops.moe_align_block_size is before[0]


def test_no_vllm_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vllm must be installed") as caught:
        vllm.patch_for_good()
    assert_format(caught.value)


def test_an_import_error_inside_vllm_is_its_own(monkeypatch, tmp_path):
    (tmp_path / "vllm.py").write_text("import no_such_dependency_of_vllm")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency_of_vllm"):
        vllm.patch_for_good()
