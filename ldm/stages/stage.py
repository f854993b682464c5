"""The start and end of a stage's process, and what dvc.yaml says of a stage."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from ldm.base.errors import InputError, disk_full, env_count
from ldm.base.options import value_at
from ldm.config import Settings, find_root
from ldm.stages.fingerprint import check_recorded

NAMES = (  # every stage, each after those it depends on
    "code", "source", "shard", "pretrained", "train_vae", "cache_latents", "train_unet", "evaluate", "sample_posterior",
)  # fmt: skip
BAD_INPUT = 2  # exit code of a stage that ended with an `InputError`
BUSY = 75  # exit code of a stage whose very training another process does now
INTERRUPTED = 130  # exit code of a stage that was stopped
CHECKPOINT_SECONDS = 30  # time for a stopped rank to reach its checkpoint
END_SECONDS = 5  # time for a rank to end that has no checkpoint to reach


class Busy(InputError):
    """Another process does the same work now; when it has ended, DVC's run-cache has the result."""


_stop = SimpleNamespace(requested=False, polled=False)  # polled: by a loop within `stop_at_checkpoint`


def stage_params(root: Path, name: str, settings: Settings) -> dict[str, Any]:
    """The values of the settings that dvc.yaml names for a stage, by their dotted keys."""
    said, values = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"][name], settings.model_dump()
    return {key: value_at(values, key) for key in said.get("do", said)["params"] if isinstance(key, str)}


def stage_main(name: str, run: Callable[..., None], parallel: bool = False) -> None:
    """Run a stage in the project around the working directory and exit: 0, 2 for bad input, 130 when stopped.

    `run` gets the project's folder, and the item of a stage that dvc.yaml runs for each item of a list. If the stage is
    `parallel`, this process starts and watches the `LDM_PROCESSES` ranks that run it, unless it is one of torchrun's.
    """
    on_signals(_request_stop)
    root = Path.cwd()
    try:
        if os.environ.get("LDM_OWNER_PIPE"):
            threading.Thread(target=_watch_owner, args=(os.dup(0),), daemon=True).start()
        if len(sys.argv) > run.__code__.co_argcount:
            raise InputError(f"{name}: found {sys.argv[-1]!r}, which this stage does not take")
        root = find_root()
        if "DVC_STAGE" in os.environ and name != "code":
            check_recorded(root, name)
        if parallel and "WORLD_SIZE" not in os.environ and (count := env_count("LDM_PROCESSES", 1)) > 1:
            from ldm.stages.ranks import run_ranks  # imports torch

            sys.exit(run_ranks(name, count))
        run(root, *sys.argv[1:])
    except Exception as error:
        written = (root, *(root / place for place in (".ldm", "data", "models", "reports")), Path(tempfile.gettempdir()))
        refusal = error if isinstance(error, InputError) else disk_full(error, *written)
        if refusal is None:
            raise
        with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
            print(f"error: {refusal}", file=sys.stderr, flush=True)
        sys.exit(BUSY if isinstance(error, Busy) else BAD_INPUT)
    except KeyboardInterrupt as stop:
        on_signals(signal.SIG_IGN)  # a second one does not interrupt the end
        print(f"{name}: {stop if stop.args else 'stopped'}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def on_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


@contextlib.contextmanager
def stop_at_checkpoint() -> Iterator[Callable[[], bool]]:
    """Within, a stop does not interrupt; the yielded function says whether one was requested."""
    _stop.polled = True
    try:
        yield lambda: _stop.requested
    finally:
        _stop.polled = False


def _request_stop(*_: object) -> None:
    _stop.requested = True
    if _stop.polled:
        return
    if threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # also ends a wait in the system, such as a sleep


def _watch_owner(pipe: int) -> None:
    """Stop when the owner closes the other end of the pipe or dies, so that a stage never outlives it."""
    with contextlib.suppress(OSError):
        while os.read(pipe, 1):
            pass
    _request_stop()
    if "RANK" in os.environ:  # it may be waiting for another rank that has ended
        time.sleep(CHECKPOINT_SECONDS if _stop.polled else END_SECONDS)
        os._exit(INTERRUPTED)
