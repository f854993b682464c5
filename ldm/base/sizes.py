"""How many bytes files and folders take."""

import os
from pathlib import Path


def bytes_of(path: Path) -> int:
    """Of a file, a link or all that is in a folder; 0 if there is nothing, or no longer."""
    try:
        if not path.is_dir() or path.is_symlink():
            return path.lstat().st_size
        with os.scandir(path) as entries:
            return sum(bytes_of(Path(entry)) for entry in entries)
    except FileNotFoundError:
        return 0
