"""Progress of a step: a bar on a terminal, elsewhere a line at least every ten seconds."""

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

# Held while a line is printed, so that no fork copies half a line and the interpreter does not shut down in the middle of one.
_printing = threading.RLock()
os.register_at_fork(before=_printing.acquire, after_in_parent=_printing.release, after_in_child=_printing.release)
atexit.register(_printing.acquire)


class Progress(contextlib.AbstractContextManager["Progress"]):
    """A bar with speed and time left on a terminal; elsewhere plain lines. If no line follows, a thread repeats the last one.

    It ends at `total`, or with `close()`. A step without a count, `with Progress("evaluate: samples"): ...`, shows its seconds.
    """

    INTERVAL = 5.0  # least seconds between plain lines
    HEARTBEAT = 8.0  # most seconds between plain lines; two more are for a busy machine

    def __init__(self, label: str, total: int | None = None, unit: str = "images"):
        self.label, self.total, self.unit = label, total, unit
        self._updated = self._printed = time.monotonic()
        self._origin: tuple[float, int] | None = None  # time and count of the first call
        self._position = self._note = ""
        self._closed = threading.Event()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._open_bar()
            return
        if total is None:
            self._print()
        self._thread = threading.Thread(target=self._beat, name=f"progress of {label}", daemon=True)
        self._thread.start()

    def __call__(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that `done` of the total are done, in the first call at the start, and metrics until there are others."""
        finished = self.total is not None and done >= self.total
        with _printing:
            if self._closed.is_set():
                return
            now, due = time.monotonic(), finished or self._origin is None
            self._updated, (start, first) = now, self._origin or (now, done)
            self._origin = start, first
            self._position = f"{done:,}{'' if self.total is None else f'/{self.total:,}'} {self.unit}"
            if metrics:
                self._note = " ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:3])
            rate = (done - first) / max(now - start, 1e-9)  # of this process
            speed = f"{rate:{',.0f' if rate >= 10 else '.2g'}} {self.unit}/s" if rate > 0 else ""
            if self._bar is not None:
                self._bar.update(self._task, completed=done, rate=speed, note=self._note)
            elif due or now - self._printed >= self.INTERVAL:
                left = f"{max(self.total - done, 0) / rate:,.0f} s left" if speed and self.total is not None else ""
                self._print(self._position, speed, left, self._note)
        if finished:
            self.close()

    def close(self) -> None:
        """Print nothing from here on."""
        with _printing:
            self._closed.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._thread.join(timeout=1)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_bar(self) -> None:
        from rich import console, progress

        text = progress.TextColumn
        columns: list[progress.ProgressColumn] = [text("{task.description}"), progress.BarColumn(), text("{task.elapsed:,.0f} s")]
        if self.total is not None:
            columns += [progress.MofNCompleteColumn(), text("{task.fields[rate]}"), progress.TimeRemainingColumn(), text("left")]
        self._bar = progress.Progress(*columns, text("{task.fields[note]}"), console=console.Console(stderr=True))
        self._task = self._bar.add_task(self.label, total=self.total, rate="", note="")
        self._bar.start()
        atexit.register(self._bar.stop)  # also after a failure, or the terminal keeps a hidden cursor

    def _beat(self) -> None:
        while not self._closed.wait(max(self._printed + self.HEARTBEAT - time.monotonic(), 0)):
            with _printing:
                if not self._closed.is_set() and (now := time.monotonic()) - self._printed >= self.HEARTBEAT:
                    waited = f"{now - self._updated:.0f} s"
                    self._print(f"{self._position}, last update {waited} ago" if self._position else waited, self._note)

    def _print(self, *parts: str) -> None:
        self._printed = time.monotonic()
        words = "  ".join(filter(None, parts))
        with contextlib.suppress(OSError):  # nobody reads any more; the work goes on until it is stopped
            print(f"{self.label}: {words}\n" if words else f"{self.label}\n", end="", flush=True)  # one write, never split
