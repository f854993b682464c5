"""The one training loop: AdamW or SGLD, schedules counted in images, an average of the weights, exact resume."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.base import distributed
from ldm.base.errors import InputError
from ldm.base.randomness import generator, seed_for
from ldm.langevin.sgld import SGLD
from ldm.nets.blocks import Stage
from ldm.training.checkpoint import CheckpointStore, load_optimizer_tensors, optimizer_tensors
from ldm.training.ema import Ema, global_norm

POINTS = 40  # rows of a finished loss curve
GRADIENT_NORM = 1.0  # gradients are clipped to this norm
EXPLOSION = 1e4  # a gradient norm this many times the usual one ends the run
USUAL = 0.05  # weight of a batch in the usual gradient norm, a running mean
LOOK_SECONDS = 2.0  # between looks at what would make a GPU wait: the losses, and whether another rank is to stop
CHECK_BATCHES = 32  # between these looks, at most


class Objective(Protocol):
    """What is minimised: a module holding every trained parameter, and the loss of a part of the batch at a position."""

    @property
    def module(self) -> nn.Module: ...

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """For the optimizer. `lr_multiplier` scales the schedule; groups of another `player` are clipped by themselves."""
        ...

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss (scalar) and metrics of the images `part` of the batch whose first sample is number `images_seen`.

        What is drawn from `rng` is drawn for all `batch_size` images, so that it does not depend on how they are parted.
        """
        ...

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]:
        """What was fed in at a position, to be saved where it ended the run."""
        ...

    def compile(self) -> None:
        """Compile the networks in place."""
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


@dataclass(frozen=True)
class Execution:
    """How the device is used; results differ by rounding only."""

    autocast: torch.dtype | None = None  # of convolutions and products; parameters and sums stay float32
    compile: bool = False
    micro_batch: int | None = None  # images of a forward pass at most; gradients are accumulated over a batch
    shard: bool = False  # several processes hold a part of the model each, and not the whole


@dataclass(frozen=True)
class Langevin:
    """Sample a posterior by SGLD instead of minimising by AdamW: the learning rate is its step size; see `ldm.langevin.sgld`."""

    num_data: int  # that the loss would be a mean of if it were of all data
    prior_precision: float
    temperature: float


@dataclass
class Fitted:
    """Averaged and last weights with the module's keys, and the loss curve: a row of metrics for each logged position.

    Weights are whole also where processes shared them out, and then in the first process only.
    """

    ema: dict[str, Tensor]
    curve: list[dict[str, float]] = field(default_factory=list)
    last: dict[str, Tensor] = field(default_factory=dict)


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
    execution: Execution = Execution(),
    langevin: Langevin | None = None,
) -> Fitted:
    """Train `objective.module` for `schedule.images` images, resuming from `store` where it holds a checkpoint.

    With `langevin` the last weights are a draw from a posterior, as far as its step size fell slowly enough, the averaged ones
    estimate its mean, and gradients are not clipped.

    `progress(done, row)` is called before the first and after every batch; the row is empty where none was closed.

    In a process group each process takes its share of every batch; the first one saves and logs. Raises
    `FloatingPointError` where a loss or gradient is not finite or explodes, after saving the batch, naming it and the last
    good checkpoint, and `KeyboardInterrupt`, after saving a checkpoint, when `should_stop()` turns true: in all processes
    after the same batch, within `LOOK_SECONDS` or a batch.
    """
    loss = _parallel(objective, execution)  # before the optimizer: it may replace the parameters by parts of them
    groups = objective.parameter_groups(schedule.lr)
    multipliers = [group.pop("lr_multiplier", 1.0) for group in groups]
    players = [group.pop("player", 0) for group in groups]
    optimizer = _optimizer(groups, schedule, seed, langevin)
    ema = Ema(objective.module, schedule.ema_halflife_images)
    run = _Run(objective, optimizer, ema, journal, store)
    resumed = run.resume()
    device = next(objective.module.parameters()).device
    if not distributed.all_ranks_equal(resumed, device):
        raise InputError(f"{store.folder}: the processes found different checkpoints here; they have to share this folder")
    gradients = _Gradients(loss, optimizer, players, seed, execution, clip=langevin is None)
    every = max(1, schedule.images // POINTS // schedule.batch_size) * schedule.batch_size
    objective.module.train()
    looks = _Looks(device)
    progress(resumed, {})
    for images_seen in range(resumed, schedule.images, schedule.batch_size):
        for group, multiplier in zip(optimizer.param_groups, multipliers, strict=True):
            group["lr"] = multiplier * learning_rate(schedule, images_seen)
        run.add(images_seen, *gradients(images_seen, schedule.batch_size))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = images_seen + schedule.batch_size
        ema.update(done, schedule.batch_size)
        look = looks.due()
        stop = looks.stop(should_stop()) if look else distributed.ranks() == 1 and should_stop()
        due = done < schedule.images and (stop or done % schedule.checkpoint_images < schedule.batch_size)
        row_due = done % every < schedule.batch_size or done >= schedule.images
        if look or due or row_due:
            run.check(schedule.batch_size)
        row = run.log(done, learning_rate(schedule, images_seen)) if row_due else {}
        if due:
            run.save(done)
            if stop:
                raise KeyboardInterrupt(f"stopped at a checkpoint after {done} images")
        progress(done, row)  # after the checkpoint: printing fails if its reader is gone
    journal.flush()
    objective.module.eval()
    return Fitted(distributed.full_tensors(ema.state_dict()), run.curve, distributed.full_tensors(objective.module.state_dict()))


def _optimizer(groups: list[dict[str, Any]], schedule: Schedule, seed: int, langevin: Langevin | None) -> torch.optim.Optimizer:
    if langevin is None:
        return torch.optim.AdamW(groups, lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.99), fused=True)
    return SGLD(groups, schedule.lr, **asdict(langevin), seed=seed_for(seed, "langevin"))


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
    """The loss, whose gradients are the mean over all processes."""
    if execution.compile:
        torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # tells the compiler, too
        objective.compile()
    loss = _Loss(objective, execution.autocast)
    if distributed.ranks() == 1:
        return loss
    if not execution.shard:
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 convolutions, one layout has several names
        return DistributedDataParallel(loss)
    distributed.shard(loss, [part for part in loss.modules() if isinstance(part, Stage)])
    return loss


class _Gradients:
    """Fills the parameters' gradients with those of a whole batch, clipped or not: over micro-batches and over processes."""

    def __init__(
        self,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        players: list[int],
        seed: int,
        execution: Execution,
        clip: bool,
    ) -> None:
        self._loss, self._sharded = loss, execution.shard and distributed.ranks() > 1
        self._most = GRADIENT_NORM if clip else math.inf
        self.seed, self.micro_batch = seed, execution.micro_batch
        self._sides = [
            [p for group, its in zip(optimizer.param_groups, players, strict=True) if its == player for p in group["params"]]
            for player in sorted(set(players))
        ]

    def __call__(self, images_seen: int, batch_size: int) -> tuple[list[str], Tensor]:
        """The batch's metrics, the last one the norm of its gradients before they were clipped: names and values, float64."""
        share = batch_size // distributed.ranks()
        first, step = distributed.rank() * share, min(self.micro_batch or share, share)
        parts = [slice(start, min(start + step, first + share)) for start in range(first, first + share, step)]
        rows = []
        for part in parts:
            weight = (part.stop - part.start) / share
            with self._accumulating() if part is not parts[-1] else contextlib.nullcontext():
                loss, metrics = self._loss(images_seen, batch_size, generator(self.seed, "loss", images_seen), part)
                (loss if len(parts) == 1 else loss * weight).backward()
            rows.append(torch.stack([value.detach() for value in (loss, *metrics.values())]).double() * weight)
        means = distributed.mean(torch.stack(rows).sum(0))
        return ["loss", *metrics, "gradient_norm"], torch.cat([means, self._clip().double()[None]])

    def _accumulating(self) -> contextlib.AbstractContextManager[None]:
        """Within, a backward pass adds to the gradients without waiting for other processes: of models that each has whole."""
        return self._loss.no_sync() if isinstance(self._loss, DistributedDataParallel) else contextlib.nullcontext()

    def _clip(self) -> Tensor:
        """The norm of all gradients, each player's of which is then at most `GRADIENT_NORM`, where they are clipped."""
        sides = [distributed.local_shards(p.grad for p in side if p.grad is not None) for side in self._sides]
        norms = torch.stack([global_norm(side) for side in sides])
        if self._sharded:
            norms = (distributed.mean(norms.square()) * distributed.ranks()).sqrt()
        for side, scale in zip(sides, (self._most / norms).clamp(max=1.0), strict=True):
            torch._foreach_mul_(side, scale)
        return torch.linalg.vector_norm(norms)


class _Looks:
    """After which batches to look at what would make a GPU wait: about every `LOOK_SECONDS`, on all ranks at the same batch."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._alone = device, distributed.ranks() == 1
        self._last, self._batches = time.monotonic(), 0  # the last look, and the batches since
        self._next = CHECK_BATCHES if self._alone else 1

    def due(self) -> bool:
        """Whether to look after this batch: one process asks the clock, several have agreed on a number of batches."""
        self._batches += 1
        late = self._alone and time.monotonic() - self._last >= LOOK_SECONDS
        return late or self._batches >= self._next

    def stop(self, asked: bool) -> bool:
        """Look whether any rank was asked to stop, and agree on the next look from the slowest rank's seconds per batch."""
        if not self._alone:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # else these are the seconds it takes to queue a batch
            seconds = (time.monotonic() - self._last) / self._batches
            most = torch.tensor([float(asked), seconds], dtype=torch.float64, device=self._device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            asked, seconds = bool(most[0] > 0), float(most[1])
            self._next = int(min(max(LOOK_SECONDS / max(seconds, 1e-9), 1), CHECK_BATCHES))
        self._last, self._batches = time.monotonic(), 0
        return asked


class _Run:
    """What a checkpoint holds: weights, optimizer state, average, loss curve, sums since the last row, undelivered metrics."""

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, ema: Ema, journal: Journal, store: CheckpointStore
    ):
        self.objective, self.optimizer, self.ema, self.journal, self.store = objective, optimizer, ema, journal, store
        self.curve: list[dict[str, float]] = []
        self._new: list[tuple[int, list[str], Tensor]] = []  # metrics that nobody has looked at
        self._sums: dict[str, float] = {}
        self._count = 0
        self._saved: int | None = None
        self._usual: float | None = None  # gradient norm

    def add(self, images_seen: int, names: list[str], values: Tensor) -> None:
        """Keep a batch's metrics for `check`, without waiting for the device."""
        self._new.append((images_seen, names, values))

    def check(self, batch_size: int) -> None:
        """Sum up what came since the last look; raise `FloatingPointError` where a batch went wrong, which is then saved."""
        new, self._new = self._new, []
        rows = torch.stack([values for _, _, values in new]).tolist()
        for (images_seen, names, _), row in zip(new, rows, strict=True):
            metrics = dict(zip(names, row, strict=True))
            loss, norm = metrics["loss"], metrics["gradient_norm"]
            usual = norm if self._usual is None else self._usual
            if not (math.isfinite(loss) and math.isfinite(norm) and norm <= EXPLOSION * max(usual, GRADIENT_NORM)):
                raise FloatingPointError(self._wrong(images_seen, batch_size, loss, norm))
            self._usual = usual + USUAL * (norm - usual)
            self._sums = {name: self._sums.get(name, 0.0) + value for name, value in metrics.items()}
            self._count += 1

    def _wrong(self, images_seen: int, batch_size: int, loss: float, norm: float) -> str:
        """Save the batch that went wrong, and say where, and how."""
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
        self.journal.log({**row, "lr": lr}, images_seen)
        return row

    def save(self, images_seen: int) -> None:
        tensors = {f"model.{k}": v for k, v in self.objective.module.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        tensors = distributed.full_tensors(tensors)
        if distributed.rank() == 0:
            state = {"images_seen": images_seen, "curve": self.curve, "count": self._count, "sums": self._sums}
            self.store.save(tensors, {**state, "usual": self._usual, "journal": self.journal.state_dict()})
        self._saved = images_seen
        self.journal.flush()  # after the checkpoint: a kill in between delivers the same metrics again, not new ones

    def resume(self) -> int:
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
            self.journal.load_state_dict(state["journal"])
        except (KeyError, IndexError, RuntimeError) as error:  # adopted from other code
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.store.folder}: does not fit what is trained now ({reason}); `ldm checkpoints drop` it"
            ) from error
        self._saved = state["images_seen"]
        print(f"resuming after {self._saved} images from {self.store.folder}", flush=True)
        return int(self._saved)
