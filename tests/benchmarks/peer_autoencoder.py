"""diffusers' `AutoencoderKL`, trained as its own example does, behind the few methods by which ours is measured.

The recipe is that of `examples/research_projects/autoencoderkl/train_autoencoderkl.py` at its default options: squared error
and 1e-6 KL, both summed over an image; AdamW (0.9, 0.999) with weight decay 0.01; gradients clipped to norm 1; constant
learning rate; no average of the weights; default layout; eager. It is spared what costs time there and trains nothing so
early: LPIPS is computed without gradients, and the discriminator joins after 50,000 steps. The network is that of
the example (Stable Diffusion's: SiLU, attention in the middle, widths 1:2:4, as many groups as 32 or the narrowest
level allows) at our number of levels, resnets and latent channels, and as wide as ours. The learning rate, 4.5e-6 there
for weights trained before, is the caller's.
"""

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.base.pixels import to_float
from ldm.base.randomness import generator
from ldm.data.batches import Batches
from ldm.nets.autoencoder import DiagonalGaussian

KL_SCALE = 1e-6


class Peer(nn.Module):
    def __init__(self, channels: int, latent_channels: int, widths: tuple[int, ...], layers: int):
        super().__init__()
        levels = len(widths)
        self.latent_channels, self.factor = latent_channels, 2 ** (levels - 1)
        self.net = diffusers.AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=widths,
            layers_per_block=layers,
            latent_channels=latent_channels,
            norm_num_groups=min(widths[0], 32),
        )

    def encode(self, x: Tensor) -> DiagonalGaussian:
        posterior = self.net.encode(x).latent_dist
        return DiagonalGaussian(posterior.mean, posterior.logvar)

    def decode(self, z: Tensor) -> Tensor:
        return self.net.decode(z).sample

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.latent_channels, height // self.factor, width // self.factor


class Training:
    """The example's loop, a number of steps at a time."""

    def __init__(self, peer: Peer, batches: Batches, batch_size: int, lr: float, seed: int):
        self.peer, self.batches, self.batch_size, self.images_seen = peer, batches, batch_size, 0
        self.optimizer = torch.optim.AdamW(peer.parameters(), lr, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        self.device = next(peer.parameters()).device
        self.noise = generator(seed, "peer", device=self.device)

    def steps(self, count: int) -> None:
        self.peer.train()
        for _ in range(count):
            x = to_float(self.batches.at(self.images_seen, self.batch_size)).to(self.device)
            posterior = self.peer.net.encode(x).latent_dist
            output = self.peer.net.decode(posterior.sample(self.noise)).sample
            squares = F.mse_loss(output, x, reduction="sum") / len(x)
            (squares + KL_SCALE * posterior.kl().sum() / len(x)).backward()
            nn.utils.clip_grad_norm_(self.peer.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.images_seen += self.batch_size
        self.peer.eval()
