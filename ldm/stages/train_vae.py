"""Train the autoencoder on the shards' training images, or take a pretrained one, and measure it on validation images."""

import shutil
from pathlib import Path
from typing import Any

import torch

from ldm.base.device import set_up
from ldm.base.distributed import rank, ranks
from ldm.base.errors import InputError
from ldm.base.hashing import folder_hash
from ldm.base.paths import AUTOENCODER, PRETRAINED, SHARDS, VAE_CURVE
from ldm.base.progress import Progress
from ldm.base.randomness import seed_for
from ldm.bayes.likelihoods.likelihood import FILE as LIKELIHOOD
from ldm.bayes.likelihoods.likelihood import Likelihood, as_discrete, load_likelihood
from ldm.config import Settings, load_settings
from ldm.data.batches import Batches
from ldm.data.parallel import loader_workers
from ldm.data.reader import ShardReader
from ldm.evaluation.autoencoder import evaluate_elbo, fit_scale, summary
from ldm.nets.autoencoder import Autoencoder, VQModel, load_autoencoder
from ldm.stages.inputs import index_hash, stage_shards
from ldm.stages.runtime import stage_main
from ldm.stages.stage import Stage
from ldm.stages.training import training, write_curve
from ldm.training.fit import Fitted
from ldm.training.objectives import Parts


def build(settings: Settings) -> tuple[Autoencoder, Likelihood]:
    """The untrained autoencoder and likelihood that the settings and seed describe."""
    torch.manual_seed(seed_for(settings.seed, "initialise", "autoencoder"))
    options, channels = settings.autoencoder, settings.data.channels
    likelihood, regulariser = settings.train_vae.likelihood.build(), options.regulariser
    names = {"latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention"}
    autoencoder = regulariser.build(
        in_channels=channels,
        out_channels=likelihood.outputs(channels),
        attention=[level in options.attention for level in range(len(options.block_out_channels))],
        **options.model_dump(include=names),
    )
    return autoencoder, likelihood


def start(root: Path, settings: Settings) -> tuple[Autoencoder, Likelihood]:
    """As `build`, or the pretrained autoencoder if there is one, with its likelihood if the settings name the same."""
    autoencoder, likelihood = build(settings)
    folder, name = root / PRETRAINED, settings.autoencoder.pretrained
    if name is None:
        return autoencoder, likelihood
    source = folder / "source.txt"
    if not source.is_file() or source.read_text() != f"{name}\n":
        raise InputError(f"{folder}: is not autoencoder.pretrained {name}; run the stage pretrained first")
    pretrained = load_autoencoder(folder)
    check_same(autoencoder, pretrained, name)
    if (folder / LIKELIHOOD).is_file():
        found = load_likelihood(folder)
        if not settings.train_vae.images or (found.kind, found.scale) == (likelihood.kind, likelihood.scale):
            likelihood = found
            print(f"train_vae: likelihood of {name}: {found.kind}, scale {found.scale}", flush=True)
    return pretrained, likelihood


def check_same(described: Autoencoder, found: Autoencoder, name: str) -> None:
    """Raise an `InputError` if the settings do not describe the autoencoder that was found."""
    here, there = in_settings(described), in_settings(found)
    if differ := [f"{key} is {here.get(key)}, but it has {there[key]}" for key in there if there[key] != here.get(key)]:
        raise InputError(f"autoencoder.pretrained {name} is not what params.yaml describes: {'; '.join(differ)}")


def in_settings(autoencoder: Autoencoder) -> dict[str, Any]:
    """The settings that describe an autoencoder."""
    config = autoencoder.config
    same = ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention")
    described = {f"autoencoder.{key}": config[key] for key in same}
    described |= {
        "autoencoder.regulariser.kind": "vq" if isinstance(autoencoder, VQModel) else "kl",
        "autoencoder.latent_channels": autoencoder.latent_channels,
        "autoencoder.attention": [level for level, attends in enumerate(config["attention"]) if attends],
        "data.channels": config["in_channels"],
        "out_channels (by data.channels and train_vae.likelihood.scale)": config["out_channels"],
    }
    if isinstance(autoencoder, VQModel):
        described["autoencoder.regulariser.num_vq_embeddings"] = config["num_vq_embeddings"]
    return described


def measured(
    autoencoder: Autoencoder, likelihood: Likelihood, val: ShardReader, seed: int, trained: bool = True
) -> tuple[Likelihood, dict[str, float]]:
    """A likelihood of 8-bit pixels, its scale fitted to the validation images if need be, and the bound on them.

    `trained`: whether the likelihood's scale was trained, with this autoencoder or an earlier run's.
    """
    discrete = as_discrete(likelihood)
    has_scale = trained or likelihood.kind == "bernoulli" or likelihood.scale == "per_pixel"
    likelihood = discrete if discrete is not None and has_scale else fit_scale(autoencoder, val, seed)
    return likelihood, summary(evaluate_elbo(autoencoder, likelihood, val, seed))


def train(root: Path, settings: Settings, reader: ShardReader, parts: Parts, work: Any) -> Fitted:
    """Train the parts in place; averaged weights are loaded."""
    options, preprocessing = settings.train_vae, reader.preprocessing
    image = (preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    loss = options.objective.build(parts, root, seed_for(settings.seed, "initialise", "discriminator"), image)
    fitted: Fitted = work.fit(loss, num_data=len(reader) * image[0] * image[1] * image[2])  # the loss is a mean over values
    loss.module.load_state_dict(fitted.ema)
    return fitted


def run(root: Path) -> None:
    settings = load_settings(root)
    device = set_up(settings.deterministic)
    reader, val = (stage_shards(root, split) for split in ("train", "val"))
    autoencoder, likelihood = start(root, settings)
    autoencoder.place(device), likelihood.to(device)
    options, regulariser = settings.train_vae, settings.autoencoder.regulariser
    inputs = {"shards": index_hash(reader), "pretrained": folder_hash(root / PRETRAINED)}
    with training(root, STAGE, settings, options, inputs, device) as work:
        fitted = Fitted({}, [])
        if options.images:
            loading = {"workers": loader_workers(device.type), "rank": rank(), "ranks": ranks()}
            batches = Batches(reader, settings.seed, shuffle=options.shuffle, flip=options.flip, **loading)
            fitted = train(root, settings, reader, Parts(autoencoder, likelihood, batches, regulariser), work)
        if not work.first:
            return
        trained = bool(options.images) or (root / PRETRAINED / LIKELIHOOD).is_file()
        with Progress("train_vae: validation"):
            likelihood, held_out = measured(autoencoder, likelihood, val, settings.seed, trained)
        work.tracker.log({f"val_{name}": value for name, value in held_out.items()}, options.images)
        shutil.rmtree(root / AUTOENCODER, ignore_errors=True)
        autoencoder.save_pretrained(root / AUTOENCODER)
        likelihood.save_pretrained(root / AUTOENCODER)
        work.note_adopted(root / AUTOENCODER)
        write_curve(fitted, root / VAE_CURVE)
    print(f"train_vae: validation ELBO {held_out['elbo_nats']:.1f} nats, {held_out['elbo_bits_per_dim']:.4f} bits/dim")


STAGE = Stage(
    "train_vae",
    run,
    settings=("seed", "deterministic", "precision", "compile", "data.channels", "autoencoder", "train_vae"),
    inputs=(SHARDS, PRETRAINED),
    outs=(AUTOENCODER, VAE_CURVE),
)

if __name__ == "__main__":
    stage_main(STAGE, parallel=True)
