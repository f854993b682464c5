"""Frozen text encoders: the base class of what `text` can name, and what it builds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ldm.base.errors import InputError
from ldm.base.files import content_hash, file_hash
from ldm.base.lazy import Tensor, torch
from ldm.base.options import Choice

PADDING = 8  # texts are padded to a multiple of so many tokens
SHOWN = 40  # characters of a prompt in a warning
SUFFIXES = (".json", ".safetensors", ".txt", ".model")  # files of weights, configuration and tokenizer
NOT_IDENTITY = {"max_truncated_fraction", "cache"}  # options that change no embedding
Count = Callable[[list[str]], list[int]]


class Unavailable(InputError):
    """The encoder is not on this machine and cannot be fetched."""


class Text(Choice):
    max_tokens: Annotated[int, Field(ge=3)]  # with two special tokens
    max_truncated_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01  # a larger share of longer captions stops the run
    cache: bool = True  # embeddings are kept with the latents; false: computed while the U-Net trains, where they would not fit

    @property
    def identity(self) -> dict[str, Any]:
        """The options that embeddings depend on."""
        return self.model_dump(exclude=NOT_IDENTITY)

    def build(self, sha256: str | None = None, device: torch.device | str = "cpu") -> TextEncoder:
        """Load the encoder to a device; `InputError` if it cannot be found, or its files have another hash than `sha256`."""
        encoder = TextEncoder(self, device)
        if sha256 not in (None, encoder.sha256):
            found = f"text encoder in {encoder.folder}: found sha256 {encoder.sha256}, the model was trained with {sha256}"
            raise InputError(f"{found}; restore its files, or embed the captions again (dvc repro --force cache_latents)")
        return encoder

    def check(self, root: Path) -> None:
        """Raise a `ValueError` if the setting names nothing that could be loaded, before anything is trained."""

    def located(self, root: Path) -> Text:
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

    def load(self, device: torch.device) -> Loaded:
        """The weights on a device, and the tokenizer."""
        raise NotImplementedError


class Loaded(NamedTuple):
    folder: Path  # of weights and tokenizer
    tokenize: Callable[[list[str]], list[list[int]]]  # cut at `max_tokens`, special tokens among them
    embed: Callable[[Tensor, Tensor], Tensor]  # tokens (N, T), int64, and their mask, bool, to the last layer (N, T, width)
    width: int
    pad: int = 0  # the token that texts are padded with; no mask shows it


class TextEncoder:
    """A frozen text encoder on a device. `sha256` names weights and tokenizer; `width` is the size of a token's vector."""

    def __init__(self, options: Text, device: torch.device | str = "cpu"):
        self.device, self.max_tokens = torch.device(device), options.max_tokens
        self._loaded = options.load(self.device)
        self.folder, self.width = self._loaded.folder, self._loaded.width
        self._count, _ = options.counter()
        from ldm.base.memory import Parts

        self._parts = Parts(self.device, "texts")
        hashes = (f"{path.name}\0{file_hash(path)}\n" for path in files_of(self.folder))
        self.sha256 = content_hash("".join(hashes).encode())

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embed texts: float32 (N, T, width) for the T tokens of the longest, zero beyond each text's end; the mask, (N, T).

        Texts of up to 8, 16, 24, … tokens are padded to as many and computed together, so that no embedding depends on which
        other texts there are, but for rounding.
        """
        distinct = list(dict.fromkeys(texts))
        # of some tokenizers, the empty text has no token
        tokens, embed = [ids or [self._loaded.pad] for ids in self._loaded.tokenize(distinct)], self._loaded.embed
        found, mask = torch.zeros(len(distinct), max(map(len, tokens)), self.width, device=self.device), ragged_mask(tokens)
        by_length: dict[int, list[int]] = {}
        for row, ids in enumerate(tokens):
            by_length.setdefault(min(-(-len(ids) // PADDING) * PADDING, self.max_tokens), []).append(row)
        for length, rows in by_length.items():
            padded = [tokens[row] + [self._loaded.pad] * (length - len(tokens[row])) for row in rows]
            real = ragged_mask([tokens[row] for row in rows], length).to(self.device)
            with torch.no_grad():
                parts = self._parts(partial(_part, embed, torch.tensor(padded).to(self.device), real), len(rows), kind=length)
                hidden = torch.cat(list(parts)) * real[..., None]
            found[rows, :length] = hidden[:, : found.shape[1]].float()
        places = {text: row for row, text in enumerate(distinct)}
        order = torch.tensor([places[text] for text in texts])
        return found[order.to(self.device)], mask[order].to(self.device)

    def warn_of_cut(self, texts: list[str]) -> None:
        """Issue a warning if the encoder does not read some texts to their end."""
        most, counts = self.max_tokens, dict(zip(texts, self._count(texts), strict=True))
        if cut := [text for text, count in counts.items() if count > most]:
            shown = cut[0] if len(cut[0]) <= SHOWN else f"{cut[0][:SHOWN]}…"
            what = f"{len(cut)} of {len(counts)} prompts are" if len(cut) > 1 else "a prompt is"
            warnings.warn(f"{what} cut at {most} tokens: {shown!r} has {counts[cut[0]]}; the rest changes nothing", stacklevel=3)


def _part(embed: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor, rows: slice) -> Tensor:
    return embed(ids[rows], mask[rows])


def files_of(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def ragged_mask(tokens: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
    """Which of `length` positions, by default as many as the longest has, are real tokens, bool (N, length)."""
    lengths = torch.tensor([len(ids) for ids in tokens])
    return torch.arange(length or int(lengths.max())) < lengths[:, None]
