"""What the training stages share: ranks, precision, work folder, MLflow run and the loop."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from ldm.base import distributed
from ldm.base.environment import env_count, env_switch
from ldm.base.errors import InputError
from ldm.base.progress import Progress
from ldm.config import Settings
from ldm.nets.diffusers import Pretrained
from ldm.registry.tracking import Run, stage_run
from ldm.stages.runtime import stop_at_checkpoint
from ldm.stages.stage import Stage
from ldm.stages.work import Work, identify, opened
from ldm.training.checkpoint import CheckpointStore
from ldm.training.fit import Execution, Fitted, Objective, fit

if TYPE_CHECKING:
    from ldm.training.options import Training as Schedule


@dataclass(frozen=True)
class Training:
    """A training stage under way, on one of its ranks."""

    stage: str
    options: "Schedule"
    seed: int
    execution: Execution
    gradient_checkpointing: bool
    store: CheckpointStore
    tracker: Run
    work: Work | None  # None: on another rank than 0, which writes no outs

    def fit(self, objective: Objective, num_data: int = 0) -> Fitted:
        """Train as the settings say. `num_data`: size of the data, for an optimizer that samples a posterior."""
        for net in objective.module.modules():
            if isinstance(net, Pretrained):
                net.set_gradient_checkpointing(self.gradient_checkpointing)
        bar = Progress(self.stage, self.options.images) if self.work else contextlib.nullcontext(lambda done, row: None)
        try:
            with bar as progress, stop_at_checkpoint() as should_stop:
                return fit(
                    objective, self.options, seed=self.seed, tracker=self.tracker, store=self.store, progress=progress,
                    should_stop=should_stop, execution=self.execution, num_data=num_data,
                )  # fmt: skip
        except FloatingPointError as error:  # deterministic: a retry would fail again
            raise InputError(str(error)) from None


@contextlib.contextmanager
def training(
    root: Path, stage: Stage, settings: Settings, options: "Schedule", inputs: dict[str, str], device: torch.device
) -> Iterator[Training]:
    """Join the ranks, open the work folder and the MLflow run; at the end, delete the work folder with its checkpoints.

    The settings that the stage reads, `inputs` (hashes), code and layout are the run's identity: a run with the same identity
    resumes from its checkpoint.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % ranks:
        found = f"{stage.name}.batch_size {options.batch_size}"
        raise InputError(f"{found} cannot be shared by {ranks} processes; make it a multiple")
    micro_batch, gradient_checkpointing = env_count("LDM_MICRO_BATCH", 0) or None, env_switch("LDM_GRADIENT_CHECKPOINTING")
    shard = env_switch("LDM_SHARD_MODEL") and ranks > 1 and stage.name == "train_unet"  # autoencoders are small
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.bfloat16 if settings.precision == "bf16" or (settings.precision == "auto" and has_bf16) else None
    execution = Execution(autocast, settings.compile, micro_batch, shard)
    layout = {"device": str(device), "processes": ranks, "micro_batch": micro_batch, "shard": shard}
    params = stage.params(settings)
    identity = identify(stage.name, params, inputs, layout)
    store = CheckpointStore(identity.folder(root) / "checkpoint")
    with distributed.process_group(device), contextlib.ExitStack() as held:
        threads, first = torch.get_num_threads(), distributed.rank() == 0
        work = held.enter_context(opened(root, identity, options.images, threads)) if first else None
        tracker = held.enter_context(stage_run(stage.name, params | layout, identity.key, work.tags() if work else None))
        yield Training(stage.name, options, settings.seed, execution, gradient_checkpointing, store, tracker, work)
        if work:
            work.finish()


def write_curve(fitted: Fitted, path: Path) -> None:
    """Write the loss curve as CSV, at least its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(fitted.curve, columns=None if fitted.curve else ["images", "loss"]).to_csv(path, index=False)
