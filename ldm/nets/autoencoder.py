"""The KL autoencoder of latent diffusion, with the keys and outputs of diffusers' `AutoencoderKL`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ldm.nets.blocks import (
    Downsample,
    ImageAttention,
    Pretrained,
    Resnet,
    Stage,
    Upsample,
    check_multiples,
    norm_silu,
)

EPS = 1e-6
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """N(mean, exp(logvar)), every dimension by itself: sums over dimensions are the caller's."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(self ‖ N(0, 1)) in nats."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (LOG_2PI + self.logvar + (z - self.mean).square() * (-self.logvar).exp())

    def entropy(self) -> Tensor:
        return 0.5 * (1 + LOG_2PI + self.logvar)


def _middle(channels: int, groups: int, attention: bool) -> Stage:
    resnets = (Resnet(channels, channels, groups, EPS) for _ in range(2))
    return Stage(resnets, [ImageAttention(channels, groups, EPS)] if attention else [])


class Encoder(nn.Module):
    def __init__(self, inputs: int, outputs: int, channels: Sequence[int], layers: int, groups: int, mid: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[max(level - 1, 0)]
            resnets = (Resnet(before if layer == 0 else width, width, groups, EPS) for layer in range(layers))
            last = level == len(channels) - 1
            self.down_blocks.append(Stage(resnets, down=None if last else Downsample(width, symmetric=False)))
        self.mid_block = _middle(channels[-1], groups, mid)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in (*self.down_blocks, self.mid_block):
            x, _ = stage(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    def __init__(self, inputs: int, outputs: int, channels: Sequence[int], layers: int, groups: int, mid: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, channels[-1], 3, padding=1)
        self.mid_block = _middle(channels[-1], groups, mid)
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            before = channels[min(level + 1, len(channels) - 1)]
            resnets = (Resnet(before if layer == 0 else width, width, groups, EPS) for layer in range(layers + 1))
            self.up_blocks.append(Stage(resnets, up=None if level == 0 else Upsample(width)))
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], EPS)
        self.conv_out = nn.Conv2d(channels[0], outputs, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for stage in (self.mid_block, *self.up_blocks):
            x, _ = stage(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class AutoencoderKL(Pretrained):
    """Images (B, in_channels, H, W) to a Gaussian over latents (B, latent_channels, H/f, W/f) and back.

    The factor f is 2 for each level of `block_out_channels` after the first.
    """

    CLASS = "AutoencoderKL"
    DEFAULTS: ClassVar = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [64],
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "mid_block_add_attention": True,
    }
    FIXED: ClassVar = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}
    CARRIED = ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__(locals())
        check_multiples(block_out_channels, [norm_num_groups] * len(block_out_channels), "norm_num_groups")
        shape = (block_out_channels, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shape)
        self.decoder = Decoder(latent_channels, out_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)  # each (B, latent_channels, H/f, W/f)
        return DiagonalGaussian(mean, logvar.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (latent_channels, H/f, W/f) of the latents of images of this size."""
        factor = 2 ** (len(self.config["block_out_channels"]) - 1)
        return int(self.config["latent_channels"]), height // factor, width // factor

    @staticmethod
    def to_diffusers(config: dict[str, Any]) -> dict[str, Any]:
        levels = len(config["block_out_channels"])
        types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        return config | types

    @staticmethod
    def from_diffusers(config: dict[str, Any]) -> dict[str, Any]:
        return {key: config[key] for key in AutoencoderKL.DEFAULTS}
