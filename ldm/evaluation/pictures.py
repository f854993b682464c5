"""Pictures of an evaluation: reconstructions, the latent space, samples with their prompts, trainings."""

import math
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ldm.base.randomness import seed_for
from ldm.bayes.diagnostics import COLLAPSED
from ldm.bayes.elbo import Elbo
from ldm.evaluation.evaluation import Evaluation
from ldm.report.grid import image_grid
from ldm.report.plots import channel_bars, loss_curves, rate_distortion

ROWS, COLUMNS = 10, 8
STEPS = ("−3", "−2", "−1", "0", "1", "2", "3")  # of a traversal


def draw(evaluation: Evaluation, plots: Path, vae: pd.DataFrame, unet: pd.DataFrame, *, discrete: bool) -> None:
    """Draw what this model has into the folder `plots`, which is made anew; `vae` and `unet` are the curves of the trainings."""
    shutil.rmtree(plots, ignore_errors=True)
    plots.mkdir(parents=True)
    if evaluation.unseen_prompts is not None:
        prompt_grid(plots / "unseen_prompts.png", evaluation.unseen_prompts, evaluation.unseen_samples)
    # reconstructions, samples of the autoencoder alone, walks between two test images, what each latent channel does
    model, real, width = evaluation.model, evaluation.test_images, min(len(evaluation.test_images), COLUMNS)
    starts = range(0, min(len(real), 3 * width) - width + 1, width)  # up to three full pairs of rows
    pairs = [half[start : start + width] for start in starts for half in (real, evaluation.reconstructions)]
    names = ["real", "reconstructed"] * len(starts)
    image_grid(list(chain(*pairs)), width, plots / "reconstructions.png", row_labels=names)
    drawn = model.sample_prior(2 * COLUMNS, seed=seed_for(evaluation.seed, "prior")).numpy()
    image_grid(drawn, COLUMNS, plots / "prior_samples.png")
    shape = max(evaluation.test.shapes.values(), key=len)  # the commonest: only images of one shape have images between them
    first, last = torch.from_numpy(evaluation.test.images(shape[[0, min(1, len(shape) - 1)]]))
    walks = [model.interpolate(first, last, COLUMNS, linear=linear) for linear in (True, False)]
    image_grid(torch.cat(walks).numpy(), COLUMNS, plots / "interpolation.png", row_labels=["linear", "spherical"])
    moved = model.traverse(first, len(STEPS), reach=3)[: ROWS * len(STEPS)].numpy()
    names = [f"channel {i}" for i in range(len(moved) // len(STEPS))]
    image_grid(moved, len(STEPS), plots / "traversals.png", row_labels=names, column_labels=STEPS)
    if (found := evaluation.latents) is not None:
        bars, low = plots / "latent_channels.png", COLLAPSED * found.positions
        channel_bars(found.kl.tolist(), bars, title="KL of each latent channel", low=low)
    draw_rate_distortion(evaluation.elbo, vae, plots / "rate_distortion.png", discrete=discrete)
    noise = {f"loss_noise_q{i}": name for i, name in enumerate(("least noise", "less", "more", "most noise"), start=1)}
    for name, title, frame, columns, y_label in (
        ("train_vae", "Training the autoencoder", vae, ["loss"], "loss"),
        ("train_unet", "Training the U-Net", unet, ["loss"], "loss"),
        ("train_unet_noise", "Training the U-Net, by noise level", unet, [*noise.values()], "mean squared error"),
    ):
        if not frame.empty:  # trained at all
            loss_curves(frame.rename(columns=noise), plots / f"{name}.png", title=title, columns=columns, y_label=y_label)


def prompt_grid(path: Path, prompts: pd.DataFrame, images: Sequence[np.ndarray]) -> None:
    """A row for each label (or prompt, where there are no labels) and the first samples drawn for it, each with its prompt.

    A sheet of the first samples, where there are no labels and a prompt has one sample.
    """
    column = "label" if "label" in prompts else "text"
    rows = list(prompts.groupby(column, sort=False).groups.values())[:ROWS]
    width = min(COLUMNS, *map(len, rows))
    chosen = np.concatenate([row[:width] for row in rows])
    if width == 1 and column == "text":  # every prompt has one sample: a sheet of them
        width, chosen = min(COLUMNS, len(images)), np.arange(min(ROWS * COLUMNS, len(images)))
    image_grid([images[place] for place in chosen], width, path, captions=prompts.text[chosen].tolist())


def draw_rate_distortion(own: Elbo, curve: pd.DataFrame, path: Path, *, discrete: bool) -> None:
    """What latents and pixels of test images cost, beside those of training images in each quarter of the training."""
    if curve.empty or not discrete:  # not trained, or with the likelihood of a density, whose nats are no code length
        return
    rate = float(own.kl.mean())
    terms = curve.assign(rate=curve.get("kl_nats", rate))[["rate", "distortion_nats"]].to_numpy()  # VQ's rate is constant
    quarters = np.array_split(terms, min(4, len(terms)))
    points = {"test images": [rate, -float(own.reconstruction.mean())]}
    points |= {f"training, quarter {i}": np.median(rows, axis=0).tolist() for i, rows in enumerate(quarters, start=1)}
    frame = pd.DataFrame(list(points.values()), columns=["rate_bits_per_dim", "distortion_bits_per_dim"])
    dims = float(torch.as_tensor(own.dims).double().mean())
    rate_distortion((frame / (dims * math.log(2))).assign(series=list(points)), path, title="Rate and distortion")
