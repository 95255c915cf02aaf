"""Builds the site of docs/ into site/, as zensical.toml says; every warning is an error.

`zensical build --strict` fails for a link to a page or a heading that does not exist. It only prints what
griffe says of a docstring that it cannot read, parts of which are then missing on the page.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPLAINTS = ("griffe:", "Warning")


def main() -> int:
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, end="")
    complaints = [line for line in done.stdout.splitlines() if line.startswith(COMPLAINTS)]
    if complaints:
        print(f"{len(complaints)} warning(s), which are errors here", file=sys.stderr)
    return done.returncode or bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
