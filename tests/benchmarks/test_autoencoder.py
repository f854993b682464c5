"""The autoencoder's training step, training recipe and encoding against the obvious alternatives, each in one run.

Figures are ratios, above 1 where ours is faster. `make bench` prints them; the tests themselves hold both sides to equal
work. `test_training_step_on_a_gpu` runs where there is one, and has been written without: its first run is its own test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks.peer_autoencoder import Peer, Training
from benchmarks.rate_distortion import ROOT, digits, measure, standard_error, train, with_settings
from benchmarks.timing import LAYOUTS, Stopwatch, activations, compare, first_losses, interleaved, peak_flops, times_faster
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.base.device import default_device
from ldm.base.memory import Parts
from ldm.base.pixels import to_float, to_uint8
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.config import load_settings
from ldm.data.batches import Batches
from ldm.data.caption_columns import all_captions
from ldm.data.encoding import TEXT, write_latents
from ldm.data.reader import ShardReader
from ldm.evaluation.autoencoder import fit_scale
from ldm.evaluation.metrics.psnr import psnr as psnr_of
from ldm.nets.autoencoder import Autoencoder, AutoencoderKL
from ldm.stages.train_vae import build

SETTINGS = load_settings(ROOT)
NETWORKS: dict[str, tuple[dict[str, Any], int, int]] = {  # arguments, side of the images, batch size
    "default": (build(SETTINGS)[0].config, 32, 64),
    "32-64-64": ({"in_channels": 1, "out_channels": 1, "latent_channels": 4, "block_out_channels": [32, 64, 64]}, 32, 64),
}
LARGE = {  # Stable Diffusion's
    "stable diffusion": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
        },
        256,
        8,
    )
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()  # a network met before would make the next one's sizes dynamic, or find no room


# A training step of the same network


def our_loss(net: AutoencoderKL, x: Tensor, noise: Tensor) -> Tensor:
    posterior = net.encode(x)
    return F.mse_loss(net.decode(posterior.sample(noise)), x) + 1e-6 * posterior.kl().mean()


def their_loss(net: diffusers.AutoencoderKL, x: Tensor, noise: Tensor) -> Tensor:
    posterior = net.encode(x).latent_dist
    squares = F.mse_loss(net.decode(posterior.mean + posterior.std * noise).sample, x)
    return squares + 1e-6 * posterior.kl().sum() / noise.numel()


class Step:
    """A training step of a network saved in a folder, in one configuration."""

    def __init__(
        self,
        folder: Path,
        ours: bool,
        layout: torch.memory_format,
        compiled: bool = False,
        *,
        batch: tuple[Tensor, Tensor],
        fused: bool = True,
        autocast: bool = False,
    ):
        cls = AutoencoderKL if ours else diffusers.AutoencoderKL
        x, self.noise = batch
        self.net = cls.from_pretrained(folder).to(x.device, memory_format=layout).train()
        self.x, self.autocast = x.contiguous(memory_format=layout), autocast
        self.loss: Callable[..., Tensor] = our_loss if ours else their_loss
        if compiled:
            self.loss = torch.compile(self.loss, dynamic=False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), fused=fused or None)

    def forward_backward(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.net, self.x, self.noise)
        loss.backward()
        return loss

    def __call__(self) -> float:
        loss = self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device


def save_network(folder: Path, arguments: dict[str, Any], side: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Write a network with random weights; returns images and noise for it."""
    torch.manual_seed(0)
    net = AutoencoderKL(**arguments)
    net.save_pretrained(folder)
    x = torch.randn(batch, net.config["in_channels"], side, side).to(device)
    return x, torch.randn(batch, *net.latent_shape(side, side)).to(device)


@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(network: str, tmp_path: Path) -> None:
    """Forward, backward and fused AdamW in float32, against diffusers eager and compiled, in both layouts."""
    arguments, side, size = NETWORKS[network]
    device = default_device()
    make = partial(Step, tmp_path, batch=save_network(tmp_path, arguments, side, size, device))
    steps = {"ours": make(True, torch.channels_last), "ours compiled": make(True, torch.channels_last, True)}
    for layout, memory_format in LAYOUTS.items():
        steps[f"diffusers {layout}"] = make(False, memory_format)
        steps[f"diffusers {layout} compiled"] = make(False, memory_format, True)
    steps = first_losses(steps, 1e-4)
    compare(f"training step of {network} on {device}", interleaved(steps), size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("network", [*NETWORKS, *LARGE])
def test_training_step_on_a_gpu(network: str, tmp_path: Path) -> None:
    """As above under bf16 autocast, with the example's loop (eager, default layout and optimizer) as a further peer."""
    arguments, side, size = (NETWORKS | LARGE)[network]
    batch = save_network(tmp_path, arguments, side, size, torch.device("cuda"))
    make = partial(Step, tmp_path, batch=batch, autocast=True)
    steps = {"ours": make(True, torch.channels_last), "ours compiled": make(True, torch.channels_last, True)}
    steps["diffusers as in its example"] = make(False, torch.contiguous_format, fused=False)
    for layout, memory_format in LAYOUTS.items():
        steps[f"diffusers {layout} compiled"] = make(False, memory_format, True)
    steps = first_losses(steps, 2e-2)
    flops = products(make(True, torch.channels_last))
    seconds = interleaved(steps)
    compare(f"bf16 training step of {network} on {torch.cuda.get_device_name()}", seconds, size)
    peak = peak_flops()
    for name, step in steps.items():
        used = f"{flops / median(seconds[name]) / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else "peak FLOP/s not known"
        print(f"  {name}: {activations(step) / 2**20:.0f} MiB beyond weights and optimizer state, {used}")


def products(step: Step) -> int:
    """Floating-point operations of convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step.forward_backward()
    return counter.get_total_flops()


# What a second of training buys


@dataclass(frozen=True)
class Point:
    """What a training run has reached on the test images."""

    images: int
    seconds: float
    bits_per_dim: float
    standard_error: float
    psnr: float

    def __str__(self) -> str:
        error = f"{self.bits_per_dim:.3f} ± {self.standard_error:.3f} bits/dim"
        return f"  {self.images:6d} images {self.seconds:7.1f} s  {error}  {self.psnr:.2f} dB"


def look(images: int, seconds: float, autoencoder: Autoencoder, likelihood: Likelihood, readers: dict[str, ShardReader]) -> Point:
    bits = measure(autoencoder, likelihood, readers, SETTINGS.seed).bits_per_dim
    point = Point(images, seconds, float(bits.mean()), standard_error(bits), psnr(autoencoder, likelihood, readers["test"]))
    print(point, flush=True)
    return point


@torch.inference_mode()
def psnr(autoencoder: Autoencoder, likelihood: Likelihood, reader: ShardReader) -> float:
    """Of the reconstructions from posterior means, in dB, as the stage `evaluate` measures it: a mean over 8-bit images."""
    pixels = reader.images(range(len(reader)))
    parts = to_float(pixels).to(default_device()).split(256)
    back = [to_uint8(likelihood.mean(autoencoder.decode(autoencoder.encode(part).mean))).cpu() for part in parts]
    return float(psnr_of(pixels, torch.cat(back).numpy()).mean())


def our_run(images: int, every: int, readers: dict[str, ShardReader]) -> list[Point]:
    """The default recipe in as many images, its averaged weights looked at on the way."""
    settings = with_settings(SETTINGS, f"train_vae.images={images}", f"train_vae.checkpoint_images={every}")
    autoencoder, likelihood = build(settings)
    average = nn.ModuleDict({"autoencoder": autoencoder, "likelihood": likelihood}).to(default_device())
    points: list[Point] = []

    def save(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        with watch.paused():
            average.load_state_dict({k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")})
            points.append(look(state["images_seen"], watch.total, autoencoder, likelihood, readers))

    watch = Stopwatch()
    trained = train(settings, readers["train"], save)
    with watch.paused():
        points.append(look(images, watch.total, *trained, readers))
    return points


class TheirRun:
    """The example's recipe, looked at now and then, with a scale fitted on validation images each time."""

    EVERY = 1280  # images

    def __init__(self, lr: float, batch_size: int, readers: dict[str, ShardReader]):
        torch.manual_seed(SETTINGS.seed)
        options = SETTINGS.autoencoder
        latents = 4  # diffusers' default
        self.peer = Peer(SETTINGS.data.channels, latents, options.block_out_channels, options.layers_per_block)
        self.peer.to(default_device())
        self.name, self.readers, self.seconds = f"learning rate {lr:g}, batches of {batch_size}", readers, 0.0
        self.points: list[Point] = []
        self.training = Training(self.peer, Batches(readers["train"], SETTINGS.seed), batch_size, lr, SETTINGS.seed)

    def go_on(self, steps: int) -> Self:
        print(f"diffusers' example, {self.name}")
        every = self.EVERY // self.training.batch_size
        for _ in range(0, steps, every):
            watch = Stopwatch()
            self.training.steps(every)
            with watch.paused():
                self.seconds += watch.total
                likelihood = fit_scale(self.peer, self.readers["val"], SETTINGS.seed)
                self.points.append(look(self.training.images_seen, self.seconds, self.peer, likelihood, self.readers))
        return self


def compare_goals(name: str, own: list[Point], theirs: list[Point]) -> None:
    """Print when each first reached the best that theirs ever reached, by either measure."""
    bits, sharp = min(theirs, key=lambda p: p.bits_per_dim), max(theirs, key=lambda p: p.psnr)
    first = {
        f"{bits.bits_per_dim:.3f} bits/dim": (bits, [p for p in own if p.bits_per_dim <= bits.bits_per_dim]),
        f"{sharp.psnr:.2f} dB": (sharp, [p for p in own if p.psnr >= sharp.psnr]),
    }
    for what, (goal, reached) in first.items():
        ours = f"ours {reached[0].seconds:.1f} s, {reached[0].seconds / goal.seconds:.2f} of it" if reached else "ours never"
        print(f"  {name}: {what} after {goal.seconds:.1f} s; {ours}")


def test_quality_against_training_seconds(tmp_path: Path) -> None:
    """bits/dim and PSNR of the test images: our default recipe against diffusers' example at equal parameters.

    Of three learning rates at 120 batches of 64, the example goes on to 300 with the one of the highest PSNR; and it runs
    at our batch size over as many images as 120 batches of 64 have.
    """
    readers = digits(tmp_path, SETTINGS)
    print("\nours, default recipe")
    own = our_run(SETTINGS.train_vae.images, 480, readers)
    runs = [TheirRun(lr, 64, readers).go_on(120) for lr in (3e-4, 1e-3, 3e-3)]
    small = TheirRun(1e-3, SETTINGS.train_vae.batch_size, readers)
    small.go_on(120 * 64 // SETTINGS.train_vae.batch_size)
    short = [point for run in runs for point in run.points]
    best = max(runs, key=lambda run: run.points[-1].psnr).go_on(180)
    assert best.points[-1].psnr > best.points[0].psnr + 3  # it learns
    sizes = [sum(p.numel() for p in net.parameters()) for net in (build(SETTINGS)[0], best.peer)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.07)
    print(f"parameters: ours {sizes[0]:,}, diffusers' {sizes[1]:,}; {torch.get_num_threads()} threads; the example's best:")
    compare_goals("120 batches of 64, best of three learning rates", own, short)
    compare_goals(f"300 batches of 64, {best.name}", own, best.points)
    compare_goals(f"as many images, {small.name}", own, small.points)


# Encoding for the latent cache


@pytest.mark.parametrize("network", NETWORKS)
def test_encoding_for_the_latent_cache(network: str, tmp_path: Path) -> None:
    """`write_latents` as the stage calls it against a loop that only encodes the same images, decoded before."""
    device, readers = default_device(), digits(tmp_path, SETTINGS)
    readers = {split: readers[split] for split in ("train", "val")}
    autoencoder = AutoencoderKL(**NETWORKS[network][0]).place(device).eval()
    embed = SETTINGS.text.build()
    embedded: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def encode(images: np.ndarray) -> tuple[Tensor, Tensor]:
        posterior = autoencoder.encode(to_float(images).to(device))
        return posterior.mean.cpu(), posterior.logvar.cpu()

    def remembered(texts: list[str]) -> tuple[Tensor, Tensor]:
        if tuple(texts) not in embedded:
            embedded[tuple(texts)] = embed(texts)
        return embedded[tuple(texts)]

    runs = iter(range(10**6))

    def cache(captions: Callable[[list[str]], tuple[Tensor, Tensor]]) -> None:
        number = next(runs)
        out, store = tmp_path / f"latents{number}", tmp_path / f"store{number}"
        write_latents(
            readers, out, encode, captions, dict.fromkeys(TEXT, ""), lambda done: None, store=store, code="",
            divide=Parts(device), texts=all_captions,
        )  # fmt: skip

    batches = [
        reader.images(positions[start : start + 256])
        for reader in readers.values()
        for _, positions in reader.shard_positions()
        for start in range(0, len(positions), 256)
    ]
    count = sum(map(len, batches))
    seconds = interleaved(
        {
            "encoder alone": lambda: [encode(images) for images in batches],
            "with the cache": lambda: cache(remembered),
            "with captions": lambda: cache(embed),
        }
    )
    bare = seconds.pop("encoder alone")
    print(f"\n{network}, {count} images of {SETTINGS.data.image_size} pixels, encoder alone: {count / median(bare):.0f} images/s")
    for name, times in seconds.items():
        print(f"  {name}: {count / median(times):.0f} images/s, {times_faster(times, bare):.2f} of it")
