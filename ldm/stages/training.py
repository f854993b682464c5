"""What the training stages share: ranks, precision, work folder, MLflow run and the loop."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ldm.base import distributed
from ldm.base.errors import InputError, env_count, env_switch
from ldm.base.progress import Progress
from ldm.config import Settings
from ldm.nets.diffusers import Pretrained
from ldm.registry.tracking import Run, stage_run
from ldm.stages.checks import check_training_space
from ldm.stages.stage import stage_params, stop_at_checkpoint
from ldm.stages.work import Work, identify, opened
from ldm.training.checkpoint import CheckpointStore
from ldm.training.fit import Execution, Objective, fit


@contextlib.contextmanager
def training(
    root: Path, name: str, settings: Settings, inputs: dict[str, str], device: torch.device, out: str, table: str
) -> Iterator[tuple[Callable[..., dict[str, Tensor]], Run, Work | None]]:
    """Join the ranks, open the work folder and the MLflow run; at the end, write the loss curve and delete the work folder.

    Yields the function that trains an objective as the settings say and returns its averaged weights, the MLflow run, and the
    work, which is None on ranks that write no outs. Equal settings, `inputs` (hashes), code and layout resume a checkpoint.
    """
    options, ranks = getattr(settings, name), int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % ranks:
        found = f"{name}.batch_size {options.batch_size}"
        raise InputError(f"{found} cannot be shared by {ranks} processes; make it a multiple")
    micro_batch, gradient_checkpointing = env_count("LDM_MICRO_BATCH", 0) or None, env_switch("LDM_GRADIENT_CHECKPOINTING")
    shard = env_switch("LDM_SHARD_MODEL") and ranks > 1 and name == "train_unet"  # autoencoders are small
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.bfloat16 if settings.precision == "bf16" or (settings.precision == "auto" and has_bf16) else None
    layout = {"device": str(device), "processes": ranks, "micro_batch": micro_batch, "shard": shard}
    params, curve = stage_params(root, name, settings), list[dict[str, float]]()
    run = identify(root, name, params, inputs, layout)

    def fit_objective(objective: Objective, num_data: int = 0) -> dict[str, Tensor]:
        """`num_data`: size of the data, for an optimizer that samples a posterior."""
        for net in objective.module.modules():
            if isinstance(net, Pretrained):
                net.set_gradient_checkpointing(gradient_checkpointing)
        if work:
            check_training_space(run.checkpoint, root / out, objective.module, options)
        bar = Progress(name, options.images) if work else contextlib.nullcontext(lambda done, row: None)
        try:
            with bar as progress, stop_at_checkpoint() as should_stop:
                fitted = fit(
                    objective, options, seed=settings.seed, tracker=tracker, progress=progress, should_stop=should_stop,
                    store=CheckpointStore(run.checkpoint), num_data=num_data,
                    execution=Execution(autocast, settings.compile, micro_batch, shard),
                )  # fmt: skip
        except FloatingPointError as error:  # deterministic: a retry would fail again
            raise InputError(str(error)) from None
        curve.extend(fitted.curve)
        return fitted.ema

    with distributed.process_group(device), contextlib.ExitStack() as held:
        threads, first = torch.get_num_threads(), distributed.rank() == 0
        work = held.enter_context(opened(root, run, options.images, threads)) if first else None
        described = (work.run_key, work.tags()) if work else ()
        tracker = held.enter_context(stage_run(name, params | layout, *described))
        yield fit_objective, tracker, work
        if work:
            work.note_adopted(root / out)
            (root / table).parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(curve, columns=None if curve else ["images", "loss"]).to_csv(root / table, index=False)
            work.finish()
