"""The process of a stage: its entry point and its end."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from ldm.base.errors import InputError
from ldm.config import find_root
from ldm.stages.fingerprint import check_recorded
from ldm.stages.stage import Stage

INTERRUPTED = 130  # exit code of a stage that was stopped


def stage_main(stage: Stage) -> None:
    """Run a stage in the project around the working directory and exit: 0, 2 for bad input, 130 when stopped."""
    signal.signal(signal.SIGTERM, lambda *_: _stop.request())
    signal.signal(signal.SIGINT, lambda *_: _stop.request())
    if os.environ.get("LDM_OWNER_PIPE"):
        threading.Thread(target=_watch_owner, daemon=True).start()
    try:
        root, items = find_root(), sys.argv[1:]
        if len(items) != (stage.for_each is not None):
            wanted = f"one of {stage.for_each} in params.yaml" if stage.for_each else "no arguments"
            raise InputError(f"{stage.name} takes {wanted}, found {items}")
        if "DVC_STAGE" in os.environ and stage.name != "code":
            check_recorded(root, stage.name)
        stage.run(root, *items)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # a second wish to stop must not turn the exit code into another
        print(f"{stage.name}: {stop if stop.args else 'stopped'}", file=sys.stderr, flush=True)
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
