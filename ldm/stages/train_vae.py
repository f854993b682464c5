"""Train the autoencoder on the shards' training images, or take a pretrained one, and measure it on validation images."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.base.device import set_up
from ldm.base.distributed import rank, ranks
from ldm.base.errors import InputError
from ldm.base.hashing import folder_hash
from ldm.base.paths import AUTOENCODER, PRETRAINED, SHARDS, VAE_CURVE
from ldm.base.progress import Progress
from ldm.base.randomness import seed_for
from ldm.bayes.likelihoods import FILE as LIKELIHOOD
from ldm.bayes.likelihoods import Likelihood, load_likelihood, make_likelihood
from ldm.config import Settings, load_settings
from ldm.data.batches import Batches
from ldm.data.parallel import loader_workers
from ldm.data.reader import ShardReader
from ldm.evaluation.autoencoder import evaluate_elbo, fit_scale, summary
from ldm.nets.adversary import PatchDiscriminator, Perceptual
from ldm.nets.autoencoder import Autoencoder, AutoencoderKL, VQModel, load_autoencoder
from ldm.stages.inputs import index_hash, stage_shards
from ldm.stages.runtime import stage_main
from ldm.stages.stage import Stage
from ldm.stages.training import training, write_curve
from ldm.training.adversarial import AdversarialObjective, Adversary
from ldm.training.fit import Fitted, Langevin
from ldm.training.vae import VaeObjective


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
    """As `build`, or the pretrained autoencoder where there is one, with its likelihood if that is the one to be trained."""
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
    """Raise an `InputError` where the settings do not describe the autoencoder that was found."""
    here, there = in_settings(described), in_settings(found)
    if differ := [f"{key} is {here.get(key)}, but it has {there[key]}" for key in there if there[key] != here.get(key)]:
        raise InputError(f"autoencoder.pretrained {name} is not what params.yaml describes: {'; '.join(differ)}")


def in_settings(autoencoder: Autoencoder) -> dict[str, Any]:
    """An autoencoder in the words of the settings, as far as they speak of it."""
    config = autoencoder.config
    same = ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention")
    described = {f"autoencoder.{key}": config[key] for key in same}
    described |= {
        "autoencoder.regulariser": "vq" if isinstance(autoencoder, VQModel) else "kl",
        "autoencoder.latent_channels": autoencoder.latent_channels,
        "autoencoder.attention": [level for level, attends in enumerate(config["attention"]) if attends],
        "data.channels": config["in_channels"],
        "out_channels (by data.channels and train_vae.scale)": config["out_channels"],
    }
    if isinstance(autoencoder, VQModel):
        described["autoencoder.num_vq_embeddings"] = config["num_vq_embeddings"]
    return described


def objective(
    root: Path, settings: Settings, autoencoder: Autoencoder, likelihood: Likelihood, batches: Batches, side: int
) -> VaeObjective:
    """What the settings minimise, on images of `side` pixels."""
    options, device = settings.train_vae, next(autoencoder.parameters()).device
    if options.objective == "elbo":
        return VaeObjective(autoencoder, likelihood, batches, options)
    ldm = options.ldm
    torch.manual_seed(seed_for(settings.seed, "initialise", "discriminator"))
    discriminator = PatchDiscriminator(settings.data.channels, ldm.discriminator_channels, ldm.discriminator_layers)
    given = None if ldm.perceptual_sha256 is None else (root / ldm.perceptual, ldm.perceptual_sha256)
    perceptual = Perceptual.from_file(*given) if given else Perceptual()
    check_fits(discriminator, perceptual, torch.zeros(1, settings.data.channels, side, side))
    adversary = Adversary(
        perceptual.to(device),
        ldm.perceptual_weight,
        discriminator.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        ldm.discriminator_weight,
        ldm.discriminator_start,
    )
    return AdversarialObjective(autoencoder, likelihood, batches, options, adversary)


def langevin(settings: Settings, train: ShardReader) -> Langevin | None:
    """What SGLD samples, where it is the optimizer: the loss is a mean over the values of all images."""
    if settings.autoencoder.optimizer == "adamw":
        return None
    values = len(train) * train.preprocessing.channels * train.preprocessing.image_size**2
    return Langevin(values, **settings.train_vae.sgld.model_dump())


@torch.no_grad()
def check_fits(discriminator: PatchDiscriminator, perceptual: Perceptual, x: Tensor) -> None:
    """Raise an `InputError` where images such as x are too small for the networks that judge them."""
    for name, judge in (("discriminator_layers", discriminator), ("perceptual", lambda x: perceptual(x, x))):
        try:
            judge(x)
        except RuntimeError as error:
            raise InputError(f"train_vae.ldm.{name}: too deep for images of {x.shape[-1]} pixels (data.image_size)") from error


def measured(
    autoencoder: Autoencoder, likelihood: Likelihood, val: ShardReader, seed: int, trained: bool = True
) -> tuple[Likelihood, dict[str, float]]:
    """A likelihood of 8-bit pixels, fitted to the validation images where there was none, and the bound on them.

    `trained`: whether the likelihood was, with this autoencoder or an earlier run's.
    """
    if likelihood.kind == "gaussian" and likelihood.scale == "per_pixel":  # the same Gaussians, integrated over each value
        discrete = make_likelihood("discretized_gaussian", likelihood.scale, float(likelihood.log_scale))
        likelihood = discrete.to(likelihood.log_scale.device)
    elif not likelihood.discrete or not (trained or likelihood.kind == "bernoulli" or likelihood.scale == "per_pixel"):
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
    with training(root, STAGE, settings, options, inputs, device) as work:
        fitted = Fitted({}, [])
        if options.images:
            loading = {"workers": loader_workers(device.type), "rank": rank(), "ranks": ranks()}
            batches = Batches(train, settings.seed, shuffle=options.shuffle, flip=options.flip, **loading)
            loss = objective(root, settings, autoencoder, likelihood, batches, train.preprocessing.image_size)
            fitted = work.fit(loss, langevin(settings, train))
            loss.module.load_state_dict(fitted.ema)
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
    stage_main(STAGE)
