"""Bounds on log p of test images: of the whole system image by image, and of the autoencoder alone."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldm.base.progress import Progress
from ldm.data.reader import ShardReader
from ldm.evaluation.autoencoder import evaluate_importance, summary
from ldm.evaluation.evaluation import Evaluation
from ldm.evaluation.parts import of_each
from ldm.evaluation.value import Value, described
from ldm.nets.autoencoder import VQModel

ABOUT = {  # unit, title, how to read it
    "bits_per_dim": (
        "bits/dim", "bits/dim",
        "The most that autoencoder and diffusion model together need to describe one value of a test image, given its caption: "
        "an upper bound on −log₂ p(image | caption). Lower is better; raw 8-bit pixels take 8. "
        "Compare only models on the same images and captions.",
    ),
    "nats": ("nats", "bound", "log p(image | caption) is at least this: the sum of the next three. Higher is better."),
    "reconstruction_nats": ("nats", "bound: reconstruction", "log p of the pixels, given the latents."),
    "entropy_nats": ("nats", "bound: entropy", "How loosely the encoder's posterior pins the latents."),
    "prior_nats": ("nats", "bound: prior", "log p of the latents under the diffusion model."),
    "elbo_bits_per_dim": ("bits/dim", "autoencoder alone", "Its own bound, without the diffusion model. Lower is better."),
    "rate_bits_per_dim": ("bits/dim", "rate", "What the latents cost: KL(q(z | x) ‖ p(z)), or VQ's codes."),
    "distortion_bits_per_dim": ("bits/dim", "distortion", "What the pixels cost, given the latents."),
    "importance_bits_per_dim": ("bits/dim", "importance-weighted", "A tighter bound of the autoencoder alone. Lower is better."),
    "importance_gap_nats": ("nats", "importance gap", "How much tighter it is: what the encoder's posterior misses, at least."),
}  # fmt: skip


def image_bounds(model: Any, samples: ShardReader, levels: int, seed: int, progress: Callable[[int], None]) -> pd.DataFrame:
    """`model.bound` of each image under its caption: its terms, their sum `nats`, and `dims`. Draws depend on key and `seed`."""
    names, captions, done = ("reconstruction", "entropy", "prior", "nats"), samples.captions, set[int]()
    progress(0)

    def terms(positions: np.ndarray, images: Tensor) -> tuple[Tensor, ...]:
        rows = captions.iloc[positions]
        bound = model.bound(images, rows.text.tolist(), levels=levels, seed=seed, keys=rows.key.tolist())
        done.update(positions.tolist())
        progress(len(done))
        return *(getattr(bound, name).double() for name in names), torch.full((len(rows),), images[0].numel())

    values = dict(zip((*names, "dims"), of_each(samples, model.device, terms), strict=True))
    return pd.DataFrame({"key": captions.key, **{name: value.numpy() for name, value in values.items()}})


def measure_bounds(evaluation: Evaluation, levels: int, importance_samples: int) -> tuple[pd.DataFrame, list[Value]]:
    """The terms of every test image, nats, and their means as values; for VQ, those of the autoencoder alone."""
    model, own, test = evaluation.model, evaluation.elbo, evaluation.test
    numbers = {name: value for name, value in summary(own).items() if "per_dim" in name}
    note = f"{len(test)} test images of {test.preprocessing.described}"
    if isinstance(model.autoencoder, VQModel):
        terms = {"reconstruction": own.reconstruction.double(), "rate": own.kl.double()}
        frame = pd.DataFrame({"key": test.captions.key, **terms, "dims": own.dims})
        about = ABOUT | {"elbo_bits_per_dim": ("bits/dim", "bits/dim", ABOUT["elbo_bits_per_dim"][2])}
        note = f"autoencoder alone, as there is no bound of the whole system with VQ; {note}"
        return frame, described(numbers, about, {"elbo_bits_per_dim": note})
    with Progress("evaluate: importance-weighted bound"):
        tighter = evaluate_importance(model.autoencoder, model.likelihood, test, evaluation.seed, importance_samples)
    with Progress("evaluate: bound", len(test)) as progress:
        frame = image_bounds(model, test, levels=levels, seed=evaluation.seed, progress=progress)
    to_bits = -1 / (frame.dims * math.log(2))  # of each image
    bits, gap = frame.nats * to_bits, float((tighter - own.nats.double()).mean())
    numbers |= {"importance_bits_per_dim": float((tighter.numpy() * to_bits).mean()), "importance_gap_nats": gap}
    numbers |= {"bits_per_dim": float(bits.mean()), "bits_per_dim_se": float(bits.std()) / math.sqrt(len(bits))}
    numbers |= {"nats": float(frame.nats.mean())}
    numbers |= {f"{name}_nats": float(frame[name].mean()) for name in ("reconstruction", "entropy", "prior")}
    return frame, described(numbers, ABOUT, {"bits_per_dim": f"{note}, given their captions"})
