"""The layers of autoencoders and U-Nets, under diffusers' key names."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.base.errors import InputError


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H·W, C); a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H·W, C) -> (B, C, H, W), a view: the tensor that it is added to decides the layout."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class Resnet(nn.Module):
    """Twice norm, SiLU and convolution, with the time embedding, after its SiLU, added in between."""

    def __init__(self, inputs: int, outputs: int, groups: int, eps: float, time_channels: int | None = None) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, eps), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, outputs) if time_channels else None
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, eps), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h: Tensor = self.conv1(norm_silu(self.norm1, x))  # (B, outputs, H, W)
        if self.time_emb_proj is not None:
            h = h.add_(self.time_emb_proj(time)[:, :, None, None])  # in place: no backward needs a convolution's output
        h = self.conv2(norm_silu(self.norm2, h))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class HeadNorm(nn.RMSNorm):
    """RMS norm (Zhang & Sennrich 2019) of each head's queries or keys, so that logits cannot grow without bound."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)  # only equal types are fused


class Attention(nn.Module):
    """Multi-head attention of tokens (B, N, C) to themselves or to a context (B, T, D)."""

    def __init__(self, channels: int, heads: int, context: int | None = None, bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, source = heads, context or channels
        self.to_q = nn.Linear(channels, channels, bias)
        self.to_k, self.to_v = nn.Linear(source, channels, bias), nn.Linear(source, channels, bias)
        self.norm_q, self.norm_k = (HeadNorm(channels // heads, eps=1e-5) if qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, tokens: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`mask` (B, 1, 1, T'), T' >= T, is added to the logits; beyond T it must be -inf."""
        source = tokens if context is None else context
        q, k, v = self.to_q(tokens), self.to_k(source), self.to_v(source)
        if mask is not None and (missing := mask.shape[-1] - k.shape[1]):
            k, v = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))
        q, k, v = (projected.unflatten(-1, (self.heads, -1)) for projected in (q, k, v))  # (B, N or T', heads, C/heads)
        q, k, v = self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


class ImageAttention(Attention):
    """Attention over all positions, with biases, a group norm before and a residual."""

    def __init__(self, channels: int, groups: int, eps: float, heads: int = 1, qk_norm: bool = False) -> None:
        super().__init__(channels, heads, bias=True, qk_norm=qk_norm)
        self.group_norm = nn.GroupNorm(groups, channels, eps)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return x + to_map(super().forward(to_tokens(self.group_norm(x))), x)


class GEGLU(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        # two maps, because the halves of one would be strided, and their gradients copied into one tensor
        value, gate = (F.linear(tokens, *half) for half in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True))
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each with a layer norm before and a residual."""

    def __init__(self, channels: int, heads: int, context: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(channels), Attention(channels, heads, qk_norm=qk_norm)
        self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(channels, heads, context, qk_norm=qk_norm)
        net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))
        self.norm3, self.ff = nn.LayerNorm(channels), nn.Sequential(OrderedDict(net=net))

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), context, mask)
        return tokens + self.ff(self.norm3(tokens))


class Transformer(nn.Module):
    """The U-Net's attention: transformer blocks over all positions, between two projections (1x1 or linear)."""

    def __init__(self, channels: int, heads: int, context: int, groups: int, layers: int, linear: bool, qk_norm: bool) -> None:
        super().__init__()
        blocks = (TransformerBlock(channels, heads, context, qk_norm) for _ in range(layers))
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        # a 1x1 convolution is a linear map of tokens: no copy into another layout
        tokens = F.linear(to_tokens(self.norm(x)), self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        return x + to_map(F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias), x)


class Downsample(nn.Module):
    """Halves the size; pads all sides (U-Net), or only right and below (autoencoder)."""

    def __init__(self, channels: int, symmetric: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to `size` or twice the input's, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size or [2 * n for n in x.shape[2:]], mode="nearest"))


class Block(nn.Module):
    """A block of either network: resnets, each followed by its attention if it has one, then the resampler."""

    recompute = False  # keep only the inputs, and compute the rest again in the backward pass

    def __init__(self, resnets: Iterable[Resnet], attentions: Iterable[nn.Module], resampler: nn.Module | None = None) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([resampler] if isinstance(resampler, Downsample) else [])
        self.upsamplers = nn.ModuleList([resampler] if isinstance(resampler, Upsample) else [])

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """The output, and that of each layer (the skips of a later block); arguments as for `_run`."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, *args, use_reentrant=False, **kwargs)
        return self._run(*args, **kwargs)

    def _run(
        self, x: Tensor, time: Tensor | None = None, *text: Tensor | None, skips: Sequence[Tensor] = (), size: Any = None
    ) -> tuple[Tensor, list[Tensor]]:
        """`text`: context and mask. The last of `skips` goes into the first resnet; `size` is the upsampler's."""
        outputs = []
        for resnet, attention, skip in zip_longest(self.resnets, self.attentions, reversed(skips)):
            x = resnet(x if skip is None else torch.cat([x, skip], dim=1), time)
            x = x if attention is None else attention(x, *text)
            outputs.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            outputs.append(x)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x, outputs


def per_level(value: Any, channels: Sequence[int], name: str) -> list[Any]:
    """A value for each level, from a list or one for all; `InputError` if there are too few or too many."""
    values = [value] * len(channels) if isinstance(value, int) else list(value)
    if len(values) != len(channels):
        raise InputError(f"{name} has {len(values)} values for {len(channels)} of block_out_channels")
    return values


def check_divisor(channels: Sequence[int], divisors: int | Sequence[int], name: str) -> None:
    for count, divisor in zip(channels, per_level(divisors, channels, name), strict=True):
        if count % divisor:
            raise InputError(f"block_out_channels: {count} is not a multiple of {name} = {divisor}")
