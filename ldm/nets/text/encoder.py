"""Frozen text encoders: the base class of what `text` can name, and what it builds."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ldm.base.errors import InputError
from ldm.base.files import content_hash, file_hash
from ldm.base.lazy import Tensor, torch
from ldm.base.options import Choice

BATCH = 64  # texts embedded at once
SHOWN = 40  # characters of a prompt in a warning
SUFFIXES = (".json", ".safetensors", ".txt", ".model")  # files of weights, configuration and tokenizer
Embed = Callable[[list[str]], tuple[Tensor, Tensor]]
Count = Callable[[list[str]], list[int]]


class Unavailable(InputError):
    """The encoder is not on this machine and cannot be fetched."""


class Text(Choice):
    max_tokens: Annotated[int, Field(ge=3)]  # with two special tokens
    max_cut: Annotated[float, Field(ge=0, le=1)] = 0.01  # a larger share of captions longer than max_tokens stops the run

    def build(self, sha256: str | None = None) -> "TextEncoder":
        """Load the encoder; `InputError` if it cannot be found, or if its files have another hash than `sha256`."""
        encoder = TextEncoder(self)
        if sha256 not in (None, encoder.sha256):
            found = f"text encoder in {encoder.folder}: found sha256 {encoder.sha256}, the model was trained with {sha256}"
            raise InputError(f"{found}; restore its files, or embed the captions again (dvc repro --force cache_latents)")
        return encoder

    def check(self, root: Path) -> None:
        """Raise a `ValueError` if the setting names nothing that could be loaded, before anything is trained."""

    def located(self, root: Path) -> "Text":
        """The same options, with the name of a folder taken as relative to `root`, whatever the working directory."""
        return self

    def folder(self) -> Path | None:
        """Where its files lie, if the options name a folder on this disk: a saved model takes those with it."""
        return None

    def counter(self) -> tuple[Count, int | None]:
        """Counts the tokens of texts before anything is cut, special ones among them; and the most that `max_tokens` can be.

        Loads the tokenizer, no weights.
        """
        return lambda texts: [0] * len(texts), None  # an encoder that cuts nothing

    def load(self) -> tuple[Path, Embed, int]:
        """Folder of weights and tokenizer; a function of N texts to the last layer (N, max_tokens, width) and its mask; width."""
        raise NotImplementedError


class TextEncoder:
    """`sha256` names weights and tokenizer; `width` is the size of a token's vector."""

    def __init__(self, options: Text):
        (self.folder, self._embed, self.width), (self._count, _) = options.load(), options.counter()
        self.max_tokens = options.max_tokens
        hashes = (f"{path.name}\0{file_hash(path)}\n" for path in files_of(self.folder))
        self.sha256 = content_hash("".join(hashes).encode())

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embed texts: float32 (N, max_tokens, width), zero beyond each text's end, and its mask, bool (N, max_tokens)."""
        batches = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
        with torch.no_grad():
            parts = [(hidden * mask[..., None], mask) for hidden, mask in map(self._embed, batches)]
        embeddings, masks = zip(*parts, strict=True)
        return torch.cat(embeddings), torch.cat(masks)

    def warn_of_cut(self, texts: list[str]) -> None:
        """Issue a warning if the encoder does not read some texts to their end."""
        most, counts = self.max_tokens, dict(zip(texts, self._count(texts), strict=True))
        if cut := [text for text, count in counts.items() if count > most]:
            shown = cut[0] if len(cut[0]) <= SHOWN else f"{cut[0][:SHOWN]}…"
            what = f"{len(cut)} of {len(counts)} prompts are" if len(cut) > 1 else "a prompt is"
            warnings.warn(f"{what} cut at {most} tokens: {shown!r} has {counts[cut[0]]}; the rest changes nothing", stacklevel=3)


def files_of(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def trim(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the positions that no text (N, T, D) of the batch uses: masked positions cost time and change nothing."""
    longest = int(mask.sum(1).max())
    return text[:, :longest], mask[:, :longest]
