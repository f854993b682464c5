"""The one training loop: schedules counted in images, an average of the weights, exact resume."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.base import distributed
from ldm.base.errors import InputError
from ldm.base.randomness import generator
from ldm.base.resources import Resources
from ldm.base.tensors import save_tensors
from ldm.nets.diffusers import Pretrained
from ldm.training.checkpoint import CheckpointStore, load_optimizer_tensors, optimizer_tensors
from ldm.training.optimizers import Optimizer

if TYPE_CHECKING:
    from ldm.training.options import Training

PARTS, STATE = ("model", "ema", "optimizer"), ("curve", "count", "sums", "usual")  # tensors and attributes in a checkpoint
POINTS = 40  # rows of a finished loss curve
GRADIENT_NORM = 1.0  # gradients are clipped to this norm
EXPLOSION = 1e4  # a gradient norm this many times the usual one ends the run
USUAL = 0.05  # weight of a batch in the usual gradient norm, a running mean
SYNC_SECONDS = 2.0  # between synchronisations: reading the losses, and asking the other ranks whether to stop
SYNC_BATCHES = 32  # between synchronisations at most
RAMP = 0.05  # early on the average's half-life is at most this share of the images seen (Karras et al. 2024, EDM2)


class Objective(Protocol):
    """What is minimised: a module holding every trained parameter, and the loss of a part of the batch at a position."""

    @property
    def module(self) -> nn.Module: ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For the optimizer. `lr_multiplier` scales the schedule; groups of one `clip_group` (default 0) are clipped together."""

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss (scalar) and metrics of images `part` of the batch at a position; `rng` draws for the undivided batch."""

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]: ...  # is saved if it ends the run
    def compile(self) -> None: ...


class Tracker(Protocol):  # where metrics go; undelivered ones travel in the checkpoint, so that none is lost or doubled
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


class Fitted(NamedTuple):
    ema: dict[str, Tensor]  # averaged weights with the module's keys; sharded ones are gathered, on the first rank only
    curve: list[dict[str, float]]  # a row of metrics for each logged position


class Ema:
    """Averages the parameters of a module, its half-life counted in images; buffers are copied."""

    def __init__(self, module: nn.Module, halflife_images: int):
        self.halflife_images, live = halflife_images, module.state_dict(keep_vars=True)
        self.average = {name: tensor.detach().clone() for name, tensor in live.items()}  # with the module's keys
        pairs = [(average, live[name]) for name, average in self.average.items()]
        self._weights, self._buffers = ([p for p in pairs if isinstance(p[1], nn.Parameter) == is_weight] for is_weight in (1, 0))

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        """Move the average towards the weights after a batch; a half-life of 0 copies them."""
        halflife = min(self.halflife_images, RAMP * images_seen)
        weight = 1 - 0.5 ** (batch_size / halflife) if halflife > 0 else 1.0
        averages, weights = (distributed.local_shards(tensors) for tensors in zip(*self._weights, strict=True))
        torch._foreach_lerp_(averages, weights, weight)
        for average, buffer in self._buffers:
            average.copy_(buffer)


def learning_rate(schedule: Training, images_seen: int) -> float:
    """Linear warm-up, then cosine decay to zero at the last image."""
    if images_seen < schedule.warmup_images:
        return schedule.lr * (images_seen + schedule.batch_size) / (schedule.warmup_images + schedule.batch_size)
    progress = (images_seen - schedule.warmup_images) / max(schedule.images - schedule.warmup_images, 1)
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    objective: Objective, schedule: Training, *, seed: int, tracker: Tracker, store: CheckpointStore,
    progress: Callable[[int, dict[str, float]], None], should_stop: Callable[[], bool] = lambda: False,
    execution: Execution = Execution(), num_data: int = 0,
) -> Fitted:  # fmt: skip
    """Train `objective.module` for `schedule.images` images, resuming from `store` if it holds a checkpoint.

    `progress(done, row)` is called before the first and after every batch; the row is empty unless one was closed. `num_data`,
    for optimizers that sample a posterior, is the number of terms that the loss is a mean of. Raises `FloatingPointError`, after
    saving the batch, for a loss or gradient that is not finite or explodes, and `KeyboardInterrupt`, after a checkpoint, if
    `should_stop()`: on all ranks after the same batch.
    """
    loss = _parallel(objective, execution)  # before the optimizer: sharding replaces the parameters
    choice: Optimizer = schedule.optimizer
    groups, ours = objective.parameter_groups(), {"lr_multiplier": 1.0, "clip_group": 0}
    extras = [{name: group.pop(name, default) for name, default in ours.items()} for group in groups]
    optimizer = choice.build(groups, schedule.lr, seed, num_data)
    for group, extra in zip(optimizer.param_groups, extras, strict=True):
        group.update(extra)  # now: optimizers refuse options that they do not know
    run = _Run(objective, optimizer, Ema(objective.module, schedule.ema_halflife_images), tracker, store)
    resumed = run.resume()
    device = next(objective.module.parameters()).device
    if not distributed.all_ranks_equal(resumed, device):
        raise InputError(f"{store.folder}: the ranks found different checkpoints here; they have to share this folder")
    every = max(1, schedule.images // POINTS // schedule.batch_size) * schedule.batch_size
    countable = device.type == "cuda" and not execution.compile and not execution.shard  # operations one by one, on one device
    precision = execution.autocast or torch.float32
    used = Resources(device, resumed, precision, count_flops=countable and distributed.rank() == 0)
    clip = GRADIENT_NORM if choice.clips else math.inf
    gradients = partial(_gradients, loss, optimizer, seed, execution, used, clip)
    objective.module.train()
    progress(resumed, {})
    for images_seen in range(resumed, schedule.images, schedule.batch_size):
        lr, done = learning_rate(schedule, images_seen), images_seen + schedule.batch_size
        for group in optimizer.param_groups:
            group["lr"] = group["lr_multiplier"] * lr
        run.unread.append((images_seen, *gradients(images_seen, schedule.batch_size)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.ema.update(done, schedule.batch_size)
        synced, stop = run.sync(should_stop, device)
        checkpoint_due = done < schedule.images and (stop or done % schedule.checkpoint_images < schedule.batch_size)
        row_due = done % every < schedule.batch_size or done >= schedule.images
        if synced or checkpoint_due or row_due:
            run.check(schedule.batch_size)
        row = run.close_row(done, lr, used.metrics(done)) if row_due else {}
        if checkpoint_due:
            run.save(done)
            if stop:
                raise KeyboardInterrupt(f"stopped at a checkpoint after {done} images")
        progress(min(done, schedule.images), row)  # after the checkpoint: printing fails if its reader is gone
    tracker.flush()
    objective.module.eval()
    return Fitted(distributed.full_tensors(run.ema.average), run.curve)


class _Loss(nn.Module):
    """The loss as a module's forward, as DDP and FSDP2 wrap it."""

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
    distributed.shard(loss, [block for net in loss.modules() if isinstance(net, Pretrained) for block in net.blocks()])
    return loss


def _gradients(
    loss: nn.Module, optimizer: torch.optim.Optimizer, seed: int, execution: Execution, used: Resources, max_norm: float,
    images_seen: int, batch_size: int,
) -> tuple[list[str], Tensor]:  # fmt: skip
    """Fill and clip the gradients of a batch; return its metrics, last the norm before clipping: names, and values in float64."""
    share = batch_size // distributed.ranks()
    first, step = distributed.rank() * share, min(execution.micro_batch or share, share)
    parts = [slice(start, min(start + step, first + share)) for start in range(first, first + share, step)]
    rows, metrics = [], {}
    for part in parts:
        weight = (part.stop - part.start) / share
        more = isinstance(loss, DistributedDataParallel) and part is not parts[-1]  # wait for other ranks at the last
        with loss.no_sync() if more else contextlib.nullcontext():  # type: ignore[operator]
            with used.forward(part.stop - part.start):
                value, metrics = loss(images_seen, batch_size, generator(seed, "loss", images_seen), part)
            (value if len(parts) == 1 else value * weight).backward()
        rows.append(torch.stack([x.detach() for x in (value, *metrics.values())]).double() * weight)
    means = distributed.mean(torch.stack(rows).sum(0))
    groups: dict[int, list[Tensor]] = defaultdict(list)
    for group in optimizer.param_groups:
        groups[group["clip_group"]] += distributed.local_shards(p.grad for p in group["params"] if p.grad is not None)
    norms = torch.stack([global_norm(gradients) for gradients in groups.values()])
    if execution.shard and distributed.ranks() > 1:
        norms = (distributed.mean(norms.square()) * distributed.ranks()).sqrt()
    for gradients, scale in zip(groups.values(), (max_norm / norms).clamp(max=1.0), strict=True):
        torch._foreach_mul_(gradients, scale)
    return ["loss", *metrics, "gradient_norm"], torch.cat([means, torch.linalg.vector_norm(norms).double()[None]])


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


@dataclass
class _Run:
    """A run under way: what a checkpoint holds, and when to read the losses that are still on the device."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    ema: Ema
    tracker: Tracker
    store: CheckpointStore
    curve: list[dict[str, float]] = field(default_factory=list)
    unread: list[tuple[int, list[str], Tensor]] = field(default_factory=list)  # metrics of batches, still on the device
    sums: dict[str, float] = field(default_factory=dict)  # of the metrics of the `count` batches since the last row
    count: int = 0
    saved: int = 0  # images seen at the last checkpoint
    usual: float | None = None  # gradient norm
    synced: float = field(default_factory=time.monotonic)  # when the device and the other ranks were last waited for
    batches: int = 0  # since then
    next: int = 1  # batches until ranks synchronise, by the seconds of the slowest

    def sync(self, should_stop: Callable[[], bool], device: torch.device) -> tuple[bool, bool]:
        """Whether to wait for the device after this batch, the same on all ranks, and whether any was asked to stop."""
        self.batches, stop = self.batches + 1, False
        if distributed.ranks() == 1:
            stop, due = should_stop(), time.monotonic() - self.synced >= SYNC_SECONDS or self.batches >= SYNC_BATCHES
        elif due := self.batches >= self.next:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # else these are the seconds it takes to queue a batch
            seconds = (time.monotonic() - self.synced) / self.batches
            largest = torch.tensor([float(should_stop()), seconds], dtype=torch.float64, device=device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            stop, slowest = bool(largest[0] > 0), float(largest[1])
            self.next = int(min(max(SYNC_SECONDS / max(slowest, 1e-9), 1), SYNC_BATCHES))
        if due:
            self.synced, self.batches = time.monotonic(), 0
        return due, stop

    def check(self, batch_size: int) -> None:
        """Read the metrics since the last check; raise `FloatingPointError` if a batch went wrong, which is then saved."""
        rows = torch.stack([values for _, _, values in self.unread]).tolist()
        for (images_seen, names, _), row in zip(self.unread, rows, strict=True):
            metrics = dict(zip(names, row, strict=True))
            loss, norm = metrics["loss"], metrics["gradient_norm"]
            usual = norm if self.usual is None else self.usual  # running mean of the norm
            if not (math.isfinite(loss) and math.isfinite(norm) and norm <= EXPLOSION * max(usual, GRADIENT_NORM)):
                file = self.store.folder.parent / f"bad_batch_{images_seen}.{distributed.rank()}.safetensors"
                file.parent.mkdir(parents=True, exist_ok=True)
                save_tensors({k: v.cpu().contiguous() for k, v in self.objective.batch(images_seen, batch_size).items()}, file)
                kept = f"the checkpoint at {self.saved} images in {self.store.folder}" if self.saved else "none was saved"
                raise FloatingPointError(
                    f"the batch of images {images_seen} to {images_seen + batch_size - 1} has loss {loss:.4g} and gradient norm "
                    f"{norm:.4g}, usual is {usual:.4g}; it is in {file}; last good state: {kept}; lower the learning rate"
                )
            self.usual = usual + USUAL * (norm - usual)
            self.sums = {name: self.sums.get(name, 0.0) + value for name, value in metrics.items()}
            self.count += 1
        self.unread = []

    def close_row(self, images_seen: int, lr: float, used: dict[str, float]) -> dict[str, float]:
        """Log the means since the last row of the loss curve, and what was `used` meanwhile, which is no part of the curve."""
        row = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        self.curve.append({"images": images_seen, **row, "lr": lr})
        self.tracker.log({**row, "lr": lr, **used}, images_seen)
        return row

    def save(self, images_seen: int) -> None:
        parts = self.objective.module.state_dict(), self.ema.average, optimizer_tensors(self.optimizer)
        named = {f"{part}.{k}": v for part, state in zip(PARTS, parts, strict=True) for k, v in state.items()}
        tensors, state = distributed.full_tensors(named), {name: getattr(self, name) for name in STATE}
        if distributed.rank() == 0:
            self.store.save(tensors, {"images_seen": images_seen, **state, "tracker": self.tracker.state_dict()})
        self.saved = images_seen
        self.tracker.flush()  # after the checkpoint: a kill in between delivers the same metrics again, not new ones

    def resume(self) -> int:
        """Restore the checkpoint; return the images seen, 0 without one. `InputError` if it does not fit the model."""
        if (loaded := self.store.load()) is None:
            return 0
        tensors, state = loaded
        model, ema, optimizer = ({k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{p}.")} for p in PARTS)
        try:
            distributed.load(self.objective.module.state_dict(), model)
            distributed.load(self.ema.average, ema)
            load_optimizer_tensors(self.optimizer, optimizer)
            self.tracker.load_state_dict(state["tracker"])
            for name in STATE:
                setattr(self, name, state[name])
        except (KeyError, IndexError, RuntimeError) as error:  # adopted from other code
            reason = f"does not fit what is trained now ({str(error).splitlines()[0]}); `ldm checkpoints drop` it"
            raise InputError(f"{self.store.folder}: {reason}") from error
        self.saved = state["images_seen"]
        print(f"resuming after {self.saved} images from {self.store.folder}", flush=True)
        return self.saved
