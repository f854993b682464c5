"""The one training loop: AdamW, schedules counted in images, an average of the weights, exact resume."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.randomness import generator
from ldm.training.checkpoint import CheckpointStore, load_optimizer_tensors, optimizer_tensors
from ldm.training.ema import Ema, global_norm

POINTS = 40  # rows of a finished loss curve
GRADIENT_NORM = 1.0  # gradients are clipped to this norm


class Objective(Protocol):
    """What is minimised: a module holding every trained parameter, and the loss of the batch at a position."""

    @property
    def module(self) -> nn.Module: ...

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]: ...

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar) and metrics of the batch whose first sample is number `images_seen`."""
        ...


class Journal(Protocol):
    """Where metrics go. Undelivered ones travel in the checkpoint, so that none is lost or doubled."""

    def log(self, metrics: dict[str, float], images_seen: int) -> None: ...
    def flush(self) -> None: ...
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


class Schedule(Protocol):
    """The part of the settings that the loop reads; see `ldm.config.Optimizer`."""

    images: int
    batch_size: int
    lr: float
    warmup_images: int
    weight_decay: float
    ema_halflife_images: int
    checkpoint_images: int


@dataclass
class Fitted:
    """Averaged weights with the module's keys, and the loss curve: a row of metrics for each logged position."""

    ema: dict[str, Tensor]
    curve: list[dict[str, float]] = field(default_factory=list)


def learning_rate(schedule: Schedule, images_seen: int) -> float:
    """Linear warm-up, then cosine decay to zero at the last image."""
    if images_seen < schedule.warmup_images:
        return schedule.lr * (images_seen + schedule.batch_size) / (schedule.warmup_images + schedule.batch_size)
    progress = (images_seen - schedule.warmup_images) / max(schedule.images - schedule.warmup_images, 1)
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    objective: Objective,
    schedule: Schedule,
    *,
    seed: int,
    journal: Journal,
    store: CheckpointStore,
    progress: Callable[[int, dict[str, float]], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Fitted:
    """Train `objective.module` for `schedule.images` images, resuming from `store` where it holds a checkpoint.

    Raises `FloatingPointError` at a loss or gradient that is not finite, naming the position and the last good checkpoint, and
    `KeyboardInterrupt`, after saving a checkpoint, when `should_stop()` turns true.
    """
    groups = objective.parameter_groups(schedule.lr)
    multipliers = [group.pop("lr_multiplier", 1.0) for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.99), fused=True)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    ema = Ema(objective.module, schedule.ema_halflife_images)
    run = _Run(objective, optimizer, ema, journal, store)
    resumed = run.resume()
    every = max(1, schedule.images // POINTS // schedule.batch_size) * schedule.batch_size
    objective.module.train()
    progress(resumed, {})
    for images_seen in range(resumed, schedule.images, schedule.batch_size):
        for group, multiplier in zip(optimizer.param_groups, multipliers, strict=True):
            group["lr"] = multiplier * learning_rate(schedule, images_seen)
        loss, metrics = objective.loss(images_seen, schedule.batch_size, generator(seed, "loss", images_seen))
        loss.backward()
        norm = global_norm(p.grad for p in trained if p.grad is not None)
        torch._foreach_mul_([p.grad for p in trained if p.grad is not None], (GRADIENT_NORM / norm).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = images_seen + schedule.batch_size
        ema.update(done, schedule.batch_size)
        run.add({"loss": loss.detach(), **metrics, "gradient_norm": norm})
        if done % every < schedule.batch_size or done >= schedule.images:
            row = run.log(done, learning_rate(schedule, images_seen))
            progress(done, row)
        stop = should_stop()
        if done < schedule.images and (stop or done % schedule.checkpoint_images < schedule.batch_size):
            run.save(done)
            if stop:
                raise KeyboardInterrupt(f"stopped at a checkpoint after {done} images")
    journal.flush()
    objective.module.eval()
    return Fitted(ema.state_dict(), run.curve)


class _Run:
    """What a checkpoint holds: weights, optimizer state, average, loss curve, sums since the last row, undelivered metrics."""

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, ema: Ema, journal: Journal, store: CheckpointStore
    ):
        self.objective, self.optimizer, self.ema, self.journal, self.store = objective, optimizer, ema, journal, store
        self.curve: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._saved: int | None = None

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()
        self._count += 1

    def log(self, images_seen: int, lr: float) -> dict[str, float]:
        """Close a row of the loss curve: means since the last one."""
        row = self._finite_means(images_seen)
        self._sums, self._count = {}, 0
        self.curve.append({"images": images_seen, **row, "lr": lr})
        self.journal.log({**row, "lr": lr}, images_seen)
        return row

    def _finite_means(self, images_seen: int) -> dict[str, float]:
        row = {name: float(total / self._count) for name, total in self._sums.items()}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                kept = f"the checkpoint at {self._saved} images in {self.store.folder}" if self._saved else "none was saved"
                raise FloatingPointError(
                    f"{name} is {row[name]} within the {self._count} batches before image {images_seen}; "
                    f"last good state: {kept}; lower the learning rate"
                )
        return row

    def save(self, images_seen: int) -> None:
        self._finite_means(images_seen)  # a checkpoint never holds weights that a retry could not go on from
        tensors = {f"model.{k}": v for k, v in self.objective.module.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        tensors |= {f"sums.{k}": v for k, v in self._sums.items()}
        state = {"images_seen": images_seen, "curve": self.curve, "count": self._count, "sums": list(self._sums)}
        self.store.save(tensors, {**state, "journal": self.journal.state_dict()})
        self._saved = images_seen
        self.journal.flush()  # after the checkpoint: a kill in between delivers the same metrics again, not new ones

    def resume(self) -> int:
        loaded = self.store.load()
        if loaded is None:
            return 0
        tensors, state = loaded

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.objective.module.load_state_dict(under("model."))
        self.ema.load_state_dict(under("ema."))
        load_optimizer_tensors(self.optimizer, under("optimizer."))
        sums = under("sums.")
        self._sums, self._count, self.curve = {name: sums[name] for name in state["sums"]}, state["count"], state["curve"]
        self.journal.load_state_dict(state["journal"])
        self._saved = state["images_seen"]
        print(f"resuming after {self._saved} images from {self.store.folder}", flush=True)
        return int(self._saved)
