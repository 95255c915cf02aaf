"""What README.md and docs/*.md show: every Python block runs from the built wheel, every command exists.

A page's blocks run one after the other in a process of its own, as a reader tries them. It sees the wheel and
the installed packages, and no checkout. A comment behind a `print(...)` is what it prints. A block "python3"
is a script of several processes, which tests/expert_parallel/test_two_processes.py runs.
"""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
COMMENTED_PRINT = re.compile(r"^ *print\(.*\)  # (.+)$", re.M)


def blocks(page: str, *languages: str) -> list[tuple[int, str]]:
    """(line, text) of the fenced blocks in these languages."""
    text = PAGES[page]
    found = [m for m in FENCE.finditer(text) if m[1] in languages]
    return [(text[: m.start(2)].count("\n") + 1, m[2]) for m in found]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python", "py", "pycon")]

# Begins the process that sees no checkout. SITE is the wheel's folder, STAND_INS the file with stand-ins for
# vLLM.
READER = r"""
import doctest, importlib.util, re, sys
import jax.experimental.pallas
import moe_align_jax
if importlib.util.find_spec("torch"):
    import torch_bridge
assert moe_align_jax.__file__.startswith(SITE), moe_align_jax.__file__
for absent in ("tests", "benchmarks", "examples"):
    assert importlib.util.find_spec(absent) is None, f"the checkout is on the path: {absent}"


def read(page, blocks):
    source = "".join(code for _, code in blocks)
    has_gpu = True
    if "torch" in source:
        import torch
        has_gpu = torch.cuda.is_available()
    if "vllm" in source and importlib.util.find_spec("vllm") is None:
        spec = importlib.util.spec_from_file_location("stand_ins", STAND_INS)
        stubs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stubs)
        sys.modules.update(stubs.stand_ins(stubs.custom_ops(None, None)))
    scope = {"__name__": "__main__"}
    for line, code in blocks:
        where = f"{page}, the block at line {line}"
        if not has_gpu:
            code = re.sub("(?<=[\"'])cuda(?=[\"'])", "cpu", code)
        try:
            if ">>>" in code:
                test = doctest.DocTestParser().get_doctest(code, scope, where, page, line)
                assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0, where
                scope.update(test.globs)
            else:
                # The empty lines make a traceback name the page's own line.
                exec(compile("\n" * (line - 1) + code, page, "exec"), scope)
        except NotImplementedError as error:
            if has_gpu or "CUDA" not in str(error):
                raise  # what needs a GPU says so
            print(f"{where}: {error}", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with what the wheel installs."""
    pytest.importorskip(
        "hatchling", reason="the extra test is not installed: no wheel can be built"
    )
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [file] = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def packages() -> list[str]:
    """The path of this process without checkouts of ours."""
    there = [Path(entry or os.curdir).resolve() for entry in sys.path]
    return [str(e) for e in there if e.exists() and not (e / "moe_align_jax").exists()]


@pytest.fixture(scope="module")
def reader(wheel):
    names = f"SITE, STAND_INS = {str(wheel)!r}, {str(ROOT / 'benchmarks' / 'vllm_file.py')!r}\n"
    path = os.pathsep.join([str(wheel), *packages()])
    # -S: no .pth file, which may name a checkout that is installed as it stands. -P: not the working folder.
    with forked.start(names + READER, "-S", "-P", PYTHONPATH=path) as process:
        yield process


@pytest.mark.every_case
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run_from_the_wheel(page, reader, tmp_path):
    code = blocks(page, "python", "py", "pycon")
    source = "".join(text for _, text in code)
    if "torch" in source:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    done = reader.run(f"read({page!r}, {code!r})", tmp_path)
    assert done.returncode == 0, done.stderr
    printed = iter(done.stdout.splitlines())
    for promised in COMMENTED_PRINT.findall(source):
        assert promised in printed, f"no line {promised!r} (in this order) in {done.stdout}"


def test_the_pages_have_python():
    assert {"README.md", "docs/expert_load.md", "docs/expert_parallel.md"} <= set(WITH_PYTHON)


def test_readme_jax_export_note_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    section = PAGES["README.md"].split("## Install")[1].split("\n## ")[0]
    for extra in extras:
        assert f"`{extra}`" in section, f"README's Install does not name the extra {extra}"


def test_the_extra_all_holds_every_extra_for_users():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    [everything] = extras["all"]
    name, listed = re.fullmatch(r"([\w-]+)\[([\w,]+)\]", everything).groups()
    assert name == project["name"]
    for_developers = {"test", "dev", "docs", "examples", "all", "cuda12", "cuda13"}
    assert set(listed.split(",")) == extras.keys() - for_developers
    contents = [tuple(extras[extra]) for extra in extras]
    assert len(set(contents)) == len(contents), "two extras are the same"


# -- the site ----------------------------------------------------------------------------------------


def pages_of(nav) -> list[str]:
    """The pages that a list of entries of zensical.toml names."""
    found = []
    for entry in nav:
        for value in entry.values():
            found += [value] if isinstance(value, str) else pages_of(value)
    return found


def test_the_site_shows_every_page_once():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages_of(nav)) == sorted(there)


def test_api_pages_show_every_public_name():
    shown = re.findall(r"^::: ([\w.]+)$", "".join(PAGES.values()), re.M)
    assert len(shown) == len(set(shown))
    for package in ("moe_align_jax", "torch_bridge"):
        if package == "torch_bridge":
            pytest.importorskip("torch", reason="PyTorch is not installed")
        module = importlib.import_module(package)
        # Submodules are pages of their own; the results of both packages are of one type.
        public = {n for n in module.__all__ if not inspect.ismodule(getattr(module, n))}
        public -= {"__version__", *(["AlignedBlocks"] if package == "torch_bridge" else [])}
        on_pages = {name.rpartition(".")[2] for name in shown if name.startswith(package)}
        assert public <= on_pages, f"not on a page in docs/api: {sorted(public - on_pages)}"


@pytest.mark.parametrize("face", ["vllm.py", "sglang/__init__.py", "deep_gemm/__init__.py"])
def test_api_pages_show_the_names_of_other_projects(face):
    """What such a face defines, or imports `as` itself to hand it on."""
    tree = ast.parse((ROOT / "torch_bridge" / face).read_text())
    public = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}
    handed_on = [a for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names if a.asname]
    public |= {alias.name for alias in handed_on if alias.name == alias.asname}
    names = re.findall(r"^::: torch_bridge\.[\w.]*?(\w+)$", PAGES["docs/api/torch_bridge.md"], re.M)
    assert public and public <= set(names), sorted(public - set(names))


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/kernels.md"])
def test_files_on_the_map_exist(page):
    """A path in backticks exists from the root, or within one of our folders."""
    files = [
        path.relative_to(ROOT).as_posix()
        for folder in ("moe_align_jax", "torch_bridge", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if "__pycache__" not in path.parts
    ]
    prose = FENCE.sub("", PAGES[page])
    named = {s.rstrip("/") for s in re.findall(r"`([\w./]+(?:/|\.py|\.toml|\.json))`", prose)}
    missing = [
        name
        for name in sorted(named)
        if name.upper() != name  # PEER.py, NAME.py: the reader's own
        and not re.search(r"\b(?:NAME|PEER)\b|_NAME", name)
        and not (ROOT / name).exists()
        and not any(file.endswith("/" + name) for file in files)
    ]
    assert named and missing == []


@pytest.mark.parametrize(
    ("page", "folder"),
    [
        *(("docs/architecture.md", name) for name in ("moe_align_jax", "torch_bridge")),
        ("tests/README.md", "tests"),
    ],
)
def test_the_map_names_all_that_lies_in_a_folder(page, folder):
    """Every module and folder of a package, every folder of the tests: in the part of the map that is the
    folder's, or in the table, as a name by itself."""
    lie = [path for path in (ROOT / folder).iterdir() if not path.name.startswith(("__", "."))]
    modules = [path.name for path in lie if path.suffix == ".py" and folder != "tests"]
    folders = [f"{path.name}/" for path in lie if path.is_dir()]
    text = (ROOT / page).read_text()
    of_folder = rf"^```text\n(?:(?!```).*\n)*?{re.escape(folder)}/\n((?:  .*\n)+)"
    part = re.search(of_folder, text, re.M)
    shown = part[1] if part else "".join(re.findall(r"^\|.*\n", text, re.M))
    missing = [
        n for n in (*modules, *folders) if not re.search(rf"(?<![\w/]){re.escape(n)}", shown)
    ]
    assert folders and missing == []


# -- commands ----------------------------------------------------------------------------------------

COMMANDS = ("moe-align", "make", "python", "pip")
# Programs of others that a page may show.
FOREIGN = ("vllm",)


def commands(page: str):
    """(line, words) of each command in a shell block or in code within a sentence."""
    text = PAGES[page]
    for line, block in blocks(page, "", "sh", "bash", "shell", "console"):
        lines = [re.sub(r"(^|\s)#.*", "", x) for x in block.replace("\\\n", " ").splitlines()]
        found = [re.sub(r"^\$ ", "", x).split() for x in lines if x.strip()]
        found = [
            words[next((i for i, w in enumerate(words) if "=" not in w), 0) :] for words in found
        ]
        if found and found[0][0] in COMMANDS:  # else a picture, or a list of files
            yield from ((line, words) for words in found)
    prose = FENCE.sub("", text)
    for span in re.findall(r"`([^`]+)`", prose):
        words = span.split()
        if len(words) > 1 and words[0] in COMMANDS:
            yield 0, words


def options_of(words: list[str]) -> set[str]:
    return {w.split("=")[0].strip("'\"") for w in words if re.match(r"--?[a-zA-Z]", w)}


def declared(source: str) -> set[str]:
    """The options that a file's argument parser takes, also those that another benchmark's module adds."""
    found = {"-h", "--help"}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(ast.Attribute(attr="add_argument")):
                values = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
                found |= {v for v in values if v.startswith("-")}
            case ast.Call(ast.Attribute(ast.Name(module), "add_arguments")):
                found |= declared((ROOT / "benchmarks" / f"{module}.py").read_text())
    return found


def complaint(words: list[str]) -> str | None:
    """What of a command does not exist, or None."""
    program, *rest = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in rest:
            name, is_variable, _ = word.partition("=")
            pattern = rf"\$\({name}\)|ifdef {name}\b" if is_variable else rf"^{name}:"
            if not word.startswith("-") and not re.search(pattern, makefile, re.M):
                return f"make has no {word}"
        return None
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = extras["optional-dependencies"].keys()
        for asked in re.findall(r"(?:\.|moe-align-jax)\[([\w,]+)\]", " ".join(rest)):
            if unknown := set(asked.split(",")) - extras:
                return f"no extra {unknown}"
        return None
    if program == "moe-align":
        pytest.importorskip("typer", reason="the extra cli is not installed")
        import typer

        from moe_align_jax._cli.app import app

        command = typer.main.get_command(app)
        name = rest[0] if rest and not rest[0].startswith("-") else None
        if name is not None and name not in command.commands:
            return f"moe-align has no command {name}"
        if name == "bench":
            return complaint(["python", "-m", "benchmarks.run", *rest[1:]])
        known = {"--help"}
        for parameter in (command.commands[name] if name else command).params:
            known |= {*parameter.opts, *parameter.secondary_opts}
        unknown = options_of(rest) - known
        return f"moe-align {name} has no {unknown}" if unknown else None
    if program in FOREIGN:
        return None
    if program != "python":
        return f"what is {program}?"
    if rest[0] == "-m":
        module = rest[1].replace(".", "/")
        files = [ROOT / f"{module}.py", ROOT / module / "__main__.py"]
    else:
        files = [ROOT / rest[0]]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        top = rest[1].split(".")[0] if rest[0] == "-m" else rest[0]
        ours = not (rest[0] == "-m" and importlib.util.find_spec(top)) or (ROOT / top).exists()
        return f"no file {rest[:2]}" if ours else None
    unknown = options_of(rest[2 if rest[0] == "-m" else 1 :]) - declared(file.read_text())
    return f"{file.name} has no {unknown}" if unknown else None


# A notebook says what was run on its day, with commands that may have gone since.
@pytest.mark.parametrize("page", [page for page in PAGES if "notebook" not in page])
def test_commands_and_their_options_exist(page):
    wrong = [f"line {n}: {' '.join(w)}: {c}" for n, w in commands(page) if (c := complaint(w))]
    assert wrong == []


def test_pages_show_commands():
    shown = [" ".join(words) for page in PAGES for _, words in commands(page)]
    for program in COMMANDS:
        assert any(text.startswith(program) for text in shown), program


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make test PYTON=/usr/bin/python",
        "pip install -e '.[cuda13,bench]'",
        "moe-align optimise",
        "moe-align eplb FILE --gpus 3",
        "moe-align bench --no-such-option 1",
        "python -m benchmarks.nothing",
        "python -m benchmarks.run --no-such-option",
        "python examples/moe_layer.py --topk 3",
        "python examples/nothing.py",
        "cargo build",
    ],
)
def test_what_does_not_exist_is_found(command):
    assert complaint(command.split()) is not None
