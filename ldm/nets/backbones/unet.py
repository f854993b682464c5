"""The U-Net as a backbone; the network itself is in `ldm/nets/unet.py`."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from ldm.base.options import Positive
from ldm.nets.backbones.backbone import Backbone

if TYPE_CHECKING:
    from ldm.nets.unet import UNet


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
    def network() -> "type[UNet]":
        from ldm.nets.unet import UNet

        return UNet

    @model_validator(mode="after")
    def _levels_match(self) -> "UNetBackbone":
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError("attention needs none, self or cross for each entry of block_out_channels")
        for name in ("norm_num_groups", "num_heads"):
            for channels in self.block_out_channels:
                if channels % getattr(self, name):
                    raise ValueError(f"block_out_channels has {channels}, not a multiple of {name} {getattr(self, name)}")
        return self

    def check(self, side: int) -> None:
        halvings = len(self.block_out_channels) - 1
        if side % 2**halvings:
            raise ValueError(f"latents of side {side} are no multiple of {2**halvings}, as needed by backbone.block_out_channels")

    def build(self, channels: int, context_width: int) -> "UNet":
        return self.network()(channels, channels, cross_attention_dim=context_width, **self.model_dump(exclude={"kind"}))
