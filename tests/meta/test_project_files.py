"""The files for people and for services: links lead somewhere, and what they state is what the code does."""

import os
import pathlib
import re
import subprocess
import tomllib

import pytest

from moe_align_jax._lowering import select

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/support.md", "tests/README.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def anchors(page: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_in_code_spans_exist(page):
    known = {
        path.name
        for folder in ("moe_align_jax", "torch_bridge", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    for span in re.findall(r"`([\w./]+\.(?:py|md|sh|toml|json))`", text_of(page)):
        if "/" in span:
            assert (ROOT / span).exists() or (ROOT / page).parent.joinpath(span).exists(), span
        else:
            assert span in known or (ROOT / span).exists(), f"{page}: {span}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w.-]+):", text_of("Makefile"), re.M))
    for target in re.findall(r"(?:^|`)make ([\w.-]+)", text_of(page), re.M):
        assert target in targets, f"{page}: make {target}"


def test_make_without_a_target_names_the_targets():
    """`make help` was no target, and bare make an installation."""
    [first] = re.findall(r"\A(?:[^\n]*\n)*?([\w-]+):", text_of("Makefile"))
    assert first == "help"
    for arguments in ([], ["help"]):
        said = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        named = re.findall(r"^  ([\w.-]+) ", said.stdout, re.M)
        assert {"demo", "test", "examples", "lint", "docs", "gpu-test"} <= {*named}
        assert {*named} <= {*re.findall(r"^([\w.-]+):", text_of("Makefile"), re.M)}


def test_the_support_page_names_the_releases_of_the_code():
    page = text_of("docs/support.md")
    oldest = ".".join(map(str, select.OLDEST_JAX))
    unknown = ".".join(map(str, select.UNKNOWN_JAX)).removesuffix(".0")
    assert f"| {oldest} and newer, below {unknown} |" in page
    assert f"jax>={oldest}" in PROJECT["dependencies"]
    [torch] = PROJECT["optional-dependencies"]["torch"]
    assert f"| {torch.removeprefix('torch>=')} and newer |" in page
    assert PROJECT["requires-python"] == ">=3.12" and "| 3.12 and newer |" in page
    [vllm] = set(re.findall(r"Install vllm ([\d.]+)", text_of("torch_bridge/vllm_patch.py")))
    assert f"| vLLM, for the patch and the plugin | {vllm} |" in page


def test_the_security_page_states_the_limits_of_the_cache():
    page = text_of("SECURITY.md")
    from torch_bridge._direct import compile_pool, disk_cache

    assert f"At most {disk_cache._MAX_BYTES >> 20} MiB are kept" in page
    assert f"ends after {compile_pool._COMPILE_SECONDS} s" in page


def test_ci_runs_the_script_that_people_run():
    workflow = text_of(".github/workflows/ci.yml")
    assert re.findall(r"^ +- run: (.+)$", workflow, re.M) == ["sh .ci/run"]


@pytest.mark.parametrize(
    ("given", "commit", "turn"),
    [
        *(("", "4243140", "0"), ("", "4243141", "1"), ("", "abcdef8", "0"), ("", "abcde8f", "1")),
        *(("0", "4243141", "0"), ("1", "4243140", "1"), ("", "", "0")),
    ],
)
def test_the_commit_gives_the_turn_of_the_longest_tests(given, commit, turn):
    [line] = re.findall(r"^case .*TURN.* esac$", text_of(".ci/run"), re.M)
    script = f"git() {{ echo {commit}; }}\n{line}\nexport TURN\nsh -c 'echo $TURN'"
    done = subprocess.run(
        ["sh", "-eu", "-c", script],
        env=os.environ | {"TURN": given},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split()) == (0, [turn]), done.stderr


def test_services_read_their_files():
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    for path in forms:
        form = yaml.safe_load(path.read_text())
        if path.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= form.keys(), path.name
        names = [item["id"] for item in form["body"] if item["type"] != "markdown"]
        assert names and len(set(names)) == len(names), path.name
    assert len(forms) > 1
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]


def test_hooks_run_the_tools_of_the_extra_dev():
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    [repo] = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert repo["repo"] == "local"
    tools = {re.match(r"\w+", text)[0] for text in PROJECT["optional-dependencies"]["dev"]}
    for hook in repo["hooks"]:
        assert hook["language"] == "system"
        module = re.match(r"\.venv/bin/python -m (\w+)", hook["entry"])
        assert module and module[1] in tools, hook["entry"]
