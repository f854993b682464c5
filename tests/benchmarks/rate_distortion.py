"""One network trained on digits by the ELBO, by the LDM paper's objective, and with other weights of the KL term.

`python tests/benchmarks/rate_distortion.py` prints a row for each on the test images, with the difference of the first two
image by image, and draws rate against distortion into rate_distortion.png beside this file. All are measured by the ELBO
under a discretised logistic likelihood, whatever they were trained on: with its learned scale, or for the LDM objective,
which has no likelihood of 8-bit pixels, with the scale that suits the validation images best.
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ldm.base.device import default_device
from ldm.base.options import assigned
from ldm.base.randomness import seed_for
from ldm.bayes.elbo import Elbo
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.config import Settings, load_settings
from ldm.data import open_shards, write_shards
from ldm.data.batches import Batches
from ldm.data.reader import ShardReader
from ldm.data.sources.digits import Digits
from ldm.evaluation.autoencoder import evaluate_elbo, fit_scale, summary
from ldm.nets.autoencoder import Autoencoder
from ldm.registry.tracking import Run
from ldm.report.plots import rate_distortion
from ldm.stages.train_vae import build
from ldm.training.fit import fit
from ldm.training.objectives import VaeObjective

ROOT = Path(__file__).parents[2]
PLOT = Path(__file__).with_suffix(".png")
BETAS = 0.1, 0.3, 3.0, 10.0
Save = Callable[[dict[str, Tensor], dict[str, Any]], None]


class Watched:
    """In the place of a checkpoint store: nothing is kept, `save` may look at the tensors that would have been."""

    folder = Path("nowhere")

    def __init__(self, save: Save = lambda tensors, state: None):
        self.save = save

    def load(self) -> None:
        return None


def digits(folder: Path, settings: Settings) -> dict[str, ShardReader]:
    """The splits of the digits, sharded as the pipeline's first two stages do."""
    Digits().write(folder, folder / "source")
    write_shards(folder / "source", folder / "shards", **settings.data.model_dump(exclude={"source", "path"}))
    return {split: open_shards(folder / "shards", split) for split in ("train", "val", "test")}


def train(settings: Settings, reader: ShardReader, save: Save = lambda *_: None) -> tuple[Autoencoder, Likelihood]:
    """What the stage `train_vae` does between opening the shards and measuring the average of the weights."""
    device = default_device()
    autoencoder, likelihood = build(settings)
    autoencoder.place(device), likelihood.to(device)
    elbo = VaeObjective(autoencoder, likelihood, Batches(reader, settings.seed), settings.autoencoder.regulariser)
    image = (settings.data.channels, settings.data.image_size, settings.data.image_size)
    loss = settings.train_vae.objective.build(elbo, ROOT, seed_for(settings.seed, "initialise", "discriminator"), image)
    fitted = fit(
        loss, settings.train_vae, seed=settings.seed, tracker=Run(), store=Watched(save), progress=lambda done, row: None
    )  # fmt: skip
    loss.module.load_state_dict(fitted.ema)
    return autoencoder, likelihood


def with_settings(settings: Settings, *assignments: str) -> Settings:
    """The settings with some changed, as `ldm run --set` takes them, validated."""
    return Settings.model_validate(assigned(settings.model_dump(), assignments))


def measure(autoencoder: Autoencoder, likelihood: Likelihood, readers: dict[str, ShardReader], seed: int) -> Elbo:
    """The ELBO of every test image."""
    if not likelihood.discrete:
        likelihood = fit_scale(autoencoder, readers["val"], seed)
    return evaluate_elbo(autoencoder, likelihood, readers["test"], seed)


def standard_error(values: Tensor) -> float:
    return float(values.double().std()) / math.sqrt(len(values))


def main() -> None:
    settings = load_settings(ROOT)
    images = settings.train_vae.images
    beta = "autoencoder.regulariser.beta"
    ldm = ["train_vae.objective.kind=ldm", f"train_vae.objective.discriminator_start={images // 2}", f"{beta}=1e-6"]
    runs = {"ELBO": [], "LDM objective": [*ldm, "train_vae.likelihood.kind=laplace"]}
    runs |= {f"beta {value:g}": [f"{beta}={value}"] for value in BETAS}
    bits, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        readers = digits(Path(folder), settings)
        for name, changes in runs.items():
            start = time.perf_counter()
            bound = measure(*train(with_settings(settings, *changes), readers["train"]), readers, settings.seed)
            bits[name] = bound.bits_per_dim.cpu()
            series = "LDM objective" if name == "LDM objective" else f"ELBO, beta {min(BETAS):g} to {max(BETAS):g}"
            row = {"run": name, "series": series, **summary(bound), "bits_per_dim_se": standard_error(bits[name])}
            rows.append(row | {"seconds": time.perf_counter() - start})
            print(f"{name}: {row['elbo_bits_per_dim']:.4f} ± {row['bits_per_dim_se']:.4f} bits/dim", flush=True)
    frame = pd.DataFrame(rows).set_index("run")
    print(f"\n{len(bound.nats)} test images, {images} images seen, {torch.get_num_threads()} threads, torch {torch.__version__}")
    shown = ["elbo_bits_per_dim", "bits_per_dim_se", "rate_bits_per_dim", "distortion_bits_per_dim", "seconds"]
    print(frame[shown].to_string(float_format=lambda value: f"{value:.4f}"))
    less = bits["LDM objective"] - bits["ELBO"]
    print(f"\nELBO below the LDM objective: {float(less.mean()):.4f} ± {standard_error(less):.4f} bits/dim, image by image")
    rate_distortion(frame, PLOT, title="Digits, test images")
    print(f"plot: {PLOT}")


if __name__ == "__main__":
    main()
