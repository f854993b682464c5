"""Work on many files with all cores."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from typing import Any

from ldm.base.environment import env_count
from ldm.base.errors import InputError

Run = Callable[..., Any]

CHUNK = 16  # items of a task
AHEAD = 8  # tasks whose results wait, for each process
IMAGES_PER_WORKER = 500  # fewer are done before another process has started


def default_workers() -> int:
    """`LDM_WORKERS`, else the number of cores that this process may use. Never changes a result."""
    if os.environ.get("LDM_WORKERS"):
        return env_count("LDM_WORKERS", 0)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers(device: str) -> int:
    """Processes that decode ahead of training: `LDM_WORKERS`, else the cores beside a GPU; none on a CPU, where all train."""
    return default_workers() if os.environ.get("LDM_WORKERS") or device != "cpu" else 0


@contextlib.contextmanager
def processes(count: int) -> Iterator[Run]:
    """A `map` that uses `count` processes and gives results in order; the built-in `map` if `count` is below two.

    The mapped function must be importable from its module. Its errors are raised here. The processes end with this one; if
    one of them dies, `InputError` is raised.
    """
    if count < 2:
        yield map
        return
    # Spawned, not forked: forked siblings would hold each other's sentinel open and outlive a killed parent.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start)
    others = set(multiprocessing.active_children())
    try:
        yield functools.partial(_in_order, pool, count * AHEAD)
    except BaseException as error:
        children = set(multiprocessing.active_children()) - others
        for child in children:
            child.terminate()
        for child in children:
            wait([child.sentinel])
        results: Any = pool._result_queue
        results._writer.close()  # else the pool would wait for the rest of a result that was being sent
        if isinstance(error, BrokenProcessPool):
            raise InputError("a worker process was killed; if memory ran out, set LDM_WORKERS to fewer than now") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, ahead: int, function: Run, items: Iterable[Any]) -> Iterator[Any]:
    """Like `pool.map`, with at most `ahead` tasks that wait to be read."""
    left = iter(items)
    submitted = (pool.submit(_each, function, chunk) for chunk in iter(lambda: list(islice(left, CHUNK)), []))
    pending = deque(islice(submitted, ahead))
    while pending:
        # Of a process that dies while it sends a result, the pool would wait for the rest.
        while not futures.wait([pending[0]], timeout=1).done:
            if any(process.exitcode is not None for process in list(pool._processes.values())):
                raise BrokenProcessPool
        yield from pending.popleft().result()
        pending.extend(islice(submitted, 1))


def _each(function: Run, items: list[Any]) -> list[Any]:
    return list(map(function, items))


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent: Any = multiprocessing.parent_process()

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
