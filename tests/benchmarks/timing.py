"""Interleaved timing of the same work done in several ways, how much of a device it used, and seconds of training."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import pytest
import torch

from ldm.base.device import default_device

PAIRS = 15
LAYOUTS = {"default": torch.contiguous_format, "channels-last": torch.channels_last}
# Dense bf16 products per second at most, in 1e12, by a part of the device's name: the vendor's data sheets.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "RTX 4090": 165}

Passes = dict[str, Callable[[], Any]]


def first_losses(steps: Passes, tolerance: float) -> Passes:
    """Take each step once, and leave out those that cannot be compiled here; all have the same loss."""
    losses, able = {}, {}
    for name, step in steps.items():
        start = time.perf_counter()
        try:
            losses[name] = step()
        except Exception as error:
            if "compiled" not in name:
                raise
            print(f"\n{name}: cannot be compiled here ({type(error).__name__}: {str(error).strip().splitlines()[0]})")
            continue
        able[name] = step
        if "compiled" in name:
            print(f"\n{name}: first step {time.perf_counter() - start:.0f} s", end="", flush=True)
    assert list(losses.values()) == pytest.approx([next(iter(losses.values()))] * len(losses), rel=tolerance)
    return able


def interleaved(passes: Passes, rounds: int = PAIRS) -> dict[str, list[float]]:
    """Seconds of each pass, the first round unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def times_faster(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds, so that a machine that slows down for a while does not decide."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


def compare(title: str, seconds: dict[str, list[float]], batch: int) -> None:
    """Print milliseconds of every configuration, and ratios of our best one to each of diffusers'."""
    import diffusers

    own = {name: times for name, times in seconds.items() if name.startswith("ours")}
    best = min(own, key=lambda name: median(own[name]))
    peers = {name: times for name, times in seconds.items() if name not in own}
    fastest = min(peers, key=lambda name: median(peers[name]))
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"\n{title}, batch {batch}, {threads}; ratios are of {best!r}")
    for name, times in seconds.items():
        ratio = f", ratio {times_faster(seconds[best], times):.2f}" if name in peers else ""
        note = " <- its best" if name == fastest else ""
        print(f"  {name}: {median(times) * 1e3:.1f} ms, {batch / median(times):.0f} images/s{ratio}{note}")
    for name, times in own.items():
        ratios = ", ".join(f"{times_faster(times, peers[peer]):.2f} of {peer!r}" for peer in peers)
        print(f"  {name!r}: {ratios}", flush=True)


def activations(step: Callable[[], Any]) -> int:
    """Bytes that a step takes of the GPU at its peak beyond what is held between steps."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak_flops() -> float | None:
    """Of the GPU, from its name or from LDM_BENCH_PEAK_TFLOPS."""
    name = torch.cuda.get_device_name()
    known = next((tera for part, tera in PEAK_TFLOPS.items() if part in name), None)
    given = os.environ.get("LDM_BENCH_PEAK_TFLOPS") or known
    return float(given) * 1e12 if given else None


class Stopwatch:
    """Seconds of training: of the processor, all threads together, or of the clock where a GPU does the work."""

    def __init__(self) -> None:
        self.on_gpu = default_device().type == "cuda"
        self.total, self._since = 0.0, self._now()

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if self.on_gpu else time.process_time()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.total += self._now() - self._since
        yield
        self._since = self._now()
