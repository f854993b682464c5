"""Train the U-Net on cached latents."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ldm.config import Settings, load_settings
from ldm.data.latents import Latents, open_latents
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import noise_levels
from ldm.hashing import canonical_json, file_hash, folder_hash
from ldm.nets.unet import UNet
from ldm.randomness import seed_for
from ldm.stages.runtime import Progress, set_up, stage_main, stop_at_checkpoint, work_folder, work_key
from ldm.tracking import stage_run
from ldm.training.checkpoint import CheckpointStore
from ldm.training.fit import fit
from ldm.training.unet import UnetObjective

OUT, RAW, CURVE = "models/unet", "models/unet_raw", "reports/curves/train_unet.csv"


def build(settings: Settings, context_width: int) -> UNet:
    """The untrained U-Net that the settings and seed describe."""
    torch.manual_seed(seed_for(settings.seed, "initialise", "unet"))
    channels = settings.autoencoder.latent_channels
    return UNet(channels, channels, cross_attention_dim=context_width, **settings.unet.model_dump())


def recipe(settings: Settings, latents: Latents) -> dict[str, Any]:
    """What the weights alone do not say: a `ldm.model.Recipe` but for the sampling defaults."""
    manifest = latents.manifest
    kept = {name: manifest[name] for name in ("autoencoder", "preprocessing", "latent_mean", "latent_std")}
    return {**settings.diffusion.model_dump(), **kept, "text": {**manifest["text"], "sha256": manifest["text_encoder"]}}


def run(root: Path) -> None:
    settings = load_settings(root)
    device = set_up(settings.deterministic)
    latents = open_latents(root / "data/latents", "train", autoencoder=folder_hash(root / "models/autoencoder"))
    unet = build(settings, latents.text.shape[-1]).place(device)
    options, diffusion = settings.train_unet, settings.diffusion
    denoiser = Denoiser(unet, diffusion.kind, noise_levels(diffusion.noise, diffusion.sigma_max))
    params = {
        "seed": settings.seed,
        "deterministic": settings.deterministic,
        "device": str(device),
        **settings.unet.model_dump(),
        **diffusion.model_dump(),
        **options.model_dump(),
    }
    key = work_key("train_unet", params, {"latents": file_hash(root / "data/latents/manifest.json")})
    with work_folder(root, "train_unet", key) as work, stage_run("train_unet", params, key) as tracker:
        store = CheckpointStore(work / "checkpoint")
        objective = UnetObjective(denoiser, latents, options.caption_dropout, settings.seed, device)
        with stop_at_checkpoint() as should_stop:
            progress = Progress("train_unet", options.images)
            fitted = fit(
                objective, options, seed=settings.seed, journal=tracker, store=store, progress=progress, should_stop=should_stop
            )
        unet.save_pretrained(root / RAW)
        unet.load_state_dict(fitted.ema)
        unet.save_pretrained(root / OUT)
        (root / OUT / "recipe.json").write_text(canonical_json(recipe(settings, latents)))
        (root / CURVE).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(fitted.curve).to_csv(root / CURVE, index=False)
        store.clear()


if __name__ == "__main__":
    stage_main("train_unet", run)
