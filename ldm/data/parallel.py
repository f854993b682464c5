"""Work on many files with all cores."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any, TypeVar

from ldm.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """`LDM_WORKERS`, else the cores that this process may use. Never changes a result."""
    asked = os.environ.get("LDM_WORKERS", "")
    if not asked:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked.isdecimal():
        raise InputError(f"LDM_WORKERS is {asked!r}; set it to a number of processes (0: none beside the main one)")
    return int(asked)


def loader_workers(device: str) -> int:
    """Processes that decode ahead of training: `LDM_WORKERS`, else the cores beside a GPU; on a CPU all of them train."""
    return default_workers() if os.environ.get("LDM_WORKERS") or device != "cpu" else 0


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Results in the order of `items`, by `workers` processes that end with this one; in this process for fewer than two.

    `function` must be a module's own. What it raises is raised here; a worker that dies is an error, never a wait.
    """
    if workers < 2:
        yield from map(function, items)
        return
    # Spawned, not forked: forked siblings would hold each other's sentinel open and outlive a killed parent.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)
    others = set(multiprocessing.active_children())
    try:
        yield from pool.map(function, items)
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says what becomes of us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    wait([parent.sentinel])
    os._exit(1)
