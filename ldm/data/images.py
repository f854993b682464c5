"""Read a folder of captioned images: which images there are, what their captions say, and their pixels."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # by content: a suffix proves nothing, and Pillow's EPS runs a program
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


class UnreadableImage(Exception):
    """A file that is not an image we can decode; the message is the reason."""


def list_images(folder: Path) -> pd.DataFrame:
    """The captioned images of `folder`, one row each, sorted by `file_name`.

    Captions follow the conventions people already have, the first that is found: `metadata.csv` or
    `metadata.jsonl` (`file_name,text` and any further columns, such as `label`); a `.txt` file beside each
    image; subfolders named after a class, whose name then is caption and label.

    Returns columns `file_name` (POSIX path relative to `folder`), `text` and what else the table holds.
    Raises `InputError` for a folder that is missing or empty, and for captions that name missing images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; set data.path in params.yaml to a folder of captioned images")
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
    if not found:
        raise InputError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))}); put captioned images there")
    for name in ("metadata.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            return _from_table(folder / name, set(found))
    if any((folder / name).with_suffix(".txt").is_file() for name in found):
        return _from_sidecars(folder, found)
    if all("/" in name for name in found):
        classes = [name.rsplit("/", 2)[-2] for name in found]
        return pd.DataFrame({"file_name": found, "text": classes, "label": classes})
    raise InputError(
        f"{folder}: {len(found)} images but no captions; add metadata.csv with columns file_name,text, "
        "or a .txt file beside each image, or one subfolder per class"
    )


def _from_table(path: Path, found: set[str]) -> pd.DataFrame:
    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        else:
            table = pd.read_json(path, lines=True, dtype=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as a table: {error}") from None
    for column in ("file_name", "text"):
        if column not in table:
            raise InputError(f"{path}: column {column!r} is missing; found {', '.join(map(str, table.columns)) or 'none'}")
    if path.suffix == ".csv" and len(table) and not isinstance(table.index, pd.RangeIndex):
        raise InputError(f"{path}: its rows have more fields than its header; put captions that hold commas in double quotes")
    for number, row in enumerate(zip(table.file_name, table.text, strict=True), start=1):
        if not all(isinstance(value, str) for value in row):
            raise InputError(f"{path}: row {number}: file_name and text must be strings, found {row[0]!r} and {row[1]!r}")
    if "label" in table:
        table["label"] = _labels(path, table.label)
    duplicated = table.file_name[table.file_name.duplicated()]
    if len(duplicated):
        raise InputError(f"{path}: {duplicated.iloc[0]!r} has more than one row; keep one caption an image")
    missing = sorted(set(table.file_name) - found)
    if missing:
        raise InputError(
            f"{path}: names {len(missing)} images that are not in {path.parent}, the first {missing[0]!r}; "
            "add them or remove their rows"
        )
    uncaptioned = sorted(found - set(table.file_name))
    if uncaptioned:
        raise InputError(
            f"{path}: has no row for {len(uncaptioned)} images in {path.parent}, the first {uncaptioned[0]!r}; "
            "caption them or move them away"
        )
    return table.sort_values("file_name", ignore_index=True)


def _labels(path: Path, labels: pd.Series) -> pd.Series:
    """Labels as text; a label here and none there is a mistake."""
    missing = labels.isna() | (labels.astype(str).str.strip() == "")
    if missing.any():
        raise InputError(f"{path}: row {int(missing.argmax()) + 1} has no label; give every image one, or drop the column")
    return labels.astype(str)


def _from_sidecars(folder: Path, found: list[str]) -> pd.DataFrame:
    captions = []
    for name in found:
        sidecar = (folder / name).with_suffix(".txt")
        try:
            captions.append(sidecar.read_text(encoding="utf-8").strip())
        except FileNotFoundError:
            raise InputError(f"{folder / name}: has no caption file {sidecar.name} beside it, as other images here do") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{sidecar}: not UTF-8 text: {error}") from None
    return pd.DataFrame({"file_name": found, "text": captions})


def decode(blob: bytes, *, channels: int) -> Image.Image:
    """Decode an image file to greyscale (`channels` 1) or RGB (3), upright; `UnreadableImage` says why not."""
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            return _to_eight_bits(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError:  # its message holds a memory address, which would differ between runs
        raise UnreadableImage("not an image of a known format" if blob else "the file is empty") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8, transparency composited on white; other modes as they are."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImage(f"{image.mode} pixels from {values.min()} to {values.max()}; 8 or 16 bits are read")
        return Image.fromarray((values // 257).astype(np.uint8))
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels; 8 or 16 bits are read")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return image


def fit_square(image: Image.Image, size: int, resize_filter: str) -> Image.Image:
    """Scale `image` to cover a square of `size` pixels and crop it at the centre."""
    return ImageOps.fit(image, (size, size), method=FILTERS[resize_filter])


def to_array(image: Image.Image) -> np.ndarray:
    """An image as uint8 (C, H, W)."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def from_array(pixels: np.ndarray) -> Image.Image:
    """The inverse of `to_array`: uint8 (C, H, W) with 1 or 3 channels."""
    return Image.fromarray(pixels[0] if pixels.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
