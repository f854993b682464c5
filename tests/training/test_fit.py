"""The training loop against float64 recursions in numpy, and against itself killed, stopped and resumed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_two_ranks
from safetensors.torch import load_file
from tiny import with_soak
from torch import Tensor, nn

from ldm.base import distributed
from ldm.base.randomness import fill_normal, seed_for
from ldm.data.batches import order
from ldm.training import fit as loop
from ldm.training.checkpoint import CheckpointStore
from ldm.training.fit import Ema, Execution, Fitted, fit, global_norm, learning_rate
from ldm.training.optimizers import AdamW, Optimizer, Sgld

PLAIN = Execution()
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Plan:
    images: int = 96
    batch_size: int = 8
    lr: float = 0.05
    warmup_images: int = 24
    optimizer: Optimizer = AdamW(weight_decay=0.1)  # noqa: RUF009 (frozen)
    ema_halflife_images: int = 40
    checkpoint_images: int = 32


USED = ("system/images_per_second", "system/peak_memory_megabytes")  # logged beside the curve, on a CPU


class Metrics:
    """A tracker with MLflow's rule: a metric with the same key, value, time and position is stored once."""

    clock = 0  # time never stands still, not even over a restart

    def __init__(self, stored: set[tuple[str, float, int, int]]) -> None:
        self.stored, self.buffer, self.flushes = stored, [], 0
        self.dies_at, self.delivers_first = math.inf, True  # the flush at which the process ends

    def log(self, metrics: dict[str, float], images_seen: int) -> None:
        Metrics.clock += 1
        self.buffer += [(key, value, Metrics.clock, images_seen) for key, value in metrics.items()]

    def flush(self) -> None:
        self.flushes += 1
        if self.flushes < self.dies_at or self.delivers_first:
            self.stored.update(self.buffer)
            self.buffer = []
        if self.flushes >= self.dies_at:
            raise Died

    def state_dict(self) -> Any:
        return [list(metric) for metric in self.buffer]

    def load_state_dict(self, state: Any) -> None:
        self.buffer = [tuple(metric) for metric in state] + self.buffer


class Died(BaseException):
    """Stands for the end of a process."""


class Regression:
    """Least squares on fixed data; `poison` puts a NaN into one target, and a batch takes the seconds of `pause` and more."""

    def __init__(self, size: int = 50, noise: float = 0.0, poison: int | None = None, pause: float = 0.0) -> None:
        random = np.random.default_rng(0)
        self.x, self.y = random.standard_normal((size, 3)), random.standard_normal((size, 1))
        if poison is not None:
            self.y[poison] = np.nan
        self.module, self.noise, self.pause = nn.Linear(3, 1), noise, pause
        nn.init.constant_(self.module.weight, 0.5)
        nn.init.constant_(self.module.bias, -0.25)
        self.seen: list[int] = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.module.weight]}, {"params": [self.module.bias], "lr_multiplier": 3.0}]

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(images_seen)
        time.sleep(self.pause)
        index = order(5, len(self.x), images_seen, batch_size)
        x, y = (torch.from_numpy(values[index]).float() for values in (self.x, self.y))
        x = (x + self.noise * torch.randn(x.shape, generator=rng))[part]
        y = y[part]
        loss = 10 * (self.module(x) - y).square().mean()
        return loss, {"z_first": x.mean(), "a_second": self.module.bias.detach().sum()}

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]:
        return {"y": torch.from_numpy(self.y[order(5, len(self.y), images_seen, batch_size)])}


def run(
    folder: Path,
    objective: Regression,
    plan: Plan,
    tracker: Metrics | None = None,
    stop: Callable[[], bool] = lambda: False,
    execution: Execution = PLAIN,
    num_data: int = 0,
    progress: Callable[[int, dict[str, float]], None] = lambda done, row: None,
) -> Fitted:
    """`fit` with the folder's store."""
    store = CheckpointStore(folder / "store")
    return fit(
        objective, plan, seed=7, tracker=tracker or Metrics(set()), store=store, progress=progress, should_stop=stop,
        execution=execution, num_data=num_data,
    )  # fmt: skip


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)


def test_a_checkpoint_comes_before_what_may_fail(tmp_path: Path) -> None:
    """Who reads the progress may be gone, as after `kill -9` of the flow."""
    objective = Regression()

    def nobody_reads(done: int, row: dict[str, float]) -> None:
        if done:
            raise BrokenPipeError

    with pytest.raises(KeyboardInterrupt, match="stopped at a checkpoint after 8 images"):
        run(tmp_path, objective, Plan(), stop=lambda: True, progress=nobody_reads)
    loaded = CheckpointStore(tmp_path / "store").load()
    assert loaded is not None and loaded[1]["images_seen"] == 8


# schedules and arithmetic


@settings(deadline=None)
@given(
    batch=st.integers(1, 512),
    warmup=st.integers(0, 40),
    rest=st.integers(1, 200),
    lr=st.floats(1e-6, 1.0),
)
def test_learning_rate_is_a_line_and_then_a_cosine(batch: int, warmup: int, rest: int, lr: float) -> None:
    plan = Plan(images=(warmup + rest) * batch, batch_size=batch, lr=lr, warmup_images=warmup * batch)
    rates = np.array([learning_rate(plan, images_seen) for images_seen in range(0, plan.images, batch)])
    rising = lr * np.arange(1, warmup + 1) / (warmup + 1)
    falling = lr * np.cos(np.pi / 2 * np.arange(rest) / rest) ** 2  # = lr (1 + cos πt) / 2
    np.testing.assert_allclose(rates, np.concatenate([rising, falling]), rtol=1e-9, atol=1e-12 * lr)


def numpy_ema(values: np.ndarray, initial: np.ndarray, batch: int, halflife: int) -> np.ndarray:
    average = initial
    for step, value in enumerate(values, start=1):
        half = min(halflife, 0.05 * step * batch)
        keep = 2.0 ** (-batch / half) if half > 0 else 0.0
        average = keep * average + (1 - keep) * value
    return average


@pytest.mark.parametrize("halflife", [0, 10, 100, 100_000])
def test_ema_is_a_recursion_with_its_halflife_in_images(halflife: int) -> None:
    values = np.random.default_rng(0).standard_normal((60, 4))
    module = nn.Linear(4, 1, bias=False).double()
    module.register_buffer("count", torch.zeros((), dtype=torch.int64))
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(values[0]))
    ema = Ema(module, halflife)
    for step, value in enumerate(values[1:], start=1):
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(value))
            module.count += 1
        ema.update(step * 16, 16)
    found = ema.average
    np.testing.assert_allclose(found["weight"][0].numpy(), numpy_ema(values[1:], values[0], 16, halflife), rtol=1e-12)
    assert found.keys() == module.state_dict().keys()
    assert found["count"] == 59  # a counter is no weight


def test_ema_of_a_step_forgets_half_in_a_halflife() -> None:
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    ema = Ema(module, 640)
    nn.init.ones_(module.weight)
    for step in range(20):  # 20 batches of 32 are 640 images, long after the ramp
        ema.update(10**6 + 32 * step, 32)
    assert float(ema.average["weight"]) == pytest.approx(0.5, abs=1e-12)


def test_global_norm_is_that_of_all_values_together() -> None:
    tensors = [torch.randn(3, 4), torch.randn(()), torch.randn(5)]
    expected = np.linalg.norm(np.concatenate([t.double().numpy().ravel() for t in tensors]))
    assert float(global_norm(tensors)) == pytest.approx(expected, rel=1e-6)


def test_training_equals_adamw_in_float64(tmp_path: Path) -> None:
    """Loshchilov & Hutter 2019, algorithm 2, with gradients clipped to norm 1 and the learning rate of each position."""
    plan, objective = Plan(), Regression()
    w = np.array([0.5, 0.5, 0.5, -0.25])
    fitted = run(tmp_path, objective, plan)
    m, v, average, losses, norms = np.zeros(4), np.zeros(4), w, [], []
    multiplier = np.array([1, 1, 1, 3.0])
    for step in range(12):
        index = order(5, 50, step * 8, 8)
        x, y = np.c_[objective.x[index], np.ones(8)], objective.y[index, 0]
        error = x @ w - y
        gradient = 20 * error @ x / 8
        losses.append(10 * (error**2).mean())
        norms.append(np.linalg.norm(gradient))
        gradient /= max(1.0, norms[-1])
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        rate = multiplier * 0.05 * ((step + 1) / 4 if step < 3 else np.cos(np.pi / 2 * (step - 3) / 9) ** 2)
        w = w - rate * 0.1 * w
        w = w - rate * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-8)
        half = min(40, 0.05 * (step + 1) * 8)
        average = w + (average - w) * 0.5 ** (8 / half)
    assert max(norms) > 1.5  # clipping was at work
    found = torch.cat([objective.module.weight[0], objective.module.bias]).detach().numpy()
    np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-6)
    found = torch.cat([fitted.ema["weight"][0], fitted.ema["bias"]]).numpy()
    np.testing.assert_allclose(found, average, rtol=1e-4, atol=1e-6)
    assert [row["images"] for row in fitted.curve] == list(range(8, 97, 8))
    np.testing.assert_allclose([row["loss"] for row in fitted.curve], losses, rtol=1e-4)
    np.testing.assert_allclose([row["gradient_norm"] for row in fitted.curve], norms, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_langevin_dynamics_in_float64(temperature: float, tmp_path: Path) -> None:
    """Welling & Teh 2011, equation 4, with the learning rate of each position as step size, and gradients as they are."""
    plan, objective = Plan(lr=2e-4, optimizer=Sgld(prior_precision=40.0, temperature=temperature)), Regression()
    fitted = run(tmp_path, objective, plan, num_data=50)
    w, norms, moved = np.array([0.5, 0.5, 0.5, -0.25]), [], []
    average = w
    for step in range(12):
        index = order(5, 50, step * 8, 8)
        x, y = np.c_[objective.x[index], np.ones(8)], objective.y[index, 0]
        gradient = 20 * (x @ w - y) @ x / 8
        norms.append(np.linalg.norm(gradient))
        rate = np.array([1, 1, 1, 3.0]) * 2e-4 * ((step + 1) / 4 if step < 3 else np.cos(np.pi / 2 * (step - 3) / 9) ** 2)
        drawn = [fill_normal(torch.empty(n), seed_for(7, "langevin"), "langevin", i, step).numpy() for i, n in enumerate((3, 1))]
        noise = np.sqrt(rate * temperature) * np.concatenate(drawn)
        moved.append(np.abs(noise).max())
        w = w - rate / 2 * (50 * gradient + 40 * w) + noise
        average = w + (average - w) * 0.5 ** (8 / min(40, 0.05 * (step + 1) * 8))
    assert max(norms) > 1.5 and max(moved) > 1e-3  # more than what is clipped otherwise, and there is noise
    found = torch.cat([objective.module.weight[0], objective.module.bias]).detach().numpy()
    np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(torch.cat([fitted.ema["weight"][0], fitted.ema["bias"]]).numpy(), average, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([row["gradient_norm"] for row in fitted.curve], norms, rtol=1e-4)


def test_a_row_of_the_curve_is_the_mean_since_the_last(tmp_path: Path) -> None:
    """With 100 batches there is a row every second one; the tracker gets the same rows."""
    stored: set[tuple[str, float, int, int]] = set()
    fitted = run(tmp_path, Regression(), Plan(images=800, batch_size=8, lr=1e-30), Metrics(stored))
    objective = Regression()
    losses = [float(objective.loss(position, 8, torch.Generator(), slice(0, 8))[0].detach()) for position in range(0, 800, 8)]
    assert [row["images"] for row in fitted.curve] == list(range(16, 801, 16))
    np.testing.assert_allclose([row["loss"] for row in fitted.curve], np.reshape(losses, (-1, 2)).mean(axis=1), rtol=1e-5)
    logged = {(images, key): value for key, value, _, images in stored}
    used = {name: [logged.pop((row["images"], name)) for row in fitted.curve] for name in USED}
    assert logged == {(row["images"], key): value for row in fitted.curve for key, value in row.items() if key != "images"}
    assert min(used["system/images_per_second"]) > 0
    assert all(10 < megabytes < 10**5 for megabytes in used["system/peak_memory_megabytes"])


def test_progress_is_told_of_every_batch_and_of_the_rows(tmp_path: Path) -> None:
    calls: list[tuple[int, dict[str, float]]] = []
    fitted = run(tmp_path, Regression(), Plan(images=800), progress=lambda done, row: calls.append((done, row)))
    assert [done for done, _ in calls] == list(range(0, 801, 8))
    rows = [{"images": done, **row} for done, row in calls if row]
    assert rows == [{name: value for name, value in row.items() if name != "lr"} for row in fitted.curve]


@pytest.mark.parametrize(("images", "batch"), [(100, 8), (8, 8), (5, 8)])
def test_the_last_batch_is_whole(images: int, batch: int, tmp_path: Path) -> None:
    objective = Regression()
    fitted = run(tmp_path, objective, Plan(images=images, batch_size=batch))
    assert objective.seen == list(range(0, images, batch))
    assert fitted.curve[-1]["images"] == batch * math.ceil(images / batch)
    assert not objective.module.training


# the end of a process, at any moment

SCRIPT = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from safetensors.torch import save_file
from torch import nn
torch.set_num_threads(1)
from ldm.registry.tracking import Run
from ldm.training.checkpoint import CheckpointStore
from ldm.training.fit import fit
from ldm.training.optimizers import AdamW, Sgld

folder, pause, optimizer = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]

class Objective:
    def __init__(self):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(8, 3, 3, padding=1)
        self.module = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def parameter_groups(self):
        return [{"params": list(self.module.parameters())}]

    def loss(self, images_seen, batch_size, rng, part):
        print(images_seen, flush=True)
        time.sleep(pause)
        x = torch.randn(batch_size, 3, 8, 8, generator=rng).to(memory_format=torch.channels_last)
        loss = (self.module(x) - x.roll(1, 3)).square().mean()
        return loss, {"pixels": x.abs().mean()}

plan = SimpleNamespace(images=480, batch_size=4, lr=3e-3, warmup_images=40, ema_halflife_images=100, checkpoint_images=96)
plan.optimizer = Sgld() if optimizer == "sgld" else AdamW(weight_decay=0.01)
objective, store = Objective(), CheckpointStore(folder / "store")
fitted = fit(objective, plan, seed=1, tracker=Run(), store=store, progress=lambda done, row: None, num_data=10)
save_file({k: v.contiguous() for k, v in objective.module.state_dict().items()}, folder / "raw.safetensors")
save_file({k: v.contiguous() for k, v in fitted.ema.items()}, folder / "ema.safetensors")
(folder / "curve.json").write_text(json.dumps(fitted.curve))
"""


def start(folder: Path, pause: float, optimizer: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "train.py"), str(folder), str(pause), optimizer]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(
    "optimizer", [pytest.param("adamw", marks=pytest.mark.soak), "sgld"]
)  # stages are killed with the former
@pytest.mark.parametrize("seed", with_soak(1, 10))
def test_a_killed_and_resumed_process_ends_in_the_same_bytes(seed: int, optimizer: str, tmp_path: Path) -> None:
    straight = start(tmp_path / "straight", 0.0, optimizer)
    killed = start(tmp_path / "killed", 0.03, optimizer)
    moment = 4 * (24 + int(np.random.default_rng(seed).integers(4, 16)))  # after the first checkpoint, well before the second
    assert killed.stdout is not None and straight.stdout is not None
    reported = []
    for line in killed.stdout:
        reported.append(int(line))
        if reported[-1] == moment:
            killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    loaded = CheckpointStore(tmp_path / "killed/store").load()
    assert loaded is not None
    saved = loaded[1]["images_seen"]
    assert 96 <= saved < reported[-1] < 480  # in the middle of work that no checkpoint holds
    assert not (tmp_path / "killed/raw.safetensors").exists()

    resumed = start(tmp_path / "killed", 0.0, optimizer)
    lines = resumed.communicate(timeout=60)[0].split("\n")
    assert resumed.returncode == 0
    assert f"resuming after {saved} images" in lines[0]
    assert [int(line) for line in lines[1:-1]] == list(range(saved, 480, 4))
    assert [int(line) for line in straight.communicate(timeout=60)[0].split()] == list(range(0, 480, 4))
    for name in ("raw.safetensors", "ema.safetensors", "curve.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


@pytest.mark.parametrize("batches", [1, 3, 4, 7])
def test_a_stop_saves_a_checkpoint_from_which_the_same_bytes_come(batches: int, tmp_path: Path) -> None:
    """Rows close every second batch here: an odd stop leaves one half summed."""
    plan = Plan(images=640, checkpoint_images=160)
    straight = Regression(noise=0.5)
    expected = run(tmp_path / "straight", straight, plan)
    first, stored = Regression(noise=0.5), set()
    with pytest.raises(KeyboardInterrupt, match=f"after {8 * batches} images"):
        run(tmp_path / "stopped", first, plan, Metrics(stored), stop=lambda: len(first.seen) == batches)
    loaded = CheckpointStore(tmp_path / "stopped/store").load()
    assert loaded is not None and loaded[1]["images_seen"] == 8 * batches
    second = Regression(noise=0.5)
    found = run(tmp_path / "stopped", second, plan, Metrics(stored))
    assert first.seen + second.seen == straight.seen
    assert same_bytes(second.module.state_dict(), straight.module.state_dict())
    assert same_bytes(found.ema, expected.ema)
    assert pd.DataFrame(found.curve).to_csv() == pd.DataFrame(expected.curve).to_csv()  # columns in the same order, too
    positions = [(key, images) for key, _, _, images in stored]
    assert len(positions) == len(set(positions)) == 7 * len(expected.curve)  # 5 of the curve, 2 of `USED`


def test_a_stop_at_a_checkpoint_writes_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing a checkpoint by its twin would leave a moment without any."""
    saves: list[int] = []
    save = CheckpointStore.save
    monkeypatch.setattr(
        CheckpointStore, "save", lambda self, t, state: (saves.append(state["images_seen"]), save(self, t, state))[1]
    )
    objective = Regression()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, objective, Plan(), stop=lambda: len(objective.seen) == 8)  # 64 images
    assert saves == [32, 64]


def test_a_stop_in_the_last_batch_finishes(tmp_path: Path) -> None:
    objective = Regression()
    fitted = run(tmp_path, objective, Plan(), stop=lambda: len(objective.seen) == 12)
    assert fitted.curve[-1]["images"] == 96


@pytest.mark.parametrize("death", [1, 2])
@pytest.mark.parametrize("delivered", [True, False])
def test_no_metric_is_lost_or_doubled_by_a_death_around_delivery(delivered: bool, death: int, tmp_path: Path) -> None:
    stored: set[tuple[str, float, int, int]] = set()
    tracker = Metrics(stored)
    tracker.dies_at, tracker.delivers_first = death, delivered
    with pytest.raises(Died):
        run(tmp_path, Regression(), Plan(), tracker)
    assert bool(stored) == (delivered or death > 1)
    fitted = run(tmp_path, Regression(), Plan(), Metrics(stored))
    positions = sorted((images, key) for key, _, _, images in stored)
    assert positions == sorted((row["images"], key) for row in fitted.curve for key in (*row, *USED) if key != "images")


# a loss that is not finite


def first_use(sample: int) -> int:
    """Where the order comes to a sample."""
    return int(np.flatnonzero(order(5, 50, 0, 200) == sample)[0])


@pytest.mark.parametrize("place", [3, 37])
def test_a_nan_in_the_data_is_reported_with_position_and_last_good_state(place: int, tmp_path: Path) -> None:
    poison = int(order(5, 50, place, 1)[0])
    assert first_use(poison) == place
    with pytest.raises(FloatingPointError, match="loss nan and gradient norm nan") as error:
        run(tmp_path, Regression(poison=poison), Plan())
    first = place // 8 * 8
    assert f"the batch of images {first} to {first + 7}" in str(error.value)
    (file,) = tmp_path.glob("bad_batch_*")
    assert f"it is in {file}" in str(error.value)
    targets = load_file(file)["y"]
    assert torch.isnan(targets).flatten().tolist() == [index == place - first for index in range(8)]
    kept = f"the checkpoint at 32 images in {tmp_path / 'store'}" if place > 32 else "none was saved"
    assert f"last good state: {kept}" in str(error.value)


LONG = Plan(images=32_000, checkpoint_images=32_000)  # 100 batches between rows


@pytest.mark.parametrize(("seconds", "batches"), [(0.1, 4), (math.inf, 32)])
def test_losses_are_read_by_time(seconds: float, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SYNC_SECONDS", seconds)
    objective = Regression(poison=int(order(5, 50, 3, 1)[0]), pause=0.03)
    with pytest.raises(FloatingPointError, match="the batch of images 0 to 7 has loss nan"):
        run(tmp_path, objective, LONG)
    assert len(objective.seen) == batches if seconds == math.inf else 1 <= len(objective.seen) <= batches


def test_a_checkpoint_never_holds_a_nan(tmp_path: Path) -> None:
    """The checkpoint is due at 56 images, between the rows at 48 and 64: the NaN of image 50 must not get in."""
    plan = Plan(images=640, checkpoint_images=56)
    poison = int(order(5, 50, 49, 1)[0])
    assert first_use(poison) == 49
    with pytest.raises(FloatingPointError, match=r"images 48 to 55 has loss nan .* last good state: none"):
        run(tmp_path, Regression(poison=poison), plan)
    assert CheckpointStore(tmp_path / "store").load() is None


def test_an_infinite_gradient_of_a_finite_loss_is_reported(tmp_path: Path) -> None:
    class Cusp(Regression):
        def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            x = torch.zeros(batch_size, 3) if images_seen == 16 else torch.ones(batch_size, 3)
            return (self.module.weight * x).square().sum().sqrt(), {}  # its derivative at 0 is 0/0

    with pytest.raises(FloatingPointError, match=r"images 16 to 23 has loss 0 and gradient norm nan"):
        run(tmp_path, Cusp(), Plan())


def test_an_explosion_stops_before_a_checkpoint_holds_it(tmp_path: Path) -> None:
    """Finite, but a million times the usual gradient; the usual is that of the batches before."""
    objective = Regression()
    objective.y[int(order(5, 50, 49, 1)[0])] = 1e7
    with pytest.raises(FloatingPointError, match="images 48 to 55 has loss") as error:
        run(tmp_path, objective, Plan(images=640, checkpoint_images=24))
    loaded = CheckpointStore(tmp_path / "store").load()
    assert loaded is not None and loaded[1]["images_seen"] == 48
    assert "last good state: the checkpoint at 48 images" in str(error.value)
    usual = float(str(error.value).split("usual is ")[1].split(";")[0])
    assert 0 < usual < 100


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro: int, tmp_path: Path) -> None:
    """Also where the parts are unequal, and with noise, which belongs to positions and not to parts."""
    whole, parts = Regression(noise=0.5), Regression(noise=0.5)
    expected = run(tmp_path / "whole", whole, Plan())
    found = run(tmp_path / "parts", parts, Plan(), execution=Execution(micro_batch=micro))
    assert len(parts.seen) == math.ceil(8 / micro) * len(whole.seen)
    for key, value in expected.ema.items():
        torch.testing.assert_close(found.ema[key], value, rtol=1e-5, atol=1e-6)
    losses = [[row["loss"] for row in fitted.curve] for fitted in (expected, found)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_state_of_a_checkpoint_is_plain_json_and_tensors(tmp_path: Path) -> None:
    objective = Regression()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, objective, Plan(), stop=lambda: len(objective.seen) == 5)
    (folder,) = (tmp_path / "store").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.safetensors"]
    assert json.loads((folder / "state.json").read_text())["images_seen"] == 40


# two processes, which have to synchronise after the same batches


def ended(folder: Path, sync_seconds: float, objective: Regression, stop_at: float = math.inf) -> dict[str, Any]:
    """Train until something ends it, in this process a wish to stop from batch number `stop_at` on: what, and after which batch.

    And after which batches the processes synchronised.
    """
    synced: list[int] = []

    def stop() -> bool:
        synced.append(len(objective.seen))
        return len(objective.seen) >= stop_at

    loop.SYNC_SECONDS = sync_seconds
    with pytest.raises((KeyboardInterrupt, FloatingPointError)) as end:
        run(folder, objective, LONG, stop=stop)
    return {"batches": len(objective.seen), "synced": synced, "end": str(end.value)}


def child(folder: Path) -> None:
    """One of the two, of which the second takes 0.05 s for a batch, and asks to stop at the sixth or has a NaN there."""
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu")):
        second = distributed.rank() == 1
        pause, poison = 0.05 * second, int(order(5, 1000, 5 * 8 + 7, 1)[0])  # the last image of the sixth batch
        results = {
            "stopped": ended(folder / "stopped", 0.2, Regression(1000, pause=pause), 6 if second else math.inf),
            "poisoned": ended(folder / "poisoned", 0.2, Regression(1000, pause=pause, poison=poison)),
            "fast": ended(folder / "fast", 3600.0, Regression(1000), 70),
        }
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either process found."""
    folder = tmp_path_factory.mktemp("pair")
    code = f"import test_fit; test_fit.child(test_fit.Path({str(folder)!r}))"
    run_two_ranks(folder, code, Path(__file__).parent)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_stop_of_one_process_ends_both_at_the_same_batch_in_time(pair: list[dict[str, Any]]) -> None:
    first, second = (found["stopped"] for found in pair)
    assert first == second
    assert 6 <= first["batches"] < 10  # 0.2 s are four batches of the slower process at most
    assert first["end"] == f"stopped at a checkpoint after {8 * first['batches']} images"


def test_a_nan_of_one_process_ends_both_at_the_same_batch_in_time(pair: list[dict[str, Any]]) -> None:
    first, second = (found["poisoned"] for found in pair)
    assert (first["batches"], first["synced"]) == (second["batches"], second["synced"])
    assert 6 <= first["batches"] < 10
    assert all(found["end"].startswith("the batch of images 40 to 47 has loss nan") for found in (first, second))


def test_two_fast_processes_synchronise_every_32_batches(pair: list[dict[str, Any]]) -> None:
    first, second = (found["fast"] for found in pair)
    assert first == second
    assert first["synced"] == [1, 33, 65, 97]  # the stop at the 70th is seen at the last one
    assert first["batches"] == 97
