"""Encode all training and validation images, and embed all captions."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.base.device import set_up
from ldm.base.paths import AUTOENCODER, LATENT_STORE, LATENTS
from ldm.base.pixels import to_float
from ldm.base.progress import Progress
from ldm.bayes.diagnostics import diagnose
from ldm.config import load_settings
from ldm.data.latents import open_latents, write_latents
from ldm.data.reader import stage_shards
from ldm.nets.autoencoder import VQModel, load_autoencoder
from ldm.nets.diffusers import network_hash
from ldm.nets.text.encoder import TextEncoder
from ldm.registry.tracking import stage_run
from ldm.stages.checks import check_captions, check_latents_space
from ldm.stages.stage import stage_main, stage_params
from ldm.stages.work import identify


def run(root: Path) -> None:
    settings = load_settings(root)
    device = set_up(settings.deterministic)
    autoencoder, digest = load_autoencoder(root / AUTOENCODER).place(device), network_hash(root / AUTOENCODER)
    check_captions(root, settings, ("train", "val"))
    check_latents_space(root, autoencoder, settings.cache_latents.flip)
    encoder, text = TextEncoder(settings.text.located(root)), settings.text.model_dump(exclude={"max_cut"})
    identity = {"autoencoder": digest, "text_encoder": encoder.sha256, "text": text}
    code = identify(root, "cache_latents", {"deterministic": settings.deterministic}, {}, {"device": device.type}).key

    @torch.inference_mode()
    def encode(images: np.ndarray) -> tuple[Tensor, Tensor]:
        posterior = autoencoder.encode(to_float(images).to(device))
        return posterior.mean.cpu(), posterior.logvar.cpu()

    with stage_run("cache_latents", stage_params(root, "cache_latents", settings)) as tracker:
        readers = {split: stage_shards(root, split) for split in ("train", "val")}
        total = sum(map(len, readers.values()))
        manifest, reused = write_latents(
            readers, root / LATENTS, encode, encoder, identity, Progress("cache_latents", total),
            store=root / LATENT_STORE, code=code, flip=settings.cache_latents.flip,
        )  # fmt: skip
        if not isinstance(autoencoder, VQModel):
            val = open_latents(root / LATENTS, "val", autoencoder=digest)
            found = diagnose(val.mean, val.logvar)
            tracker.log(found.metrics(), total)
            if warning := found.warning():
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        tracker.log({f"latent_std_{i}": std for i, std in enumerate(manifest["latent_std"])} | {"reused_shards": reused}, total)
    print(f"cache_latents: {len(manifest['files'])} shards, {reused} of them encoded before and reused")


if __name__ == "__main__":
    stage_main("cache_latents", run)
