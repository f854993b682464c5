"""Frozen text encoders: the base class of what `text` can name, and what it builds."""

from collections.abc import Callable
from pathlib import Path

from ldm.base.errors import InputError
from ldm.base.files import content_hash, file_hash
from ldm.base.lazy import Tensor, torch
from ldm.base.options import Choice, Positive

BATCH = 64  # texts embedded at once
SUFFIXES = (".json", ".safetensors", ".txt", ".model")  # files of weights, configuration and tokenizer
Embed = Callable[[list[str]], tuple[Tensor, Tensor]]


class Text(Choice):
    max_tokens: Positive

    def build(self, sha256: str | None = None) -> "TextEncoder":
        """Load the encoder; `InputError` if it cannot be found, or if its files have another hash than `sha256`."""
        encoder = TextEncoder(self)
        if sha256 not in (None, encoder.sha256):
            found = f"text encoder in {encoder.folder}: found sha256 {encoder.sha256}, the model was trained with {sha256}"
            raise InputError(f"{found}; restore its files, or embed the captions again (dvc repro --force cache_latents)")
        return encoder

    def check(self, root: Path) -> None:
        """Raise a `ValueError` if the setting names nothing that could be loaded, before anything is trained."""

    def load(self) -> tuple[Path, Embed, int]:
        """Folder of weights and tokenizer; a function of N texts to the last layer (N, max_tokens, width) and its mask; width."""
        raise NotImplementedError


class TextEncoder:
    """`sha256` names weights and tokenizer; `width` is the size of a token's vector."""

    def __init__(self, options: Text):
        self.folder, self._embed, self.width = options.load()
        files = sorted(path for path in self.folder.iterdir() if path.suffix in SUFFIXES)
        self.sha256 = content_hash("".join(f"{path.name}\0{file_hash(path)}\n" for path in files).encode())

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embed texts: float32 (N, max_tokens, width), zero beyond each text's end, and its mask, bool (N, max_tokens)."""
        batches = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
        with torch.no_grad():
            parts = [(hidden * mask[..., None], mask) for hidden, mask in map(self._embed, batches)]
        embeddings, masks = zip(*parts, strict=True)
        return torch.cat(embeddings), torch.cat(masks)


def trim(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the positions that no text (N, T, D) of the batch uses: masked positions cost time and change nothing."""
    longest = int(mask.sum(1).max())
    return text[:, :longest], mask[:, :longest]
