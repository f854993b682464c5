"""What the training stages share: processes, precision, work folder, MLflow run and the loop."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from ldm.base import distributed
from ldm.base.errors import InputError
from ldm.base.paths import WORK
from ldm.base.progress import Progress
from ldm.config import Settings
from ldm.nets.diffusers import Pretrained
from ldm.registry.tracking import Run, stage_run
from ldm.stages.runtime import INTERRUPTED, stop_at_checkpoint
from ldm.stages.stage import Stage
from ldm.stages.work import Work, identify, opened
from ldm.training.checkpoint import CheckpointStore
from ldm.training.fit import Execution, Fitted, Objective, fit

if TYPE_CHECKING:
    from ldm.training.options import Training as Schedule

GRACE = 5.0  # seconds in which a process notices by itself that another one failed


@dataclass(frozen=True)
class Training:
    """A training stage under way."""

    fit: Callable[..., Fitted]  # of an objective, and of the number of data if the optimizer samples a posterior
    tracker: Run
    first: bool  # of the processes: the one that writes
    work: Work | None  # the first one's folder

    def note_adopted(self, out: Path) -> None:
        """See `ldm.stages.work.Work.note_adopted`."""
        if self.work:
            self.work.note_adopted(out)


@contextlib.contextmanager
def training(
    root: Path, stage: Stage, settings: Settings, options: "Schedule", inputs: dict[str, str], device: torch.device
) -> Iterator[Training]:
    """Within, `LDM_PROCESSES` processes run the stage; at its end the checkpoints of the first one are dropped.

    The settings that the stage reads and `inputs` (hashes) are the run's identity, with the code: a run with the same ones
    goes on from its checkpoint.
    """
    count = int(os.environ.get("WORLD_SIZE") or _count("LDM_PROCESSES", 1))
    if options.batch_size % count:
        raise InputError(
            f"{stage.name}.batch_size {options.batch_size} cannot be shared by {count} processes; make it a multiple"
        )
    micro_batch, checkpointing = _count("LDM_MICRO_BATCH", 0) or None, _switch("LDM_GRADIENT_CHECKPOINTING")
    shard = _switch("LDM_SHARD_MODEL") and count > 1 and stage.name == "train_unet"  # autoencoders are small
    execution = Execution(_autocast(settings.precision, device), settings.compile, micro_batch, shard)
    with _peers(stage.name), distributed.process_group(device), contextlib.ExitStack() as held:
        first = distributed.rank() == 0
        layout = {"device": str(device), "processes": distributed.ranks(), "micro_batch": micro_batch, "shard": shard}
        params = stage.params(settings)
        identity = identify(stage.name, params, inputs, layout)
        tracker, work = Run(), None
        if first:
            work = held.enter_context(opened(root, identity, options.images, torch.get_num_threads()))
            tracker = held.enter_context(stage_run(stage.name, params | layout, identity.key, work.tags()))
        store = CheckpointStore(root / WORK / stage.name / identity.key / "checkpoint")

        def run(objective: Objective, num_data: int = 0) -> Fitted:
            for net in objective.module.modules():
                if isinstance(net, Pretrained):
                    net.set_gradient_checkpointing(checkpointing)
            bar = Progress(stage.name, options.images) if first else contextlib.nullcontext(lambda done, row: None)
            try:
                with bar as progress, stop_at_checkpoint() as should_stop:
                    return fit(
                        objective, options, seed=settings.seed, tracker=tracker, store=store, progress=progress,
                        should_stop=should_stop, execution=execution, num_data=num_data,
                    )  # fmt: skip
            except FloatingPointError as error:  # the same would come again: no retry helps
                raise InputError(str(error)) from None

        yield Training(run, tracker, first, work)
        if work:
            work.finish()


def write_curve(fitted: Fitted, path: Path) -> None:
    """The loss curve as CSV, with its header at least."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(fitted.curve, columns=None if fitted.curve else ["images", "loss"]).to_csv(path, index=False)


def _autocast(precision: str, device: torch.device) -> torch.dtype | None:
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and has_bf16) else None


def _count(name: str, least: int) -> int:
    value = os.environ.get(name) or str(least)
    if not (value.isascii() and value.isdigit()) or int(value) < least:
        raise InputError(f"{name} is {value!r}; set it to a whole number of {least} or more, or unset it")
    return int(value)


def _switch(name: str) -> bool:
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise InputError(f"{name} is {value!r}; set it to 1, or unset it")
    return value == "1"


def _watch(child: "subprocess.Popen[bytes]", rank: int) -> None:
    """End this process where another one failed: it may be waiting for it where nothing else interrupts."""
    code = child.wait()
    if code in (0, INTERRUPTED):
        return
    time.sleep(GRACE)  # mostly the loss is noticed, and the end an orderly one
    print(f"error: process {rank} of this training ended with exit code {code}", file=sys.stderr, flush=True)
    os._exit(2 if code == 2 else 1)


@contextlib.contextmanager
def _peers(stage: str) -> Iterator[None]:
    """Start the other processes that `LDM_PROCESSES` asks for, unless torchrun has; none of them outlives this one."""
    count = _count("LDM_PROCESSES", 1)
    if count == 1 or "WORLD_SIZE" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        common = {"WORLD_SIZE": str(count), "LDM_RENDEZVOUS": f"file://{folder}/rendezvous"}
        children: list[subprocess.Popen[bytes]] = []
        for rank in range(1, count):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LDM_OWNER_PIPE": "1"}
            command = [sys.executable, "-m", f"ldm.stages.{stage}"]
            children.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment))
            threading.Thread(target=_watch, args=(children[-1], rank), daemon=True).start()
        os.environ.update(common, RANK="0", LOCAL_RANK="0")
        try:
            yield
        except RuntimeError as error:
            time.sleep(1)  # the others may have ended first, and this error be of no more than their absence
            if 2 in [child.poll() for child in children]:
                raise InputError("another process of this training cannot go on; its error stands above") from error
            raise
        finally:
            for name in (*common, "RANK", "LOCAL_RANK"):
                del os.environ[name]
            for child in children:
                child.communicate()  # closes its stdin: it has come to its end, or is to
