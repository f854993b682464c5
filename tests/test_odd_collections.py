"""Collections that are unlike the digits: a wrong setting is one line before anything is trained, a right one runs through."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from photographs import part
from PIL import Image
from test_photographs import SETTINGS, STAGES, run
from tiny import REPOSITORY, clone, set_params

from ldm.base.errors import InputError
from ldm.stages import shard

COUNT = 40


def pictures(folder: Path, change: Callable[[Image.Image, int], Image.Image] = lambda image, number: image,
             caption: Callable[[int], str | None] = lambda number: f"picture {number}", suffix: str = "png",
             count: int = COUNT, **options: Any) -> None:  # fmt: skip
    """40 pictures, each with a text file beside it if it has a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        change(part(number, 60, 40), number).save(folder / f"{number}.{suffix}", **options)
        if (text := caption(number)) is not None:
            (folder / f"{number}.txt").write_text(text)


def grey16(image: Image.Image, number: int) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def with_alpha(image: Image.Image, number: int) -> Image.Image:
    if number % 2:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def animated(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(COUNT):
        frames = [part(number + COUNT * i, 60, 40) for i in range(3)]
        frames[0].save(folder / f"{number}.gif", save_all=True, append_images=frames[1:])
        (folder / f"{number}.txt").write_text(f"picture {number}")


def panoramas(folder: Path) -> None:
    folder.mkdir(parents=True)
    wide = part(0, 400, 30).resize((4000, 300))
    for number in range(COUNT):
        turned = np.roll(np.asarray(wide), 100 * number, axis=1)
        Image.fromarray(turned).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"panorama {number}")


def tags(number: int) -> str:
    random = np.random.default_rng(number)
    return ", ".join(f"tag {tag}" for tag in random.permutation(1000))


class Odd(NamedTuple):
    write: Callable[[Path], None]
    wrong: dict[str, Any]  # a setting that does not suit it
    said: str  # the line that this stops with
    right: dict[str, Any] | None  # the settings that do


PATH = "photographs"  # as `SETTINGS` say
ODD = {
    "one class": Odd(
        lambda folder: pictures(folder / "cats", caption=lambda number: None),
        {"data": {"captions": "text files"}}, r"has no caption: no table is for it, and no \d+\.txt is beside it", {},
    ),
    "three images": Odd(
        lambda folder: pictures(folder, count=3),
        {}, r"its 3 readable images leave fewer than 2 for the .* split; add images or", None,
    ),
    "16-bit greyscale": Odd(
        lambda folder: pictures(folder, grey16), {"data": {"channels": 2}}, r"data\.channels: found 2", {"data": {"channels": 1}},
    ),
    "CMYK": Odd(
        lambda folder: pictures(folder, lambda image, number: image.convert("CMYK"), suffix="jpg"),
        {"data": {"min_side": 512}}, r"60 x 40 pixels, smaller than data\.min_side 512", {},
    ),
    "panoramas": Odd(
        panoramas, {"data": {"shapes": {"kind": "buckets", "step": 12}}}, r"shapes\.step 12 does not divide data\.image_size 32",
        {"data": {"shapes": {"kind": "buckets", "step": 8, "max_aspect": 16}}},
    ),
    "equal captions": Odd(
        lambda folder: pictures(folder, caption=lambda number: "a picture of something"),
        {"text": {"max_tokens": 4}}, r"1 of 1 distinct captions would be cut at text\.max_tokens 4", {},
    ),
    "no captions": Odd(
        lambda folder: pictures(folder, caption=lambda number: None),
        {}, r"40 images but no captions; add .*, or set data\.captions: none",
        {"data": {"captions": "none"}, "text": {"cache": False}},
    ),
    "1,000 tags": Odd(
        lambda folder: pictures(folder, caption=tags), {"text": {"max_tokens": 64}},
        r"40 of 40 distinct captions would be cut at text\.max_tokens 64; .*to 512 for all that the encoder reads",
        {"text": {"max_tokens": 64, "max_truncated_fraction": 1}, "cache_latents": {"shuffle_tags": 2, "shorten": True}},
    ),
    "mixed alpha": Odd(
        lambda folder: pictures(folder, with_alpha), {"data": {"background": "white"}}, r"data\.background: found 'white'",
        {"data": {"background": "#00ff00"}},
    ),
    "animated": Odd(
        animated, {"data": {"max_pixels": 100}}, r"60 x 40 pixels, more than data\.max_pixels 100",
        {"text": {"cache": False}},
    ),
}  # fmt: skip
FEW = {
    "data": {"val_fraction": 0.25, "test_fraction": 0.25},
    "evaluate": {"samples": 6},
    "text": {"max_tokens": 16},
    "train_vae": {"images": 64},
    "train_unet": {"images": 64},
}


def merged(*changes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for change in changes:
        for name, value in change.items():
            found[name] = {**found.get(name, {}), **value}
    return found


@pytest.mark.parametrize("name", ODD)
def test_a_wrong_setting_is_one_line_before_anything_is_trained(name: str, tmp_path: Path) -> None:
    odd = ODD[name]
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / file, tmp_path)
    odd.write(tmp_path / PATH)
    set_params(tmp_path, merged(SETTINGS, FEW, odd.wrong))
    with pytest.raises(InputError, match=odd.said) as caught:
        shard.run(tmp_path)
    assert "\n" not in str(caught.value)
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*") if path.parent.name != PATH}
    assert made <= {".ldm/quarantine.csv"}  # nothing half written


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name, odd in ODD.items() if odd.right is not None])
def test_a_right_setting_runs_through(name: str, tmp_path: Path) -> None:
    root, odd = clone(tmp_path / "project"), ODD[name]
    odd.write(root / PATH)
    set_params(root, merged(SETTINGS, FEW, odd.right or {}))
    done = run(root, *STAGES)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (root / "reports/report.html").is_file()
