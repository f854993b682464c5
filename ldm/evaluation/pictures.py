"""Pictures of an evaluation, each a PNG and its caption: reconstructions, the latent space, samples with their prompts."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ldm.base.randomness import seed_for
from ldm.bayes.diagnostics import COLLAPSED
from ldm.bayes.elbo import Elbo
from ldm.evaluation.evaluation import Evaluation
from ldm.report.grid import image_grid
from ldm.report.page import Figure
from ldm.report.plots import channel_bars, loss_curves, rate_distortion

ROWS, COLUMNS = 10, 8
STEPS = ("−3", "−2", "−1", "0", "1", "2", "3")  # of a traversal


def draw_system(evaluation: Evaluation, plots: Path) -> list[Figure]:
    """Unseen prompts, reconstructions, the latent space and its channels, as far as this model has them."""
    figures = []
    if evaluation.unseen_prompts is not None:
        path = plots / "unseen_prompts.png"
        prompt_grid(path, evaluation.unseen_prompts, evaluation.unseen_samples)
        figures.append(Figure("Unseen prompts", "Samples for prompts that no caption says in these words.", path))
    figures += [_reconstructions(evaluation, plots), *_latent_space(evaluation, plots)]
    if (found := evaluation.latents) is not None:
        path = plots / "latent_channels.png"
        channel_bars(found.kl.tolist(), path, title="KL of each latent channel", low=COLLAPSED * found.positions)
        figures.append(Figure("Latent channels", found.warning() or "What each latent channel of a test image carries.", path))
    return figures


def prompt_grid(path: Path, prompts: pd.DataFrame, images: np.ndarray) -> None:
    """A row for each label (or prompt, where there are no labels) and the first samples drawn for it, each with its prompt."""
    column = "label" if "label" in prompts else "text"
    rows = list(prompts.groupby(column, sort=False).groups.values())[:ROWS]
    width = min(COLUMNS, *(len(row) for row in rows))
    chosen = np.concatenate([row[:width] for row in rows])
    image_grid(images[chosen], width, path, captions=prompts.text[chosen].tolist())


def _reconstructions(evaluation: Evaluation, plots: Path) -> Figure:
    real, path = evaluation.test_images, plots / "reconstructions.png"
    columns = min(len(real), COLUMNS)
    starts = range(0, min(len(real), 3 * columns) - columns + 1, columns)  # up to three full pairs of rows
    pairs = [half[start : start + columns] for start in starts for half in (real, evaluation.reconstructions)]
    image_grid(np.concatenate(pairs), columns, path, row_labels=["real", "reconstructed"] * len(starts))
    return Figure("Reconstructions", "Test images, encoded and decoded by the autoencoder.", path)


def _latent_space(evaluation: Evaluation, plots: Path) -> list[Figure]:
    """Samples of the autoencoder alone, walks between two test images, and what each latent channel does."""
    model, test = evaluation.model, evaluation.test
    first, last = (torch.from_numpy(test.images(range(i, i + 1)))[0] for i in (0, min(1, len(test) - 1)))
    drawn = model.sample_prior(2 * COLUMNS, seed=seed_for(evaluation.seed, "prior"))
    image_grid(drawn.numpy(), COLUMNS, plots / "prior_samples.png")
    walks = [model.interpolate(first, last, COLUMNS, linear=linear) for linear in (True, False)]
    image_grid(torch.cat(walks).numpy(), COLUMNS, plots / "interpolation.png", row_labels=["linear", "spherical"])
    moved = model.traverse(first, len(STEPS), reach=3)
    names = [f"channel {i}" for i in range(len(moved) // len(STEPS))][:ROWS]
    shown = moved[: len(names) * len(STEPS)].numpy()
    image_grid(shown, len(STEPS), plots / "traversals.png", row_labels=names, column_labels=STEPS)
    captions = {
        "prior_samples": (
            "Without the diffusion model",
            "Samples of the autoencoder alone: z ~ p(z), x ~ p(x | z).",
        ),
        "interpolation": ("From one test image to another", "Decoded from points between their latents."),
        "traversals": ("What each latent channel does", "The channel is shifted everywhere, by so many standard deviations."),
    }
    return [Figure(*words, plots / f"{name}.png") for name, words in captions.items()]


def draw_rate_distortion(own: Elbo, curve: pd.DataFrame, path: Path, *, discrete: bool) -> list[Figure]:
    """What latents and pixels of test images cost, beside those of training images in each quarter of the training.

    None for an autoencoder that was not trained, or whose likelihood was a density: its nats are no code length.
    """
    if curve.empty or not discrete:
        return []
    rate = float(own.kl.mean())
    terms = curve.assign(rate=curve.get("kl_nats", rate))[["rate", "distortion_nats"]].to_numpy()  # VQ's rate is constant
    quarters = np.array_split(terms, min(4, len(terms)))
    points = {"test images": [rate, -float(own.reconstruction.mean())]}
    points |= {f"training, quarter {i}": np.median(rows, axis=0).tolist() for i, rows in enumerate(quarters, start=1)}
    frame = pd.DataFrame(list(points.values()), columns=["rate_bits_per_dim", "distortion_bits_per_dim"])
    rate_distortion((frame / (own.dims * math.log(2))).assign(series=list(points)), path, title="Rate and distortion")
    about = "What the autoencoder's latents and pixels cost, in training the median. On a grey line the sum is the same."
    return [Figure("Rate and distortion", about, path)]


def draw_trainings(vae: pd.DataFrame, unet: pd.DataFrame, plots: Path) -> list[Figure]:
    """The loss of both trainings, and the U-Net's by noise level; none of a training that was none."""
    noise = {f"loss_noise_q{i}": name for i, name in enumerate(("least noise", "less", "more", "most noise"), start=1)}
    mean = "Mean loss since the last point, against images seen."
    quarters = "The unweighted loss in each quarter of the training's noise levels, equally often drawn."
    charts = {
        "train_vae": (vae, ["loss"], "loss", "Training the autoencoder", mean),
        "train_unet": (unet, ["loss"], "loss", "Training the U-Net", mean),
        "train_unet_noise": (unet, [*noise.values()], "mean squared error", "Training the U-Net, by noise level", quarters),
    }
    figures = []
    for name, (frame, columns, y_label, title, caption) in charts.items():
        if not frame.empty:
            path, named = plots / f"{name}.png", frame.rename(columns=noise)
            loss_curves(named, path, title=title, columns=columns, x="images", y_label=y_label)
            figures.append(Figure(title, caption, path))
    return figures
