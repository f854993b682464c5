"""What the setting `backbone` can name: the network that denoises latents."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ldm.base.errors import InputError
from ldm.base.options import Choice, kinds

if TYPE_CHECKING:
    from ldm.nets.diffusers import Pretrained


class Backbone(Choice):
    """How a network is built and loaded. Saving and the parts to shard are the network's (`Pretrained`)."""

    saved_as: ClassVar[str]  # `_class_name` in config.json

    def build(self, channels: int, context_width: int) -> "Pretrained":
        """The untrained network for latents of `channels` channels under a text whose tokens have `context_width` values."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path) -> "Pretrained":
        raise NotImplementedError

    def check(self, side: int) -> None:
        """Raise a `ValueError` if it cannot take latents of `side` x `side`."""


def load_backbone(folder: Path) -> Any:
    """The network of a folder, of the kind that its config.json names; `InputError` if none is."""
    from ldm.nets.diffusers import CONFIG, read_config

    found = read_config(folder).get("_class_name")
    known = {choice.saved_as: choice for choice in kinds(Backbone).values()}
    if found not in known:
        raise InputError(f"{folder / CONFIG}: _class_name is {found!r}; expected {' or '.join(known)}")
    return known[found].load(folder)
