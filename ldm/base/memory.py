"""How much is computed at once outside training: as much as memory takes, measured with one item and not guessed from settings.

Training has `batch_size`, which changes results. Elsewhere the number of images, captions or samples of a part changes speed and
rounding only, so it follows from what one of them takes and from the memory of this kind of machine.
"""

import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.base.errors import env_positive

MOST = 256  # items at once: more are not faster
SHARE, CROWDED = 1 / 8, 1 / 2  # of all memory that a part may take, and of what is free where that is less
WORKSPACE = 2.0  # what is set aside for each byte of tensors: kernels need more, on a CPU up to 1.8 times in all
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
T = TypeVar("T")


def budget(device: torch.device) -> int:
    """Bytes that a part may take: `LDM_MEMORY_GB`, else `SHARE` of the device's memory, or `CROWDED` of the free one if less."""
    limit = env_positive("LDM_MEMORY_GB", "gigabytes") * 1e9
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free, total = _host()
    return int(min(limit, SHARE * total, CROWDED * free))


def _host() -> tuple[int, int]:
    """Free and total memory of this machine, or of the container that this process is in."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, StopIteration):  # Linux: what can be had without swapping, caches among it
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))  # goes when it is needed
        total, free = min(total, limit), min(free, limit - used + cached)
    return free, total


class Parts:
    """Divides items into parts that fit into memory. `device` is where they are computed, `what` they are called."""

    def __init__(self, device: torch.device, what: str = "images") -> None:
        self.device, self.what = device, what
        self._sizes: dict[Hashable, int] = {}  # of parts, by kind of item

    def __call__(
        self, function: Callable[[slice], T], count: int, *, kind: Hashable = None, one: Callable[[], Any] | None = None
    ) -> Iterator[T]:
        """`function` of consecutive slices of `count` items. Where one does not fit, smaller ones are tried, and it is said.

        Items of one `kind`, such as a shape, take the same memory. It is measured by `one`, which computes a single item, by
        default the first; its result is not used, so that how work is divided does not depend on what was done before.
        """
        if kind not in self._sizes and count > 1:
            _, taken = measured(one or functools.partial(function, slice(0, 1)), self.device)
            self._sizes[kind] = max(1, min(MOST, _power_of_two(budget(self.device) / max(taken, 1))))
        start, size = 0, self._sizes.get(kind, 1)
        while start < count:
            part = slice(start, min(start + size, count))
            try:
                result = function(part)
            except RuntimeError as error:
                if not _out_of_memory(error) or part.stop - part.start == 1:
                    raise
            else:
                yield result
                start = part.stop
                continue
            if part.stop - part.start == self._sizes[kind]:  # and not the rest of an earlier one
                self._sizes[kind] //= 2
            size = (part.stop - part.start) // 2
            if self.device.type == "cuda":  # here, where the error and its frames are gone
                torch.cuda.empty_cache()
            print(f"memory: {part.stop - start} {self.what} do not fit at once; trying {size}", flush=True)


def measured(function: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """The result of a function, and the bytes of device memory to set aside for another like it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        return result, int(torch.cuda.max_memory_allocated(device) - before)
    with _Living() as living:
        result = function()
    return result, int(WORKSPACE * living.peak)


class _Living(TorchDispatchMode):
    """The largest sum of the bytes of tensors that were made and lived at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and importing the compiler takes longer than importing torch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            if (key := _storage(tensor)) not in given:  # neither a view nor in place
                given.add(key)
                storage = tensor.untyped_storage()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._end, storage.nbytes())
        return result

    def _end(self, size: int) -> None:
        self.now -= size


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _power_of_two(x: float) -> int:
    """The largest one up to x, so that a little more or less free memory does not change how work is divided."""
    return 1 << max(int(x).bit_length() - 1, 0)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
