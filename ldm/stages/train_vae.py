"""Train the autoencoder on the shards' training images, or take a pretrained one, and measure it on validation images."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from ldm.base.device import set_up
from ldm.base.distributed import rank, ranks
from ldm.base.errors import InputError
from ldm.base.files import folder_hash
from ldm.base.paths import AUTOENCODER, PRETRAINED, VAE_CURVE
from ldm.base.progress import Progress
from ldm.base.randomness import seed_for
from ldm.bayes.likelihoods.likelihood import FILE as LIKELIHOOD
from ldm.bayes.likelihoods.likelihood import Likelihood, as_discrete, load_likelihood
from ldm.config import Settings, load_settings
from ldm.data.batches import Batches
from ldm.data.parallel import loader_workers
from ldm.data.reader import ShardReader, stage_shards
from ldm.evaluation.autoencoder import evaluate_elbo, fit_scale, summary
from ldm.nets.autoencoder import Autoencoder, VQModel, load_autoencoder
from ldm.stages.checks import check_captions, check_fetched, check_part, check_sizes
from ldm.stages.stage import stage_main
from ldm.stages.training import training
from ldm.training.objectives import VaeObjective

SHAPE = ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention")  # as settings and config name it


def build(settings: Settings) -> tuple[Autoencoder, Likelihood]:
    """The untrained autoencoder and likelihood that the settings and seed describe."""
    torch.manual_seed(seed_for(settings.seed, "initialise", "autoencoder"))
    options, channels = settings.autoencoder, settings.data.channels
    likelihood = settings.train_vae.likelihood.build()
    attention = [level in options.attention for level in range(len(options.block_out_channels))]
    shape = options.model_dump(include={*SHAPE, "latent_channels"})
    outputs = likelihood.outputs(channels)
    return options.regulariser.build(in_channels=channels, out_channels=outputs, attention=attention, **shape), likelihood


def start(root: Path, settings: Settings) -> tuple[Autoencoder, Likelihood]:
    """As `build`, or the pretrained autoencoder if there is one, with its likelihood if the settings name the same."""
    autoencoder, likelihood = build(settings)
    folder, name = root / PRETRAINED, settings.autoencoder.pretrained
    if name is None:
        return autoencoder, likelihood
    check_fetched(folder, "autoencoder.pretrained", name)
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

    def in_settings(net: Autoencoder) -> dict[str, Any]:
        config, is_vq = net.config, isinstance(net, VQModel)
        codes = {"autoencoder.regulariser.num_vq_embeddings": config["num_vq_embeddings"]} if is_vq else {}
        return {f"autoencoder.{key}": config[key] for key in SHAPE} | codes | {
            "autoencoder.regulariser.kind": "vq" if is_vq else "kl",
            "autoencoder.latent_channels": net.latent_channels,
            "autoencoder.attention": [level for level, attends in enumerate(config["attention"]) if attends],
            "data.channels": config["in_channels"],
            "out_channels (by data.channels and train_vae.likelihood.scale)": config["out_channels"],
        }  # fmt: skip

    here, there = in_settings(described), in_settings(found)
    if differ := [f"{key} is {here.get(key)}, but it has {there[key]}" for key in there if there[key] != here.get(key)]:
        hint = "the rebuild deployment (or autoencoder.pretrained: null) trains one from nothing"
        raise InputError(f"autoencoder.pretrained {name} is not what params.yaml describes: {'; '.join(differ)}; {hint}")


def measured(
    autoencoder: Autoencoder, likelihood: Likelihood, val: ShardReader, seed: int, trained: bool = True
) -> tuple[Likelihood, dict[str, float]]:
    """A likelihood of 8-bit pixels, its scale fitted to the validation images if it was not `trained`, and the bound on them."""
    discrete = as_discrete(likelihood)
    has_scale = trained or likelihood.kind == "bernoulli" or likelihood.scale == "per_pixel"
    likelihood = discrete if discrete is not None and has_scale else fit_scale(autoencoder, val, seed)
    return likelihood, summary(evaluate_elbo(autoencoder, likelihood, val, seed))


def run(root: Path) -> None:
    settings = load_settings(root)
    device, out = set_up(settings.deterministic), root / AUTOENCODER
    check_sizes(root, settings)
    check_captions(root, settings)
    reader, val = (stage_shards(root, split) for split in ("train", "val"))
    autoencoder, likelihood = start(root, settings)
    check_part(settings, autoencoder.decoder)
    autoencoder.place(device)
    likelihood.to(device)
    options, seed = settings.train_vae, settings.seed
    inputs = {"shards": reader.digest, "pretrained": folder_hash(root / PRETRAINED)}
    with training(root, "train_vae", settings, inputs, device, AUTOENCODER, VAE_CURVE) as (fit, tracker, work):
        if options.images:
            loading = {"workers": loader_workers(device.type), "rank": rank(), "ranks": ranks()}
            batches = Batches(reader, seed, shuffle=options.shuffle, flip=options.flip, **loading)
            channels, smallest = reader.preprocessing.channels, min(reader.shapes, key=min)
            values = sum(len(positions) * channels * math.prod(shape) for shape, positions in reader.shapes.items())
            elbo = VaeObjective(autoencoder, likelihood, batches, settings.autoencoder.regulariser, values / len(reader))
            loss = options.objective.build(elbo, root, seed_for(seed, "initialise", "discriminator"), (channels, *smallest))
            loss.module.load_state_dict(fit(loss, num_data=values))  # the loss is a mean over values
        if not work:
            return
        trained = bool(options.images) or (root / PRETRAINED / LIKELIHOOD).is_file()
        with Progress("train_vae: validation"):
            likelihood, held_out = measured(autoencoder, likelihood, val, seed, trained)
        tracker.log({f"val_{name}": value for name, value in held_out.items()}, options.images)
        shutil.rmtree(out, ignore_errors=True)
        autoencoder.save_pretrained(out)
        likelihood.save_pretrained(out)
    print(f"train_vae: validation ELBO {held_out['elbo_nats']:.1f} nats, {held_out['elbo_bits_per_dim']:.4f} bits/dim")


if __name__ == "__main__":
    stage_main("train_vae", run, parallel=True)
