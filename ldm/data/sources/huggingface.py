"""A data set of the Hugging Face hub, or a local one that the package `datasets` opens, as a folder of captioned images."""

import io
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ldm.base.errors import InputError
from ldm.base.files import replacing
from ldm.data.caption_columns import FURTHER, MAIN, NUMBERED, is_for_captions
from ldm.data.sources.source import Source

HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:@]+))?@(?P<commit>[0-9a-f]{40})")
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tiff", "GIF": ".gif"}
STRINGS = ("string", "large_string", "string_view")  # types of `datasets`
NUMBER = re.compile(r"(u?int|float)\d+")


class HuggingFace(Source):
    """A data set of the hub at a commit, or a local folder. DVC does not see changes in such a folder."""

    kind: Literal["huggingface"] = "huggingface"
    dataset: Annotated[str, Field(min_length=1)]  # NAME@COMMIT or NAME:CONFIG@COMMIT on the hub, or FOLDER or FOLDER:CONFIG

    def write(self, root: Path, out: Path) -> int:
        """Write each split as `SPLIT/00000000.SUFFIX`, with the images' own bytes, and captions as `metadata.jsonl`.

        The table has `file_name`, `text` (a list of several captions), `captions` and numbered captions where the data set has
        them, `label` if one column holds classes, and every other scalar. A row without an image becomes an empty file, which the
        `shard` stage quarantines; one without text is refused.
        """
        where = f"data.source.dataset {self.dataset!r}"
        splits, local = _load(self.dataset, root, where)
        from datasets import Image  # `_load` says what to install without it

        features = next(iter(splits.values())).features
        image, columns = _columns(features, where)
        with replacing(out) as folder, (folder / "metadata.jsonl").open("w", encoding="utf-8", newline="\n") as table:
            for split, rows in sorted(splits.items()):
                (folder / split).mkdir()
                read = rows.select_columns([image, *set(columns.values())]).cast_column(image, Image(decode=False))
                for number, row in enumerate(read):
                    here = f"{where}: split {split}, row {number}"
                    blob = _read(row[image] or {"bytes": b""}, local, here)
                    file_name = f"{split}/{number:08d}{_suffix(blob)}"
                    (folder / file_name).write_bytes(blob)
                    record = {key: _value(row[column], features[column]) for key, column in columns.items()}
                    for key in ("text", "label"):
                        if record.get(key, "") is None:
                            raise InputError(f"{here}: column {columns[key]!r} is empty; every image needs its {key}")
                    table.write(json.dumps({"file_name": file_name, **record}, ensure_ascii=False) + "\n")
        return sum(map(len, splits.values()))


def _load(dataset: str, root: Path, where: str) -> tuple[dict[str, Any], Path | None]:
    """Every split of the data set, as memory-mapped tables in the cache of `datasets`; and its folder if it is a local one."""
    name, config, commit = dataset, None, None
    if hub := HUB.fullmatch(dataset):
        name, config, commit = f"hf://datasets/{hub['name']}", hub["config"], hub["commit"]  # never a folder of that name
    elif not (root / dataset).is_dir():
        name, _, config = dataset.rpartition(":")
        if not (name and (root / name).is_dir()):
            hint = "a data set on the hub is NAME@COMMIT or NAME:CONFIG@COMMIT with the 40 hex digits of a commit"
            raise InputError(f"{where}: no such folder; {hint}, since a name alone, or a branch, would not say which data")
    folder = None if hub else (root / name).resolve()
    try:
        import datasets
        import huggingface_hub.utils as hub_utils
    except ImportError as error:
        raise InputError(f"{where} needs a package ({error}); pip install 'ldm-pipeline[huggingface]'") from None
    for library in (datasets, hub_utils):
        library.disable_progress_bars()
        library.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        builder = datasets.load_dataset_builder(str(folder or name), config, revision=commit)
        # If the hub does not answer, `datasets` takes the latest copy in its cache, whatever its commit.
        if commit and builder.hash != commit:
            raise ConnectionError(f"the hub does not answer, and the latest copy in the cache is of commit {builder.hash}")
        builder.download_and_prepare()
        return builder.as_dataset(), folder
    except Exception as error:  # many libraries raise here; every error means that the data cannot be had
        generic = isinstance(error, datasets.exceptions.DatasetGenerationError)  # its cause has the reason
        reason = (generic and error.__cause__) or error
        raise InputError(f"{where}: {type(reason).__name__}: {' '.join(str(reason).split())}") from error


def _columns(features: dict[str, Any], where: str) -> tuple[str, dict[str, str]]:
    """The column of images, and the column of the data set for each column of `metadata.jsonl`."""
    types = {name: _type(feature) for name, feature in features.items()}
    found = ", ".join(f"{name} ({type_})" for name, type_ in types.items())
    images, classes = ([name for name in types if types[name] == kind] for kind in ("Image", "ClassLabel"))
    if len(images) != 1:
        raise InputError(f"{where}: expected one column of images, found {len(images)} among its columns {found}")
    label = classes[0] if len(classes) == 1 else None
    texts = [name for name, type_ in types.items() if type_.removeprefix("list of ") in STRINGS]
    further = {name: name for name in texts if name == FURTHER or NUMBERED.fullmatch(name)}
    otherwise = None if further else texts[0] if len(texts) == 1 else label
    caption = next((name for name in MAIN if name in texts), otherwise)
    if caption is None and not further:
        expected = "expected text or caption, or a single one of strings or of classes, among its columns"
        raise InputError(f"{where}: which column holds the captions? {expected} {found}")
    columns = ({"text": caption} if caption else {}) | further | ({"label": label} if label else {})
    for name, kind in types.items():
        if name not in columns.values() and (kind in (*STRINGS, "bool", "ClassLabel") or NUMBER.fullmatch(kind)):
            free = name
            while free == "file_name" or free in columns or (is_for_captions(free) and name not in texts):
                free = f"source_{free}"
            columns[free] = name
    return images[0], columns


def _value(value: Any, feature: Any) -> Any:
    """A value for `metadata.jsonl`: captions, the name of a class, None for what is hidden or missing."""
    if isinstance(value, list):
        return [text for text in value if text is not None] or None
    if value is not None and hasattr(feature, "int2str"):  # hidden classes are -1
        return None if value < 0 else feature.int2str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN or infinity


def _type(feature: Any) -> str:
    """A feature's type in words: `string`, `list of string`, `int32`, `ClassLabel`, `Image`."""
    from datasets import LargeList, List, Value

    if isinstance(feature, List | LargeList):
        return f"list of {_type(feature.feature)}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _read(image: dict[str, Any], folder: Path | None, where: str) -> bytes:
    """The bytes of an image file. A local data set, in `folder`, may name files of its own."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    if image["bytes"] is not None or image["path"] is None:
        return image["bytes"] or b""
    path = (folder or Path()) / image["path"]
    # Files of the hub are in its caches. Any other file is not part of the commit, and may be a secret of the user's.
    caches = map(Path, (HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH))
    if folder is None and not any(path.resolve().is_relative_to(cache.resolve()) for cache in caches):
        raise InputError(f"{where}: names the file {path}, which is not in the data set")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{where}: its image {path} cannot be read: {error.strerror}") from None


def _suffix(blob: bytes) -> str:
    """The suffix for an image's format. A file that Pillow cannot open becomes .png, which the `shard` stage quarantines."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(blob), formats=tuple(SUFFIXES)) as image:
            return SUFFIXES.get(image.format or "", ".jpg")  # Pillow calls a JPEG that holds several pictures MPO
    except Exception:  # decoders of foreign bytes raise anything
        return ".png"
