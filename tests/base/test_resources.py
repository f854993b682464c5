"""What is measured of a training: against numbers known beforehand."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm.base import resources
from ldm.base.resources import Resources, peak_flops

CPU = torch.device("cpu")


def test_speed_is_of_the_time_since_the_last_row() -> None:
    used = Resources(CPU, 1000, torch.float32, count_flops=False)
    for seconds, images in ((0.2, 1100), (0.4, 1300)):
        start = time.monotonic()
        time.sleep(seconds)
        rate = used.metrics(images)["system/images_per_second"]
        assert 0.5 < rate * (time.monotonic() - start) / (100 if images == 1100 else 200) <= 1.01


def test_peak_memory_is_that_of_the_kernel() -> None:
    block = torch.ones(2 * 10**7)  # 80 MB
    found = Resources(CPU, 0, torch.float32, count_flops=False).metrics(8)["system/peak_memory_megabytes"]
    del block
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert found == pytest.approx(int(peak.split()[1]) * 1024 / 1e6, rel=0.02) and found > 80


def test_the_first_forward_pass_is_counted_and_training_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers: two operations a weight and pixel, and all of it three times; attention is counted, too."""
    monkeypatch.setattr(resources, "PRODUCT", 256)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 16, 1))
    net.to(memory_format=torch.channels_last)
    images = torch.randn(8, 4, 6, 6).to(memory_format=torch.channels_last)

    def step(used: Resources) -> list[torch.Tensor]:
        net.zero_grad()
        with used.forward(8):
            x = net(images).flatten(2).transpose(1, 2)  # (8, 36, 16)
            loss = nn.functional.scaled_dot_product_attention(x, x, x).square().sum()
        loss.backward()
        return [loss, *(parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None)]

    expected = step(Resources(CPU, 0, torch.float32, count_flops=False))
    used = Resources(CPU, 0, torch.float32, count_flops=True)
    for _ in range(2):
        assert all(map(torch.equal, step(used), expected))
    found, operations = used.metrics(16), 3 * 2 * 36 * (4 * 9 * 8 + 8 * 16 + 2 * 36 * 16)
    assert used._flops == operations
    rate = operations * found["system/images_per_second"]
    assert found["system/model_flops_utilization"] == pytest.approx(rate / used._peak)


def test_the_peak_is_of_the_order_of_numpy_s_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "PRODUCT", 512)
    a, seconds = np.ones((512, 512), np.float32), []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    assert 0.1 < peak_flops(CPU, torch.float32) * min(seconds) / (2 * 512**3) < 10


def test_nothing_is_drawn_from_the_training_s_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "PRODUCT", 64)
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    Resources(CPU, 0, torch.float32, count_flops=True)
    assert torch.equal(torch.randn(3), expected)
