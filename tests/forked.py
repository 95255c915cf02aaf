"""Scripts in processes of their own that fork off one which has imported what they need.

Importing jax and PyTorch takes longer than what most such scripts then do. Nothing of them has been used when
a script begins: its process starts threads, jax's backends and compilers of its own.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

SECONDS = 120
# A line in, JSON: [script, folder to run in, files for what it prints]. A line out: its exit status.
_SERVER = r"""
import json, os, sys, traceback, warnings

def _run(script, folder, *files):
    status = 1
    try:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        if folder is not None:
            os.chdir(folder)
        exec(compile(script, "<script>", "exec"), globals())
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

for _line in sys.stdin:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax's own, at the fork
        _child = os.fork()
    if _child == 0:
        _run(*json.loads(_line))
    print(os.waitstatus_to_exitcode(os.waitpid(_child, 0)[1]), flush=True)
"""


class Forks:
    """The process that forks: see `start`."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def run(self, script: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a script, in a folder, after what the process began with, and in its names.

        One that hangs is ended, with the process that forks, after `SECONDS`.
        """
        process = self._process
        assert process.stdin and process.stdout
        with tempfile.TemporaryDirectory() as where:
            files = Path(where, "out"), Path(where, "err")
            request = [script, folder and str(folder), *map(str, files)]
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            clock = threading.Timer(SECONDS, os.killpg, (process.pid, signal.SIGKILL))
            clock.start()
            status = process.stdout.readline()
            clock.cancel()
            assert status, (
                "the process that forks has ended: a script hung, or its message is above"
            )
            texts = [file.read_text() if file.exists() else "" for file in files]
        return subprocess.CompletedProcess([], int(status), *texts)


@contextlib.contextmanager
def start(begin: str, *options: str, **environment: str) -> Iterator[Forks]:
    """A process that runs `begin` and then forks for each script. `options` are those of the interpreter."""
    with subprocess.Popen(
        [sys.executable, *options, "-c", begin + _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    ) as process:
        yield Forks(process)
