"""Train the autoencoder on the shards' training images, or take a pretrained one, and measure it on validation images."""

import shutil
from pathlib import Path
from typing import Any

import torch

from ldm.bayes.likelihoods import FILE as LIKELIHOOD
from ldm.bayes.likelihoods import Likelihood, load_likelihood, make_likelihood
from ldm.config import Settings, load_settings
from ldm.data.batches import Batches
from ldm.data.parallel import loader_workers
from ldm.data.reader import ShardReader
from ldm.distributed import rank, ranks
from ldm.errors import InputError
from ldm.hashing import folder_hash
from ldm.nets.adversary import PatchDiscriminator, Perceptual
from ldm.nets.autoencoder import Autoencoder, AutoencoderKL, VQModel, load_autoencoder
from ldm.nets.blocks import CONFIG
from ldm.randomness import seed_for
from ldm.stages.inputs import index_hash, stage_shards
from ldm.stages.runtime import set_up, stage_main
from ldm.stages.training import training, write_curve
from ldm.training.adversarial import AdversarialObjective, Adversary
from ldm.training.fit import Fitted
from ldm.training.vae import VaeObjective, evaluate_elbo, fit_scale, summary

PRETRAINED, OUT, CURVE = "models/pretrained", "models/autoencoder", "reports/curves/train_vae.csv"


def build(settings: Settings) -> tuple[Autoencoder, Likelihood]:
    """The untrained autoencoder and likelihood that the settings and seed describe."""
    torch.manual_seed(seed_for(settings.seed, "initialise", "autoencoder"))
    options, channels = settings.autoencoder, settings.data.channels
    likelihood = make_likelihood(settings.train_vae.likelihood, settings.train_vae.scale, settings.train_vae.log_scale)
    arguments: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": likelihood.outputs(channels),
        "latent_channels": options.latent_channels,
        "block_out_channels": options.block_out_channels,
        "layers_per_block": options.layers_per_block,
        "norm_num_groups": options.norm_num_groups,
        "mid_block_add_attention": options.mid_block_add_attention,
        "attention": [level in options.attention for level in range(len(options.block_out_channels))],
    }
    if options.regulariser == "vq":
        return VQModel(**arguments, num_vq_embeddings=options.num_vq_embeddings), likelihood
    return AutoencoderKL(**arguments), likelihood


def start(root: Path, settings: Settings) -> tuple[Autoencoder, Likelihood]:
    """As `build`, with the weights of the pretrained autoencoder where there is one."""
    autoencoder, likelihood = build(settings)
    folder = root / PRETRAINED
    if settings.autoencoder.pretrained is None:
        return autoencoder, likelihood
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: holds no autoencoder; run the stage pretrained first")
    pretrained = load_autoencoder(folder)
    check_same(autoencoder, pretrained, settings.autoencoder.pretrained)
    if (folder / LIKELIHOOD).is_file():
        found = load_likelihood(folder)
        if (found.kind, found.scale) == (likelihood.kind, likelihood.scale):
            likelihood = found
    return pretrained, likelihood


def check_same(described: Autoencoder, found: Autoencoder, name: str | None) -> None:
    """Raise an `InputError` where the settings do not describe the autoencoder that was found."""
    ours, theirs = ({"regulariser": net.CLASS, **net.config} for net in (described, found))
    differ = [f"{key} is {theirs.get(key)}, here {ours.get(key)}" for key in theirs | ours if theirs.get(key) != ours.get(key)]
    if differ:
        raise InputError(f"autoencoder.pretrained {name}: its {'; its '.join(differ)}; set params.yaml to what it has")


def objective(root: Path, settings: Settings, autoencoder: Autoencoder, likelihood: Likelihood, batches: Batches) -> VaeObjective:
    options, device = settings.train_vae, next(autoencoder.parameters()).device
    if options.objective == "elbo":
        return VaeObjective(autoencoder, likelihood, batches, options)
    ldm = options.ldm
    torch.manual_seed(seed_for(settings.seed, "initialise", "discriminator"))
    discriminator = PatchDiscriminator(settings.data.channels, ldm.discriminator_channels, ldm.discriminator_layers)
    given = None if ldm.perceptual_sha256 is None else (root / ldm.perceptual, ldm.perceptual_sha256)
    adversary = Adversary(
        (Perceptual.from_file(*given) if given else Perceptual()).to(device),
        ldm.perceptual_weight,
        discriminator.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        ldm.discriminator_weight,
        ldm.discriminator_start,
    )
    return AdversarialObjective(autoencoder, likelihood, batches, options, adversary)


def measured(
    autoencoder: Autoencoder, likelihood: Likelihood, val: ShardReader, seed: int
) -> tuple[Likelihood, dict[str, float]]:
    """A likelihood of 8-bit pixels, fitted to the validation images where there was none, and the bound on them."""
    if not likelihood.discrete:
        likelihood = fit_scale(autoencoder, val, seed)
    return likelihood, summary(evaluate_elbo(autoencoder, likelihood, val, seed))


def run(root: Path) -> None:
    settings = load_settings(root)
    device = set_up(settings.deterministic)
    train, val = (stage_shards(root, split) for split in ("train", "val"))
    autoencoder, likelihood = start(root, settings)
    autoencoder.place(device), likelihood.to(device)
    options = settings.train_vae
    inputs = {"shards": index_hash(train), "pretrained": folder_hash(root / PRETRAINED)}
    params = {
        "seed": settings.seed,
        "deterministic": settings.deterministic,
        "precision": settings.precision,
        "compile": settings.compile,
        **settings.autoencoder.model_dump(),
    }
    with training(root, "train_vae", params, options, inputs, device) as work:
        fitted = Fitted({}, [])
        if options.images:
            loading = {"workers": loader_workers(device.type), "rank": rank(), "ranks": ranks()}
            batches = Batches(train, settings.seed, shuffle=options.shuffle, flip=options.flip, **loading)
            loss = objective(root, settings, autoencoder, likelihood, batches)
            fitted = work.fit(loss)
            loss.module.load_state_dict(fitted.ema)
        if not work.first:
            return
        likelihood, held_out = measured(autoencoder, likelihood, val, settings.seed)
        work.tracker.log({f"val_{name}": value for name, value in held_out.items()}, options.images)
        shutil.rmtree(root / OUT, ignore_errors=True)
        autoencoder.save_pretrained(root / OUT)
        likelihood.save_pretrained(root / OUT)
        write_curve(fitted, root / CURVE)
    print(f"train_vae: validation ELBO {held_out['elbo_nats']:.1f} nats, {held_out['elbo_bits_per_dim']:.4f} bits/dim")


if __name__ == "__main__":
    stage_main("train_vae", run)
