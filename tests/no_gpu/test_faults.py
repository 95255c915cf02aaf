"""The checks of the GPU-less compile find what they are there for: PTX by hand, each with one fault."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests import forms
from tests.no_gpu import cases, matmul, ptx, script, toolchain, worker

KERNEL = """
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)
.maxntid 256, 1, 1
{
	ld.param::entry.b64 	%rd1, [k_param_0];
	ld.param.u64 	%rd2, [k_param_1];
	cvta.to.global.u64 	%rd3, %rd1;
	// begin inline asm
	griddepcontrol.wait;
	// end inline asm
	mul.wide.u32 	%rd4, %r1, 4;
	add.s64 	%rd5, %rd3, %rd4;
	@%p1 bra 	$L__BB0_1;
	ld.global.b32 	%r2, [%rd5+4];
	ld.shared.v4.b32 	{%r3, %r4, %r5, %r6}, [%r7];
	st.global.v4.b32 	[%rd2], {%r3, %r4, %r5, %r6};
}
"""
WAIT = "griddepcontrol.wait;"
LOG = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    {stack} bytes stack frame, {stores} bytes spill stores, 4 bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers
"""


def test_accesses_are_traced_to_their_parameters():
    load, store = ptx.global_accesses(KERNEL)
    assert load[:3] == ("ld.global.b32", 4, frozenset({0}))
    assert store[:3] == ("st.global.v4.b32", 16, frozenset({1}))


def test_what_ptxas_says_is_read():
    assert ptx.usage(LOG.format(stack=8, stores=12, registers=40)) == (40, 8, 12, 4)


def test_a_sound_kernel_has_no_fault():
    used = ptx.Usage(128, 0, 0, 0)
    assert not [
        *worker.resource_faults(used, 256, KERNEL),
        *worker.order_faults(KERNEL, pdl=True, first=True),
        *worker.load_faults(KERNEL, ("topk_ids", "expert_ids"), 1),
    ]


@pytest.mark.parametrize(
    ("used", "threads", "fault"),
    [
        ((32, 0, 4, 0), 256, "4 bytes spilled"),
        ((32, 0, 0, 4), 256, "4 bytes spilled"),
        ((32, 16, 0, 0), 256, "16 bytes of stack"),
        ((249, 0, 0, 0), 256, None),  # 256 x 256: the last that fits
        ((257, 0, 0, 0), 256, "take 67584 of 65536"),
        ((32, 0, 0, 0), 512, "compiled for CTAs of 256 threads, launched with 512"),
    ],
)
def test_resources(used, threads, fault):
    found = list(worker.resource_faults(ptx.Usage(*used), threads, KERNEL))
    assert len(found) == (fault is not None), found
    assert not fault or fault in found[0]


@pytest.mark.parametrize(
    ("text", "pdl", "first", "fault"),
    [
        (KERNEL.replace(WAIT, ""), True, True, "missing"),
        (KERNEL, False, True, "without PDL"),
        (KERNEL.replace(WAIT, "griddepcontrol.launch_dependents;"), False, True, "without PDL"),
        (KERNEL.replace(WAIT, "ld.global.b32 %r9, [%rd3];\n" + WAIT), True, True, "ahead"),
        (KERNEL.replace(WAIT, "ld.global.b32 %r9, [%rd3];\n" + WAIT), True, False, None),
        (KERNEL.replace(WAIT, "st.global.b32 [%rd3], %r9;\n" + WAIT), True, False, "ahead"),
        (KERNEL.replace(WAIT, ""), False, True, None),
    ],
)
def test_order(text, pdl, first, fault):
    found = list(worker.order_faults(text, pdl=pdl, first=first))
    assert len(found) == (fault is not None), found
    assert not fault or fault in found[0]


CLAMP = "{};\nmul.wide.u32 	%rd7, %r8, 4;\nadd.s64 	%rd8, %rd5, %rd7;\n"


@pytest.mark.parametrize(
    ("load", "id_words", "fault"),
    [
        ("ld.global.b32 	%r2, [%rd5+4]", 1, None),
        ("ld.global.v2.b32 	{%r2, %r8}, [%rd5+8]", 2, None),
        ("ld.global.nc.b64 	%rd9, [%rd5]", 2, None),
        ("ld.global.v2.b32 	{%r2, %r8}, [%rd5+8]", 1, "of 8 bytes"),
        ("ld.global.b64 	%rd9, [%rd5]", 1, "of 8 bytes"),
        ("ld.global.nc.v4.u32 	{%r2, %r8, %r9, %r10}, [%rd5]", 2, "of 16 bytes"),
        ("ld.v2.b32 	{%r2, %r8}, [%rd1]", 1, "of 8 bytes"),
        ("ld.global.b32 	%r2, [%rd2]", 1, "gone blind"),
        (f"{CLAMP.format('min.u32 	%r8, %r9, %r1')}ld.global.b32 	%r2, [%rd8]", 1, None),
        (
            f"{CLAMP.format('selp.b32 	%r8, %r9, %r1, %p2')}ld.global.b32 	%r2, [%rd8]",
            1,
            "predicate",
        ),
    ],
)
def test_load_width(load, id_words, fault):
    text = KERNEL.replace("ld.global.b32 	%r2, [%rd5+4]", load)
    found = list(worker.load_faults(text, ("topk_ids", "expert_ids"), id_words))
    assert len(found) == (fault is not None), found
    assert not fault or fault in found[0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"grid": (5, 1, 1)}, "grid"),
        ({"cluster": (4, 1, 1)}, "clusters"),
        ({"block": (128, 1, 1)}, "block"),
        ({"shared_bytes": 1020}, "the kernel asks for 1024"),
        ({"parameters": ("topk_ids",)}, "not passed: ['expert_ids']"),
    ],
)
def test_launch(change, fault):
    kernel = SimpleNamespace(
        num_ctas=4, cluster=2, num_threads=256, shared_words=256, outputs={"expert_ids": (1,)}
    )
    launch = {"grid": (4, 1, 1), "cluster": (2, 1, 1), "block": (256, 1, 1), "shared_bytes": 1024}
    launch |= {"parameters": ("topk_ids", "expert_ids")} | change
    found = list(worker.launch_faults(kernel, "direct", SimpleNamespace(**launch)))
    assert len(found) == (fault is not None), found
    assert not fault or fault in found[0]


ARRIVE = "barrier.cluster.arrive.relaxed.aligned; "
POST = "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r1], %r2, [%r3];"


@pytest.mark.parametrize(
    ("instructions", "mailbox", "fault"),
    [
        ("", 0, None),
        (ARRIVE + POST, 8, None),
        (ARRIVE, 8, "of 8 words, and 0 posts"),
        (POST, 0, "of 0 words, and 1 posts"),
        (POST, 8, "0 barriers of the cluster, not 1"),
        (ARRIVE + ARRIVE + POST, 8, "2 barriers of the cluster, not 1"),
        (ARRIVE + POST + "fence.acq_rel.cluster;", 8, "fence.acq_rel.cluster in"),
        (POST + "barrier.cluster.arrive.aligned;", 8, "barrier.cluster.arrive.aligned in"),
        ("barrier.cluster.arrive.release.aligned;", 0, "arrive.release.aligned in"),
    ],
)
def test_mail(instructions, mailbox, fault):
    found = list(worker.mail_faults(KERNEL.replace(WAIT, instructions + WAIT), mailbox))
    assert len(found) == (fault is not None), found
    assert not fault or fault in found[0]


def test_the_selection_covers_every_size_form_and_pair_of_options():
    chosen = cases.all_cases()
    assert {case.form for case in chosen} == {
        "warp",
        "pairs",
        "block",
        "cluster",
        "grid",
        "sorted",
        "radix",
        "batched",
    }
    sizes = {(c.problem.num_experts, c.problem.block_size) for c in chosen}
    assert {(size.num_experts, size.block_size) for size in forms.SIZES} <= sizes
    # Counted here by another way than the selection does.
    together = {
        (form, id_words, expert_map, inverse)
        for form in ("warp", "block", "grid", "sorted", "radix")
        for id_words in (1, 2)
        for expert_map in ("", "label", "filter")
        for inverse in (False, True)
    }
    for pair in ((0, 1, 2), (0, 1, 3), (0, 2, 3)):
        met = {
            tuple(
                (c.form, c.problem.id_words, c.problem.expert_map, c.problem.return_inverse)[i]
                for i in pair
            )
            for c in chosen
            if c.form != "batched"
        }
        assert {tuple(x[i] for i in pair) for x in together} <= met


def test_a_thread_arrives_for_others_that_it_has_met():
    waits, arrives = (
        "wgmma.wait_group.sync.aligned 0;\n",
        "mbarrier.arrive.shared::cluster.b64 _, [r];\n",
    )
    seen = "mbarrier.try_wait.parity.shared::cta.b64 p, [r], 0;\n"
    meets, at_first = "bar.sync 1, 128;\n", seen + arrives * 4
    assert (
        matmul.arrivals_alone(at_first + seen + waits + meets + arrives + seen + meets + arrives)
        == 0
    )
    assert matmul.arrivals_alone(at_first + seen + waits + arrives + seen + meets + arrives) == 1
    assert matmul.arrivals_alone(at_first + waits + meets + arrives + seen + arrives + waits) == 1


def test_without_a_c_compiler_the_set_up_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "/no/such/compiler")
    with pytest.raises(toolchain.Missing, match="C compiler does not run.*/no/such/compiler"):
        toolchain._build_recorder(tmp_path)
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(toolchain.Missing, match="install gcc or clang"):
        toolchain._build_recorder(tmp_path)


def test_the_recorder_has_the_layout_that_is_read(tmp_path):
    try:
        toolchain._build_recorder(tmp_path)
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    library = ctypes.CDLL(str(tmp_path / toolchain.LIBRARY))
    recorded = worker._Recorded.in_dll(library, "recorded")
    assert library.cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), b".version 9.0") == 200
    assert recorded.modules == 0
    assert library.cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), b"\x7fELF") == 0
    assert library.cuModuleGetFunction(ctypes.byref(ctypes.c_void_p()), None, b"last_field") == 0
    assert (recorded.modules, recorded.entry) == (1, b"last_field")


def test_kernels_of_one_file_keep_their_names_apart():
    head = ".version 8.8\n.target sm_90a\n.address_size 64\n"
    text = f'{head}{KERNEL}\t.loc\t1 481 0\n.file\t1 "k.py"\n\t.section\t.debug_macinfo\t{{\t}}\n'
    whole = matmul.in_one_file([text, text])
    assert whole.count(".version") == whole.count(".address_size") == 1
    assert not any(word in whole for word in (".loc", ".file", ".section"))
    for place in (0, 1):
        name = f"kernel{place}_of_this_file_k"
        assert (
            whole.count(f".entry {name}(.param .u64 {name}_param_0, .param .u64 {name}_param_1)")
            == 1
        )
        assert whole.count(f"[{name}_param_0]") == 1
    assert "[k_param_0]" not in whole


def test_what_ptxas_says_is_that_of_its_kernel():
    said = "ptxas info : (C7510) wgmma.mma_async instructions are serialized in the function 'k'\n"
    about = [
        LOG.format(stack=0, stores=0, registers=168),
        LOG.format(stack=8, stores=12, registers=40) + said,
    ]
    named = [x.replace("'k'", f"'kernel{i}_of_this_file_k'") for i, x in enumerate(about)]
    # ptxas begins with the last kernel.
    log = (
        "ptxas info    : 0 bytes gmem\n"
        + named[1].replace("for k\n", "for kernel1_of_this_file_k\n")
        + named[0]
    )
    found = matmul.of_each(log, 2)
    assert [ptx.usage(x).registers for x in found] == [168, 40]
    sass = "        /*0000*/  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR36], R24 ;\n"
    assert (
        list(
            matmul.faults(
                found[0].replace("4 bytes spill loads", "0 bytes spill loads"), sass, 1.0, 2.0
            )
        )
        == []
    )
    spilled, serialized = matmul.faults(found[1], sass, 1.0, 2.0)
    assert spilled == "16 bytes spilled, 8 bytes of stack" and "serialized" in serialized
    [nothing] = matmul.faults(
        found[0].replace("4 bytes spill loads", "0 bytes spill loads"), "", 1.0, 2.0
    )
    assert nothing == "no wgmma"


def test_a_sample_is_one_in_n(monkeypatch):
    assert list(script.one_in_sample("abcdefg")) == list("abcdefg")
    monkeypatch.setattr(script, "_step", 3)
    assert list(script.one_in_sample("abcdefghi")) == ["a", "f", "h"]
    monkeypatch.setattr(script, "_step", 2)
    assert list(script.one_in_sample("aAbBcC")) == ["a", "B", "c"]


SEVERAL = """
import sys
from types import SimpleNamespace
from tests.no_gpu import several

def module(name, check):
    sys.modules[f"tests.no_gpu.{name}"] = SimpleNamespace(__name__=name, check=check)

module("right", lambda plugin, runtime: [(f"{plugin} {runtime}", [])])
module("wrong", lambda plugin, runtime: [("a kernel", ["16 bytes spilled"])])
module("broken", lambda plugin, runtime: 1 / 0)
for names in (["right", "right"], ["wrong", "right"], ["right", "broken", "right"]):
    print(several.check_each("plugin", "runtime", "1", *names), "is the status", flush=True)
"""


def test_several_modules_stop_at_the_first_with_a_fault():
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], capture_output=True, text=True, check=True
    )
    right = ["right:", "plugin runtime", "1 kernels, 0 faults"]
    wrong = ["wrong:", "a kernel", "1 kernels, 1 faults"]
    assert done.stdout.splitlines() == [
        *(*right, *right, "0 is the status"),
        *(*wrong, "1 is the status"),
        *(*right, "broken:", "1 is the status"),
    ]
    assert "16 bytes spilled" in done.stderr and "ZeroDivisionError" in done.stderr
