"""What the setting `text` can name: a pretrained, frozen text encoder, giving one vector a token."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.base.options import Choice, Positive

if TYPE_CHECKING:
    from ldm.nets.text.encoder import TextEncoder


class Text(Choice):
    max_tokens: Positive

    def build(self, sha256: str | None = None) -> "TextEncoder":
        """Load it; `InputError` if it cannot be found, or if the hash of its files is not `sha256`."""
        from ldm.nets.text.encoder import TextEncoder

        encoder = TextEncoder(self)
        encoder.check(sha256)
        return encoder

    def check(self, root: Path) -> None:
        """Raise a `ValueError` if it is not where the setting says: before anything is trained."""

    def locate(self) -> Path:
        """The folder of its weights and tokenizer."""
        raise NotImplementedError

    def network(self, folder: Path) -> Callable[[list[str]], Any]:
        """Texts to the last layer (N, max_tokens, width) and its mask, bool (N, max_tokens); with an attribute `width`."""
        raise NotImplementedError
