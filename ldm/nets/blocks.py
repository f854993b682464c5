"""What both networks are built of, under diffusers' key names, and diffusers' folder format."""

import json
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.base.errors import InputError
from ldm.base.hashing import content_hash, file_hash

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
OLD_KEYS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def network_hash(folder: Path) -> str:
    """Identity of a saved network: of its configuration and weights, not of what else is in the folder."""
    return content_hash("".join(file_hash(folder / name) for name in (CONFIG, WEIGHTS)).encode())


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer outside of autocast: bfloat16 has 8 bits, too few for pixels, means and variances that are to be compared."""
    if not torch.is_autocast_enabled(x.device.type):
        return layer(x)
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H·W, C); a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H·W, C) -> (B, C, H, W), always a view: what it is added to decides the layout."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class Resnet(nn.Module):
    """norm, SiLU, convolution, twice, with the time embedding (already activated) added in between."""

    def __init__(self, inputs: int, outputs: int, groups: int, eps: float, time_channels: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, outputs) if time_channels else None
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h: Tensor = self.conv1(norm_silu(self.norm1, x))  # (B, outputs, H, W)
        if self.time_emb_proj is not None:
            h = h.add_(self.time_emb_proj(time)[:, :, None, None])  # no backward needs a convolution's output
        h = self.conv2(norm_silu(self.norm2, h))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class HeadNorm(nn.RMSNorm):
    """RMS norm (Zhang & Sennrich 2019) of each head's queries or keys, so that logits cannot grow without bound."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)  # fused only where types agree


class Attention(nn.Module):
    """Multi-head attention of tokens (B, N, C) to themselves or to a context (B, T, D)."""

    def __init__(
        self, channels: int, heads: int, context_channels: int | None = None, bias: bool = False, qk_norm: bool = False
    ) -> None:
        super().__init__()
        source, width = context_channels or channels, channels // heads
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias)
        self.to_k = nn.Linear(source, channels, bias)
        self.to_v = nn.Linear(source, channels, bias)
        self.norm_q, self.norm_k = (HeadNorm(width) if qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, tokens: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`mask` (B, 1, 1, T') is added to the logits; what it has beyond T must be -inf."""
        source = tokens if context is None else context
        q, k, v = self.to_q(tokens), self.to_k(source), self.to_v(source)
        if mask is not None and (missing := mask.shape[-1] - k.shape[1]):
            k, v = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))
        q, k, v = (projected.unflatten(-1, (self.heads, -1)) for projected in (q, k, v))  # (B, N or T', heads, C/heads)
        q, k, v = self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


class ImageAttention(Attention):
    """Biased attention over all positions, normalised, with a residual."""

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
        # two maps rather than two halves of one: halves are strided, and their gradients would be copied into one
        value, gate = (F.linear(tokens, *half) for half in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True))
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each pre-normalised with a residual."""

    def __init__(self, channels: int, heads: int, context_channels: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(channels), Attention(channels, heads, qk_norm=qk_norm)
        self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(channels, heads, context_channels, qk_norm=qk_norm)
        self.norm3, self.ff = nn.LayerNorm(channels), FeedForward(channels)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), context, mask)
        return tokens + self.ff(self.norm3(tokens))


class Transformer(nn.Module):
    """The U-Net's attention: transformer blocks over all positions between two projections (1x1 or linear)."""

    def __init__(
        self, channels: int, heads: int, context_channels: int, groups: int, layers: int, linear: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        blocks = (TransformerBlock(channels, heads, context_channels, qk_norm) for _ in range(layers))
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        # a 1x1 convolution is a linear map of tokens, and so takes either kind of weight without another copy
        tokens = F.linear(to_tokens(self.norm(x)), self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        return x + to_map(F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias), x)


class Downsample(nn.Module):
    """Halves the size: padded on all sides in the U-Net, only right and below in the autoencoder."""

    def __init__(self, channels: int, symmetric: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, or to the odd size that the downsampler met, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size or [2 * n for n in x.shape[2:]], mode="nearest"))


class Stage(nn.Module):
    """Every block of both networks: resnets, each followed by its attention where it has one, then the resampler."""

    recompute = False  # keep only the inputs, and compute the rest again in the backward pass

    def __init__(
        self,
        resnets: Iterable[Resnet],
        attentions: Iterable[nn.Module] = (),
        down: Downsample | None = None,
        up: Upsample | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([down] if down else [])
        self.upsamplers = nn.ModuleList([up] if up else [])

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """The output, and what each layer gave (a later stage's `skips`); `_run` says of what."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, *args, use_reentrant=False, **kwargs)
        return self._run(*args, **kwargs)

    def _run(
        self,
        x: Tensor,
        time: Tensor | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        skips: Sequence[Tensor] = (),
        size: Sequence[int] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """`skips` go in last first; `size` is what the upsampler is to reach, twice its input if None."""
        outputs = []
        for resnet, attention, skip in zip_longest(self.resnets, self.attentions, reversed(skips)):
            x = resnet(x if skip is None else torch.cat([x, skip], dim=1), time)
            x = x if attention is None else attention(x, context, mask)
            outputs.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            outputs.append(x)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x, outputs


def per_level(value: int | Sequence[int], channels: Sequence[int], name: str) -> list[int]:
    """One value for each level, given as that or as one for all."""
    if isinstance(value, int):
        return [value] * len(channels)
    check_levels(value, channels, name)
    return list(value)


def check_levels(values: Sequence[Any], channels: Sequence[int], name: str) -> None:
    if len(values) != len(channels):
        raise InputError(f"{name} has {len(values)} values for {len(channels)} of block_out_channels")


def check_multiples(channels: Sequence[int], divisors: Sequence[int], name: str) -> None:
    for count, divisor in zip(channels, divisors, strict=True):
        if count % divisor:
            raise InputError(f"block_out_channels: {count} is not a multiple of {name} = {divisor}")


class Pretrained(nn.Module):
    """A network kept as diffusers keeps it: `config.json` and `diffusion_pytorch_model.safetensors` in one folder."""

    CLASS: ClassVar[str]  # diffusers' name of the network
    DEFAULTS: ClassVar[dict[str, Any]]  # diffusers' defaults of the configuration keys that are read
    FIXED: ClassVar[dict[str, Any]]  # configuration keys of which one value is supported; any other key must be null
    CARRIED: ClassVar[tuple[str, ...]]  # configuration keys that change no output, written back as they were read

    def __init__(self, scope: dict[str, Any]) -> None:
        """`scope`: the subclass's constructor's arguments, as its `locals()` gives them."""
        super().__init__()
        arguments = {key: value for key, value in scope.items() if key not in ("self", "__class__")}
        self.config: dict[str, Any] = {key: list(v) if isinstance(v, Sequence) else v for key, v in arguments.items()}
        self.carried: dict[str, Any] = {}

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training holds only the inputs of the stages and computes them twice (Chen et al. 2016)."""
        return any(module.recompute for module in self.modules() if isinstance(module, Stage))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, Stage):
                module.recompute = on

    def place(self, device: torch.device | str) -> Self:
        """Move to a device, in channels-last layout, which convolutions run faster in."""
        return self.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def to_diffusers(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments as diffusers' configuration."""
        raise NotImplementedError

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> dict[str, Any]:
        """diffusers' configuration, nothing missing, as the constructor's arguments."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder; equal networks give equal bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": self.CLASS, **self.to_diffusers(self.config), **self.carried}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        state = {key: value.cpu().contiguous() for key, value in sorted(self.state_dict().items())}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The network of a folder that this class or diffusers wrote, in float32 on the CPU."""
        config, weights = read_config(folder), _present(folder, WEIGHTS)
        try:
            state = {_new_key(key): value for key, value in load_file(weights).items()}
        except (ValueError, SafetensorError) as error:
            raise InputError(f"{weights} is damaged ({error}); fetch it again") from error
        net = cls._skeleton(Path(folder) / CONFIG, config)
        _check_state(weights, net.state_dict(), state)
        net.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in state.items()}, assign=True)
        return net

    @classmethod
    def _skeleton(cls, file: Path, config: dict[str, Any]) -> Self:
        """The network that `config` describes, without memory for its weights."""
        found = cls.DEFAULTS | {key: value for key, value in config.items() if not key.startswith("_")}
        try:
            arguments = cls.from_diffusers(found)
            expected = cls.FIXED | cls.to_diffusers(arguments) | {"_class_name": cls.CLASS}
            for key, value in {**found, "_class_name": config.get("_class_name")}.items():
                only = expected.get(key)
                repeated = [only] * len(found["block_out_channels"])  # how diffusers may write one value for all levels
                if value not in (None, only, repeated) and key not in cls.CARRIED:
                    raise InputError(f"{key} = {value!r} is not supported, only {only!r}")
            with torch.device("meta"):
                net = cls(**arguments)
        except (InputError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise InputError(f"{file}: {error}") from error
        net.carried = {key: config[key] for key in cls.CARRIED if key in config}
        return net


def _present(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{path} is missing: expected a folder that save_pretrained wrote (safetensors)")
    return path


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a network's folder in diffusers' format."""
    file = _present(folder, CONFIG)
    try:
        return dict(json.loads(file.read_bytes()))
    except (TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); fetch it again") from error


def _new_key(key: str) -> str:
    """Published autoencoders still carry the names that diffusers gave attention weights before version 0.12."""
    for old, new in OLD_KEYS.items():
        key = key.replace(old, new)
    return key


def _check_state(file: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for what, keys in (("misses", expected.keys() - found.keys()), ("has unexpected", found.keys() - expected.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"{file} {what} key {min(keys)}{more}: these weights are not of the network in {CONFIG}")
    for key, value in expected.items():
        if value.shape != found[key].shape:
            shapes = f"{tuple(found[key].shape)}, expected {tuple(value.shape)}"
            raise InputError(f"{file}: {key} has shape {shapes}: these weights are not of the network in {CONFIG}")
