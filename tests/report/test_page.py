"""The report as a reader's browser sees it: parsed, not matched as text."""

import math
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.value import Value
from ldm.report.page import write_page


def value(name: str, number: float, title: str, **more: Any) -> Value:
    return Value(**{"name": name, "value": number, "title": title, "reading": f"How to read {title}."} | more)


VALUES = [
    value("bits_per_dim", 2.34567, "bits/dim", error=0.0123, unit="bits/dim", headline=True, note="178 test images"),
    value("nats", -1664.9, "the bound", unit="nats"),
    value("psnr", 31.27, "PSNR", unit="dB", headline=True),
    value("prompt_accuracy", 0.985, "prompt accuracy", unit="share", headline=True),
    value("made_up", 0.00123456, "something new", headline=True),
]
VOID = {"meta", "img", "br", "line", "rect", "link", "input"}


class Reader(HTMLParser):
    """Collects tags and text and insists that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def write(folder: Path, **changes: Any) -> str:
    png = folder / "figure.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(png)
    given: dict[str, Any] = {
        "title": "Latent diffusion on digits",
        "about": "Measured on 178 test images.",
        "samples": [(np.full((1, 8, 8), 7, np.uint8), "a seven"), (np.full((3, 80, 80), 9, np.uint8), "a nine")],
        "values": VALUES,
        "pictures": {"train_vae": png},
        "warning": None,
        "settings": {"seed": 7, "unet": {"channels": (64, 128), "lr": 0.0003141592653}},
    }
    write_page(folder / "report.html", "report.html", **(given | changes))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_samples_come_first_then_headline_numbers_then_details(tmp_path: Path) -> None:
    text = Reader(write(tmp_path)).text
    parts = [
        "Latent diffusion on digits",
        "Measured on 178 test images.",
        "a seven",
        "a nine",
        "bits/dim 2.346 ± 0.012 178 test images How to read bits/dim.",
        "PSNR 31.27 dB",
        "prompt accuracy 98.5%",
        "something new 0.001235",
        "Training the autoencoder Mean loss since the last point, against images seen.",
        "All numbers",
        "the bound -1,665 nats How to read the bound. nats",
        "seed: 7",
        "lr: 0.0003141592653",
    ]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert text.count("How to read the bound.") == 1  # no headline number
    assert text.count("How to read PSNR.") == 2


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    source = write(tmp_path)
    tags = Reader(source).tags
    assert {tag for tag, _ in tags}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    for _, attributes in tags:
        assert not any(name.startswith("on") for name in attributes)
        assert "src" not in attributes or (attributes["src"] or "").startswith("data:image/png;base64,")
        assert "href" not in attributes
    assert "url(" not in source
    assert "@import" not in source


def test_pictures_are_embedded_whole(tmp_path: Path) -> None:
    images = [attributes for tag, attributes in Reader(write(tmp_path)).tags if tag == "img"]
    small, large, figure = (b64decode((image["src"] or "").partition(",")[2]) for image in images)
    assert figure == (tmp_path / "figure.png").read_bytes()
    assert (images[2]["width"], images[2]["height"]) == ("8", "8")
    tiles = [np.asarray(Image.open(BytesIO(png))) for png in (small, large)]
    assert (tiles[0] == 7).all() and tiles[0].shape == (8, 8) and (tiles[1] == 9).all() and tiles[1].shape == (80, 80, 3)
    assert images[0].get("class") == "small" and "class" not in images[1]  # enlarged without smoothing


def test_everything_is_escaped(tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>&amp;'
    source = write(
        tmp_path,
        title=nasty,
        about=nasty,
        samples=[(np.zeros((1, 8, 8), np.uint8), nasty)],
        values=[value(nasty, 1.0, nasty, unit="nasty", note=nasty, headline=True)],
        pictures={"latent_channels": tmp_path / "figure.png"},
        warning=nasty,
        settings={"nasty": nasty},
    )
    reader = Reader(source)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.text.count(nasty) >= 10


def test_a_number_that_is_not_finite_is_a_dash(tmp_path: Path) -> None:
    text = Reader(write(tmp_path, values=[value("nats", math.nan, "the bound", headline=True)], pictures={}, settings={})).text
    assert "the bound – How to read" in text
    for word in ("PSNR", "nan", "None"):
        assert word not in text


@pytest.mark.parametrize(
    ("number", "error", "unit", "expected"),
    [
        (2.88567, 0.00984, "bits/dim", ("2.8857 ± 0.0098", "bits/dim")),
        (0.068114, 0.083477, "", ("0.068 ± 0.083", "")),
        (-2048.197, 12.3, "nats", ("-2,048 ± 12", "nats")),
        (2.5, 0.0, "nats", ("2.5", "nats")),
        (41.4626, None, "dB", ("41.46", "dB")),
        (-133.415, None, "nats", ("-133.4", "nats")),
        (123456.7, None, "", ("123,457", "")),
        (0.99716, None, "share", ("99.7%", "")),
        (58.0, None, "title", ("58", "")),
        (math.nan, 0.1, "nats", ("–", "")),
    ],
)
def test_numbers_are_as_exact_as_they_are_known(number: float, error: float | None, unit: str, expected: tuple[str, str]) -> None:
    assert value("x", number, "title", error=error, unit=unit).shown() == expected


def test_same_input_same_bytes_and_no_paths(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first == second
    assert str(tmp_path) not in first


def test_a_missing_picture_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        write(tmp_path, pictures={"reconstructions": tmp_path / "gone.png"})
    assert not (tmp_path / "report.html").exists()
