"""Train the U-Net, or another backbone, on cached latents."""

from pathlib import Path
from typing import Any

import torch

from ldm.base.device import set_up
from ldm.base.hashing import canonical_json, file_hash
from ldm.base.paths import AUTOENCODER, LATENTS, UNET, UNET_CURVE
from ldm.base.randomness import seed_for
from ldm.config import Settings, load_settings
from ldm.data.latents import Latents, open_latents
from ldm.diffusion.denoiser import Denoiser
from ldm.nets.backbones.backbone import Backbone
from ldm.nets.diffusers import Pretrained, network_hash
from ldm.stages.runtime import stage_main
from ldm.stages.stage import Stage
from ldm.stages.training import training, write_curve
from ldm.training.unet import UnetObjective


def build(settings: Settings, context_width: int) -> Pretrained:
    """The untrained network that the settings and seed describe."""
    torch.manual_seed(seed_for(settings.seed, "initialise", "unet"))
    backbone: Backbone = settings.backbone
    return backbone.build(settings.autoencoder.latent_channels, context_width)


def recipe(settings: Settings, latents: Latents) -> dict[str, Any]:
    """What the weights alone do not say: a `ldm.diffusion.recipe.Recipe` but for the sampling defaults."""
    manifest = latents.manifest
    kept = {name: manifest[name] for name in ("autoencoder", "preprocessing", "latent_mean", "latent_std")}
    text = {"options": manifest["text"], "sha256": manifest["text_encoder"]}
    return {"diffusion": settings.diffusion.model_dump(), "text": text, **kept}


def run(root: Path) -> None:
    settings = load_settings(root)
    device = set_up(settings.deterministic)
    latents = open_latents(root / LATENTS, "train", autoencoder=network_hash(root / AUTOENCODER))
    network = build(settings, latents.text.shape[-1]).place(device)
    options, diffusion = settings.train_unet, settings.diffusion
    denoiser = Denoiser(network, diffusion.prediction, diffusion.noise.build())
    inputs = {"latents": file_hash(root / LATENTS / "manifest.json")}
    with training(root, STAGE, settings, options, inputs, device) as started:
        fitted = started.fit(UnetObjective(denoiser, latents, options, settings.seed, device))
        if not started.work:
            return
        network = build(settings, latents.text.shape[-1])  # a whole one: the other may have been sharded
        network.load_state_dict({k.removeprefix("unet."): v for k, v in fitted.ema.items() if k.startswith("unet.")})
        network.save_pretrained(root / UNET)
        started.work.note_adopted(root / UNET)
        (root / UNET / "recipe.json").write_text(canonical_json(recipe(settings, latents)))
        write_curve(fitted, root / UNET_CURVE)


STAGE = Stage(
    "train_unet",
    run,
    settings=(
        "seed", "deterministic", "precision", "compile", "autoencoder.latent_channels", "backbone", "diffusion", "train_unet",
    ),
    inputs=(LATENTS, AUTOENCODER),
    outs=(UNET, UNET_CURVE),
)  # fmt: skip

if __name__ == "__main__":
    stage_main(STAGE, parallel=True)
