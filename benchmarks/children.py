"""A benchmark's child: a process that prepares, waits for its turn to measure, and gives rows as they come.

`wait_for_turn` and `give` are called in the child, `Child` is what its parent has of it.
"""

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks import machine

_READY, _ROW = "READY", "ROW "


def wait_for_turn() -> None:
    """Tells the parent that all is prepared, and waits until this process may measure."""
    print(_READY, flush=True)
    sys.stdin.readline()


def give(rows: Iterable[dict[str, Any]], commit_id: str | None = None) -> None:
    """Gives the parent rows as they come, each with where it was measured."""
    facts = machine.facts(commit_id)  # ahead of the timings: it starts processes
    for row in rows:
        print(_ROW + json.dumps(row | facts), flush=True)


class Child:
    """`python -m module argv`, which calls `give`, and `wait_for_turn` meanwhile."""

    def __init__(self, module: str, argv: Sequence[str]):
        command, pipe = [sys.executable, "-m", module, *argv], subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, cwd=machine.ROOT
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.early: list[dict[str, Any]] = []  # rows that came before it was ready
        self.is_ready = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for text in lines:
                self.lines.put(text)
        self.lines.put(None)

    def _rows(self, patience: float, until: float, last: str = "") -> Iterator[dict[str, Any]]:
        """Rows to the line `last`, or to the end of the output. Other lines are printed."""
        while True:
            left = min(patience, until - time.monotonic())
            try:
                text = self.lines.get(timeout=max(left, 0.1))
            except queue.Empty:
                silent = f"silent for {left:.0f} s" if left >= patience else "no time was left"
                raise TimeoutError(silent) from None
            if text is None:
                self.lines.put(None)  # it stays at its end
                return
            if last and text.strip() == last:
                return
            if text.startswith(_ROW):
                yield json.loads(text.removeprefix(_ROW))
            else:
                print(text, end="", flush=True)

    def ready(self, patience: float, until: float) -> None:
        """Waits until it is ready, or has ended.

        Args:
            patience: seconds of silence that are allowed.
            until: when the time is up, on `time.monotonic`.

        Raises:
            TimeoutError: it was silent for too long, or the time is up.
        """
        if not self.is_ready:
            for row in self._rows(patience, until, _READY):
                self.early.append(row)
            self.is_ready = True

    def rows(self, patience: float, until: float) -> Iterator[dict[str, Any]]:
        """Its rows, as they come; arguments and errors are those of `ready`."""
        while self.early:
            yield self.early.pop(0)
        yield from self._rows(patience, until)

    def go(self) -> None:
        """Tells it to measure."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except OSError:  # it has ended
            pass

    def end(self) -> int:
        """Its exit code; it is ended if it has not yet."""
        assert self.process.stdin is not None
        if self.reader.is_alive():
            self.process.kill()
        code = self.process.wait()
        self.reader.join(timeout=5)
        try:
            self.process.stdin.close()
        except OSError:
            pass
        return code
