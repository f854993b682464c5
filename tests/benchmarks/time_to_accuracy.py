"""Seconds of training until prompts are read as asked: our default settings, and diffusers' examples, on digits.

`PYTHONPATH=tests python tests/benchmarks/time_to_accuracy.py` prints a table. All that is trained counts, autoencoder and
U-Net, and so do the latents and text embeddings made in between; seconds are those of `benchmarks.timing.Stopwatch`. At each
look 200 prompts, 20 a digit, are sampled and read by the classifier of the stage `evaluate`, which knows real training images
only; looking does not count. Ours is looked at with its averaged weights and default sampling settings. The examples
(`peer_autoencoder`, `peer_unet`) train one autoencoder for all learning rates of the U-Net, and a run of theirs ends when it
has reached the goal or has taken four times as long as ours did; a number behind the command says how many times instead.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from benchmarks import peer_autoencoder, peer_unet
from benchmarks.rate_distortion import ROOT, Watched, digits, train
from benchmarks.timing import Stopwatch
from torch import Tensor

from ldm.base.device import default_device, set_up
from ldm.base.memory import Parts
from ldm.base.pixels import to_float, to_uint8
from ldm.base.randomness import generator
from ldm.config import Settings, load_settings
from ldm.data.batches import Batches, order
from ldm.data.caption_columns import all_captions
from ldm.data.encoding import write_latents
from ldm.data.latents import Latents, open_latents
from ldm.data.reader import ShardReader
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.options import Recipe
from ldm.evaluation.evaluation import balanced, labelled
from ldm.evaluation.metrics.prompt_accuracy import fit_classifier
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import Autoencoder
from ldm.nets.text.encoder import TextEncoder
from ldm.registry.tracking import Run
from ldm.stages.train_unet import build, recipe
from ldm.training.fit import fit
from ldm.training.unet import UnetObjective

GOAL = 0.97
LOOKS = 12  # at our training
LEARNING_RATES = 5e-4, 1e-3, 2e-3
AUTOENCODER_STEPS, AUTOENCODER_LR, AUTOENCODER_BATCH = 120, 1e-3, 64  # the rate: the best of three, see RESULTS.md
BATCH, CAPTION_DROPOUT, EVERY = 128, 0.1, 25  # of the example's U-Net: images, share, steps between looks
PARTS = 256  # images encoded or decoded at a time


@dataclass(frozen=True)
class Point:
    """What a run had reached at a look."""

    images: int
    seconds: float
    accuracy: float

    def __str__(self) -> str:
        return f"  {self.images:6d} images {self.seconds:7.1f} s  {self.accuracy:6.1%}"


@dataclass(frozen=True)
class Exam:
    """The prompts, and the classifier of what is drawn for them."""

    prompts: pd.DataFrame
    classifier: Any

    def look(self, images_seen: int, watch: Stopwatch, sample: Callable[[list[str]], np.ndarray]) -> Point:
        drawn = sample(self.prompts.text.tolist())
        point = Point(images_seen, watch.total, self.classifier.score(drawn, self.prompts.label.to_numpy()))
        print(point, flush=True)
        return point


def exam(train: ShardReader, samples: int) -> Exam:
    labels = labelled(train.captions)
    assert labels is not None
    return Exam(balanced(labels, samples), fit_classifier(train.images(range(len(train))), train.captions.label.to_numpy()))


def first(points: list[Point]) -> Point | None:
    """The first look at which the goal was reached."""
    return next((point for point in points if point.accuracy >= GOAL), None)


# Ours


def cached(settings: Settings, autoencoder: Autoencoder, readers: dict[str, ShardReader], folder: Path) -> Latents:
    """What the stage `cache_latents` makes of the training images."""
    encoder = settings.text.build(device=default_device())
    text = {"text_encoder": encoder.sha256, "text_width": encoder.width, "text": settings.text.identity}

    @torch.inference_mode()
    def encode(images: np.ndarray) -> tuple[Tensor, Tensor]:
        posterior = autoencoder.encode(to_float(images).to(default_device()))
        return posterior.mean.cpu(), posterior.logvar.cpu()

    out = folder / "latents"
    write_latents(
        {"train": readers["train"]}, out, encode, encoder, {"autoencoder": "", **text}, lambda done: None,
        store=folder / "store", code="", divide=Parts(default_device()), texts=all_captions,
    )  # fmt: skip
    return open_latents(out, "train")


def our_run(settings: Settings, readers: dict[str, ShardReader], folder: Path, asked: Exam) -> list[Point]:
    """The default settings, looked at on the way through the U-Net's training."""
    points: list[Point] = []
    options = settings.train_unet
    options = options.model_copy(update={"checkpoint_images": options.images // LOOKS // options.batch_size * options.batch_size})
    device = set_up(settings.deterministic)
    watch = Stopwatch()
    autoencoder, likelihood = train(settings, readers["train"])
    latents = cached(settings, autoencoder, readers, folder)
    unet, average = (build(settings, latents.width).place(device) for _ in range(2))
    diffusion = settings.diffusion
    denoiser = Denoiser(unet, diffusion.prediction, diffusion.noise.build())
    system = Recipe(**recipe(settings, latents), sampling=settings.sampling.model_dump())
    model = LatentDiffusion(autoencoder, likelihood, average, system)

    def look(images_seen: int, ema: dict[str, Tensor]) -> None:
        with watch.paused():
            average.load_state_dict({k.removeprefix("unet."): v for k, v in ema.items() if k.startswith("unet.")})
            points.append(asked.look(images_seen, watch, lambda prompts: model.sample(prompts, seed=settings.seed).numpy()))

    def save(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        look(state["images_seen"], {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")})

    objective = UnetObjective(denoiser, latents, options, settings.seed, device)
    fitted = fit(
        objective, options, seed=settings.seed, tracker=Run(), store=Watched(save), progress=lambda done, row: None
    )  # fmt: skip
    look(options.images, fitted.ema)
    return points


# diffusers' examples


@dataclass(frozen=True)
class Prepared:
    """The example's autoencoder, and what it and the text encoder made of the training set."""

    autoencoder: peer_autoencoder.Peer
    encoder: TextEncoder
    mean: Tensor  # (N, c, h, w), scaled to unit variance
    std: Tensor  # (N, c, h, w), likewise
    scale: float
    text: Tensor  # (N, T, D)
    empty: Tensor  # (T, D)
    seconds: float


def prepare(settings: Settings, reader: ShardReader) -> Prepared:
    torch.manual_seed(settings.seed)
    device, watch = default_device(), Stopwatch()
    peer = peer_autoencoder.Peer(settings.data.channels, 4, (32, 64, 64), 1).to(device)
    training = peer_autoencoder.Training(
        peer, Batches(reader, settings.seed), AUTOENCODER_BATCH, AUTOENCODER_LR, settings.seed
    )  # fmt: skip
    training.steps(AUTOENCODER_STEPS)
    images = torch.from_numpy(reader.images(range(len(reader)))).split(PARTS)
    with torch.no_grad():
        parts = [peer.encode(to_float(part).to(device)) for part in images]
    mean, std = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "std"))
    scale = float(1 / (mean.var() + std.square().mean()).sqrt())
    encoder = settings.text.build()
    captions = reader.captions.text.tolist()
    distinct = [*dict.fromkeys(captions), ""]
    text, _ = encoder(distinct)
    rows = torch.tensor([distinct.index(caption) for caption in captions])
    text = text.to(device)
    prepared = Prepared(peer, encoder, mean * scale, std * scale, scale, text[rows], text[-1], 0.0)
    with watch.paused():
        return replace(prepared, seconds=watch.total)


def drawn(prepared: Prepared, net: diffusers.UNet2DConditionModel, seed: int, prompts: list[str]) -> np.ndarray:
    """Images of the example's U-Net as it is, uint8 (N, C, H, W)."""
    text, _ = prepared.encoder(prompts)
    length = len(prepared.empty)  # tokens of every text, as in the example
    context = F.pad(text, (0, 0, 0, max(length - text.shape[1], 0)))[:, :length].to(prepared.empty)
    shape = len(prompts), *prepared.mean.shape[1:]
    noise = torch.randn(shape, generator=generator(seed, "sample")).to(context)
    net.eval()
    z = peer_unet.ddim(net, noise, context, prepared.empty) / prepared.scale
    net.train()
    with torch.inference_mode():
        return to_uint8(torch.cat([prepared.autoencoder.decode(part) for part in z.split(PARTS)])).cpu().numpy()


def their_run(settings: Settings, prepared: Prepared, lr: float, limit: float, asked: Exam) -> list[Point]:
    """The example's U-Net at a learning rate, looked at until it reaches the goal or has taken `limit` seconds."""
    torch.manual_seed(settings.seed)
    watch = Stopwatch()
    watch.total = prepared.seconds
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    channels, width = prepared.mean.shape[1], prepared.text.shape[-1]
    net = diffusers.UNet2DConditionModel(
        in_channels=channels, out_channels=channels, block_out_channels=(64, 128), cross_attention_dim=width, **blocks
    ).to(default_device())
    training = peer_unet.Training(net, lr)
    rng = generator(settings.seed, "example")
    points: list[Point] = []
    images_seen = 0
    while watch.total < limit and not first(points):
        for _ in range(EVERY):
            training.step(*batch(prepared, settings.seed, images_seen, rng))
            images_seen += BATCH
        with watch.paused():
            points.append(asked.look(images_seen, watch, partial(drawn, prepared, net, settings.seed)))
    return points


def batch(prepared: Prepared, seed: int, images_seen: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise, timesteps and text embeddings, some of them of the empty caption."""
    index = torch.from_numpy(order(seed, len(prepared.mean), images_seen, BATCH)).to(prepared.mean.device)
    posterior_noise, noise = torch.randn((2, BATCH, *prepared.mean.shape[1:]), generator=rng).to(prepared.mean)
    timesteps = torch.randint(1000, (BATCH,), generator=rng).to(index)
    dropped = (torch.rand(BATCH, generator=rng) < CAPTION_DROPOUT).to(index.device)
    x0 = prepared.mean[index] + prepared.std[index] * posterior_noise
    context = torch.where(dropped[:, None, None], prepared.empty, prepared.text[index])
    return x0, noise, timesteps, context


def main() -> None:
    times = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    settings = load_settings(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        readers = digits(Path(folder), settings)
        asked = exam(readers["train"], settings.evaluate.samples)
        print("ours", flush=True)
        own = our_run(settings, readers, Path(folder), asked)
        torch.use_deterministic_algorithms(False)
        reached = first(own)
        limit = times * (reached or own[-1]).seconds
        runs = {"ours": own}
        print(f"diffusers' autoencoder; runs end at {limit:.0f} s", flush=True)
        prepared = prepare(settings, readers["train"])
        for lr in LEARNING_RATES:
            print(f"diffusers, learning rate {lr:g}", flush=True)
            runs[f"diffusers, learning rate {lr:g}"] = their_run(settings, prepared, lr, limit, asked)
    print(f"\n{GOAL:.0%} of {len(asked.prompts)} prompts; {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = [{"run": name, **summary(points, reached)} for name, points in runs.items()]
    print(pd.DataFrame(rows).to_string(index=False))


def summary(points: list[Point], ours: Point | None) -> dict[str, str]:
    """When a run reached the goal, in seconds and in times of ours, and what it had reached at its end."""
    goal, last = first(points), points[-1]
    return {
        "seconds to goal": f"{goal.seconds:.0f}" if goal else f"not in {last.seconds:.0f}",
        "times ours": f"{goal.seconds / ours.seconds:.2f}" if goal and ours else "",
        "images": str((goal or last).images),
        "accuracy at the end": f"{last.accuracy:.1%}",
    }


if __name__ == "__main__":
    main()
