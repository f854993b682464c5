"""Work on many files with all cores."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from ldm.base.errors import InputError, env_count
from ldm.data.images import UnreadableImage

Progress = Callable[[int, int], None]  # (done, total)

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
def mapped(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, progress: Progress = lambda done, total: None
) -> Iterator[Iterator[Any]]:
    """`map(function, items)` by `workers` processes, in order; by this one if there are fewer than two.

    `progress` is told how many results were read, and of how many. An `UnreadableImage` is the result of its
    item; what else `function` raises is raised here. The processes end with this one; if one dies, `InputError` is raised.
    """

    def attempt(item: Any) -> Any:
        try:
            return function(item)
        except Exception as error:  # returned: torch would wrap it in a traceback
            return error

    def results(found: Iterable[Any]) -> Iterator[Any]:
        progress(0, len(items))
        for done, result in enumerate(found, start=1):
            if isinstance(result, Exception) and not isinstance(result, UnreadableImage):
                raise result
            progress(done, len(items))
            yield result

    if workers < 2 or sys.platform == "darwin":  # whose system libraries do not survive a fork
        yield results(map(attempt, items))
        return
    import torch
    from torch.utils.data import DataLoader

    options: dict[str, Any] = {"generator": torch.Generator(), "multiprocessing_context": "fork", "worker_init_fn": _start}
    options |= {"num_workers": workers, "prefetch_factor": AHEAD, "collate_fn": lambda chunk: [attempt(item) for item in chunk]}
    batches: Any = iter(DataLoader(items, CHUNK, **options))  # type: ignore[arg-type]  # any sequence will do
    try:
        yield results(chain.from_iterable(batches))
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise InputError("a worker process was killed; if memory ran out, set LDM_WORKERS to fewer than now") from None
    finally:
        batches._shutdown_workers()  # now, not when the traceback that holds it is gone
        for worker in batches._workers:  # some may just have been told to end
            worker.join()


def _start(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()

    def end_with_parent() -> None:  # torch's workers would first send their results, which nobody reads
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
