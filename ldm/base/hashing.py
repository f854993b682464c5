"""Identity of bytes, files and folders; JSON whose bytes depend on the value alone."""

import hashlib
import json
from pathlib import Path
from typing import Any


def content_hash(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """One sha256 over the names and contents of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return content_hash("".join(f"{path.relative_to(folder).as_posix()}\0{file_hash(path)}\n" for path in files).encode())


def canonical_json(value: Any) -> str:
    """Indented JSON with sorted keys and a final newline."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n"
