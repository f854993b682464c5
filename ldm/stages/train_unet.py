"""Train the U-Net, or another backbone, on cached latents."""

from pathlib import Path
from typing import Any

import torch

from ldm.base.device import set_up
from ldm.base.files import canonical_json, file_hash, folder_hash
from ldm.base.options import chosen
from ldm.base.paths import AUTOENCODER, INITIAL, LATENTS, UNET, UNET_CURVE
from ldm.base.randomness import seed_for
from ldm.config import Settings, load_settings
from ldm.data.latents import Latents, open_latents
from ldm.diffusion.denoiser import Denoiser
from ldm.nets.backbone import Backbone, load_backbone
from ldm.nets.diffusers import Pretrained, network_hash
from ldm.nets.text.encoder import Text, TextEncoder
from ldm.stages.checks import check_fetched, check_initial, check_sizes
from ldm.stages.stage import stage_main
from ldm.stages.training import training
from ldm.training.unet import UnetObjective


def build(settings: Settings, context_width: int) -> Pretrained:
    """The untrained network that the settings and seed describe."""
    torch.manual_seed(seed_for(settings.seed, "initialise", "unet"))
    backbone: Backbone = settings.backbone
    return backbone.build(settings.autoencoder.latent_channels, context_width)


def start(root: Path, settings: Settings, latents: Latents) -> Pretrained:
    """As `build`, or with the averaged weights of the model that `train_unet.init` names."""
    network, folder, name = build(settings, latents.width), root / INITIAL, settings.train_unet.init
    if name:
        check_fetched(folder, "train_unet.init", name)
        check_initial(root, settings, folder, latents.manifest)
        network.load_state_dict(load_backbone(folder / "unet").state_dict())
        print(f"train_unet: starts from {name}", flush=True)
    return network


def encoder(root: Path, latents: Latents, device: torch.device) -> TextEncoder | None:
    """The text encoder with which captions that the cache has as text are embedded while the U-Net trains."""
    if latents.embedded:
        return None
    text: Text = chosen(Text, latents.manifest["text"])
    return text.located(root).build(latents.manifest["text_encoder"], device)


def recipe(settings: Settings, latents: Latents) -> dict[str, Any]:
    """A `ldm.diffusion.options.Recipe` but for the sampling defaults: what the weights alone do not say."""
    kept = {name: latents.manifest[name] for name in ("autoencoder", "preprocessing", "latent_mean", "latent_std")}
    text = {"options": latents.manifest["text"], "sha256": latents.manifest["text_encoder"]}
    return {"diffusion": settings.diffusion.model_dump(), "text": text, **kept}


def run(root: Path) -> None:
    settings = load_settings(root)
    device, diffusion = set_up(settings.deterministic), settings.diffusion
    check_sizes(root, settings)
    latents = open_latents(root / LATENTS, "train", autoencoder=network_hash(root / AUTOENCODER))
    network = start(root, settings, latents).place(device)
    denoiser = Denoiser(network, diffusion.prediction, diffusion.noise.build())
    inputs = {"latents": file_hash(root / LATENTS / "manifest.json"), "initial": folder_hash(root / INITIAL)}
    with training(root, "train_unet", settings, inputs, device, UNET, UNET_CURVE) as (fit, _, work):
        ema = fit(UnetObjective(denoiser, latents, settings.train_unet, settings.seed, device, encoder(root, latents, device)))
        if not work:
            return
        network = build(settings, latents.width)  # a whole one: the other may have been sharded
        network.load_state_dict({k.removeprefix("unet."): v for k, v in ema.items() if k.startswith("unet.")})
        network.save_pretrained(root / UNET)
        (root / UNET / "recipe.json").write_text(canonical_json(recipe(settings, latents)))


if __name__ == "__main__":
    stage_main("train_unet", run, parallel=True)
