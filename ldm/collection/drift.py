"""Whether new images are like those that the model was trained on: their scores under the decoder's posterior.

A score is the spread of an image's bound over posterior samples of weights (`ldm.langevin.predictive`). The stage
sample_posterior left those of the test images, which the new ones are compared with.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch
from scipy.stats import fisher_exact

from ldm.base.device import default_device
from ldm.base.errors import InputError
from ldm.base.paths import MODEL, POSTERIOR
from ldm.config import load_settings
from ldm.data.batches import order
from ldm.data.folders import Place, walk
from ldm.data.images import SUFFIXES, Preprocessing, UnreadableImage
from ldm.langevin.chains import Draws
from ldm.langevin.predictive import DecoderPosterior
from ldm.model import LatentDiffusion
from ldm.nets.blocks import network_hash

QUANTILE = 0.99  # of the test images' scores: beyond it an image counts as unlike them
LEVEL = 0.001  # chance that images like the test images are called drift
MOST = 1000  # images scored
SHOWN = 5


@dataclass(frozen=True)
class Drift:
    """Scores of new images beside the test images'."""

    found: int  # images in the folder
    scores: pd.DataFrame  # file_name, score, of `MOST` of them at most, the largest score first
    unreadable: int
    limit: float  # the test images' quantile
    p_value: float  # of so many beyond it, if the new images were like the test images (Fisher's exact test)

    @property
    def beyond(self) -> int:
        return int((self.scores.score > self.limit).sum())

    @property
    def drifted(self) -> bool:
        return self.p_value < LEVEL

    @property
    def verdict(self) -> str:
        share = (
            f"{self.beyond} of {len(self.scores)} images score beyond {QUANTILE:.0%} of the test images (p = {self.p_value:.2g})"
        )
        return f"drift: {share}; look at them" if self.drifted else f"no drift: {share}"

    def lines(self) -> list[str]:
        """The report, for people."""
        chosen = "" if self.found == len(self.scores) + self.unreadable else f", {len(self.scores)} of them scored, at random"
        count = "1 image" if self.found == 1 else f"{self.found} images"
        lines = [f"{count}{chosen}; {self.unreadable} unreadable", self.verdict]
        most = self.scores[self.scores.score > self.limit].head(SHOWN)
        return lines + [
            f"  {name}: {score:.3g} nats, the limit is {self.limit:.3g}" for name, score in most.itertuples(index=False)
        ]


def samplers(root: Path) -> list[str]:
    """Those whose posterior samples the project asks for and has; what earlier settings left behind may be of another model."""
    files = ("samples.safetensors", "scores.csv")
    asked = load_settings(root).sample_posterior
    return [sampler for sampler in asked if all((root / POSTERIOR / sampler / name).is_file() for name in files)]


def drift(root: Path, folder: Path, sampler: str | None = None) -> Drift:
    """Score the images of a folder, with captions or without, under the posterior samples of `sampler`.

    By default the first that params.yaml names. Raises `InputError` where there are no samples, of this model, or no images.
    """
    known = samplers(root)
    if not known or (sampler or known[0]) not in known:
        has = f"it has {', '.join(known)}" if known else "set sample_posterior: [sgld] in params.yaml and run the pipeline"
        raise InputError(f"{root / POSTERIOR}: no posterior samples{f' of {sampler}' if sampler else ''}; {has}")
    source = root / POSTERIOR / (sampler or known[0])
    model = LatentDiffusion.load(root / MODEL, default_device())
    draws, about = Draws.load(source / "samples.safetensors")
    if about.get("autoencoder") != network_hash(root / MODEL / "autoencoder"):
        raise InputError(f"{source}: its samples are of another decoder than models/ldm; run `dvc repro`")
    torch.backends.cudnn.allow_tf32 = False  # as in the stage: rounding to 10 bits would add to every new score
    reference = pd.read_csv(source / "scores.csv").score.to_numpy()
    names, pixels, found, unreadable = _images(folder, Preprocessing(**model.recipe.preprocessing))
    posterior = DecoderPosterior(model.autoencoder, model.likelihood, draws)
    scores = pd.DataFrame({"file_name": names, "score": posterior.scores(torch.from_numpy(pixels)).numpy()})
    limit = float(np.quantile(reference, QUANTILE))
    counts = [[int((values > limit).sum()), int((values <= limit).sum())] for values in (scores.score.to_numpy(), reference)]
    p_value = float(fisher_exact(counts, alternative="greater").pvalue)
    return Drift(found, scores.sort_values("score", ascending=False, ignore_index=True), unreadable, limit, p_value)


def _images(folder: Path, prepared: Preprocessing) -> tuple[list[str], np.ndarray, int, int]:
    """Names and pixels, uint8 (N, C, H, W), of at most `MOST` images as the model sees them; all; unreadable ones."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder of images")
    images = [name for name, reason in walk(folder) if PurePosixPath(name).suffix.lower() in SUFFIXES and not reason]
    chosen = sorted(images[i] for i in order(0, len(images), 0, min(len(images), MOST))) if images else []
    names, pixels = [], []
    for name in chosen:
        try:
            pixels.append(prepared.as_seen(Place(folder / name).read()))
            names.append(name)
        except UnreadableImage:
            pass
    if not names:
        raise InputError(f"{folder}: holds no readable images ({', '.join(sorted(SUFFIXES))})")
    return names, np.stack(pixels), len(images), len(chosen) - len(names)
