"""The text-conditional U-Net of latent diffusion, with the keys and outputs of diffusers' `UNet2DConditionModel`."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.nets.blocks import (
    Downsample,
    Pretrained,
    Resnet,
    Stage,
    Transformer,
    Upsample,
    check_multiples,
    norm_silu,
    per_level,
)

EPS = 1e-5
MASKED = -1e4  # diffusers' bias of a masked token; finite, so that a context masked throughout still gives numbers


def timestep_features(timesteps: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of timesteps (B,) at geometric frequencies: (B, channels), zero-padded if odd."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, channels % 2))


class TimeEmbedding(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class UNet(Pretrained):
    """Noisy latents (B, C, H, W), timesteps (B,) and a text (B, T, D) to an output like the latents.

    `cross_attention` says level by level, outermost first, whether transformers follow the resnets; the middle has one
    in any case. `num_heads` and `transformer_layers_per_block` are one number, or one per level.
    """

    CLASS = "UNet2DConditionModel"
    DEFAULTS: ClassVar = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 1280,
        "norm_num_groups": 32,
        "use_linear_projection": False,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    FIXED: ClassVar = {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "only_cross_attention": False,
        "mid_block_only_cross_attention": False,
        "dual_cross_attention": False,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": 0.0,
        "act_fn": "silu",
        "norm_eps": EPS,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
        "class_embeddings_concat": False,
    }
    CARRIED = ("sample_size", "upcast_attention", "addition_embed_type_num_heads")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        cross_attention: Sequence[bool],
        cross_attention_dim: int,
        num_heads: int | Sequence[int],
        norm_num_groups: int = 32,
        use_linear_projection: bool = False,
        transformer_layers_per_block: int | Sequence[int] = 1,
    ) -> None:
        super().__init__(locals())
        channels, levels, groups = list(block_out_channels), len(block_out_channels), norm_num_groups
        heads, depths = per_level(num_heads, levels), per_level(transformer_layers_per_block, levels)
        if len(cross_attention) != levels:
            raise InputError(f"cross_attention has {len(cross_attention)} values for {levels} of block_out_channels")
        check_multiples(channels, [groups] * levels, "norm_num_groups")
        check_multiples(channels, heads, "num_heads")
        time_channels, self.layers = 4 * channels[0], layers_per_block

        def resnet(inputs: int, level: int) -> Resnet:
            return Resnet(inputs, channels[level], groups, EPS, time_channels)

        def transformer(level: int) -> Transformer:
            shape = (groups, depths[level], use_linear_projection)
            return Transformer(channels[level], heads[level], cross_attention_dim, *shape)

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0])
        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]  # channels of what the way down hands over to the way up
        for level, attends in enumerate(cross_attention):
            resnets = [resnet(skips[-1] if i == 0 else channels[level], level) for i in range(layers_per_block)]
            down = Downsample(channels[level], symmetric=True) if level < levels - 1 else None
            attentions = [transformer(level) for _ in resnets if attends]
            self.down_blocks.append(Stage(resnets, attentions, down=down))
            skips += [channels[level]] * (layers_per_block + (down is not None))
        last = levels - 1
        self.mid_block = Stage([resnet(channels[last], last) for _ in range(2)], [transformer(last)])
        self.up_blocks = nn.ModuleList()
        before = channels[last]
        for level in reversed(range(levels)):
            resnets = []
            for _ in range(layers_per_block + 1):
                resnets.append(resnet(before + skips.pop(), level))
                before = channels[level]
            attentions = [transformer(level) for _ in resnets if cross_attention[level]]
            self.up_blocks.append(Stage(resnets, attentions, up=Upsample(channels[level]) if level else None))
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], EPS)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """`timesteps` may be fractional; `context_mask` (B, T) is True at the tokens to attend to."""
        features = timestep_features(timesteps, self.conv_in.out_channels).to(x.dtype)
        time = F.silu(self.time_embedding(features))  # (B, 4·channels[0]), activated once for all resnets
        mask = None  # (B, 1, 1, T), added to the logits
        if context_mask is not None:
            mask = torch.zeros_like(context_mask, dtype=x.dtype).masked_fill(~context_mask, MASKED)[:, None, None]
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down_blocks:
            x, outputs = stage(x, time, context, mask)
            skips += outputs
        x, _ = self.mid_block(x, time, context, mask)
        for stage in self.up_blocks:
            taken, skips = skips[-self.layers - 1 :], skips[: -self.layers - 1]
            size = skips[-1].shape[2:] if skips else None
            x, _ = stage(x, time, context, mask, skips=taken, size=size)
        return self.conv_out(norm_silu(self.conv_norm_out, x))

    @staticmethod
    def to_diffusers(config: dict[str, Any]) -> dict[str, Any]:
        attends = config["cross_attention"]
        theirs = {key: config[key] for key in UNet.DEFAULTS if key in config}
        return theirs | {
            "attention_head_dim": config["num_heads"],  # diffusers' name for the number of heads
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        }

    @staticmethod
    def from_diffusers(config: dict[str, Any]) -> dict[str, Any]:
        attends = [kind == "CrossAttnDownBlock2D" for kind in config["down_block_types"]]
        ours = {key: config[key] for key in UNet.DEFAULTS if not key.endswith("_types") and key != "attention_head_dim"}
        return ours | {"cross_attention": attends, "num_heads": config["attention_head_dim"]}
