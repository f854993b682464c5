"""Pages: one HTML file with everything in it, no scripts, nothing fetched. Same input, same bytes."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ldm.report.grid import as_image
from ldm.report.numbers import shown

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
TEMPLATES.filters["shown"] = shown


@dataclass(frozen=True)
class Figure:
    """A PNG on disk and what it shows."""

    title: str
    caption: str
    png_path: Path


def write_report(
    path: Path,
    *,
    title: str,
    about: str,
    samples: Sequence[tuple[np.ndarray, str]],
    values: Sequence[Any],
    figures: Sequence[Figure],
    settings: Mapping[str, Any],
) -> None:
    """Write the report of an evaluation: `samples`, uint8 (C, H, W) with prompts, then `values` (`ldm.evaluation.value`)."""
    tiles = [(_data_url(_png(image)), max(image.shape) < 64, prompt) for image, prompt in samples]
    pictures = [(figure, _data_url(figure.png_path.read_bytes()), Image.open(figure.png_path).size) for figure in figures]
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_page(path, "report.html", title=title, about=about, tiles=tiles, values=values, pictures=pictures, settings=text)


def write_page(path: str | PathLike[str], template: str, **values: Any) -> None:
    text = TEMPLATES.get_template(template).render(values)
    Path(path).write_text(text, encoding="utf-8", newline="\n")


def _png(image: np.ndarray) -> bytes:
    file = BytesIO()
    as_image(image).save(file, "PNG", optimize=True)
    return file.getvalue()


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
