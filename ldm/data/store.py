"""A store of latents by content. A file is named `KEY-SHA256.safetensors` and linked to where it is used."""

import json
import os
import shutil
from pathlib import Path

from ldm.base.hashing import file_hash


def find(store: Path, key: str) -> Path | None:
    """The file for a key, if its content still has the hash in its name."""
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
    """Remove all files that the folder `latents` does not hold; DVC may have restored that without running the stage."""
    kept = {file["sha256"] for file in json.loads((latents / "manifest.json").read_text())["files"]}
    for path in store.glob("*"):
        if path.stem.rpartition("-")[2] not in kept:
            path.unlink(missing_ok=True)  # another run may have removed it
