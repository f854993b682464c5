"""Checkpoints: every bit comes back, a kill at any moment leaves a whole one, and an optimizer goes on as if never stopped."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.base.errors import disk_full
from ldm.training import checkpoint
from ldm.training.checkpoint import CheckpointStore, load_optimizer_tensors, optimizer_tensors


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def save_at(store: CheckpointStore, images_seen: int) -> None:
    store.save({"w": torch.full((100,), float(images_seen))}, {"images_seen": images_seen})


def test_every_bit_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "not/yet/there")
    assert store.load() is None
    tensors = {
        "half": torch.randn(3, 4).bfloat16(),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 3).T,
        "odd": torch.tensor([float("inf"), -0.0, 1e-45]),
        "count": torch.tensor([2**62 + 1]),
        "learned": nn.Parameter(torch.randn(2)),
    }
    state = {"images_seen": 64, "curve": [{"loss": 0.1 + 0.2, "lr": 1e-320}], "tracker": {"metrics": [["loss", 0.3, 1, 64]]}}
    store.save(tensors, state)
    loaded = store.load()
    assert loaded is not None and loaded[1] == state
    assert loaded[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[0][name].dtype == tensor.dtype and loaded[0][name].shape == tensor.shape
        assert bits(loaded[0][name]) == bits(tensor.detach())


def test_on_a_full_disk_the_old_one_stays_and_nothing_half_written(tmp_path: Path) -> None:
    store, limits = CheckpointStore(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    save_at(store, 64)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(Exception, match=r"os error 27") as full:
            store.save({"w": torch.zeros(100_000)}, {"images_seen": 128})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert disk_full(full.value, tmp_path) and [path.name for path in tmp_path.iterdir()] == ["000000000064"]
    loaded = store.load()
    assert loaded and loaded[1] == {"images_seen": 64}


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    for images_seen in (64, 128, 10**9):
        save_at(store, images_seen)
        loaded = store.load()
        assert loaded is not None and loaded[1]["images_seen"] == loaded[0]["w"][0] == images_seen
        assert len(list((tmp_path / "store").iterdir())) == 1


def killed_at(number: int, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run `work` in a child that gets SIGKILL at file operation `number`; whether it got so far."""
    child = os.fork()
    if child == 0:
        try:
            left = [number]

            def before(operation: Callable[..., Any]) -> Callable[..., Any]:
                def run(*args: Any, **kwargs: Any) -> Any:
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return operation(*args, **kwargs)

                return run

            for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "open")):
                monkeypatch.setattr(owner, name, before(getattr(owner, name)))
            monkeypatch.setattr(checkpoint, "save_tensors", before(checkpoint.save_tensors))
            monkeypatch.setattr(Path, "write_text", before(Path.write_text))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_kill_before_any_file_operation_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, number = [], 0
    while True:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        store = CheckpointStore(tmp_path / "store")
        save_at(store, 64)
        killed = killed_at(number, lambda: save_at(store, 128), monkeypatch)  # noqa: B023
        loaded = store.load()
        assert loaded is not None and loaded[1]["images_seen"] in (64, 128)
        assert (loaded[0]["w"] == loaded[1]["images_seen"]).all()
        seen.append(loaded[1]["images_seen"])
        save_at(store, 128 if seen[-1] == 64 else 192)  # what the kill left does not hinder the next one
        loaded = store.load()
        assert loaded is not None and (loaded[0]["w"] == loaded[1]["images_seen"]).all() and loaded[1]["images_seen"] > seen[-1]
        if not killed:
            break
        number += 1
    assert seen == sorted(seen) and {64, 128} == set(seen)
    assert number >= 8  # it was killed at that many different moments


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.conv(x)


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step)).to(memory_format=torch.channels_last)
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_goes_on_with_the_same_bits(layout: torch.memory_format, fused: bool, tmp_path: Path) -> None:
    """Fused kernels walk weights and moments in memory order, so the layout must come back as well."""
    torch.manual_seed(0)
    initial = Net().state_dict()

    def fresh() -> tuple[Net, torch.optim.Optimizer]:
        net = Net().to(memory_format=layout)
        net.load_state_dict(initial)
        groups = [{"params": [net.conv.weight, net.scale]}, {"params": [net.conv.bias, net.unused], "lr": 0.1}]
        return net, torch.optim.AdamW(groups, lr=0.02, fused=fused)

    straight, optimizer = fresh()
    train(straight, optimizer, range(8))
    first, optimizer = fresh()
    train(first, optimizer, range(4))
    store = CheckpointStore(tmp_path / "store")
    store.save(optimizer_tensors(optimizer), {"images_seen": 4})
    second, optimizer = fresh()
    second.load_state_dict(first.state_dict())
    loaded = store.load()
    assert loaded is not None
    load_optimizer_tensors(optimizer, loaded[0])
    train(second, optimizer, range(4, 8))
    for name, value in straight.state_dict().items():
        assert bits(second.state_dict()[name]) == bits(value), name
    assert optimizer.param_groups[1]["lr"] == 0.1
