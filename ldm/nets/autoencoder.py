"""The autoencoders of latent diffusion, with the keys and outputs of diffusers' `AutoencoderKL` and `VQModel`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ldm.nets.blocks import Block, Downsample, ImageAttention, Resnet, Upsample, check_divisor, norm_silu, per_level
from ldm.nets.diffusers import Pretrained, load_network, registered

EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
BETA = 0.25  # commitment cost of van den Oord et al. 2017, equation 3
DISTANCES = 2**24  # between latents and codes, at a time
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """N(mean, exp(logvar)). Methods work elementwise: the caller sums over dimensions."""

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


def full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer without autocast: the 8 bits of bfloat16 are too few to compare pixels, means and variances."""
    if not torch.is_autocast_enabled(x.device.type):
        return layer(x)
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


def _block(inputs: int, width: int, groups: int, layers: int, attentions: int, resample: type | None = None) -> Block:
    resnets = (Resnet(inputs if i == 0 else width, width, groups, EPS) for i in range(layers))
    attention = [ImageAttention(width, groups, EPS) for _ in range(attentions)]
    return Block(resnets, attention, resample(width) if resample else None)


class Encoder(nn.Module):
    """Images (B, C, H, W) to moments (AutoencoderKL) or features (VQModel)."""

    def __init__(self, config: dict[str, Any], outputs: int) -> None:
        super().__init__()
        channels, groups, layers = config["block_out_channels"], config["norm_num_groups"], config["layers_per_block"]
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.down_blocks, before = nn.ModuleList(), channels[0]
        for level, width in enumerate(channels):
            attentions, down = layers * config["attention"][level], Downsample if level < len(channels) - 1 else None
            self.down_blocks.append(_block(before, width, groups, layers, attentions, down))
            before = width
        self.mid_block = _block(before, before, groups, 2, int(config["mid_block_add_attention"]))
        self.conv_norm_out, self.conv_out = nn.GroupNorm(groups, before, EPS), nn.Conv2d(before, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x, _ = block(x)
        return full_precision(self.conv_out, norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    """The encoder's mirror, with one more resnet in each level."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        channels, groups, layers = config["block_out_channels"], config["norm_num_groups"], config["layers_per_block"] + 1
        before = channels[-1]
        self.conv_in = nn.Conv2d(config["latent_channels"], before, 3, padding=1)
        self.mid_block = _block(before, before, groups, 2, int(config["mid_block_add_attention"]))
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            attentions, up = layers * config["attention"][level], Upsample if level else None
            self.up_blocks.append(_block(before, width, groups, layers, attentions, up))
            before = width
        self.conv_norm_out = nn.GroupNorm(groups, before, EPS)
        self.conv_out = nn.Conv2d(before, config["out_channels"], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in (self.mid_block, *self.up_blocks):
            x, _ = block(x)
        return full_precision(self.conv_out, norm_silu(self.conv_norm_out, x))


class Autoencoder(Pretrained):
    """Images (B, in_channels, H, W) to latents (B, C, H/f, W/f), rounded down, and back. Levels after the first double f."""

    DOWN: ClassVar = {False: "DownEncoderBlock2D", True: "AttnDownEncoderBlock2D"}
    UP: ClassVar = {False: "UpDecoderBlock2D", True: "AttnUpDecoderBlock2D"}
    DEFAULTS: ClassVar = {
        "in_channels": 3, "out_channels": 3, "block_out_channels": [64], "layers_per_block": 1, "norm_num_groups": 32,
        "mid_block_add_attention": True, "down_block_types": [DOWN[False]], "up_block_types": [UP[False]],
    }  # fmt: skip
    FIXED: ClassVar = {"act_fn": "silu"}
    CARRIED: ClassVar[tuple[str, ...]] = ("sample_size", "scaling_factor", "force_upcast")
    MOMENTS: ClassVar = 1  # channels of the encoder's output for each of `latent_channels`
    post_quant_conv: nn.Module

    @registered
    def __init__(
        self, in_channels: int, out_channels: int, latent_channels: int, block_out_channels: Sequence[int],
        layers_per_block: int = 1, norm_num_groups: int = 32, mid_block_add_attention: bool = True,
        attention: Sequence[bool] | None = None,  # after the resnets, by level; None: nowhere
    ) -> None:  # fmt: skip
        self.config["attention"] = per_level(attention or False, block_out_channels, "attention")
        check_divisor(block_out_channels, norm_num_groups, "norm_num_groups")
        self.latent_channels = latent_channels
        self.encoder = Encoder(self.config, self.MOMENTS * latent_channels)
        self.decoder = Decoder(self.config)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    @property
    def factor(self) -> int:
        """Pixels per latent, on a side."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, H/f, W/f) of the latents of images of this size."""
        return self.latent_channels, height // self.factor, width // self.factor


class AutoencoderKL(Autoencoder):
    """With a Gaussian posterior, which a KL term keeps near N(0, 1) (Rombach et al. 2022, section 3.1)."""

    CLASS = "AutoencoderKL"
    DEFAULTS = Autoencoder.DEFAULTS | {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
    CARRIED = (*Autoencoder.CARRIED, "shift_factor", "latents_mean", "latents_std")
    MOMENTS = 2

    def __init__(self, *shape: Any, use_quant_conv: bool = True, use_post_quant_conv: bool = True, **options: Any) -> None:
        """Further arguments as for `Autoencoder`. Stable Diffusion 3 and Flux have neither of the two 1x1 convolutions."""
        super().__init__(*shape, **options)
        self.config |= {"use_quant_conv": use_quant_conv, "use_post_quant_conv": use_post_quant_conv}
        count = self.latent_channels
        self.quant_conv = nn.Conv2d(2 * count, 2 * count, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(count, count, 1) if use_post_quant_conv else nn.Identity()

    def encode(self, x: Tensor) -> DiagonalGaussian:
        mean, logvar = full_precision(self.quant_conv, self.encoder(x)).chunk(2, dim=1)  # each (B, latent_channels, H/f, W/f)
        return DiagonalGaussian(mean, logvar.clamp(*LOGVAR_RANGE))


class Quantized(NamedTuple):
    latents: Tensor  # (B, C, H, W): the nearest codes; their gradient is that of what was quantised
    indices: Tensor  # (B, H, W), int64
    commitment: Tensor  # (B,)


class Codebook(nn.Module):
    """Latents to the nearest of `size` learned codes (van den Oord et al. 2017)."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def forward(self, h: Tensor) -> Quantized:
        """`commitment` is the mean of ‖sg[h] − e‖² + 0.25·‖h − sg[e]‖² over an image's latents (equation 3, last two terms)."""
        indices = self.nearest(h)
        codes = self.embedding(indices).permute(0, 3, 1, 2)  # (B, C, H, W)
        commitment = (h.detach() - codes).square() + BETA * (h - codes.detach()).square()
        straight_through = (h - h.detach()) + codes.detach()  # exactly a code, in h's layout, and d/dh is 1
        return Quantized(straight_through, indices, commitment.flatten(1).mean(1))

    @torch.no_grad()
    def nearest(self, h: Tensor) -> Tensor:
        """Indices (B, H, W) of the codes nearest to h (B, C, H, W), computed in float32 or float64, also under autocast."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        codes = self.embedding.weight.to(dtype)  # (K, C)
        points = h.movedim(1, -1).flatten(0, -2).to(dtype)  # (B·H·W, C)
        with torch.autocast(h.device.type, enabled=False):
            squares = codes.square().sum(1)
            parts = points.split(max(DISTANCES // len(codes), 1))
            found = [torch.addmm(squares, part, codes.T, alpha=-2).argmin(1) for part in parts]  # of ‖h − e‖² − ‖h‖²
        return torch.cat(found).view(len(h), *h.shape[2:])


class VQModel(Autoencoder):
    """With a codebook. Quantisation is the decoder's first layer (Rombach et al. 2022, section 3.1): latents are continuous."""

    CLASS = "VQModel"
    DEFAULTS = Autoencoder.DEFAULTS | {"latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None}
    FIXED = Autoencoder.FIXED | {"norm_type": "group"}
    CARRIED = (*Autoencoder.CARRIED, "lookup_from_codebook")

    def __init__(self, *shape: Any, num_vq_embeddings: int = 256, vq_embed_dim: int | None = None, **options: Any) -> None:
        """Further arguments as for `Autoencoder`. `vq_embed_dim`: channels of latents and codes (None: `latent_channels`)."""
        super().__init__(*shape, **options)
        self.config |= {"num_vq_embeddings": num_vq_embeddings, "vq_embed_dim": vq_embed_dim}
        features, self.latent_channels = self.latent_channels, vq_embed_dim or self.latent_channels
        self.quant_conv = nn.Conv2d(features, self.latent_channels, 1)
        self.quantize = Codebook(num_vq_embeddings, self.latent_channels)
        self.post_quant_conv = nn.Conv2d(self.latent_channels, features, 1)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """The latents before quantisation, as the mean of a Gaussian with standard deviation 3e-7. Its KL means nothing."""
        h = full_precision(self.quant_conv, self.encoder(x))
        return DiagonalGaussian(h, torch.full_like(h, LOGVAR_RANGE[0]))

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(self.quantize(z).latents)


def load_autoencoder(folder: str | Path, shape_only: bool = False) -> Autoencoder:
    """The autoencoder of a folder in diffusers' format, of the class that its config.json names, as `load_network`."""
    return load_network(folder, AutoencoderKL, VQModel, shape_only=shape_only)
