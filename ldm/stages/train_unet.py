"""Train the U-Net on cached latents."""

from pathlib import Path
from typing import Any

import torch

from ldm.base.device import set_up
from ldm.base.hashing import canonical_json, file_hash
from ldm.base.paths import AUTOENCODER, LATENTS, UNET, UNET_CURVE, UNET_RAW
from ldm.base.randomness import seed_for
from ldm.config import Settings, load_settings
from ldm.data.latents import Latents, open_latents
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import noise_levels
from ldm.nets.blocks import network_hash
from ldm.nets.unet import UNet
from ldm.stages.runtime import stage_main
from ldm.stages.stage import Stage
from ldm.stages.training import training, write_curve
from ldm.training.unet import UnetObjective


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
    latents = open_latents(root / LATENTS, "train", autoencoder=network_hash(root / AUTOENCODER))
    unet = build(settings, latents.text.shape[-1]).place(device)
    options, diffusion = settings.train_unet, settings.diffusion
    denoiser = Denoiser(unet, diffusion.kind, noise_levels(**diffusion.model_dump(exclude={"kind"})))
    inputs = {"latents": file_hash(root / LATENTS / "manifest.json")}
    with training(root, STAGE, settings, options, inputs, device) as work:
        fitted = work.fit(UnetObjective(denoiser, latents, options, settings.seed, device))
        if not work.first:
            return
        unet = build(settings, latents.text.shape[-1])  # a whole one: processes may have shared the other out
        for folder, weights in ((UNET_RAW, fitted.last), (UNET, fitted.ema)):
            unet.load_state_dict({k.removeprefix("unet."): v for k, v in weights.items() if k.startswith("unet.")})
            unet.save_pretrained(root / folder)
            work.note_adopted(root / folder)
        (root / UNET / "recipe.json").write_text(canonical_json(recipe(settings, latents)))
        write_curve(fitted, root / UNET_CURVE)


STAGE = Stage(
    "train_unet",
    run,
    settings=(
        "seed", "deterministic", "precision", "compile", "autoencoder.latent_channels", "unet", "diffusion", "train_unet",
    ),
    inputs=(LATENTS, AUTOENCODER),
    outs=(UNET, UNET_RAW, UNET_CURVE),
)  # fmt: skip

if __name__ == "__main__":
    stage_main(STAGE)
