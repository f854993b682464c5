"""The process of a stage, or the processes (ranks) that run it together: entry point and end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ldm.base.environment import env_count
from ldm.base.errors import InputError
from ldm.config import find_root
from ldm.stages.fingerprint import check_recorded
from ldm.stages.stage import Stage

BAD_INPUT = 2  # exit code of a stage that ended with an `InputError`
INTERRUPTED = 130  # exit code of a stage that was stopped
CHECKPOINT_SECONDS = 30  # time for a stopped rank to reach its checkpoint
END_SECONDS = 5  # time for a rank to end that has no checkpoint to reach

_stop = SimpleNamespace(requested=False, polled=False)  # polled: by a loop within `stop_at_checkpoint`


def stage_main(stage: Stage, parallel: bool = False) -> None:
    """Run a stage in the project around the working directory and exit: 0, 2 for bad input, 130 when stopped.

    If it is `parallel`, this process starts and watches the `LDM_PROCESSES` ranks that run it, unless it is one of torchrun's.
    """
    _on_signals(_request_stop)
    try:
        if os.environ.get("LDM_OWNER_PIPE"):
            threading.Thread(target=_watch_owner, args=(os.dup(0),), daemon=True).start()
        root, items = find_root(), sys.argv[1:]
        if len(items) != (stage.for_each is not None):
            wanted = f"one of {stage.for_each} in params.yaml" if stage.for_each else "no arguments"
            raise InputError(f"{stage.name} takes {wanted}, found {items}")
        if "DVC_STAGE" in os.environ and stage.name != "code":
            check_recorded(root, stage.name)
        if parallel and "WORLD_SIZE" not in os.environ and (count := env_count("LDM_PROCESSES", 1)) > 1:
            sys.exit(_run_ranks(stage.name, count))
        stage.run(root, *items)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt as stop:
        _on_signals(signal.SIG_IGN)  # a second one does not interrupt the end
        print(f"{stage.name}: {stop if stop.args else 'stopped'}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def _run_ranks(stage: str, count: int) -> int:
    """Run a stage as `count` ranks on this machine. Returns the stage's exit code when all of them have ended.

    The ranks' stdin is a pipe of which only this process holds the other end: they stop when this process closes it or is
    killed. The stderr of ranks other than 0 is shown only if they fail.
    """
    from torch.distributed import TCPStore

    with socket.create_server(("127.0.0.1", 0)) as listening:  # TCPStore itself would listen on all interfaces
        port = listening.getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    variables = os.environ | {
        "WORLD_SIZE": str(count), "MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "LDM_OWNER_PIPE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 opens no store
        "GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback,
    }  # fmt: skip
    read, write = os.pipe()
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(count):
                with (Path(folder) / str(rank)).open("wb") as errors:
                    ranks.append(subprocess.Popen(
                        [sys.executable, "-m", f"ldm.stages.{stage}"], stdin=read, stderr=errors if rank else None,
                        env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True,
                    ))  # fmt: skip
            codes: list[int | None] = [None]
            while None in codes and not any(codes):  # until all have succeeded or one has failed
                time.sleep(0.1)
                codes = [rank.poll() for rank in ranks]
        except KeyboardInterrupt:
            _on_signals(signal.SIG_IGN)
            os.close(write)
            return INTERRUPTED if any(_ended(ranks, CHECKPOINT_SECONDS)) else 0
        failed = {rank: code for rank, code in enumerate(codes) if code}
        refused = [rank for rank, code in enumerate(_ended(ranks, END_SECONDS)) if code == BAD_INPUT]
        if not refused and set(failed.values()) <= {INTERRUPTED}:
            return INTERRUPTED if failed else 0
        for rank in refused[:1] or failed:
            if rank:
                sys.stderr.write((Path(folder) / str(rank)).read_text())
            if not refused:
                print(f"error: process {rank} of this training ended with exit code {failed[rank]}", file=sys.stderr, flush=True)
        return BAD_INPUT if refused else 1


def _ended(ranks: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """Exit codes. Ranks that wait for one that failed notice by themselves, or are killed after some seconds."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(deadline - time.monotonic(), 0))
        rank.kill()  # nothing if it has ended
    return [rank.wait() for rank in ranks]


def _on_signals(handler: Any) -> None:
    """Handle the signals that stop a stage."""
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
