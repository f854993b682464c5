"""The store of latents by content: files named `KEY-SHA256.safetensors`, linked to where they are used."""

import json
import os
import shutil
from pathlib import Path

from ldm.base.hashing import file_hash


def find(store: Path, key: str) -> Path | None:
    """The file of a key, if its bytes are still what its name says: `KEY-SHA256.safetensors`."""
    for path in store.glob(f"{key}-*.safetensors"):
        if path.name == f"{key}-{file_hash(path)}.safetensors":
            return path
        path.unlink()
    return None


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def prune_store(store: Path, latents: Path) -> None:
    """Remove from the store what `latents` does not hold. DVC may restore earlier latents without running the stage."""
    kept = {file["sha256"] for file in json.loads((latents / "manifest.json").read_text())["files"]}
    for path in store.glob("*"):
        if path.stem.rpartition("-")[2] not in kept:
            path.unlink(missing_ok=True)  # another run may have been faster
