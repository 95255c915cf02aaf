"""The folder that a command will write into, tried before the command's work is done."""

import tempfile
from pathlib import Path


def check(folder: Path) -> None:
    """Makes the folder, and a file in it for a moment.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
