"""What the setting `backbone` can name: the network that denoises latents. The networks themselves are in their own files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ldm.base.options import Choice, Positive, kinds

if TYPE_CHECKING:
    from ldm.nets.diffusers import Pretrained


class Backbone(Choice):
    """Which class the network is, and how it is built; loading, saving and the parts to shard are the class's own."""

    @staticmethod
    def network() -> "type[Pretrained]":
        raise NotImplementedError

    def build(self, channels: int, context_width: int) -> "Pretrained":
        """The untrained network for latents of `channels` channels and a text whose tokens have `context_width` values."""
        options = self.model_dump(exclude={"kind"})
        return self.network()(in_channels=channels, out_channels=channels, cross_attention_dim=context_width, **options)

    def check(self, side: int) -> None:
        """Raise a `ValueError` if it cannot take latents of `side` x `side`."""


class UNetBackbone(Backbone):
    kind: Literal["unet"] = "unet"
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)]  # channels of each level
    layers_per_block: Positive = 1
    attention: tuple[Literal["none", "self", "cross"], ...]  # by level; the middle is always "cross"
    transformer_layers_per_block: Positive = 1
    num_heads: Positive = 4
    norm_num_groups: Positive = 8
    qk_norm: bool = False  # RMS norm of queries and keys; diffusers cannot open such a network

    @staticmethod
    def network() -> "type[Pretrained]":
        from ldm.nets.unet import UNet

        return UNet

    @model_validator(mode="after")
    def _levels_match(self) -> "UNetBackbone":
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError("attention needs none, self or cross for each entry of block_out_channels")
        for name, divisor in (("norm_num_groups", self.norm_num_groups), ("num_heads", self.num_heads)):
            if wrong := [channels for channels in self.block_out_channels if channels % divisor]:
                raise ValueError(f"block_out_channels has {wrong[0]}, not a multiple of {name} {divisor}")
        return self

    def check(self, side: int) -> None:
        if side % (factor := 2 ** (len(self.block_out_channels) - 1)):
            raise ValueError(f"latents of side {side} are no multiple of {factor}, as needed by backbone.block_out_channels")


def load_backbone(folder: Path, shape_only: bool = False) -> Any:
    """The network of a folder, of the backbone that its config.json names, as `load_network`; `InputError` if none is."""
    from ldm.nets.diffusers import load_network

    return load_network(folder, *(choice.network() for choice in kinds(Backbone).values()), shape_only=shape_only)
