"""The autoencoders of latent diffusion, with the keys and outputs of diffusers' `AutoencoderKL` and `VQModel`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.base.errors import InputError
from ldm.nets.blocks import (
    Block,
    Downsample,
    ImageAttention,
    Resnet,
    Upsample,
    check_levels,
    check_multiples,
    full_precision,
    norm_silu,
)
from ldm.nets.diffusers import CONFIG, Pretrained, read_config, registered

EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
BETA = 0.25  # commitment cost of van den Oord et al. 2017, equation 3
DISTANCES = 2**24  # between points and codes, held at once
DOWN, UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """N(mean, exp(logvar)); every method works elementwise, and the caller sums over dimensions."""

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


@dataclass(frozen=True)
class Shape:
    """What encoder and decoder share; sequences are by level, at full resolution first."""

    channels: Sequence[int]
    attention: Sequence[bool]
    layers: int
    groups: int
    middle_attention: bool


def _attentions(count: int, channels: int, groups: int, attends: bool) -> list[ImageAttention]:
    return [ImageAttention(channels, groups, EPS) for _ in range(count if attends else 0)]


def _middle(channels: int, groups: int, attends: bool) -> Block:
    resnets = (Resnet(channels, channels, groups, EPS) for _ in range(2))
    return Block(resnets, _attentions(1, channels, groups, attends))


class Encoder(nn.Module):
    """Images (B, C, H, W) to moments (AutoencoderKL) or features (VQModel)."""

    def __init__(self, inputs: int, outputs: int, shape: Shape) -> None:
        super().__init__()
        channels, groups = shape.channels, shape.groups
        self.conv_in = nn.Conv2d(inputs, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[max(level - 1, 0)]
            resnets = (Resnet(before if i == 0 else width, width, groups, EPS) for i in range(shape.layers))
            attentions = _attentions(shape.layers, width, groups, shape.attention[level])
            last = level == len(channels) - 1
            self.down_blocks.append(Block(resnets, attentions, down=None if last else Downsample(width, symmetric=False)))
        self.mid_block = _middle(channels[-1], groups, shape.middle_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x, _ = block(x)
        return full_precision(self.conv_out, norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    def __init__(self, inputs: int, outputs: int, shape: Shape) -> None:
        super().__init__()
        channels, groups = shape.channels, shape.groups
        self.conv_in = nn.Conv2d(inputs, channels[-1], 3, padding=1)
        self.mid_block = _middle(channels[-1], groups, shape.middle_attention)
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            before = channels[min(level + 1, len(channels) - 1)]
            resnets = (Resnet(before if i == 0 else width, width, groups, EPS) for i in range(shape.layers + 1))
            attentions = _attentions(shape.layers + 1, width, groups, shape.attention[level])
            self.up_blocks.append(Block(resnets, attentions, up=None if level == 0 else Upsample(width)))
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], EPS)
        self.conv_out = nn.Conv2d(channels[0], outputs, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in (self.mid_block, *self.up_blocks):
            x, _ = block(x)
        return full_precision(self.conv_out, norm_silu(self.conv_norm_out, x))


class Autoencoder(Pretrained):
    """What both kinds share: images (B, in_channels, H, W) to latents (B, C, H/f, W/f), rounded down, and back.

    The factor f is 2 for each level of `block_out_channels` after the first. `attention` says level by level, for the
    encoder and its mirror in the decoder, whether attention follows each resnet (None: nowhere); that of the middle is
    `mid_block_add_attention`.
    """

    DEFAULTS: ClassVar = {
        "in_channels": 3, "out_channels": 3, "block_out_channels": [64], "layers_per_block": 1, "norm_num_groups": 32,
        "mid_block_add_attention": True, "down_block_types": [DOWN[False]], "up_block_types": [UP[False]],
    }  # fmt: skip
    FIXED: ClassVar = {"act_fn": "silu"}
    CARRIED: ClassVar[tuple[str, ...]] = ("sample_size", "scaling_factor", "force_upcast")
    quant_conv: nn.Module
    post_quant_conv: nn.Module

    def _build(self, encoded: int, latents: int) -> None:
        """Make encoder and decoder; `encoded` and `latents` are the channels of the encoder's output and of the latents."""
        config, channels = self.config, self.config["block_out_channels"]
        groups, attention = config["norm_num_groups"], config["attention"] or [False] * len(channels)
        check_levels(attention, channels, "attention (down_block_types)")
        check_multiples(channels, [groups] * len(channels), "norm_num_groups")
        config["attention"] = attention  # equal networks, equal configurations
        shape = Shape(channels, attention, config["layers_per_block"], groups, config["mid_block_add_attention"])
        self.latent_channels = latents
        self.encoder = Encoder(config["in_channels"], encoded, shape)
        self.decoder = Decoder(config["latent_channels"], config["out_channels"], shape)

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

    def latent_noise(self, x: Tensor, rng: torch.Generator, count: int | None = None) -> Tensor:
        """Standard normal noise for the latents of `count` images (default: all) of the size of x (B, C, H, W)."""
        return torch.randn(count or len(x), *self.latent_shape(*x.shape[2:]), generator=rng).to(x)

    @classmethod
    def to_diffusers(cls, config: dict[str, Any]) -> dict[str, Any]:
        theirs = {key: value for key, value in config.items() if key != "attention"}
        attends = config["attention"]
        return theirs | {"down_block_types": [DOWN[a] for a in attends], "up_block_types": [UP[a] for a in attends[::-1]]}

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> dict[str, Any]:
        ours = {key: config[key] for key in cls.DEFAULTS if not key.endswith("_block_types")}
        return ours | {"attention": [kind == DOWN[True] for kind in config["down_block_types"]]}


class AutoencoderKL(Autoencoder):
    """The autoencoder whose posterior is a Gaussian, held near N(0, 1) by a KL term (Rombach et al. 2022, section 3.1).

    Some published ones (Stable Diffusion 3, Flux) go without the 1x1 convolutions around the latents.
    """

    CLASS = "AutoencoderKL"
    DEFAULTS = Autoencoder.DEFAULTS | {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
    CARRIED = (*Autoencoder.CARRIED, "shift_factor", "latents_mean", "latents_std")

    @registered
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        attention: Sequence[bool] | None = None,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
    ) -> None:
        self._build(encoded=2 * latent_channels, latents=latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else nn.Identity()

    def encode(self, x: Tensor) -> DiagonalGaussian:
        mean, logvar = full_precision(self.quant_conv, self.encoder(x)).chunk(2, dim=1)  # each (B, latent_channels, H/f, W/f)
        return DiagonalGaussian(mean, logvar.clamp(*LOGVAR_RANGE))


@dataclass(frozen=True, eq=False)
class Quantized:
    latents: Tensor  # (B, C, H, W): the nearest codes; their gradient is handed to what was quantised
    indices: Tensor  # (B, H, W), int64
    commitment: Tensor  # (B,)


class Codebook(nn.Module):
    """Latents to the nearest of `size` learned codes (van den Oord et al. 2017)."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def forward(self, h: Tensor) -> Quantized:
        """`commitment` is ‖sg[h] − e‖² + 0.25·‖h − sg[e]‖² (equation 3, last two terms), a mean over an image's latents."""
        indices = self.nearest(h)
        codes = self.embedding(indices).permute(0, 3, 1, 2)  # (B, C, H, W)
        commitment = (h.detach() - codes).square() + BETA * (h - codes.detach()).square()
        straight_through = (h - h.detach()) + codes.detach()  # exactly a code, in h's layout, and d/dh is 1
        return Quantized(straight_through, indices, commitment.flatten(1).mean(1))

    @torch.no_grad()
    def nearest(self, h: Tensor) -> Tensor:
        """Indices (B, H, W) of the codes nearest to h (B, C, H, W), in float32 at least, also under autocast."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        codes = self.embedding.weight.to(dtype)  # (K, C)
        points = h.movedim(1, -1).flatten(0, -2).to(dtype)  # (B·H·W, C)
        with torch.autocast(h.device.type, enabled=False):
            squares = codes.square().sum(1)
            found = [  # ‖h − e‖² but for ‖h‖², which is the same for every code
                torch.addmm(squares, part, codes.T, alpha=-2).argmin(1) for part in points.split(max(DISTANCES // len(codes), 1))
            ]
        return torch.cat(found).view(len(h), *h.shape[2:])


class VQModel(Autoencoder):
    """The autoencoder whose decoder sees only codes: `encode` stops before the quantisation, and `decode` begins with it.

    So the diffusion model learns the continuous latents, and quantisation is the decoder's first layer (Rombach et al.
    2022, section 3.1). `vq_embed_dim` is the number of channels of latents and codes (None: `latent_channels`).
    """

    CLASS = "VQModel"
    DEFAULTS = Autoencoder.DEFAULTS | {"latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None}
    FIXED = Autoencoder.FIXED | {"norm_type": "group"}
    CARRIED = (*Autoencoder.CARRIED, "lookup_from_codebook")

    @registered
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        attention: Sequence[bool] | None = None,
        num_vq_embeddings: int = 256,
        vq_embed_dim: int | None = None,
    ) -> None:
        self._build(encoded=latent_channels, latents=vq_embed_dim or latent_channels)
        self.quant_conv = nn.Conv2d(latent_channels, self.latent_channels, 1)
        self.quantize = Codebook(num_vq_embeddings, self.latent_channels)
        self.post_quant_conv = nn.Conv2d(self.latent_channels, latent_channels, 1)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """The latents before quantisation, as the mean of a Gaussian with a standard deviation of 3e-7.

        So caching, sampling and decoding treat both autoencoders alike. Its KL and entropy mean nothing.
        """
        h = full_precision(self.quant_conv, self.encoder(x))
        return DiagonalGaussian(h, torch.full_like(h, LOGVAR_RANGE[0]))

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(self.quantize(z).latents)


def load_autoencoder(folder: str | Path) -> AutoencoderKL | VQModel:
    """The autoencoder of a folder in diffusers' format, of the kind that its config.json names."""
    found = read_config(folder).get("_class_name")
    for kind in (AutoencoderKL, VQModel):
        if found == kind.CLASS:
            return kind.from_pretrained(folder)
    raise InputError(f"{Path(folder) / CONFIG}: _class_name is {found!r}; expected AutoencoderKL or VQModel")
