"""Where the project is."""

from pathlib import Path

from ldm.base.errors import InputError


def find_root(start: Path | None = None) -> Path:
    """The project folder at or above `start` (default: here), known by its `dvc.yaml` and `params.yaml`."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    raise InputError(f"{start}: no dvc.yaml and params.yaml here or above; change to the project's folder")
