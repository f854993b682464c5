"""Drift: compare new images with the test images by the spread of their bounds over posterior samples of the decoder."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch
from scipy.stats import fisher_exact

from ldm.base.device import set_up
from ldm.base.errors import InputError
from ldm.base.paths import MODEL, POSTERIOR
from ldm.config import load_settings
from ldm.data.batches import order
from ldm.data.folders import Place, counted, walk
from ldm.data.images import SUFFIXES, UNREAD, Preprocessing, UnreadableImage
from ldm.langevin.chains import Draws
from ldm.langevin.decoder import DecoderPosterior
from ldm.model import LatentDiffusion
from ldm.nets.diffusers import network_hash

QUANTILE = 0.99  # of the test images' scores: an image with a larger score counts as unlike them
LEVEL = 0.001  # chance of reporting drift for images that are like the test images
MOST = 1000  # images scored
LISTED = 5  # images in the report


@dataclass(frozen=True)
class Drift:
    """Scores of new images beside those of the test images."""

    found: int  # images in the folder
    scores: pd.DataFrame  # file_name, score, of `MOST` of them at most, the largest score first
    unreadable: int
    limit: float  # the test images' quantile
    p_value: float  # of so many scores above the limit, if new images are like test images (Fisher's exact test)

    @property
    def beyond(self) -> int:
        return int((self.scores.score > self.limit).sum())

    @property
    def drifted(self) -> bool:
        return self.p_value < LEVEL

    def lines(self) -> list[str]:
        """The report, for people."""
        scored = len(self.scores)
        chosen = "" if self.found == scored + self.unreadable else f", {scored} of them scored, at random"
        count = f"{self.found} image{'s' * (self.found != 1)}{chosen}; {self.unreadable} unreadable"
        share = f"{self.beyond} of {scored} images score beyond {QUANTILE:.0%} of the test images (p = {self.p_value:.2g})"
        listed = self.scores.head(min(self.beyond, LISTED)).itertuples(index=False)
        lines = [f"  {name}: {score:.3g} nats, the limit is {self.limit:.3g}" for name, score in listed]
        return [count, f"drift: {share}; look at them" if self.drifted else f"no drift: {share}", *lines]


def samplers(root: Path) -> list[str]:
    """The samplers that params.yaml names and that have left posterior samples; those of others may be of another model."""
    files, asked = ("samples.safetensors", "scores.csv"), load_settings(root).sample_posterior
    return [sampler for sampler in asked if all((root / POSTERIOR / sampler / name).is_file() for name in files)]


def drift(root: Path, folder: Path, sampler: str | None = None) -> Drift:
    """Score the images of a folder under the posterior samples of `sampler` (default: the first); `InputError` without any."""
    known = samplers(root)
    if not known or (sampler and sampler not in known):
        has = f"it has {', '.join(known)}" if known else "set sample_posterior: [sgld] in params.yaml and run the pipeline"
        raise InputError(f"{root / POSTERIOR}: no posterior samples{f' of {sampler}' if sampler else ''}; {has}")
    source = root / POSTERIOR / (sampler or known[0])
    model = LatentDiffusion.load(root / MODEL, set_up(load_settings(root).deterministic))  # as in the stage
    draws, about = Draws.load(source / "samples.safetensors")
    if about.get("autoencoder") != network_hash(root / MODEL / "autoencoder"):
        raise InputError(f"{source}: its samples are of another decoder than models/ldm; run `dvc repro`")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder of images")
    found = {name: reason for name, reason in walk(folder) if PurePosixPath(name).suffix.lower() in SUFFIXES | UNREAD}
    images, refused = [name for name, reason in found.items() if not reason], list(filter(None, found.values()))
    chosen = sorted(images[i] for i in order(0, len(images), 0, min(len(images), MOST))) if images else []
    preprocessing, pixels = Preprocessing(**model.recipe.preprocessing), dict[str, np.ndarray]()  # by file name, uint8 (C, H, W)
    for name in chosen:
        try:
            pixels[name] = preprocessing.as_seen(Place(folder / name).read())
        except UnreadableImage as error:
            refused.append(str(error))
    if not pixels:
        raise InputError(f"{folder}: holds no readable images; {counted(refused) or ', '.join(sorted(SUFFIXES))}")
    stacked = torch.from_numpy(np.stack(list(pixels.values())))
    scores = DecoderPosterior(model.autoencoder, model.likelihood, draws).scores(stacked).numpy()
    reference = pd.read_csv(source / "scores.csv").score.to_numpy()
    limit = float(np.quantile(reference, QUANTILE))
    counts = [[int((values > limit).sum()), int((values <= limit).sum())] for values in (scores, reference)]
    table = pd.DataFrame({"file_name": list(pixels), "score": scores}).sort_values("score", ascending=False, ignore_index=True)
    return Drift(len(images), table, len(chosen) - len(pixels), limit, float(fisher_exact(counts, alternative="greater").pvalue))
