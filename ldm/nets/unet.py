"""The U-Nets of latent diffusion, with the keys and outputs of diffusers' `UNet2DConditionModel` and `UNet2DModel`."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.base.errors import InputError
from ldm.nets.blocks import Block, Downsample, ImageAttention, Resnet, Transformer, Upsample, check_divisor, norm_silu, per_level
from ldm.nets.diffusers import Pretrained, registered

EPS = 1e-5
MASKED = -1e4  # diffusers' bias of a masked token; finite, so that a context with no other tokens gives no NaN
KEYS = 16  # tokens are padded to a multiple of this: CPUs take up to four times as long otherwise


def timestep_features(timesteps: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of timesteps (B,) at geometric frequencies: (B, channels), zero-padded if odd."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, channels % 2))


class UNet(Pretrained):
    """Noisy latents (B, C, H, W), timesteps (B,) and a text (B, T, D) to an output like the latents."""

    CLASS = "UNet2DConditionModel"
    MIDDLE: ClassVar = "cross"  # attention in the middle
    DOWN: ClassVar = {"none": "DownBlock2D", "self": "AttnDownBlock2D", "cross": "CrossAttnDownBlock2D"}
    UP: ClassVar = {"none": "UpBlock2D", "self": "AttnUpBlock2D", "cross": "CrossAttnUpBlock2D"}
    DEFAULTS: ClassVar = {
        "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
        "cross_attention_dim": 1280, "norm_num_groups": 32, "use_linear_projection": False, "transformer_layers_per_block": 1,
        "num_class_embeds": None, "attention_head_dim": 8, "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    }  # fmt: skip
    FIXED: ClassVar = {
        "mid_block_type": "UNetMidBlock2DCrossAttn", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0,
        "only_cross_attention": False, "mid_block_only_cross_attention": False, "dual_cross_attention": False, "dropout": 0.0,
        "downsample_padding": 1, "mid_block_scale_factor": 1, "act_fn": "silu", "norm_eps": EPS, "class_embeddings_concat": False,
        "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional", "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
    }  # fmt: skip
    CARRIED: ClassVar[tuple[str, ...]] = ("sample_size", "upcast_attention", "addition_embed_type_num_heads")

    @registered
    def __init__(
        self, in_channels: int, out_channels: int, block_out_channels: Sequence[int], layers_per_block: int,
        attention: Sequence[str], cross_attention_dim: int | None, num_heads: int | Sequence[int], norm_num_groups: int = 32,
        use_linear_projection: bool = False, transformer_layers_per_block: int | Sequence[int] = 1,
        num_class_embeds: int | None = None, qk_norm: bool = False,
    ) -> None:  # fmt: skip
        """`attention`, by level: none, self (of positions) or cross (a transformer, with text)."""
        channels, last, groups = list(block_out_channels), len(block_out_channels) - 1, norm_num_groups
        heads = per_level(num_heads, channels, "num_heads")
        depths = per_level(transformer_layers_per_block, channels, "transformer_layers_per_block")
        if self.MIDDLE == "self" and ("cross" in attention or cross_attention_dim is not None):
            raise InputError(f"{type(self).__name__} reads no text: found cross_attention_dim {cross_attention_dim}; use UNet")
        if self.MIDDLE == "cross" and cross_attention_dim is None:
            raise InputError("cross_attention_dim is missing; without text, use UnconditionalUNet")
        if unknown := [kind for kind in per_level(attention, channels, "attention") if kind not in self.DOWN]:
            raise InputError(f"attention has {unknown[0]!r}; known are {', '.join(self.DOWN)}")
        check_divisor(channels, groups, "norm_num_groups")
        attending = [*attention[:-1], self.MIDDLE]  # the middle has the width and heads of the last level
        used = [count if kind != "none" else 1 for count, kind in zip(heads, attending, strict=True)]
        check_divisor(channels, used, "num_heads")
        time_channels, self.layers = 4 * channels[0], layers_per_block

        def block(inputs: list[int], level: int, kind: str, count: int, resampler: nn.Module | None = None) -> Block:
            width, context = channels[level], cross_attention_dim or 0
            resnets = [Resnet(before, width, groups, EPS, time_channels) for before in inputs]
            plain = partial(ImageAttention, width, groups, EPS, heads[level], qk_norm)
            cross = partial(Transformer, width, heads[level], context, groups, depths[level], use_linear_projection, qk_norm)
            attentions = [(cross if kind == "cross" else plain)() for _ in range(count if kind != "none" else 0)]
            return Block(resnets, attentions, resampler)

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        first, second = nn.Linear(channels[0], time_channels), nn.Linear(time_channels, time_channels)
        self.time_embedding = nn.Sequential(OrderedDict(linear_1=first, act=nn.SiLU(), linear_2=second))
        self.class_embedding = nn.Embedding(num_class_embeds, time_channels) if num_class_embeds is not None else None
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [channels[0]]  # channels of the skips, from the way down to the way up
        for level, kind in enumerate(attention):
            inputs = [skips[-1], *[channels[level]] * (layers_per_block - 1)]
            down = Downsample(channels[level], symmetric=True) if level < last else None
            self.down_blocks.append(block(inputs, level, kind, layers_per_block, down))
            skips += [channels[level]] * (layers_per_block + (level < last))
        self.mid_block = block([channels[last]] * 2, last, self.MIDDLE, 1)
        before = channels[last]
        for level, kind in reversed(list(enumerate(attention))):
            inputs = [count + skips.pop() for count in [before, *[channels[level]] * layers_per_block]]
            up, before = Upsample(channels[level]) if level else None, channels[level]
            self.up_blocks.append(block(inputs, level, kind, layers_per_block + 1, up))
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], EPS)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None, *,
        class_labels: Tensor | None = None, concat: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`timesteps` may be fractional; `context_mask` (B, T) is True at the tokens to attend to.

        `class_labels` are int64 (B,). `concat` (B, C', H, W) are further input channels, such as an image to fill in or enlarge.
        """
        given = (("context", context, "cross_attention_dim"), ("class_labels", class_labels, "num_class_embeds"))
        for name, value, option in given:
            if (value is None) != ((setting := self.config[option]) is None):
                raise InputError(f"{name} is {'missing' if value is None else 'given'}, and the network's {option} is {setting}")
        if context is None and context_mask is not None:
            raise InputError("context_mask is given without context")
        x = x if concat is None else torch.cat([x, concat], dim=1)
        if x.shape[1] != self.conv_in.in_channels:
            raise InputError(f"x and concat have {x.shape[1]} channels, expected {self.conv_in.in_channels} (in_channels)")
        time = self.time_embedding(timestep_features(timesteps, self.conv_in.out_channels).to(x.dtype))  # (B, 4·channels[0])
        if self.class_embedding is not None:
            time = time + self.class_embedding(class_labels)
        time = F.silu(time)  # once for all resnets
        mask = None  # (B, 1, 1, T'), added to the logits
        if context_mask is not None:
            mask = torch.zeros_like(context_mask, dtype=x.dtype).masked_fill(~context_mask, MASKED)[:, None, None]
            mask = F.pad(mask, (0, -mask.shape[-1] % KEYS), value=-math.inf)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time, context, mask)
            skips += outputs
        x, _ = self.mid_block(x, time, context, mask)
        for block in self.up_blocks:
            taken, skips = skips[-self.layers - 1 :], skips[: -self.layers - 1]
            size = skips[-1].shape[2:] if skips else None
            x, _ = block(x, time, context, mask, skips=taken, size=size)
        return self.conv_out(norm_silu(self.conv_norm_out, x))

    @staticmethod
    def head_dim(config: dict[str, Any]) -> int | list[int] | None:
        """diffusers' `attention_head_dim`. If it cannot express `num_heads`: [], which diffusers refuses to open.

        Transformers take it as the number of heads. Other attention takes it as a head's width, on the way up in reverse order.
        """
        kinds, channels = config["attention"], config["block_out_channels"]
        heads = per_level(config["num_heads"], channels, "num_heads")
        dims = [c // n if kind == "self" else n for kind, c, n in zip(kinds, channels, heads, strict=True)]
        for level, kind in enumerate(kinds):
            if kind == "self" and level and kinds[-1 - level] == "none":  # nothing reads that level's value
                dims[-1 - level] = dims[level]
        same = all(dims[level] == dims[-1 - level] for level, kind in enumerate(kinds) if kind == "self")
        return _one_if_equal(dims) if same and dims[-1] == heads[-1] else []

    @staticmethod
    def heads(dim: Any, kinds: Sequence[str], channels: Sequence[int]) -> list[int]:
        """The inverse of `head_dim`."""
        dims = per_level(dim, channels, "attention_head_dim")
        return [max(c // n, 1) if kind == "self" else n for kind, c, n in zip(kinds, channels, dims, strict=True)]

    @classmethod
    def to_diffusers(cls, config: dict[str, Any]) -> dict[str, Any]:
        dim = [] if config["qk_norm"] else cls.head_dim(config)
        further = {key: config[key] for key in ("num_heads", "qk_norm")} if dim == [] else {}
        return super().to_diffusers(config) | {"attention_head_dim": dim} | further

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> dict[str, Any]:
        ours = {"cross_attention_dim": None, "qk_norm": config.get("qk_norm", False), **super().from_diffusers(config)}
        dim, heads = ours.pop("attention_head_dim"), config.get("num_heads")
        return ours | {"num_heads": heads or _one_if_equal(cls.heads(dim, ours["attention"], config["block_out_channels"]))}


class UnconditionalUNet(UNet):
    """Noisy latents and timesteps to an output like the latents, without a text: `attention` is "none" or "self"."""

    CLASS = "UNet2DModel"
    MIDDLE = "self"
    DEFAULTS: ClassVar = {
        "in_channels": 3, "out_channels": 3, "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2,
        "norm_num_groups": 32, "num_class_embeds": None, "attention_head_dim": 8,
        "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3], "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    }  # fmt: skip
    FIXED: ClassVar = UNet.FIXED | {
        "mid_block_type": "UNetMidBlock2D", "downsample_type": "conv", "upsample_type": "conv", "add_attention": True,
    }  # fmt: skip
    CARRIED = ("sample_size", "num_train_timesteps")

    @staticmethod
    def head_dim(config: dict[str, Any]) -> int | list[int] | None:
        """The width of a head, if all levels with attention have the same; None if all have one head; else []."""
        kinds, channels = [*config["attention"][:-1], "self"], config["block_out_channels"]
        heads = per_level(config["num_heads"], channels, "num_heads")
        used = [(c, n) for kind, c, n in zip(kinds, channels, heads, strict=True) if kind == "self"]
        widths = {c // n for c, n in used}
        if len(widths) == 1:
            return widths.pop()
        return None if all(n == 1 for _, n in used) else []

    @staticmethod
    def heads(dim: Any, kinds: Sequence[str], channels: Sequence[int]) -> list[int]:
        pairs = list(zip([*kinds[:-1], "self"], channels, strict=True))
        if wrong := [c for kind, c in pairs if dim and kind == "self" and c % dim]:
            raise InputError(f"attention_head_dim = {dim} does not divide the {wrong[0]} channels of a level with attention")
        return [c // (dim or c) if kind == "self" else 1 for kind, c in pairs]


def _one_if_equal(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
