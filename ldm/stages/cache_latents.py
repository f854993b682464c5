"""Encode all training and validation images, and embed all captions."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.base.device import set_up
from ldm.base.errors import megabytes
from ldm.base.memory import Parts
from ldm.base.paths import AUTOENCODER, LATENT_STORE, LATENTS
from ldm.base.pixels import to_float
from ldm.base.progress import Progress
from ldm.bayes.diagnostics import diagnose
from ldm.config import load_settings
from ldm.data.augment import augmented
from ldm.data.caption_columns import all_captions
from ldm.data.encoding import write_latents
from ldm.data.latents import CAPTIONS, Latents, open_latents
from ldm.data.reader import stage_shards
from ldm.nets.autoencoder import VQModel, load_autoencoder
from ldm.nets.diffusers import network_hash
from ldm.nets.text.encoder import TextEncoder
from ldm.registry.tracking import stage_run
from ldm.stages.checks import check_captions, check_latents_space
from ldm.stages.stage import stage_main, stage_params
from ldm.stages.work import identify

DIAGNOSED = 1 << 26  # latent values of validation images that are looked at, at most


def run(root: Path) -> None:
    settings = load_settings(root)
    device, options = set_up(settings.deterministic), settings.cache_latents
    autoencoder, digest = load_autoencoder(root / AUTOENCODER).place(device), network_hash(root / AUTOENCODER)
    counts, encoder = check_captions(root, settings, ("train", "val")), TextEncoder(settings.text.located(root), device)
    embeddings = counts.embedded_bytes(encoder.width) * (1 + options.shorten + options.shuffle_tags) if counts else 0
    most = "at most " if options.shorten or options.shuffle_tags or (counts and counts.every > 1) else ""
    kept = "take" if settings.text.cache else "are computed while the U-Net trains; kept (text.cache: true), they would take"
    print(f"cache_latents: embeddings of captions {kept} {most}{megabytes(embeddings)}", flush=True)
    check_latents_space(root, autoencoder, options.flip, embeddings if settings.text.cache else 0)
    identity = {
        "autoencoder": digest,
        "text_encoder": encoder.sha256,
        "text_width": encoder.width,
        "text": settings.text.identity,
    }
    code = identify(root, "cache_latents", {"deterministic": settings.deterministic}, {}, {"device": device.type}).key

    @torch.inference_mode()
    def encode(images: np.ndarray) -> tuple[Tensor, Tensor]:
        posterior = autoencoder.encode(to_float(images).to(device))
        return posterior.mean.cpu(), posterior.logvar.cpu()

    def texts(row: dict[str, Any]) -> list[str]:
        return augmented(all_captions(row), shorten=options.shorten, shuffle_tags=options.shuffle_tags)

    with stage_run("cache_latents", stage_params(root, "cache_latents", settings)) as tracker:
        readers = {split: stage_shards(root, split) for split in ("train", "val")}
        total = sum(map(len, readers.values()))
        manifest, reused = write_latents(
            readers, root / LATENTS, encode, encoder if settings.text.cache else None, identity, Progress("cache_latents", total),
            store=root / LATENT_STORE, code=code, divide=Parts(device), texts=texts, flip=options.flip,
        )  # fmt: skip
        mean, logvar = some(open_latents(root / LATENTS, "val", autoencoder=digest))
        if len(mean) > 1 and not isinstance(autoencoder, VQModel):
            found = diagnose(mean, logvar)
            tracker.log(found.metrics(), total)
            if warning := found.warning():
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        tracker.log({f"latent_std_{i}": std for i, std in enumerate(manifest["latent_std"])} | {"reused_shards": reused}, total)
    shards = sum(file["split"] != CAPTIONS for file in manifest["files"])
    captions = sum(file["count"] for file in manifest["files"] if file["split"] == CAPTIONS) - 1  # the empty one is always there
    print(f"cache_latents: {shards} shards, {reused} of them encoded before and reused; {captions:,} distinct captions")


def some(latents: Latents) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of images of the commonest shape, (N, c, h, w): of all of them, unless these are too many."""
    (height, width), index = max(latents.groups.items(), key=lambda group: len(group[1]))
    return latents.moments(index[: max(2, DIAGNOSED // (latents.channels * height * width))])


if __name__ == "__main__":
    stage_main("cache_latents", run)
