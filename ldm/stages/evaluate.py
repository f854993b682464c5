"""Put the system together, save it, and measure what was saved, on held-out images and fresh samples.

The system is read back from its folder before it is measured, in a process that never trained. Sampling defaults
enter here and not in training, so that changing them trains nothing again.
"""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ldm.base.device import set_up
from ldm.base.errors import InputError
from ldm.base.hashing import canonical_json
from ldm.base.paths import (
    AUTOENCODER,
    BOUNDS,
    METRICS,
    MODEL,
    PLOTS,
    REPORT,
    SAMPLES,
    SHARDS,
    UNET,
    UNET_CURVE,
    VAE_CURVE,
)  # fmt: skip
from ldm.base.progress import Progress
from ldm.base.randomness import seed_for
from ldm.bayes.diagnostics import COLLAPSED, diagnose
from ldm.bayes.elbo import Elbo
from ldm.bayes.likelihoods.likelihood import load_likelihood
from ldm.config import Settings, load_settings
from ldm.data.batches import order
from ldm.data.reader import ShardReader
from ldm.evaluation.autoencoder import evaluate_elbo, evaluate_importance, summary
from ldm.evaluation.bounds import image_bounds
from ldm.evaluation.features import PixelPCA
from ldm.evaluation.fidelity import Judge, psnr, variance_ratio
from ldm.evaluation.frechet import frechet_distance, kernel_distance
from ldm.model import LatentDiffusion, Recipe
from ldm.nets.autoencoder import VQModel, load_autoencoder
from ldm.nets.diffusers import network_hash
from ldm.nets.backbones.backbone import load_backbone
from ldm.registry.tracking import stage_run
from ldm.report.grid import image_grid
from ldm.report.page import Figure, write_report
from ldm.report.plots import channel_bars, loss_curves, rate_distortion
from ldm.stages.inputs import stage_shards
from ldm.stages.runtime import stage_main
from ldm.stages.stage import Stage

REAL = 4096  # real images that the judge, the features and the Fréchet distance see at most
POSTERIORS = 4096  # test images whose posteriors are diagnosed at most
GRID_ROWS, GRID_COLUMNS = 10, 8
STEPS = ("−3", "−2", "−1", "0", "1", "2", "3")  # of a traversal

Metrics = dict[str, float | int | str]


def run(root: Path) -> None:
    settings = load_settings(root)
    device = set_up(settings.deterministic)
    train, test = (stage_shards(root, split) for split in ("train", "test"))
    assemble(root, settings)
    model = LatentDiffusion.load(root / MODEL, device)
    shutil.rmtree(root / PLOTS, ignore_errors=True)  # not every model has every picture
    (root / PLOTS).mkdir(parents=True)
    with stage_run(STAGE.name, STAGE.params(settings)) as tracker:
        metrics, figures = bound_metrics(root, settings, model, test)
        with Progress("evaluate: reconstructions and latents"):
            parts = [part(root, settings, model, test) for part in (reconstruct, posteriors, explore)]
        with Progress("evaluate: samples"):
            parts.append(draw(root, settings, model, train, test))
        for found, more in parts:
            metrics |= found
            figures += more
        with Progress("evaluate: report"):
            report(root, settings, model, metrics, figures)
        tracker.log({name: float(value) for name, value in metrics.items() if not isinstance(value, str)}, 0)
        for figure in figures:
            tracker.artifact(Path(figure.png_path), "plots")
    print(f"evaluate: {metrics['elbo_bits_per_dim']:.4f} bits/dim, the autoencoder alone", end="")
    print(f"; {metrics['bits_per_dim']:.4f} ± {metrics['bits_per_dim_se']:.4f}, the whole system" if "nats" in metrics else "")


def assemble(root: Path, settings: Settings) -> None:
    """Write `models/ldm`: autoencoder, averaged U-Net, and the recipe with its sampling defaults."""
    vae, unet = root / AUTOENCODER, root / UNET
    recipe = Recipe(**json.loads((unet / "recipe.json").read_text()), sampling=settings.sampling.model_dump())
    if recipe.autoencoder != network_hash(vae):
        raise InputError(
            f"{unet}: was trained on latents of another autoencoder than {vae}; run `dvc repro` from cache_latents on"
        )
    LatentDiffusion(load_autoencoder(vae), load_likelihood(vae), load_backbone(unet), recipe).save(root / MODEL)


def bound_metrics(root: Path, settings: Settings, model: LatentDiffusion, test: ShardReader) -> tuple[Metrics, list[Figure]]:
    """The whole system's bound and the autoencoder's own, on the test images.

    For a VQ model there is no bound of the whole system: `bounds.csv` then holds what its codes and pixels cost.
    """
    with Progress("evaluate: the autoencoder's bound"):
        own = evaluate_elbo(model.autoencoder, model.likelihood, test, settings.seed)
    metrics: Metrics = {
        "image": test.preprocessing.described,
        "test_images": len(test),
        **{name: value for name, value in summary(own).items() if "per_dim" in name},
    }
    figures = rate_and_distortion(root, settings, own)
    if isinstance(model.autoencoder, VQModel):
        terms = {"reconstruction": own.reconstruction, "rate": own.kl}
        frame = pd.DataFrame({"key": test.captions.key, **{name: value.double().cpu() for name, value in terms.items()}})
        frame.assign(dims=own.dims).to_csv(root / BOUNDS, index=False)
        return metrics, figures
    samples = settings.evaluate.importance_samples
    with Progress("evaluate: importance-weighted bound"):
        tighter = evaluate_importance(model.autoencoder, model.likelihood, test, settings.seed, samples)
    with Progress("evaluate: bound", len(test)) as progress:
        frame = image_bounds(model, test, levels=settings.evaluate.bound_levels, seed=settings.seed, progress=progress)
    frame.to_csv(root / BOUNDS, index=False)
    to_bits = -1 / (own.dims * math.log(2))
    return metrics | {
        "importance_bits_per_dim": float(tighter.mean()) * to_bits,
        "importance_gap_nats": float(tighter.mean() - own.nats.double().mean().cpu()),
        "nats": float(frame.nats.mean()),
        "bits_per_dim": float(frame.nats.mean()) * to_bits,
        "bits_per_dim_se": -float(frame.nats.std()) / math.sqrt(len(frame)) * to_bits,
        **{f"{name}_nats": float(frame[name].mean()) for name in ("reconstruction", "entropy", "prior")},
    }, figures


def rate_and_distortion(root: Path, settings: Settings, own: Elbo) -> list[Figure]:
    """What latents and pixels cost on the test images, beside the training images quarter by quarter of the training."""
    curve, rate = pd.read_csv(root / VAE_CURVE), float(own.kl.mean())
    if curve.empty or not settings.train_vae.likelihood.discrete:  # a density's nats are no code length
        return []
    terms = curve.assign(rate=curve.get("kl_nats", rate))[["rate", "distortion_nats"]].to_numpy()  # of codes always the same
    quarters = np.array_split(terms, min(4, len(terms)))
    points = {"test images": [rate, -float(own.reconstruction.mean())]}
    points |= {f"training, quarter {i}": np.median(rows, axis=0).tolist() for i, rows in enumerate(quarters, start=1)}
    frame = pd.DataFrame(list(points.values()), columns=["rate", "distortion"]) / (own.dims * math.log(2))
    path = root / PLOTS / "rate_distortion.png"
    rate_distortion(frame.assign(series=list(points)), path, title="Rate and distortion", rate="rate", distortion="distortion")
    about = "What the autoencoder's latents and pixels cost, in training the median; on a grey line their sum is the same."
    return [Figure("Rate and distortion", about, path)]


def posteriors(root: Path, settings: Settings, model: LatentDiffusion, test: ShardReader) -> tuple[Metrics, list[Figure]]:
    """What the latents carry, channel by channel; of a VQ model, whose latents are codes, nothing."""
    if isinstance(model.autoencoder, VQModel):
        return {}, []
    encoded = [model.encode(torch.from_numpy(test.images(part))) for part in _batches(min(len(test), POSTERIORS))]
    found = diagnose(torch.cat([p.mean.cpu() for p in encoded]), torch.cat([p.logvar.cpu() for p in encoded]))
    path = root / PLOTS / "latent_channels.png"
    channel_bars(found.kl.tolist(), path, title="KL of each latent channel", low=COLLAPSED * found.positions)
    about = found.warning() or "Nats that each latent channel of a held-out image carries."
    return {**found.metrics()}, [Figure("Latent channels", about, path)]


def _batches(count: int, size: int = 256) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def explore(root: Path, settings: Settings, model: LatentDiffusion, test: ShardReader) -> tuple[Metrics, list[Figure]]:
    """Pictures of the latent space: ancestral samples of the autoencoder alone, walks between images, traversals."""
    first, last = (torch.from_numpy(test.images(range(i, i + 1)))[0] for i in (0, min(1, len(test) - 1)))
    columns = GRID_COLUMNS
    plots = root / PLOTS
    drawn = model.sample_prior(2 * columns, seed=seed_for(settings.seed, "prior"))
    image_grid(drawn.numpy(), columns, plots / "prior_samples.png")
    walks = [model.interpolate(first, last, columns, linear=linear) for linear in (True, False)]
    image_grid(torch.cat(walks).numpy(), columns, plots / "interpolation.png", row_labels=["linear", "spherical"])
    moved = model.traverse(first, len(STEPS), reach=3)
    names = [f"channel {i}" for i in range(len(moved) // len(STEPS))][:GRID_ROWS]
    shown = moved[: len(names) * len(STEPS)].numpy()
    image_grid(shown, len(STEPS), plots / "traversals.png", row_labels=names, column_labels=STEPS)
    return {}, [
        Figure("Without the diffusion model", "Ancestral samples of the autoencoder: z from its prior, x from its likelihood.",
               plots / "prior_samples.png"),
        Figure("From one held-out image to another", "Decoded from points between their latents.", plots / "interpolation.png"),
        Figure("What latent channels do", "Each shifted everywhere, by so many standard deviations.", plots / "traversals.png"),
    ]  # fmt: skip


def reconstruct(root: Path, settings: Settings, model: LatentDiffusion, test: ShardReader) -> tuple[Metrics, list[Figure]]:
    """How closely the autoencoder alone gives test images back."""
    pixels = test.images(order(seed_for(settings.seed, "real"), len(test), 0, min(len(test), REAL)))
    parts = torch.from_numpy(pixels).split(256)
    back = torch.cat([model.decode(model.encode(part).mean) for part in parts]).numpy()
    path = root / PLOTS / "reconstructions.png"
    columns = min(len(pixels), GRID_COLUMNS)
    starts = range(0, min(len(pixels), 3 * columns) - columns + 1, columns)  # up to three full pairs of rows
    pairs = [half[start : start + columns] for start in starts for half in (pixels, back)]
    image_grid(np.concatenate(pairs), columns, path, row_labels=["real", "given back"] * len(starts))
    return {"psnr": float(psnr(pixels, back).mean())}, [
        Figure("Reconstructions", "Held-out images, and what the autoencoder gives back.", path)
    ]


def draw(
    root: Path, settings: Settings, model: LatentDiffusion, train: ShardReader, test: ShardReader
) -> tuple[Metrics, list[Figure]]:
    """Samples for the captions of the data and for prompts that no caption contains, judged against real images."""
    chosen, shown = (order(seed_for(settings.seed, "real"), len(reader), 0, min(len(reader), REAL)) for reader in (train, test))
    captions, known, real = train.captions, train.images(chosen), test.images(shown)
    labels = labelled(captions)
    prompts = balanced(labels if labels is not None else captions, settings.evaluate.samples)
    drawn = model.sample(prompts.text.tolist(), seed=seed_for(settings.seed, "evaluate")).numpy()
    metrics = distance(settings.evaluate.features, known, real, drawn)
    figures = [grid(root / SAMPLES, "Samples", "The first samples drawn, none picked.", prompts, drawn)]
    if labels is None:
        return metrics, figures
    known_labels, held_out = captions.label.iloc[chosen].to_numpy(), test.captions.label.iloc[shown].to_numpy()
    judge = Judge.fit(known, known_labels)
    metrics["judge_accuracy"] = judge.accuracy(real, held_out)
    metrics["prompt_accuracy"] = judge.accuracy(drawn, prompts.label.to_numpy())
    counts = (pd.Series(known_labels).value_counts(), prompts.label.value_counts())
    if set.intersection(*(set(count.index[count >= 2]) for count in counts)):  # else no label has a variance
        metrics["variance_ratio"] = variance_ratio(known, known_labels, drawn, prompts.label.tolist())
    new = train.prompts[~train.prompts.text.isin([*captions.text, *test.captions.text])]
    if len(new):
        unseen = balanced(new, settings.evaluate.unseen_samples)
        images = model.sample(unseen.text.tolist(), seed=seed_for(settings.seed, "evaluate unseen")).numpy()
        metrics["unseen_prompt_accuracy"] = judge.accuracy(images, unseen.label.to_numpy())
        path = root / PLOTS / "unseen_prompts.png"
        figures.append(grid(path, "Unseen phrasings", "Prompts that no caption says in these words.", unseen, images))
    return metrics, figures


def labelled(captions: pd.DataFrame) -> pd.DataFrame | None:
    """Distinct captions that stand for one label, with it; None where they tell fewer than two labels apart."""
    if "label" not in captions:
        return None
    distinct = captions[["text", "label"]].drop_duplicates()
    told = distinct[~distinct.text.duplicated(keep=False)].reset_index(drop=True)
    return told if told.label.nunique() > 1 else None


def balanced(prompts: pd.DataFrame, count: int) -> pd.DataFrame:
    """`count` prompts: as many of each label as of any other, cycling through each label's own prompts."""
    prompts = prompts.drop_duplicates("text")
    groups = [group for _, group in prompts.groupby("label", sort=False)] if "label" in prompts else [prompts]
    picked = [groups[i % len(groups)].iloc[i // len(groups) % len(groups[i % len(groups)])] for i in range(count)]
    return pd.DataFrame(picked).reset_index(drop=True)


def distance(features: int, known: np.ndarray, real: np.ndarray, drawn: np.ndarray) -> Metrics:
    """Fréchet and kernel distance of equally many samples and test images, beside that of training and test images.

    Real images come in random order, so that the first `count` stand for all.
    """
    count = min(len(real), len(drawn), len(known))
    dim = min(features, count - 1, known[0].size)
    extract = PixelPCA.fit(known, dim)
    at, samples = extract(real[:count]), extract(drawn[:count])
    kernel, error = kernel_distance(samples, at)
    return {
        "kd": kernel,
        "kd_se": error,
        "fd": frechet_distance(samples, at),
        "fd_floor": frechet_distance(extract(known[:count]), at),
        "fd_name": extract.name,
        "fd_n": count,
        "fd_dim": dim,
    }


def grid(path: Path, title: str, caption: str, prompts: pd.DataFrame, images: np.ndarray) -> Figure:
    """A picture with a row for each label (or prompt, where there are no labels) and the first samples drawn for it."""
    column = "label" if "label" in prompts else "text"
    rows = [(prompts.text[members[0]], members[:GRID_COLUMNS]) for members in prompts.groupby(column, sort=False).groups.values()]
    rows = rows[:GRID_ROWS]
    width = min(len(members) for _, members in rows)
    chosen = np.concatenate([images[list(members[:width])] for _, members in rows])
    labels = [str(prompts[column][members[0]]) for _, members in rows]
    image_grid(chosen, width, path, row_labels=labels)
    return Figure(title, caption, path)


def report(root: Path, settings: Settings, model: LatentDiffusion, metrics: Metrics, figures: list[Figure]) -> None:
    """Write `metrics.json` and the self-contained `report.html`, with the loss curves of both trainings."""
    (root / METRICS).write_text(canonical_json(metrics))
    curves = []
    frames = {Path(curve).stem: pd.read_csv(root / curve) for curve in (VAE_CURVE, UNET_CURVE)}
    for (stage, frame), title in zip(frames.items(), ("Training the autoencoder", "Training the U-Net"), strict=True):
        if frame.empty:  # a pretrained autoencoder, used as it is
            continue
        path = root / PLOTS / f"{stage}.png"
        loss_curves(frame, path, title=title, columns=["loss"], x="images", y_label="loss")
        curves.append(Figure(title, "Mean loss since the last point, against images seen.", path))
    quarters = {f"loss_noise_q{i}": name for i, name in enumerate(("least noise", "less", "more", "most noise"), start=1)}
    title, path = "Training the U-Net, by noise level", root / PLOTS / "train_unet_noise.png"
    named = frames["train_unet"].rename(columns=quarters)
    loss_curves(named, path, title=title, columns=list(quarters.values()), x="images", y_label="mean squared error")
    about = "The unweighted loss in each quarter of the noise levels of training, equally often drawn."
    curves.append(Figure(title, about, path))
    write_report(
        root / REPORT,
        title="Latent diffusion model: evaluation",
        metrics=metrics,
        figures=[*figures, *curves],
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
    inputs=(SHARDS, AUTOENCODER, UNET, VAE_CURVE, UNET_CURVE),
    outs=(MODEL, BOUNDS, REPORT, METRICS, SAMPLES, PLOTS),
)

if __name__ == "__main__":
    stage_main(STAGE)
