"""The report as a reader's browser sees it: parsed, not matched as text."""

from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.report.page import Figure, write_report

METRICS: dict[str, Any] = {
    "bits_per_dim": 2.34567,
    "bits_per_dim_se": 0.0123,
    "nats": -1664.9,
    "reconstruction_nats": -1500.2,
    "entropy_nats": 50.3,
    "prior_nats": -215.0,
    "elbo_bits_per_dim": 2.51,
    "psnr": 31.27,
    "fd": 1.2345,
    "fd_floor": 0.456,
    "fd_name": "pca32",
    "fd_n": 178,
    "fd_dim": 32,
    "prompt_accuracy": 0.985,
    "unseen_prompt_accuracy": 0.97,
    "judge_accuracy": 0.989,
    "variance_ratio": 0.914,
    "test_images": 178,
    "image": "32x32x1, lanczos",
}
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
        "metrics": METRICS,
        "figures": [Figure("Samples", "One row per prompt.", png)],
        "settings": {"seed": 7, "unet": {"channels": [64, 128], "lr": 0.0003141592653}},
    }
    write_report(folder / "report.html", **(given | changes))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_headline_terms_and_settings_are_there_in_order(tmp_path: Path) -> None:
    text = Reader(write(tmp_path)).text
    parts = [
        "2.346 ± 0.012 bits/dim",
        "98.5%",
        "97.0%",
        "0.91 × real",
        "FD-pca32",
        "N = 178, d = 32, real-against-real floor 0.456",
        "31.3 dB",
        "-1,500.2",
        "50.3",
        "-1,664.9",
        "2.510 bits/dim",
        "One row per prompt.",
        "unet.channels 64, 128",
        "unet.lr 0.0003141592653",
    ]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)


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
    assert len(images) == 1
    data = b64decode((images[0]["src"] or "").partition(",")[2])
    assert data == (tmp_path / "figure.png").read_bytes()
    assert (images[0]["width"], images[0]["height"]) == ("8", "8")


def test_everything_is_escaped(tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>&amp;'
    source = write(
        tmp_path,
        title=nasty,
        metrics=METRICS | {"image": nasty, "fd_name": nasty},
        figures=[Figure(nasty, nasty, tmp_path / "figure.png")],
        settings={nasty: {nasty: [nasty]}},
    )
    reader = Reader(source)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.text.count(nasty) >= 10
    assert next(attributes["alt"] for tag, attributes in reader.tags if tag == "img") == nasty


def test_absent_metrics_leave_no_card(tmp_path: Path) -> None:
    source = write(tmp_path, metrics={"bits_per_dim": 3.0, "test_images": 12}, figures=[], settings={})
    text = Reader(source).text
    assert "3.000 bits/dim" in text
    for word in ("Prompts followed", "FD-", "PSNR", "Variety", "What the bound is made of", "nan", "None"):
        assert word not in text


def test_same_input_same_bytes_and_no_paths(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first == second
    assert str(tmp_path) not in first


def test_a_missing_picture_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        write(tmp_path, figures=[Figure("Samples", "", tmp_path / "gone.png")])
    assert not (tmp_path / "report.html").exists()
