"""What is uploaded: an sdist, the wheel that is built from it, their metadata; what the packages import."""

import ast
import email
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import moe_align_jax

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("moe_align_jax", "torch_bridge")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(source: pathlib.Path, target: str, folder: pathlib.Path) -> pathlib.Path:
    pytest.importorskip("hatchling", reason="the extra test is not installed: nothing can be built")
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [made] = folder.glob("*.tar.gz" if target == "sdist" else "*.whl")
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> pathlib.Path:
    """The folder that the sdist unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, "sdist", folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [top] = (folder / "unpacked").iterdir()
    return top


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build(sdist, "wheel", tmp_path_factory.mktemp("wheel")))


def files_of(folder: pathlib.Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def tracked() -> set[str]:
    """Files that git would commit: tracked ones, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip("this is no checkout of git")
    names = done.stdout.split("\0")
    return {name for name in names if name and (ROOT / name).is_file()}


def test_the_sdist_holds_the_checkout_without_results(sdist):
    hidden = re.compile(
        r"\.|benchmarks/results/"
    )  # .github, .ci, ... belong to the repository alone
    wanted = {name for name in tracked() if not hidden.match(name)}
    # hatchling adds PKG-INFO and git's list of what to ignore.
    assert files_of(sdist) - {"PKG-INFO", ".gitignore"} == wanted


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert installed == wanted
    assert {f"{package}/py.typed" for package in PACKAGES} <= installed
    assert "moe_align_jax/data/tuning/nvidia_h200.json" in installed


def test_metadata_of_the_wheel(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Name"] == "moe-align-jax"
    assert metadata["Version"] == moe_align_jax.__version__
    assert metadata["Requires-Python"] == ">=3.12"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The moe_align_jax authors"
    assert set(metadata.get_all("Provides-Extra", [])) == PROJECT["optional-dependencies"].keys()
    # An index refuses a project that states its license twice, and classifiers that it does not know.
    classifiers = metadata.get_all("Classifier", [])
    assert not [text for text in classifiers if text.startswith("License ::")]
    known = pytest.importorskip("trove_classifiers", reason="hatchling is not installed")
    assert set(classifiers) <= known.classifiers


def test_change_log_and_citation_name_the_version():
    version = re.escape(moe_align_jax.__version__)
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+?),? ", changes, re.M)
    assert newest and re.fullmatch(version, newest[1]), newest
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.M)


# -- what the packages import ------------------------------------------------------------------------

# Import name -> project, where they differ.
PROJECT_OF = {"yaml": "pyyaml", "prometheus_client": "prometheus-client"}
# What jax brings, and programs that ours stands in for: their users have them.
BROUGHT = {"jaxlib": "jax", "ml_dtypes": "jax", "jax_plugins": "jax"}
HOSTS = {"vllm", "sglang"}


def imported_by(package: str) -> dict[str, str]:
    """Foreign import name -> a file that imports it, lazily or not."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    ours = {*PACKAGES, "benchmarks", "tests"}
    return {n: f for n, f in found.items() if n not in sys.stdlib_module_names | ours}


def declared() -> set[str]:
    """Projects that a user's install brings: dependencies, and the extras for users."""
    extras = PROJECT["optional-dependencies"]
    for_users = [
        extras[name] for name in extras.keys() - {"test", "dev", "docs", "examples", "all"}
    ]
    asked = [*PROJECT["dependencies"], *(text for extra in for_users for text in extra)]
    return {re.match(r"[\w-]+", text)[0].lower() for text in asked}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_declared(package):
    found = imported_by(package)
    assert "jax" in found
    for name, file in found.items():
        project = BROUGHT.get(name) or PROJECT_OF.get(name, name)
        assert name in HOSTS or project in declared(), (
            f"{file} imports {name}: no dependency, no extra"
        )


def test_every_dependency_is_imported():
    names = {name for package in PACKAGES for name in imported_by(package)}
    projects = {PROJECT_OF.get(name, name) for name in names}
    for text in PROJECT["dependencies"]:
        project = re.match(r"[\w-]+", text)[0]
        assert project in projects, f"nothing imports {project}"
        assert importlib.metadata.version(project)
