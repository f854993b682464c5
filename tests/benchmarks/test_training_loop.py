"""`fit` on latents as they are cached against a bare loop of the same step on one batch that stays the same.

The bare loop noises, computes the loss and its gradients and takes a step of fused AdamW; `fit` also finds and draws each
batch, clips gradients, averages the weights, counts, and watches for what goes wrong. `make bench` prints the share.
"""

from pathlib import Path
from statistics import median

import pytest
import torch
from benchmarks.rate_distortion import ROOT, Watched
from benchmarks.test_unet_step import NETWORKS
from benchmarks.timing import interleaved, times_faster
from latent_files import write_cache
from torch import Tensor

from ldm.base.device import set_up
from ldm.config import load_settings
from ldm.data.latents import Latents, open_latents
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


def random_latents(folder: Path, channels: int, side: int, tokens: int, width: int) -> Latents:
    torch.manual_seed(1)
    moments, counts = (torch.randn(COUNT, channels, side, side), torch.full((COUNT, channels, side, side), -3.0)), [2]
    counts += [tokens, *torch.randint(3, tokens, (CAPTIONS - 1,)).tolist()]
    rows, captions = torch.randn(sum(counts), width).bfloat16(), torch.randint(1, CAPTIONS + 1, (COUNT, 1)).tolist()
    out = write_cache(folder / "latents", [moments], captions, rows, counts, width, [0.0] * channels, [1.0] * channels)
    return open_latents(out, "train")


@pytest.mark.parametrize("network", NETWORKS)
def test_training_loop(network: str, tmp_path: Path) -> None:
    chosen, diffusion, options = NETWORKS[network], SETTINGS.diffusion, SETTINGS.train_unet
    device = set_up(SETTINGS.deterministic)
    options = options.model_copy(update={"images": STEPS * options.batch_size})
    levels = diffusion.noise.build()
    width = chosen.arguments["cross_attention_dim"]
    latents = random_latents(tmp_path, chosen.arguments["in_channels"], chosen.side, chosen.tokens, width)

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
