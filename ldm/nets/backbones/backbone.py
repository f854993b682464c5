"""What the setting `backbone` can name: the network that denoises latents."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.base.options import Choice, kinds

if TYPE_CHECKING:
    from ldm.nets.diffusers import Pretrained


class Backbone(Choice):
    """Which class the network is, and how it is built; loading, saving and the parts to shard are the class's own."""

    @staticmethod
    def network() -> "type[Pretrained]":
        raise NotImplementedError

    def build(self, channels: int, context_width: int) -> "Pretrained":
        """The untrained network for latents of `channels` channels and a text whose tokens have `context_width` values."""
        raise NotImplementedError

    def check(self, side: int) -> None:
        """Raise a `ValueError` if it cannot take latents of `side` x `side`."""


def load_backbone(folder: Path) -> Any:
    """The network of a folder, of the backbone that its config.json names; `InputError` if none is."""
    from ldm.nets.diffusers import load_network

    return load_network(folder, *(choice.network() for choice in kinds(Backbone).values()))
