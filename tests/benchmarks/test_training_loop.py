"""`fit` on latents in memory against a bare loop of the same step on one batch that stays the same.

The bare loop noises, computes the loss and its gradients and takes a step of fused AdamW; `fit` also finds and draws each
batch, clips gradients, averages the weights, counts, and watches for what goes wrong. `make bench` prints the share.
"""

from statistics import median

import pytest
import torch
from benchmarks.rate_distortion import ROOT, Watched
from benchmarks.test_unet_step import NETWORKS
from benchmarks.timing import interleaved, times_faster
from torch import Tensor

from ldm.base.device import set_up
from ldm.config import load_settings
from ldm.data.latents import Latents
from ldm.diffusion.denoiser import Denoiser
from ldm.nets.unet import UNet
from ldm.registry.tracking import Run
from ldm.training.fit import Fitted, fit
from ldm.training.unet import UnetObjective

SETTINGS = load_settings(ROOT)
STEPS, ROUNDS = 40, 7
COUNT, CAPTIONS = 1264, 60  # the digits' training images, and their distinct captions


class Watching(Denoiser):
    """Remembers the first batch that it was given."""

    fed: tuple[tuple[Tensor, ...], dict[str, Tensor | None]] | None = None

    def loss(self, *batch: Tensor, **cond: Tensor | None) -> Tensor:
        self.fed = self.fed or (batch, cond)
        return super().loss(*batch, **cond)


def random_latents(channels: int, side: int, tokens: int, width: int) -> Latents:
    torch.manual_seed(1)
    shape = COUNT, channels, side, side
    text, mask = torch.randn(CAPTIONS + 1, tokens, width), torch.arange(tokens) < torch.randint(3, tokens, (CAPTIONS + 1, 1))
    mask[0] = True
    manifest = {"latent_mean": [0.0] * channels, "latent_std": [1.0] * channels}
    return Latents(torch.randn(shape), torch.full(shape, -3.0), torch.randint(CAPTIONS, (COUNT,)), text, mask, manifest)


@pytest.mark.parametrize("network", NETWORKS)
def test_latents_resident_loop(network: str) -> None:
    chosen, diffusion, options = NETWORKS[network], SETTINGS.diffusion, SETTINGS.train_unet
    device = set_up(SETTINGS.deterministic)
    options = options.model_copy(update={"images": STEPS * options.batch_size})
    levels = diffusion.noise.build()
    width = chosen.arguments["cross_attention_dim"]
    latents = random_latents(chosen.arguments["in_channels"], chosen.side, chosen.tokens, width)

    def fresh() -> Watching:
        torch.manual_seed(0)
        return Watching(UNet(**chosen.arguments).place(device), diffusion.prediction, levels)

    def loop(denoiser: Watching | None = None, images: int = options.images) -> Fitted:
        objective = UnetObjective(denoiser or fresh(), latents, options, SETTINGS.seed, device)
        schedule = options.model_copy(update={"images": images})
        return fit(objective, schedule, seed=SETTINGS.seed, tracker=Run(), store=Watched(), progress=lambda done, row: None)

    first = fresh()
    once = loop(first, options.batch_size)
    batch, cond = first.fed

    def bare(steps: int = STEPS) -> list[float]:
        denoiser, losses = fresh(), []
        optimizer = torch.optim.AdamW(denoiser.parameters(), options.lr, fused=True)
        for _ in range(steps):
            loss = denoiser.loss(*batch, **cond).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    assert once.curve[0]["loss"] == pytest.approx(bare(1)[0], rel=1e-5)  # the same work
    seconds = interleaved({"fit": loop, "bare": bare}, ROUNDS)
    rates = {name: STEPS * options.batch_size / median(times) for name, times in seconds.items()}
    print(f"\ntraining loop of {network} on {device}, batch {options.batch_size}, {torch.get_num_threads()} threads")
    share = times_faster(seconds["fit"], seconds["bare"])
    print(f"  fit {rates['fit']:.0f} images/s, {share:.3f} of a bare loop's {rates['bare']:.0f}")
