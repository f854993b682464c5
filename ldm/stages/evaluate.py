"""Put the system together, save it, and measure what was saved, on test images and fresh samples.

The system is read back from its folder before it is measured, in a process that never trained. Sampling defaults
enter here and not in training, so that changing them trains nothing again.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from ldm.base import paths
from ldm.base.device import set_up
from ldm.base.errors import InputError
from ldm.base.hashing import canonical_json
from ldm.base.progress import Progress
from ldm.bayes.likelihoods.likelihood import load_likelihood
from ldm.config import Settings, load_settings
from ldm.diffusion.recipe import Recipe
from ldm.evaluation import pictures
from ldm.evaluation.bounds import measure_bounds
from ldm.evaluation.evaluation import Evaluation
from ldm.evaluation.metrics.metric import Metric
from ldm.evaluation.value import Value, as_numbers, write_values
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import load_autoencoder
from ldm.nets.backbones.backbone import load_backbone
from ldm.nets.diffusers import network_hash
from ldm.registry.tracking import stage_run
from ldm.report.page import Figure, write_report
from ldm.stages.inputs import stage_shards
from ldm.stages.runtime import stage_main
from ldm.stages.stage import Stage

TILES = 40  # samples shown first in the report


def run(root: Path) -> None:
    settings = load_settings(root)
    options, device = settings.evaluate, set_up(settings.deterministic)
    train, test = (stage_shards(root, split) for split in ("train", "test"))
    assemble(root, settings)
    model = LatentDiffusion.load(root / paths.MODEL, device)
    evaluation = Evaluation(model, train, test, settings.seed, options.samples, options.unseen_samples)
    with stage_run(STAGE.name, STAGE.params(settings)) as tracker:
        bounds, values = measure_bounds(evaluation, options.bound_levels, options.importance_samples)
        bounds.to_csv(root / paths.BOUNDS, index=False)
        figures = draw(root, settings, evaluation)
        values += measure(options.metrics, evaluation)
        numbers = as_numbers(values)
        write_values(root / paths.METRICS_TABLE, values)
        images = {"image": test.preprocessing.described, "test_images": len(test)}
        (root / paths.METRICS).write_text(canonical_json(images | numbers))
        tracker.log({"test_images": float(len(test)), **numbers}, 0)
        report(root, settings, evaluation, values, figures)
        for picture in (root / paths.SAMPLES, *(figure.png_path for figure in figures)):
            tracker.artifact(picture, "plots")
    whole = f"; {numbers['bits_per_dim']:.4f} ± {numbers['bits_per_dim_se']:.4f}, the whole system" if "nats" in numbers else ""
    print(f"evaluate: {numbers['elbo_bits_per_dim']:.4f} bits/dim, the autoencoder alone{whole}")


def assemble(root: Path, settings: Settings) -> None:
    """Write `models/ldm`: autoencoder, averaged U-Net, and the recipe with its sampling defaults."""
    vae, unet = root / paths.AUTOENCODER, root / paths.UNET
    recipe = Recipe(**json.loads((unet / "recipe.json").read_text()), sampling=settings.sampling.model_dump())
    if recipe.autoencoder != network_hash(vae):
        raise InputError(f"{unet}: trained on latents of another autoencoder than {vae}; run `dvc repro` from cache_latents on")
    LatentDiffusion(load_autoencoder(vae), load_likelihood(vae), load_backbone(unet), recipe).save(root / paths.MODEL)


def measure(metrics: Sequence[Metric], evaluation: Evaluation) -> list[Value]:
    values = []
    for metric in metrics:
        with Progress(f"evaluate: {metric.kind}"):
            values += metric.measure(evaluation)
    return values


def draw(root: Path, settings: Settings, evaluation: Evaluation) -> list[Figure]:
    """Write `samples.png` and the pictures of `reports/plots`, which are returned."""
    shutil.rmtree(root / paths.PLOTS, ignore_errors=True)  # not every model has every picture
    (root / paths.PLOTS).mkdir(parents=True)
    pictures.prompt_grid(root / paths.SAMPLES, evaluation.prompts, evaluation.samples)
    vae, unet = (pd.read_csv(root / curve) for curve in (paths.VAE_CURVE, paths.UNET_CURVE))
    discrete, path = settings.train_vae.likelihood.discrete, root / paths.PLOTS / "rate_distortion.png"
    return [
        *pictures.draw_system(evaluation, root / paths.PLOTS),
        *pictures.draw_rate_distortion(evaluation.elbo, vae, path, discrete=discrete),
        *pictures.draw_trainings(vae, unet, root / paths.PLOTS),
    ]


def report(root: Path, settings: Settings, evaluation: Evaluation, values: list[Value], figures: list[Figure]) -> None:
    model, test, shown = evaluation.model, evaluation.test, slice(0, TILES)
    write_report(
        root / paths.REPORT,
        title="Latent diffusion model: evaluation",
        about=f"Measured on {len(test)} test images ({test.preprocessing.described}), never seen in training.",
        samples=list(zip(evaluation.samples[shown], evaluation.prompts.text[shown], strict=True)),
        values=values,
        figures=figures,
        settings={
            "seed": settings.seed,
            "sampling": settings.sampling.model_dump(),
            "evaluate": settings.evaluate.model_dump(),
            "model": {name: value for name, value in asdict(model.recipe).items() if name != "sampling"},
            "autoencoder": model.autoencoder.config,
            "unet": model.unet.config,
        },
    )


STAGE = Stage(
    "evaluate",
    run,
    settings=("seed", "deterministic", "train_vae.likelihood", "sampling", "evaluate"),
    inputs=(paths.SHARDS, paths.AUTOENCODER, paths.UNET, paths.VAE_CURVE, paths.UNET_CURVE),
    outs=(paths.MODEL, paths.BOUNDS, paths.REPORT, paths.METRICS, paths.METRICS_TABLE, paths.SAMPLES, paths.PLOTS),
)

if __name__ == "__main__":
    stage_main(STAGE)
