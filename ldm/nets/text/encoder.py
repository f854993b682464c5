"""A frozen text encoder, and its identity."""

from pathlib import Path

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.hashing import content_hash, file_hash
from ldm.nets.text.options import Text

BATCH = 64  # texts embedded at once
SUFFIXES = {".safetensors", ".json", ".txt", ".model"}  # files of weights, configuration and tokenizer


class TextEncoder:
    """`sha256` names its weights and tokenizer; `width` is the size of a token's vector."""

    def __init__(self, options: Text):
        self.folder = options.locate()
        self.sha256 = _files_hash(self.folder)
        self._network = options.network(self.folder)
        self.width: int = self._network.width  # type: ignore[attr-defined]

    def check(self, sha256: str | None) -> None:
        """Raise an `InputError` if these are not the files with that hash."""
        if sha256 is not None and self.sha256 != sha256:
            raise InputError(
                f"text encoder in {self.folder}: its files have sha256 {self.sha256}, the model was trained with {sha256}; "
                "restore them, or embed the captions again (dvc repro --force cache_latents)"
            )

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embed texts: float32 (N, max_tokens, width), zero beyond each text's end, and its mask, bool (N, max_tokens)."""
        embeddings, masks = [], []
        for start in range(0, len(texts), BATCH):
            hidden, mask = self._network(texts[start : start + BATCH])
            embeddings.append(hidden * mask[..., None])
            masks.append(mask)
        return torch.cat(embeddings), torch.cat(masks)


def trim(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the token positions that no text (N, T, D) of the batch uses; masked ones cost time and change nothing."""
    longest = int(mask.sum(1).max())
    return text[:, :longest], mask[:, :longest]


def _files_hash(folder: Path) -> str:
    hashes = {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}
    return content_hash("".join(f"{file}\0{found}\n" for file, found in hashes.items()).encode())
