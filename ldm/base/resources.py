"""What a training uses: speed, memory, load. No out holds it; MLflow shows metrics named `system/…` apart."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.base import distributed

PRODUCT, PRODUCTS = 4096, 8  # width of the matrices whose product tells a GPU's peak; how often it is timed
HOST_BYTES = 1 if sys.platform == "darwin" else 1024  # unit of the kernel's peak


class Resources:
    """Measures between two rows of a curve. With `count_flops`, it also counts the operations of the first forward pass.

    Training takes three times those: a backward pass has two products for each of the forward's. They are set against the best
    rate of a product of 4096 x 4096 matrices in the training's precision on this very device.
    """

    def __init__(self, device: torch.device, images_seen: int, dtype: torch.dtype, count_flops: bool) -> None:
        self._device = device
        self._flops, self._uncounted = 0.0, count_flops  # of training on an image
        self._peak = peak_flops(device, dtype) if count_flops else 0.0
        self._images, self._time = images_seen, time.monotonic()

    @contextlib.contextmanager
    def forward(self, images: int) -> Iterator[None]:
        """Around each forward pass."""
        if not self._uncounted:
            yield
            return
        with _Counter() as counter:
            yield
        self._flops, self._uncounted = 3 * counter.total / images, False

    def metrics(self, images_seen: int) -> dict[str, float]:
        """Since the last call; peaks since the process began."""
        now = time.monotonic()
        rate = (images_seen - self._images) / max(now - self._time, 1e-9)
        self._images, self._time = images_seen, now
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * HOST_BYTES
        found = {"images_per_second": rate, "peak_memory_megabytes": peak / 1e6}
        if self._device.type == "cuda":
            found["peak_gpu_memory_megabytes"] = torch.cuda.max_memory_allocated(self._device) / 1e6
            with contextlib.suppress(Exception):  # without NVIDIA's package, or on a part of a GPU
                found["gpu_utilization_percentage"] = float(torch.cuda.utilization(self._device))
        if self._flops:
            found["model_flops_utilization"] = self._flops * rate / distributed.ranks() / self._peak
        return {f"system/{name}": value for name, value in found.items()}


class _Counter(TorchDispatchMode):
    """Counts by torch's own table. Its `FlopCounterMode` replaces some operations by others, which round differently."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that a device reaches in a product of large matrices."""
    draw = torch.Generator(device).manual_seed(0)  # the training's own generators stay as they are
    a, b = (torch.randn(PRODUCT, PRODUCT, generator=draw, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * PRODUCT**3 / min(seconds)
