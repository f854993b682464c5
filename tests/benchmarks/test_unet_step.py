"""A training step of the U-Net (noising, network, loss, gradients clipped, AdamW) against diffusers' on the same weights.

Figures are ratios, above 1 where ours is faster. `make bench` prints them; the tests themselves hold both sides to equal
work. `-k gpu` is for a machine with a GPU, where it needs no more than torch, pytest, diffusers and what they need.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
import yaml
from benchmarks import peer_unet
from benchmarks.timing import activations, compare, first_losses, interleaved, peak_flops
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm.base.device import default_device, reuse_freed_memory
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import Linear
from ldm.nets.unet import UNet
from ldm.training.fit import GRADIENT_NORM, global_norm

PARAMS = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())  # unvalidated: pydantic is not everywhere
MODE = os.environ.get("LDM_BENCH_COMPILE_MODE")  # of torch.compile
LR = 1e-4
EXAMPLE = "diffusers as in its example"
LARGER = 64  # images at once that a large network is tried with beside its batch


def unet(widths: list[int], *attends: bool, **others: int) -> dict[str, Any]:
    """Arguments of a network on latents of four channels, with transformers at the levels that attend."""
    return {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "attention": ["cross" if a else "none" for a in attends],
        "cross_attention_dim": 384,
        "num_heads": 8,
        **others,
    }


@dataclass(frozen=True)
class Network:
    arguments: dict[str, Any]
    side: int = 8  # of the latents
    tokens: int = 11
    batch: int = 64


CHANNELS = {"in_channels": PARAMS["autoencoder"]["latent_channels"], "out_channels": PARAMS["autoencoder"]["latent_channels"]}
NETWORKS = {
    "default": Network(CHANNELS | {"cross_attention_dim": 384} | {k: v for k, v in PARAMS["backbone"].items() if k != "kind"}),
    "64-128": Network(unet([64, 128], True, True)),
}
TINY = {"tiny": Network(unet([8, 16], True, True, num_heads=2, norm_num_groups=4), tokens=3, batch=2)}
LARGE = {
    "stable diffusion 1.5": Network(unet([320, 640, 1280, 1280], True, True, True, False, cross_attention_dim=768), 64, 77, 24)
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()  # a network met before would make the next one's sizes dynamic, or find no room


class Batch(NamedTuple):
    """Latents, noise, timesteps and text embeddings, the same for both sides."""

    x0: Tensor  # (B, c, h, w)
    noise: Tensor  # (B, c, h, w)
    timesteps: Tensor  # (B,)
    context: Tensor  # (B, T, D)


def draw(network: Network, count: int, device: torch.device) -> Batch:
    torch.manual_seed(1)
    shape = count, network.arguments["in_channels"], network.side, network.side
    x0, noise, timesteps = torch.randn(shape), torch.randn(shape), torch.randint(1000, (count,))
    context = torch.randn(count, network.tokens, network.arguments["cross_attention_dim"])
    return Batch(*(tensor.to(device) for tensor in (x0, noise, timesteps, context)))


class Ours:
    """What `ldm.training.fit` does with a batch, but for its average of the weights: the example has none by default."""

    def __init__(self, net: UNet, forward: Callable[..., Tensor] | None = None, optimizer: torch.optim.Optimizer | None = None):
        self.net = net.train()
        self.levels = Linear(sigma_max=1e3).build()  # the 1000 levels of DDPMScheduler
        self.denoiser = Denoiser(net if forward is None else forward, "eps", self.levels)
        self.optimizer = optimizer or torch.optim.AdamW(net.parameters(), LR, weight_decay=1e-2, fused=True)

    def compiled(self) -> "Ours":
        """The same weights and optimizer behind the compiled network."""
        return Ours(self.net, compiled(self.net), self.optimizer)

    def gradients(self, x0: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor, autocast: bool = False) -> Tensor:
        sigma = self.levels.table.to(x0)[timesteps]
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=autocast):
            loss = self.denoiser.loss(x0, noise, sigma, context=context).mean()
        loss.backward()
        return loss

    def step(self, x0: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor, autocast: bool = False) -> float:
        loss = self.gradients(x0, noise, timesteps, context, autocast)
        found = [p.grad for p in self.net.parameters() if p.grad is not None]
        torch._foreach_mul_(found, (GRADIENT_NORM / global_norm(found)).clamp(max=1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


@dataclass(frozen=True)
class Step:
    """A training step of one side on a batch that stays the same."""

    side: Ours | peer_unet.Training
    batch: Batch
    autocast: bool

    def __call__(self) -> float:
        return self.side.step(*self.batch, self.autocast)

    def loss(self) -> float:
        """Without a change of the weights."""
        loss = self.side.gradients(*self.batch, self.autocast).item()
        self.side.optimizer.zero_grad()
        return loss


class Elsewhere:
    """The example's step in a process of its own, on a CPU: in this one memory is kept as our stages keep it."""

    def __init__(self, folder: Path, batch: Batch):
        context = multiprocessing.get_context("spawn")
        self._connection, end = context.Pipe()
        context.Process(target=peer_unet.serve, args=(end, folder, tuple(batch), LR), daemon=True).start()

    def _ask(self, word: str) -> float:
        self._connection.send(word)
        return self._connection.recv()

    def __call__(self) -> float:
        return self._ask("step")

    def loss(self) -> float:
        return self._ask("loss")


def compiled(net: torch.nn.Module) -> Callable[..., Any]:
    return torch.compile(net, dynamic=False, mode=MODE)


def configurations(network: Network, folder: Path, device: torch.device, autocast: bool) -> dict[str, Step]:
    """Both sides in the ways that they are used, all with the same random weights."""
    torch.manual_seed(0)
    UNet(**network.arguments).save_pretrained(folder)
    ours = Ours(UNet.from_pretrained(folder).place(device))
    example, best = (diffusers.UNet2DConditionModel.from_pretrained(folder).to(device) for _ in range(2))
    best.to(memory_format=torch.channels_last)
    sides = {
        "ours": ours,
        "ours compiled": ours.compiled(),
        EXAMPLE: peer_unet.Training(example, LR),
        "diffusers channels-last, compiled, fused": peer_unet.Training(best, LR, fused=True, forward=compiled(best)),
    }
    batch = draw(network, network.batch, device)
    return {name: Step(side, batch, autocast) for name, side in sides.items()}


def equal_steps(steps: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Those that can be compiled here, once their losses have been found equal."""
    able = first_losses({name: step.loss for name, step in steps.items()}, tolerance)
    return {name: steps[name] for name in able}


@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(network: str, tmp_path: Path) -> None:
    """In float32, on whatever device there is."""
    device = default_device()
    found: dict[str, Step | Elsewhere] = dict(configurations(NETWORKS[network], tmp_path, device, autocast=False))
    if device.type == "cpu":
        found[EXAMPLE] = Elsewhere(tmp_path, found[EXAMPLE].batch)
        reuse_freed_memory()  # as the stages do; diffusers' best has it too
    steps = equal_steps(found, 1e-4)
    compare(f"training step of {network} on {device}", interleaved(steps), NETWORKS[network].batch)


@pytest.mark.parametrize("network", [*TINY, "default", *LARGE])
def test_training_step_on_a_gpu(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bf16 autocast, kernels picked for speed. The tiny network goes the same way on a CPU, to see that it works."""
    if (network in TINY) == torch.cuda.is_available():
        pytest.skip("the tiny network is for a CPU, the others need a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    chosen, device = (TINY | NETWORKS | LARGE)[network], default_device()
    steps = equal_steps(configurations(chosen, tmp_path, device, autocast=True), 2e-2)
    seconds = interleaved(steps)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    compare(f"bf16 training step of {network} on {where}", seconds, chosen.batch)
    flops = products(chosen)
    for name, step in steps.items():
        print(f"  {name}: {used(flops * chosen.batch / median(seconds[name]), step)}", flush=True)
    if network != "default":
        ours = steps["ours compiled" if "ours compiled" in steps else "ours"].side
        del steps, step
        larger_batch(chosen, ours, flops)


def larger_batch(network: Network, ours: Ours, flops: int) -> None:
    """Print what `LARGER` images at once gain, where they fit."""
    gc.collect()  # the other side's networks
    torch.cuda.empty_cache()
    step = Step(ours, draw(network, LARGER, next(ours.net.parameters()).device), autocast=True)
    try:
        seconds = median(interleaved({"ours": step}, 5)["ours"])
    except torch.OutOfMemoryError:
        print(f"  ours, batch {LARGER}: does not fit")
        return
    print(f"  ours, batch {LARGER}: {seconds * 1e3:.1f} ms, {LARGER / seconds:.0f} images/s, ", end="")
    print(used(flops * LARGER / seconds, step), flush=True)


def used(rate: float, step: Step) -> str:
    """The share of the GPU's arithmetic that a step of `rate` FLOP/s used, and the memory that it takes."""
    if not torch.cuda.is_available():
        return f"{rate / 1e12:.3g} TFLOP/s"
    peak = peak_flops()
    share = f"{rate / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else f"{rate / 1e12:.1f} TFLOP/s"
    return f"{share}, {activations(step) / 2**20:.0f} MiB beyond weights and optimizer state"


def products(network: Network) -> int:
    """Floating-point operations of convolutions and matrix products for an image, forward and backward, none done twice."""
    with torch.device("meta"):
        net, batch = UNet(**network.arguments), draw(network, 1, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        net(batch.x0, batch.timesteps, batch.context).sum().backward()
    return counter.get_total_flops()
