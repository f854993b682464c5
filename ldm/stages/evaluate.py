"""Put the system together, save it, and measure what was saved, read back from its folder, on test images and fresh samples."""

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from ldm.base import paths
from ldm.base.device import set_up
from ldm.base.errors import InputError, check_space
from ldm.base.files import canonical_json
from ldm.base.progress import Progress
from ldm.bayes.likelihoods.likelihood import load_likelihood
from ldm.config import Settings, load_settings
from ldm.data.reader import stage_shards
from ldm.diffusion.options import Recipe
from ldm.evaluation.bounds import measure_bounds
from ldm.evaluation.evaluation import Evaluation
from ldm.evaluation.metrics.metric import Metric
from ldm.evaluation.pictures import draw, prompt_grid
from ldm.evaluation.value import as_numbers, write_values
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import load_autoencoder
from ldm.nets.backbone import load_backbone
from ldm.nets.diffusers import network_hash
from ldm.registry.tracking import stage_run
from ldm.report.page import write_page
from ldm.stages.checks import check_sizes, size_of
from ldm.stages.stage import stage_main, stage_params

TILES = 40  # samples shown first in the report


def run(root: Path) -> None:
    settings = load_settings(root)
    options, device = settings.evaluate, set_up(settings.deterministic)
    train, test = stage_shards(root, "train"), stage_shards(root, "test").first_by_hash(options.test_images)
    metrics: tuple[Metric, ...] = options.metrics
    check_sizes(root, settings)
    check_space(root / paths.MODEL, sum(size_of(root / made) for made in (paths.AUTOENCODER, paths.UNET)), "the model's files")
    assemble(root, settings)
    model = LatentDiffusion.load(root / paths.MODEL, device)
    with Progress("evaluate: real images"):
        evaluation = Evaluation(model, train, test, settings.seed, options.samples, options.unseen_samples)
        for metric in metrics:
            metric.check(evaluation)
    with stage_run("evaluate", stage_params(root, "evaluate", settings)) as tracker:
        bounds, values = measure_bounds(evaluation, options.bound_levels, options.importance_samples)
        bounds.to_csv(root / paths.BOUNDS, index=False)
        prompt_grid(root / paths.SAMPLES, evaluation.prompts, evaluation.samples)
        curves = [pd.read_csv(root / curve) for curve in (paths.VAE_CURVE, paths.UNET_CURVE)]
        draw(evaluation, root / paths.PLOTS, *curves, discrete=settings.train_vae.likelihood.discrete)
        for metric in metrics:
            with Progress(f"evaluate: {metric.kind}"):
                values += metric.measure(evaluation)
        numbers, described = as_numbers(values), test.preprocessing.described
        write_values(root / paths.METRICS_TABLE, values)
        (root / paths.METRICS).write_text(canonical_json({"image": described, "test_images": len(test), **numbers}))
        tracker.log({"test_images": float(len(test)), **numbers}, 0)
        about = {
            "seed": settings.seed, "sampling": settings.sampling.model_dump(), "evaluate": options.model_dump(),
            "model": {name: value for name, value in asdict(model.recipe).items() if name != "sampling"},
            "autoencoder": model.autoencoder.config, "unet": model.unet.config,
        }  # fmt: skip
        pictures = {path.stem: path for path in sorted((root / paths.PLOTS).iterdir())}
        write_page(
            root / paths.REPORT, "report.html", title="Latent diffusion model: evaluation",
            about=f"Measured on {len(test)} test images ({described}), never seen in training.",
            samples=list(zip(evaluation.samples[:TILES], evaluation.prompts.text[:TILES], strict=True)),
            values=values, pictures=pictures, warning=evaluation.latents and evaluation.latents.warning(), settings=about,
        )  # fmt: skip
        for picture in (root / paths.SAMPLES, *pictures.values()):
            tracker.artifact(picture, "plots")
    whole = f"; {numbers['bits_per_dim']:.4f} ± {numbers['bits_per_dim_se']:.4f}, the whole system" if "nats" in numbers else ""
    print(f"evaluate: {numbers['elbo_bits_per_dim']:.4f} bits/dim, the autoencoder alone{whole}")


def assemble(root: Path, settings: Settings) -> None:
    """Write `models/ldm`. Its sampling defaults enter here and not in training, so that changing them trains nothing again."""
    vae, unet = root / paths.AUTOENCODER, root / paths.UNET
    recipe = Recipe(**json.loads((unet / "recipe.json").read_text()), sampling=settings.sampling.model_dump())
    if recipe.autoencoder != network_hash(vae):
        raise InputError(f"{unet}: trained on latents of another autoencoder than {vae}; run `dvc repro` from cache_latents on")
    LatentDiffusion(load_autoencoder(vae), load_likelihood(vae), load_backbone(unet), recipe, root).save(root / paths.MODEL)


if __name__ == "__main__":
    stage_main("evaluate", run)
