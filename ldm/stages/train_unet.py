"""Train the U-Net on cached latents."""

from pathlib import Path
from typing import Any

import torch

from ldm.config import Settings, load_settings
from ldm.data.latents import Latents, open_latents
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import noise_levels
from ldm.hashing import canonical_json, file_hash
from ldm.nets.blocks import network_hash
from ldm.nets.unet import UNet
from ldm.randomness import seed_for
from ldm.stages.runtime import set_up, stage_main
from ldm.stages.training import training, write_curve
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
    latents = open_latents(root / "data/latents", "train", autoencoder=network_hash(root / "models/autoencoder"))
    unet = build(settings, latents.text.shape[-1]).place(device)
    options, diffusion = settings.train_unet, settings.diffusion
    denoiser = Denoiser(unet, diffusion.kind, noise_levels(**diffusion.model_dump(exclude={"kind"})))
    params = {
        "seed": settings.seed,
        "deterministic": settings.deterministic,
        "precision": settings.precision,
        "compile": settings.compile,
        **settings.unet.model_dump(),
        **diffusion.model_dump(),
    }
    inputs = {"latents": file_hash(root / "data/latents/manifest.json")}
    with training(root, "train_unet", params, options, inputs, device) as work:
        fitted = work.fit(UnetObjective(denoiser, latents, options, settings.seed, device))
        if not work.first:
            return
        unet = build(settings, latents.text.shape[-1])  # a whole one: processes may have shared the other out
        for folder, weights in ((RAW, fitted.last), (OUT, fitted.ema)):
            unet.load_state_dict({k.removeprefix("unet."): v for k, v in weights.items() if k.startswith("unet.")})
            unet.save_pretrained(root / folder)
        (root / OUT / "recipe.json").write_text(canonical_json(recipe(settings, latents)))
        write_curve(fitted, root / CURVE)


if __name__ == "__main__":
    stage_main("train_unet", run)
