"""What averages over posterior samples of the decoder tell: bits per dimension, uncertainty of pixels, images unlike the data."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.paths import BOUNDS
from ldm.base.pixels import BIN, to_float, to_uint8
from ldm.base.randomness import generator, seed_for
from ldm.data.batches import order
from ldm.data.reader import ShardReader
from ldm.langevin.chains import convergence, warnings
from ldm.langevin.decoder import DecoderPosterior
from ldm.report.grid import image_grid
from ldm.report.plots import histograms, traces

MEASURED = 1024  # test images at most whose pixels are mapped and scores kept
VALUES = 1 << 24  # of all of them together, at most: to rank a value takes 85 bytes
TRACED = 4  # held-out images whose log-likelihood is drawn against the draws
SHOWN = 8  # images in a row
TINY = 1e-12  # nats

Metrics = dict[str, Any]
Latents = Callable[[Tensor, list[str]], Tensor]  # from uint8 images and their keys to draws from q(z | x)
Samples = Callable[[list[str]], Tensor]  # from prompts to latents of a sample each


def measure(
    posterior: DecoderPosterior, test: ShardReader, bounds: DataFrame, latents: Latents, samples: Samples, seed: int, plots: Path
) -> tuple[DataFrame, Metrics]:
    """Scores of test images by key, and metrics. `bounds` and `latents` are those of the evaluation; `plots` is made anew."""
    shutil.rmtree(plots, ignore_errors=True)
    plots.mkdir(parents=True)
    most = min(len(test), MEASURED, max(SHOWN, VALUES // test.images([0]).size))
    rows = np.sort(order(seed_for(seed, "posterior measured"), len(test), 0, most))
    pixels, prompts = torch.from_numpy(test.images(rows)), test.captions.text.drop_duplicates().head(SHOWN).tolist()
    scores, metrics = unlike_images(posterior, pixels, seed, plots)
    metrics |= average_bound(posterior, bounds, test, latents, plots)
    metrics |= uncertainty_maps(posterior, pixels, samples(prompts), plots)
    return DataFrame({"key": test.captions.key.iloc[rows], "score": scores}), metrics


def average_bound(posterior: DecoderPosterior, bounds: DataFrame, test: ShardReader, latents: Latents, plots: Path) -> Metrics:
    """Bits/dim of the whole system on the test images, as trained and averaged over the samples; convergence of the chains."""
    captions = test.captions

    def log_prob(part: slice) -> tuple[Tensor, Tensor]:  # log p(x | z), the only term of the bound that depends on the decoder
        rows = np.arange(len(test))[part]
        images = torch.from_numpy(test.images(rows))
        x, z = to_float(images).to(posterior.device), latents(images, captions.key.iloc[rows].tolist())
        with torch.no_grad():
            trained = posterior.likelihood.log_prob(x, posterior.autoencoder.decode(z))
        return trained.double().flatten(1).sum(1).cpu(), posterior.log_prob(x, z)

    trained, draws = zip(*posterior.divide(log_prob, len(test)), strict=True)
    single, each = torch.cat(trained).numpy(), torch.cat(draws, 1)
    if bounds.key.tolist() != test.captions.key.tolist() or not np.allclose(bounds.reconstruction, single, rtol=1e-4, atol=0.1):
        raise InputError(f"{BOUNDS}: is not of this model and these test images; run `dvc repro evaluate`")
    gain, to_bits = posterior.average(each).numpy() - single, 1 / (bounds.dims * np.log(2))
    values = each.view(posterior.draws.chains, -1, each.shape[1]).numpy()
    found, names = convergence(values), [f"image {key}" for key in bounds.key[:TRACED]]
    traces(values[..., :TRACED], plots / "traces.png", title="log p(x | z, θ) of held-out images", names=names, y_label="nats")
    return {
        "bits_per_dim": float((-bounds.nats * to_bits).mean()),
        "average_bits_per_dim": float((-(bounds.nats + gain) * to_bits).mean()),
        "draw_bits_per_dim": float((-(bounds.nats + each.mean(0).numpy() - single) * to_bits).mean()),
        "gain_nats": float(gain.mean()), "gain_nats_se": float(gain.std(ddof=1) / np.sqrt(len(gain))),
        "draws": posterior.draws.count, "weights": sum(value.numel() for value in next(iter(posterior.draws)).values()),
        "rhat": float(found.rhat.max()), "ess": float(found.ess.min()), "convergence_warnings": warnings(found),
    }  # fmt: skip


def uncertainty_maps(posterior: DecoderPosterior, pixels: Tensor, sampled: Tensor, plots: Path) -> Metrics:
    """Draw each pixel's uncertainty in reconstructions of `pixels`, uint8 (N, C, H, W), and in samples, latents (M, c, h, w)."""
    mean, std = posterior.reconstructions(pixels)
    error = (mean - to_float(pixels)).square()
    first, maps = pixels[:SHOWN], {"standard deviation": std[:SHOWN], "absolute error": error[:SHOWN].sqrt()}
    _show({"real": first, "reconstructed, mean": to_uint8(mean[:SHOWN])}, maps, plots / "reconstructions.png")
    drawn, spread = posterior.uncertainty(sampled)
    _show({"mean": to_uint8(drawn)}, {"standard deviation": spread}, plots / "samples.png")
    return {"uncertainty_error_rank_correlation": float(spearmanr(std.flatten(), error.flatten()).statistic)}


def _show(images: dict[str, Tensor], maps: dict[str, Tensor], path: Path) -> None:
    """A row for each of the uint8 images (N, C, H, W) and of the non-negative maps, in which the top percent is white."""
    for name, values in maps.items():
        white = max(float(np.quantile(values.cpu(), 0.99)), TINY)
        label = f"{name}, white: {white / BIN:.2g} of 255 or more"
        images |= {label: (values / white * 255).round().clamp(max=255).to(torch.uint8)}
    pictures = torch.cat([row.cpu() for row in images.values()]).numpy()
    image_grid(pictures, len(pictures) // len(images), path, row_labels=list(images))


def unlike_images(posterior: DecoderPosterior, pixels: Tensor, seed: int, plots: Path) -> tuple[np.ndarray, Metrics]:
    """Scores (N,) of test images, uint8 (N, C, H, W), and their AUROC against the same images turned or inverted and noise."""
    noise = torch.randint(0, 256, pixels.shape, generator=generator(seed, "posterior noise")).to(torch.uint8)
    others = {"rotated": pixels.rot90(1, (2, 3)), "inverted": 255 - pixels, "noise": noise}
    scores = {name: posterior.scores(images).numpy() for name, images in {"held out": pixels, **others}.items()}
    title, own, labels = "Spread of the bound over posterior samples", scores["held out"], np.repeat([0, 1], len(pixels))
    histograms({name: values.clip(TINY) for name, values in scores.items()}, plots / "scores.png", title=title, x_label="nats")
    return own, {f"ood_auroc_{name}": float(roc_auc_score(labels, np.append(own, scores[name]))) for name in others}
