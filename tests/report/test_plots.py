"""Pictures: the pixels put in are the pixels found, labels have room, bytes repeat."""

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ldm.report import plots
from ldm.report.grid import image_grid
from ldm.report.plots import channel_bars, differences, histograms, loss_curves, rate_distortion, traces

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


TRADES = pd.DataFrame(
    {
        "series": ["beta", "beta", "other", "beta"],
        "rate_bits_per_dim": [0.9, 0.2, 1.4, 0.5],
        "distortion_bits_per_dim": [1.9, 3.6, 2.1, 2.5],
    }
)
CHAINS = np.random.default_rng(1).standard_normal((2, 6, 3))
NAMES = ["one", "two", "three", "four"]
SCORES = {"held out": np.linspace(0.1, 1, 40), "noise": np.linspace(2, 9, 30)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


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
    image_grid(images, 3, tmp_path / "grid.png", row_labels=["first", "second"], column_labels=["a", "b", "c"])
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    places = []
    for image in images:
        rgb = np.moveaxis(np.broadcast_to(image, (3, 8, 6)), 0, -1)
        found = find(picture, rgb.repeat(8, axis=0).repeat(8, axis=1))  # to 64 pixels
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


def test_every_image_keeps_its_pixels_above_its_own_caption(tmp_path: Path) -> None:
    images = noise(4, 1, 32, 32)
    captions = ["a scan of the numeral seven", "8", "a photograph of a very small dog in long grass", "b"]
    image_grid(images, 2, tmp_path / "plain.png")
    image_grid(images, 2, tmp_path / "captions.png", captions=captions)
    picture = np.asarray(Image.open(tmp_path / "captions.png").convert("RGB"))
    tiles = [np.moveaxis(np.broadcast_to(image, (3, 32, 32)), 0, -1).repeat(2, 0).repeat(2, 1) for image in images]
    places = [found for tile in tiles for found in find(picture, tile)]
    assert len(places) == 4 and places[0][0] == places[1][0] < places[2][0] and places[0][1] == places[2][1] < places[1][1]
    for row, column in places:
        below = picture[row + 66 : row + 84, column : column + 64]
        assert (below < 128).any() and (below > 200).any()
    assert (picture[places[2][0] - 8 : places[2][0] - 1] == 255).all()  # a caption does not touch the next row
    with pytest.raises(ValueError, match="1 captions, expected 4"):
        image_grid(images, 2, tmp_path / "x.png", captions=["one"])


def test_wrong_label_counts_and_images_are_refused(tmp_path: Path) -> None:
    as_floats: Any = noise(4, 1, 8, 8) / 255
    with pytest.raises(ValueError, match="1 row labels, expected 2"):
        image_grid(noise(4, 1, 8, 8), 2, tmp_path / "x.png", row_labels=["a"])
    with pytest.raises(ValueError, match="3 column labels, expected 2"):
        image_grid(noise(4, 1, 8, 8), 2, tmp_path / "x.png", column_labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="float64"):
        image_grid(as_floats, 2, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_same_input_same_bytes(tmp_path: Path) -> None:
    images = noise(4, 1, 8, 8)
    frame = pd.DataFrame({"images": [0, 64, 128], "loss": [9.0, 3.0, 0.5], "val": [np.nan, 4.0, np.nan]})
    for name, size in (("a", 10), ("b", 20)):
        matplotlib.rcParams["font.size"] = size  # a reader's own matplotlibrc
        image_grid(images, 2, tmp_path / f"{name}-grid.png", row_labels=["seven", "8"])
        loss_curves(frame, tmp_path / f"{name}-loss.png", title="Loss", columns=["loss", "val"], y_label="nats")
        rate_distortion(TRADES, tmp_path / f"{name}-rate.png", title="Rate and distortion")
        channel_bars([3.0, 0.01], tmp_path / f"{name}-bars.png", title="KL", low=0.5)
        traces(CHAINS, tmp_path / f"{name}-traces.png", title="Traces", names=NAMES, y_label="nats")
        histograms(SCORES, tmp_path / f"{name}-scores.png", title="Scores", x_label="nats")
    for kind in ("grid", "loss", "rate", "bars", "traces", "scores"):
        data = (tmp_path / f"a-{kind}.png").read_bytes()
        assert data == (tmp_path / f"b-{kind}.png").read_bytes()
        assert b"matplotlib" not in data.lower()


def test_curves_draw_something_and_name_a_missing_column(tmp_path: Path) -> None:
    frame = pd.DataFrame({"images": range(100), "loss": np.linspace(-1, 1, 100)})
    loss_curves(frame, tmp_path / "loss.png", title="Loss", columns=["loss"], y_label="")
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert (picture != 255).any()
    with pytest.raises(KeyError, match="kl"):
        loss_curves(frame, tmp_path / "x.png", title="Loss", columns=["kl"], y_label="")


def test_rates_are_sorted_into_labelled_curves_over_lines_of_equal_sum(tmp_path: Path, drawn: list[Figure]) -> None:
    rate_distortion(TRADES, tmp_path / "x.png", title="Trade")
    (axes,) = drawn[0].axes
    curves = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines if line.get_marker() == "o"}
    np.testing.assert_allclose(curves["beta"], [[0.2, 3.6], [0.5, 2.5], [0.9, 1.9]])
    np.testing.assert_allclose(curves["other"], [[1.4, 2.1]])
    lines = [np.asarray(line.get_xydata()) for line in axes.lines if line.get_marker() != "o"]
    totals = [float(text.get_text()) for text in axes.texts]
    assert len(lines) == len(totals) >= 4
    for ends, total in zip(lines, totals, strict=True):
        np.testing.assert_allclose(ends.sum(axis=1), total)
    assert min(totals) < 2.8 < 3.8 < max(totals)  # the sums of the points lie between
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["beta", "other", "same sum, −ELBO"]


def test_one_point_of_no_rate_has_room_around_it(tmp_path: Path, drawn: list[Figure]) -> None:
    point = pd.DataFrame({"series": ["a"], "rate_bits_per_dim": [0.0], "distortion_bits_per_dim": [5.0]})
    rate_distortion(point, tmp_path / "x.png", title="One")
    (axes,) = drawn[0].axes
    assert axes.get_xlim() == pytest.approx((0, 0.1))
    assert axes.get_ylim() == pytest.approx((4.9, 5.1))
    assert axes.texts


def test_a_channel_below_the_line_stands_out(tmp_path: Path, drawn: list[Figure]) -> None:
    channel_bars([30.0, 0.05, 12.5], tmp_path / "x.png", title="KL", low=0.64)
    channel_bars(np.arange(64.0).tolist(), tmp_path / "x.png", title="KL")
    few, many = (figure.axes[0] for figure in drawn)
    widths, colours = zip(*((bar.get_width(), bar.get_facecolor()) for bar in few.patches), strict=True)
    assert widths == (30.0, 0.05, 12.5)
    assert colours[0] == colours[2] != colours[1]
    assert [text.get_text() for text in few.texts] == ["30", "0.05", "12.5"]
    assert [label.get_text() for label in few.get_yticklabels()] == ["channel 0", "channel 1", "channel 2"]
    assert few.get_ylim()[0] > few.get_ylim()[1]  # the first channel is at the top
    assert len(many.patches) == len(many.texts) == 64
    assert len({bar.get_facecolor() for bar in many.patches}) == 1


def test_a_bar_is_as_thick_for_one_channel_as_for_many(tmp_path: Path, drawn: list[Figure]) -> None:
    for count in (1, 4, 64):
        channel_bars([227.0] * count, tmp_path / "x.png", title="KL", low=6.4)
    for figure in drawn:
        figure.draw_without_rendering()
        heights = [bar.get_window_extent().height / figure.dpi for bar in figure.axes[0].patches]
        assert heights == pytest.approx([0.18] * len(heights), abs=0.03)  # inches


def test_differences_are_counted_on_their_side_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_svg", lambda figure: figures.append(figure) or "")
    values = RANDOM.normal(0.4, 5, 100)
    differences(values, x_label="nats")
    (axes,) = figures[0].axes
    sides = {side: sum(bar.get_height() for bar in axes.patches if (bar.get_x() < -1e-9) == side) for side in (True, False)}
    assert sides == {True: (values < 0).sum(), False: (values >= 0).sum()}
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2
    mean = next(line for line in axes.lines if line.get_label() == f"mean {values.mean():+.3g}")
    assert np.asarray(mean.get_xdata()) == pytest.approx(values.mean())


def test_differences_take_the_colours_of_the_page_and_no_date() -> None:
    svg = differences(np.array([-1.0, 2.0, 0.5]), x_label="nats")
    assert svg == differences(np.array([-1.0, 2.0, 0.5]), x_label="nats")
    assert svg.startswith("<svg") and "<text" in svg and "<metadata" not in svg and "Created with" not in svg
    assert all(f"var(--{name})" in svg for name in ("ink", "line", "good", "bad"))
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()


def test_a_panel_for_each_quantity_and_a_line_for_each_chain(tmp_path: Path, drawn: list[Figure]) -> None:
    traces(CHAINS, tmp_path / "x.png", title="Traces", names=NAMES, y_label="nats")
    assert len(drawn[0].axes) == 3
    for number, axes in enumerate(drawn[0].axes):
        lines = [np.asarray(line.get_xydata()) for line in axes.lines]
        np.testing.assert_allclose([line[:, 1] for line in lines], CHAINS[..., number])
        assert all(line[:, 0].tolist() == list(range(6)) for line in lines)
        assert axes.get_title(loc="left") == NAMES[number]


def test_distributions_share_their_bins_and_count_everything(tmp_path: Path, drawn: list[Figure]) -> None:
    histograms(SCORES, tmp_path / "x.png", title="Scores", x_label="nats")
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(SCORES)
    outlines = [patch.get_data() for patch in axes.patches if not patch.get_fill()]
    assert [outline.values.sum() for outline in outlines] == [40, 30]
    np.testing.assert_array_equal(outlines[0].edges, outlines[1].edges)
    assert outlines[0].edges[0] < 0.1 and outlines[0].edges[-1] > 9
    assert axes.get_xscale() == "log"


def test_traces_and_distributions_have_a_readers_size(tmp_path: Path) -> None:
    for count in (1, 4):
        traces(CHAINS[..., :1].repeat(count, 2), tmp_path / "traces.png", title="Traces", names=NAMES, y_label="nats")
        width, height = Image.open(tmp_path / "traces.png").size
        assert width == 1200 and height == pytest.approx(160 * (1.7 * count + 0.6), abs=1)
    histograms({"one": np.ones(5)}, tmp_path / "scores.png", title="Scores", x_label="nats")  # of no width at all
    assert Image.open(tmp_path / "scores.png").size == (1200, 544)
