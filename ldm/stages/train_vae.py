"""Train the KL autoencoder on the evidence lower bound of the shards' training images."""

from pathlib import Path

import pandas as pd
import torch

from ldm.bayes.likelihoods import DiscretizedLogistic
from ldm.config import Settings, load_settings
from ldm.data.batches import Batches
from ldm.data.parallel import loader_workers
from ldm.nets.autoencoder import AutoencoderKL
from ldm.randomness import seed_for
from ldm.stages.inputs import index_hash, stage_shards
from ldm.stages.runtime import Progress, set_up, stage_main, stop_at_checkpoint, work_folder, work_key
from ldm.tracking import stage_run
from ldm.training.checkpoint import CheckpointStore
from ldm.training.fit import fit
from ldm.training.vae import VaeObjective, evaluate_elbo, summary

OUT, CURVE = "models/autoencoder", "reports/curves/train_vae.csv"


def build(settings: Settings) -> tuple[AutoencoderKL, DiscretizedLogistic]:
    """The untrained autoencoder and likelihood that the settings and seed describe."""
    torch.manual_seed(seed_for(settings.seed, "initialise", "autoencoder"))
    channels = settings.data.channels
    return AutoencoderKL(channels, channels, **settings.autoencoder.model_dump()), DiscretizedLogistic()


def run(root: Path) -> None:
    settings = load_settings(root)
    device = set_up(settings.deterministic)
    train, val = (stage_shards(root, split) for split in ("train", "val"))
    autoencoder, likelihood = build(settings)
    autoencoder.place(device), likelihood.to(device)
    options = settings.train_vae
    params = {
        "seed": settings.seed,
        "deterministic": settings.deterministic,
        "device": str(device),
        **settings.autoencoder.model_dump(),
        **options.model_dump(),
    }
    key = work_key("train_vae", params, {"shards": index_hash(train)})
    with work_folder(root, "train_vae", key) as work, stage_run("train_vae", params, key) as tracker:
        store = CheckpointStore(work / "checkpoint")
        batches = Batches(train, settings.seed, shuffle=options.shuffle, flip=options.flip, workers=loader_workers(device.type))
        objective = VaeObjective(autoencoder, likelihood, batches, options.beta)
        with stop_at_checkpoint() as should_stop:
            progress = Progress("train_vae", options.images)
            fitted = fit(
                objective, options, seed=settings.seed, journal=tracker, store=store, progress=progress, should_stop=should_stop
            )
        objective.module.load_state_dict(fitted.ema)
        held_out = summary(evaluate_elbo(autoencoder, likelihood, val, settings.seed))
        tracker.log({f"val_{name}": float(value) for name, value in held_out.items()}, options.images)
        autoencoder.save_pretrained(root / OUT)
        likelihood.save_pretrained(root / OUT)
        (root / CURVE).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(fitted.curve).to_csv(root / CURVE, index=False)
        store.clear()
    print(f"train_vae: validation ELBO {held_out['elbo_nats']:.1f} nats, {held_out['elbo_bits_per_dim']:.4f} bits/dim")


if __name__ == "__main__":
    stage_main("train_vae", run)
