"""Pictures: the pixels put in are the pixels found, labels have room, bytes repeat."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ldm.evaluation.plots import image_grid, loss_curves

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def find(picture: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    """Where an RGB tile occurs in a picture, (row, column)."""
    rows, columns = np.nonzero((picture[: -tile.shape[0] + 1, : -tile.shape[1] + 1] == tile[0, 0]).all(axis=-1))
    height, width = tile.shape[:2]
    return [
        (int(r), int(c)) for r, c in zip(rows, columns, strict=True) if (picture[r : r + height, c : c + width] == tile).all()
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_in_its_place_pixel_for_pixel(tmp_path: Path, channels: int) -> None:
    images = noise(5, channels, 8, 6)
    image_grid(images, 3, tmp_path / "grid.png", row_labels=["first", "second"], column_labels=["a", "b", "c"], scale=4)
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    places = []
    for image in images:
        rgb = np.moveaxis(np.broadcast_to(image, (3, 8, 6)), 0, -1)
        found = find(picture, rgb.repeat(4, axis=0).repeat(4, axis=1))
        assert len(found) == 1
        places += found
    rows, columns = zip(*places, strict=True)
    assert len(set(rows)) == 2
    assert rows[0] == rows[1] == rows[2] < rows[3] == rows[4]
    assert columns[0] == columns[3] < columns[1] == columns[4] < columns[2]


def test_cells_are_about_64_pixels_by_default(tmp_path: Path) -> None:
    widths = {}
    for size in (8, 32, 64, 200):
        image_grid(noise(1, 1, size, size), 1, tmp_path / "one.png")
        widths[size] = Image.open(tmp_path / "one.png").width - 32
    assert widths == {8: 64, 32: 64, 64: 64, 200: 200}


def test_margins_are_white_and_long_labels_fit(tmp_path: Path) -> None:
    long = "an image showing the numeral four, drawn slowly with a broad pen on squared paper"
    image_grid(noise(2, 1, 8, 8), 1, tmp_path / "grid.png", row_labels=[long, "b"], column_labels=["reconstruction"])
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    for edge in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]):
        assert (edge == 255).all()
    assert (picture[:, 16:150] < 128).any()


def test_wrong_label_counts_and_images_are_refused(tmp_path: Path) -> None:
    as_floats: Any = noise(4, 1, 8, 8) / 255
    with pytest.raises(ValueError, match="1 row labels for 2 rows"):
        image_grid(noise(4, 1, 8, 8), 2, tmp_path / "x.png", row_labels=["a"])
    with pytest.raises(ValueError, match="3 column labels for 2 columns"):
        image_grid(noise(4, 1, 8, 8), 2, tmp_path / "x.png", column_labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="float64"):
        image_grid(as_floats, 2, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_same_input_same_bytes(tmp_path: Path) -> None:
    images = noise(4, 1, 8, 8)
    frame = pd.DataFrame({"images_seen": [0, 64, 128], "loss": [9.0, 3.0, 0.5], "val": [np.nan, 4.0, np.nan]})
    for name, size in (("a", 10), ("b", 20)):
        matplotlib.rcParams["font.size"] = size  # a reader's own matplotlibrc
        image_grid(images, 2, tmp_path / f"{name}-grid.png", row_labels=["seven", "8"])
        loss_curves(frame, tmp_path / f"{name}-loss.png", title="Loss", columns=["loss", "val"], y_label="nats")
    for kind in ("grid", "loss"):
        data = (tmp_path / f"a-{kind}.png").read_bytes()
        assert data == (tmp_path / f"b-{kind}.png").read_bytes()
        assert b"matplotlib" not in data.lower()


def test_curves_draw_something_and_name_a_missing_column(tmp_path: Path) -> None:
    frame = pd.DataFrame({"images_seen": range(100), "loss": np.linspace(-1, 1, 100)})
    loss_curves(frame, tmp_path / "loss.png", title="Loss", columns=["loss"])
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert (picture != 255).any()
    with pytest.raises(KeyError, match="kl"):
        loss_curves(frame, tmp_path / "x.png", title="Loss", columns=["kl"])
