"""The one training loop: schedules counted in images, an average of the weights, exact resume."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.base import distributed
from ldm.base.errors import InputError
from ldm.base.randomness import generator
from ldm.nets.diffusers import Pretrained
from ldm.training.checkpoint import CheckpointStore, load_optimizer_tensors, optimizer_tensors
from ldm.training.ema import Ema, global_norm
from ldm.training.optimizers import Optimizer

if TYPE_CHECKING:
    from ldm.training.options import Training

POINTS = 40  # rows of a finished loss curve
GRADIENT_NORM = 1.0  # gradients are clipped to this norm
EXPLOSION = 1e4  # a gradient norm this many times the usual one ends the run
USUAL = 0.05  # weight of a batch in the usual gradient norm, a running mean
SYNC_SECONDS = 2.0  # between synchronisations: reading the losses, and asking the other ranks whether to stop
SYNC_BATCHES = 32  # between synchronisations at most


class Objective(Protocol):
    """What is minimised: a module holding every trained parameter, and the loss of a part of the batch at a position."""

    @property
    def module(self) -> nn.Module: ...

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """For the optimizer. `lr_multiplier` scales the schedule; groups of one `clip_group` (default 0) are clipped together."""
        ...

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss (scalar) and metrics of the images `part` of the batch whose first sample is number `images_seen`.

        Draws from `rng` are made for all `batch_size` images, so that they do not depend on how the batch is divided.
        """
        ...

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]:
        """The batch at a position, saved if it ends the run."""
        ...

    def compile(self) -> None:
        """Compile the networks in place."""
        ...


class Tracker(Protocol):
    """Where metrics go. Undelivered ones travel in the checkpoint, so that none is lost or doubled."""

    def log(self, metrics: dict[str, float], images_seen: int) -> None: ...
    def flush(self) -> None: ...
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


@dataclass(frozen=True)
class Execution:
    """How the device is used; results differ by rounding only."""

    autocast: torch.dtype | None = None  # of convolutions and products; parameters and sums stay float32
    compile: bool = False
    micro_batch: int | None = None  # images of a forward pass at most; gradients are accumulated over a batch
    shard: bool = False  # each rank holds a shard of the model (FSDP2)


@dataclass
class Fitted:
    """Averaged weights with the module's keys (sharded ones gathered, on the first rank only), and the loss curve."""

    ema: dict[str, Tensor]
    curve: list[dict[str, float]] = field(default_factory=list)  # a row of metrics for each logged position


def learning_rate(schedule: Training, images_seen: int) -> float:
    """Linear warm-up, then cosine decay to zero at the last image."""
    if images_seen < schedule.warmup_images:
        return schedule.lr * (images_seen + schedule.batch_size) / (schedule.warmup_images + schedule.batch_size)
    progress = (images_seen - schedule.warmup_images) / max(schedule.images - schedule.warmup_images, 1)
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    objective: Objective,
    schedule: Training,
    *,
    seed: int,
    tracker: Tracker,
    store: CheckpointStore,
    progress: Callable[[int, dict[str, float]], None],
    should_stop: Callable[[], bool] = lambda: False,
    execution: Execution = Execution(),
    num_data: int = 0,
) -> Fitted:
    """Train `objective.module` for `schedule.images` images, resuming from `store` if it holds a checkpoint.

    `progress(done, row)` is called before the first and after every batch; the row is empty unless one was closed.
    `num_data` is what an optimizer that samples a posterior needs to know: the number of terms the loss is a mean of.

    In a process group each rank takes its share of every batch; the first one saves and logs. Raises `FloatingPointError` if
    a loss or gradient is not finite or explodes, after saving the batch, and `KeyboardInterrupt`, after saving a checkpoint,
    when `should_stop()` turns true: on all ranks after the same batch, within `SYNC_SECONDS` or a batch.
    """
    loss = _parallel(objective, execution)  # before the optimizer: sharding replaces the parameters
    groups = objective.parameter_groups(schedule.lr)
    multipliers = [group.pop("lr_multiplier", 1.0) for group in groups]
    clip_groups = [group.pop("clip_group", 0) for group in groups]
    choice: Optimizer = schedule.optimizer
    optimizer = choice.build(groups, schedule.lr, seed, num_data)
    run = _Run(objective, optimizer, Ema(objective.module, schedule.ema_halflife_images), tracker, store)
    resumed = run.resume()
    device = next(objective.module.parameters()).device
    if not distributed.all_ranks_equal(resumed, device):
        raise InputError(f"{store.folder}: the ranks found different checkpoints here; they have to share this folder")
    gradients = _Gradients(loss, optimizer, clip_groups, seed, execution, clip=choice.clips)
    every = max(1, schedule.images // POINTS // schedule.batch_size) * schedule.batch_size
    objective.module.train()
    sync = _Sync(device)
    progress(resumed, {})
    for images_seen in range(resumed, schedule.images, schedule.batch_size):
        lr, done = learning_rate(schedule, images_seen), images_seen + schedule.batch_size
        for group, multiplier in zip(optimizer.param_groups, multipliers, strict=True):
            group["lr"] = multiplier * lr
        run.add(images_seen, *gradients(images_seen, schedule.batch_size))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.ema.update(done, schedule.batch_size)
        sync_due = sync.due()
        stop = sync.agree_to_stop(should_stop()) if sync_due else distributed.ranks() == 1 and should_stop()
        checkpoint_due = done < schedule.images and (stop or done % schedule.checkpoint_images < schedule.batch_size)
        row_due = done % every < schedule.batch_size or done >= schedule.images
        if sync_due or checkpoint_due or row_due:
            run.check(schedule.batch_size)
        row = run.log(done, lr) if row_due else {}
        if checkpoint_due:
            run.save(done)
            if stop:
                raise KeyboardInterrupt(f"stopped at a checkpoint after {done} images")
        progress(done, row)  # after the checkpoint: printing fails if its reader is gone
    tracker.flush()
    objective.module.eval()
    return Fitted(distributed.full_tensors(run.ema.state_dict()), run.curve)


class _Loss(nn.Module):
    """The loss as a module's forward, which is what must be wrapped to synchronise gradients."""

    def __init__(self, objective: Objective, autocast: torch.dtype | None):
        super().__init__()
        self.module, self._objective, self._autocast = objective.module, objective, autocast
        self._device = next(self.module.parameters()).device.type

    def forward(self, *position: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self._device, self._autocast, enabled=self._autocast is not None):
            return self._objective.loss(*position)


def _parallel(objective: Objective, execution: Execution) -> nn.Module:
    """The loss, whose gradients are the mean over all ranks."""
    if execution.compile:
        torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # tells the compiler, too
        objective.compile()
    loss = _Loss(objective, execution.autocast)
    if distributed.ranks() == 1:
        return loss
    if not execution.shard:
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 convolutions, one layout has several names
        return DistributedDataParallel(loss)
    networks = [net for net in loss.modules() if isinstance(net, Pretrained)]
    distributed.shard(loss, [block for net in networks for block in net.blocks()])
    return loss


class _Gradients:
    """Fills the parameters' gradients with those of a whole batch, over micro-batches and ranks, and clips them if asked to."""

    def __init__(
        self,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_groups: list[int],
        seed: int,
        execution: Execution,
        clip: bool,
    ) -> None:
        self._loss, self._sharded = loss, execution.shard and distributed.ranks() > 1
        self._max_norm = GRADIENT_NORM if clip else math.inf
        self.seed, self.micro_batch = seed, execution.micro_batch
        members = [(number, group["params"]) for number, group in zip(clip_groups, optimizer.param_groups, strict=True)]
        self._groups = [[p for n, params in members if n == number for p in params] for number in sorted(set(clip_groups))]

    def __call__(self, images_seen: int, batch_size: int) -> tuple[list[str], Tensor]:
        """The batch's metrics, last the norm of its gradients before clipping: names and values, float64."""
        share = batch_size // distributed.ranks()
        first, step = distributed.rank() * share, min(self.micro_batch or share, share)
        parts = [slice(start, min(start + step, first + share)) for start in range(first, first + share, step)]
        rows = []
        for part in parts:
            weight = (part.stop - part.start) / share
            more = isinstance(self._loss, DistributedDataParallel) and part is not parts[-1]  # wait for other ranks at the last
            with self._loss.no_sync() if more else contextlib.nullcontext():  # type: ignore[operator]
                loss, metrics = self._loss(images_seen, batch_size, generator(self.seed, "loss", images_seen), part)
                (loss if len(parts) == 1 else loss * weight).backward()
            rows.append(torch.stack([value.detach() for value in (loss, *metrics.values())]).double() * weight)
        means = distributed.mean(torch.stack(rows).sum(0))
        return ["loss", *metrics, "gradient_norm"], torch.cat([means, self._clip().double()[None]])

    def _clip(self) -> Tensor:
        """Clip each group to `GRADIENT_NORM`; return the total norm before clipping."""
        groups = [distributed.local_shards(p.grad for p in group if p.grad is not None) for group in self._groups]
        norms = torch.stack([global_norm(group) for group in groups])
        if self._sharded:
            norms = (distributed.mean(norms.square()) * distributed.ranks()).sqrt()
        for group, scale in zip(groups, (self._max_norm / norms).clamp(max=1.0), strict=True):
            torch._foreach_mul_(group, scale)
        return torch.linalg.vector_norm(norms)


class _Sync:
    """After which batches to wait for the device and the other ranks: about every `SYNC_SECONDS`, the same batch on all ranks."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._alone = device, distributed.ranks() == 1
        self._last, self._batches = time.monotonic(), 0  # the last synchronisation, and the batches since
        self._next = SYNC_BATCHES if self._alone else 1

    def due(self) -> bool:
        """Whether to synchronise after this batch: one rank asks the clock, several have agreed on a number of batches."""
        self._batches += 1
        late = self._alone and time.monotonic() - self._last >= SYNC_SECONDS
        return late or self._batches >= self._next

    def agree_to_stop(self, asked: bool) -> bool:
        """Whether any rank was asked to stop. The next synchronisation follows from the slowest rank's seconds per batch."""
        if not self._alone:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # else these are the seconds it takes to queue a batch
            seconds = (time.monotonic() - self._last) / self._batches
            largest = torch.tensor([float(asked), seconds], dtype=torch.float64, device=self._device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            asked, seconds = bool(largest[0] > 0), float(largest[1])
            self._next = int(min(max(SYNC_SECONDS / max(seconds, 1e-9), 1), SYNC_BATCHES))
        self._last, self._batches = time.monotonic(), 0
        return asked


class _Run:
    """What a checkpoint holds: weights, optimizer state, average, loss curve, sums since the last row, undelivered metrics."""

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, ema: Ema, tracker: Tracker, store: CheckpointStore
    ):
        self.objective, self.optimizer, self.ema, self.tracker, self.store = objective, optimizer, ema, tracker, store
        self.curve: list[dict[str, float]] = []
        self._unread: list[tuple[int, list[str], Tensor]] = []  # metrics still on the device
        self._sums: dict[str, float] = {}
        self._count = 0
        self._saved: int | None = None
        self._usual: float | None = None  # gradient norm

    def add(self, images_seen: int, names: list[str], values: Tensor) -> None:
        """Keep a batch's metrics for `check`, without waiting for the device."""
        self._unread.append((images_seen, names, values))

    def check(self, batch_size: int) -> None:
        """Read the metrics since the last check; raise `FloatingPointError` if a batch went wrong, which is then saved."""
        unread, self._unread = self._unread, []
        rows = torch.stack([values for _, _, values in unread]).tolist()
        for (images_seen, names, _), row in zip(unread, rows, strict=True):
            metrics = dict(zip(names, row, strict=True))
            loss, norm = metrics["loss"], metrics["gradient_norm"]
            usual = norm if self._usual is None else self._usual
            if not (math.isfinite(loss) and math.isfinite(norm) and norm <= EXPLOSION * max(usual, GRADIENT_NORM)):
                raise FloatingPointError(self._save_bad_batch(images_seen, batch_size, loss, norm))
            self._usual = usual + USUAL * (norm - usual)
            self._sums = {name: self._sums.get(name, 0.0) + value for name, value in metrics.items()}
            self._count += 1

    def _save_bad_batch(self, images_seen: int, batch_size: int, loss: float, norm: float) -> str:
        """Save the batch that went wrong; return what happened and where to look."""
        file = self.store.folder.parent / f"bad_batch_{images_seen}.{distributed.rank()}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.cpu().contiguous() for k, v in self.objective.batch(images_seen, batch_size).items()}, file)
        kept = f"the checkpoint at {self._saved} images in {self.store.folder}" if self._saved else "none was saved"
        usual = "unknown" if self._usual is None else f"{self._usual:.4g}"
        return (
            f"the batch of images {images_seen} to {images_seen + batch_size - 1} has loss {loss:.4g} and gradient norm "
            f"{norm:.4g}, usual is {usual}; it is in {file}; last good state: {kept}; lower the learning rate"
        )

    def log(self, images_seen: int, lr: float) -> dict[str, float]:
        """Close a row of the loss curve: means since the last one."""
        row = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        self.curve.append({"images": images_seen, **row, "lr": lr})
        self.tracker.log({**row, "lr": lr}, images_seen)
        return row

    def save(self, images_seen: int) -> None:
        tensors = {f"model.{k}": v for k, v in self.objective.module.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        tensors = distributed.full_tensors(tensors)
        if distributed.rank() == 0:
            state = {"images_seen": images_seen, "curve": self.curve, "count": self._count, "sums": self._sums}
            self.store.save(tensors, {**state, "usual": self._usual, "tracker": self.tracker.state_dict()})
        self._saved = images_seen
        self.tracker.flush()  # after the checkpoint: a kill in between delivers the same metrics again, not new ones

    def resume(self) -> int:
        """Restore the checkpoint; return the images seen, 0 without one. `InputError` if it does not fit the model."""
        loaded = self.store.load()
        if loaded is None:
            return 0
        tensors, state = loaded

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            distributed.load(self.objective.module.state_dict(), under("model."))
            self.ema.load_state_dict(under("ema."))
            load_optimizer_tensors(self.optimizer, under("optimizer."))
            self._sums, self._count, self.curve = state["sums"], state["count"], state["curve"]
            self._usual = state["usual"]
            self.tracker.load_state_dict(state["tracker"])
        except (KeyError, IndexError, RuntimeError) as error:  # adopted from other code
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.store.folder}: does not fit what is trained now ({reason}); `ldm checkpoints drop` it"
            ) from error
        self._saved = state["images_seen"]
        print(f"resuming after {self._saved} images from {self.store.folder}", flush=True)
        return int(self._saved)
