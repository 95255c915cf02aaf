"""Whether pyright finds the mistakes in tests/meta/user_mistakes.py, and those only.

    python tools/check_user_types.py     (an interpreter with pyright, jax and torch)

Were our functions `Any` to a type checker, as names are that a module resolves lazily, it would find none.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
FILE = ROOT / "tests" / "meta" / "user_mistakes.py"


def marked(source: str) -> set[tuple[int, str]]:
    """(line, rule) of every comment that says `error: RULE`."""
    lines = enumerate(source.splitlines(), 1)
    return {(n, m[1]) for n, text in lines if (m := re.search(r"# error: (\w+)$", text))}


def reported(file: pathlib.Path) -> set[tuple[int, str]]:
    """(line, rule) of every error that pyright reports in a copy of a file, in a folder of its own: there the
    configuration of this repository, which leaves the file out, does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(file, folder)
        settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
        (pathlib.Path(folder) / "pyrightconfig.json").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "pyright", "--outputjson", "--project", folder]
        command += ["--pythonpath", sys.executable]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        sys.exit(f"pyright gave no report: {done.stdout}{done.stderr}")
    if not answer["summary"]["filesAnalyzed"]:
        sys.exit(f"pyright looked at no file: {done.stdout}{done.stderr}")
    found = [item for item in answer["generalDiagnostics"] if item["severity"] == "error"]
    return {(item["range"]["start"]["line"] + 1, item.get("rule", "none")) for item in found}


def main() -> int:
    wanted, found = marked(FILE.read_text()), reported(FILE)
    for line, rule in sorted(wanted - found):
        print(f"{FILE.relative_to(ROOT)}:{line}: pyright does not report {rule}")
    for line, rule in sorted(found - wanted):
        print(
            f"{FILE.relative_to(ROOT)}:{line}: pyright reports {rule}, which no comment there names"
        )
    if wanted != found:
        return 1
    print(f"pyright finds the {len(wanted)} mistakes of {FILE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
