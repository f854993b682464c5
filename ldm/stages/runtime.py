"""What every stage process shares: its entry point, its end, its device, its work folder, its progress lines."""

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ldm.config import find_root
from ldm.errors import InputError

INTERRUPTED = 130  # exit code of a stage that was stopped


def stage_main(name: str, run: Callable[[Path], None]) -> None:
    """Run a stage in the project around the working directory and exit: 0, 2 for bad input, 130 when stopped."""
    signal.signal(signal.SIGTERM, lambda *_: _stop.request())
    signal.signal(signal.SIGINT, lambda *_: _stop.request())
    if os.environ.get("LDM_OWNER_PIPE"):
        threading.Thread(target=_watch_owner, daemon=True).start()
    try:
        run(find_root())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # a second wish to stop must not turn the exit code into another
        print(f"{name}: {stop if stop.args else 'stopped'}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


class _Stop:
    """A wish to end: raised in the main thread, or left for a loop that polls it to end at a checkpoint."""

    def __init__(self) -> None:
        self.polled = False
        self.requested = False

    def request(self) -> None:
        self.requested = True
        if not self.polled:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            main = threading.main_thread().ident  # a real signal, which also ends a wait in the system, such as a sleep
            signal.pthread_kill(main or 0, signal.SIGINT)


_stop = _Stop()


@contextlib.contextmanager
def stop_at_checkpoint() -> Iterator[Callable[[], bool]]:
    """Within, a stop does not interrupt; the yielded function says whether one was asked for."""
    _stop.polled = True
    try:
        yield lambda: _stop.requested
    finally:
        _stop.polled = False


def _watch_owner() -> None:
    """Stop when stdin, the pipe that the owner holds open, closes: whoever died in between, nothing outlives it."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    if int(os.environ.get("RANK", "0")) > 0:  # not the process that writes: it may be waiting for one that is no more
        os._exit(INTERRUPTED)
    _stop.request()


def set_up(deterministic: bool) -> Any:
    """The device to compute on, with deterministic kernels where asked."""
    import torch

    from ldm.device import default_device, reuse_freed_memory

    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: bounds and latents are compared to more than 10 bits
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = default_device()
    if device.type == "cpu":
        reuse_freed_memory()
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return device


def work_key(stage: str, params: dict[str, Any], inputs: dict[str, str]) -> str:
    """Identity of a run of a stage: its parameters, the hashes of its inputs, the code loaded here, library versions."""
    import numpy
    import torch

    ours = [name for name in sys.modules if name.split(".")[0] in ("ldm", "__main__")]  # the stage itself is __main__
    modules = [(name, getattr(sys.modules[name], "__file__", None)) for name in sorted(ours)]
    code = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in modules if file}
    identity = [stage, params, inputs, code, torch.__version__, numpy.__version__, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:32]


@contextlib.contextmanager
def work_folder(root: Path, stage: str, key: str) -> Iterator[Path]:
    """`.ldm/work/STAGE/KEY`, held by one process at a time. It lies outside DVC's outs, which DVC may delete."""
    folder = root / ".ldm" / "work" / stage / key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process trains this very run; wait for it or stop it") from None
        yield folder


class Progress:
    """A bar with speed and time left on a terminal; elsewhere a plain line every few seconds."""

    INTERVAL = 5.0  # seconds between plain lines

    def __init__(self, label: str, total: int, unit: str = "images"):
        self.label, self.total, self.unit = label, total, unit
        self._origin: tuple[float, int] | None = None  # when and where the first call found the work
        self._printed = 0.0
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(label, total=total, rate="", note="")
            self._bar.start()
            atexit.register(self._bar.stop)  # also after a failure, or the terminal keeps a hidden cursor

    def __call__(self, done: int, metrics: dict[str, float] | None = None) -> None:
        """`done` of the total are through. The first call says where the work stands before it begins."""
        now = time.monotonic()
        if self._origin is None:
            self._origin = now, done
            return
        start, first = self._origin
        rate = (done - first) / max(now - start, 1e-9)
        note = " ".join(f"{name} {value:.4g}" for name, value in list((metrics or {}).items())[:3])
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:,.0f} {self.unit}/s", note=note)
            if done >= self.total:
                self._bar.stop()
        elif now - self._printed >= self.INTERVAL or done >= self.total:
            self._printed = now
            left = (self.total - done) / max(rate, 1e-9)
            where = f"{done:,}/{self.total:,} {self.unit}  {rate:,.0f} {self.unit}/s"
            print(f"{self.label}: {where}  {left:.0f} s left  {note}", flush=True)
