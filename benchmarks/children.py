"""Benchmarks that run as children: a process that prepares, waits to be told, and gives rows as they come."""

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import machine


class Child:
    """`python -m module argv`, which prints "READY", reads a line, and prints rows as "ROW " and JSON."""

    def __init__(self, module: str, argv: Sequence[str]):
        command, pipe = [sys.executable, "-m", module, *argv], subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, cwd=machine.ROOT
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.is_ready = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for text in lines:
                self.lines.put(text)
        self.lines.put(None)

    def rows(self, patience: float, until: float, last: str = "") -> Iterator[dict[str, Any]]:
        """Rows as they come, to the line `last` or to the end of the output. Other lines are printed.

        Args:
            patience: seconds of silence that are allowed.
            until: when the time is up, on `time.monotonic`.

        Raises:
            TimeoutError: it was silent for too long, or the time is up.
        """
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
            if text.startswith("ROW "):
                yield json.loads(text[4:])
            else:
                print(text, end="", flush=True)

    def ready(self, patience: float, until: float) -> None:
        """Waits until it is ready, or has ended.

        Raises:
            TimeoutError: as `rows`.
        """
        if not self.is_ready:
            for _ in self.rows(patience, until, "READY"):
                pass
            self.is_ready = True

    def go(self) -> None:
        """Tells it to begin."""
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
