"""The page of a decision, as a reader's browser sees it: parsed, not matched as text."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ldm.evaluation.gate import Decision, decide
from ldm.report.page import decision_page

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def reseed() -> None:
    """Each test draws the same numbers whichever tests run before it."""
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state


def nats(values: list[float] | np.ndarray) -> pd.Series:
    return pd.Series(values, index=[f"{i:03}" for i in range(len(values))], dtype=float)


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.paths: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "path":
            self.paths.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def heights(self, kind: str) -> float:
        """The sum of the heights of all bars of a colour."""
        bars = [path["d"] or "" for path in self.paths if (path.get("style") or "").startswith(f"fill: var(--{kind})")]
        ends = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", bar)] for bar in bars]
        return sum(max(ys) - min(ys) for ys in ends)


@pytest.mark.parametrize(
    ("gain", "badge", "title", "words"),
    [
        (4.0, "promoted", "ldm version 7 becomes champion", "bits fewer per image than ldm version 6"),
        (
            0.3,
            "not promoted",
            "ldm version 7 does not become champion",
            "luck more than once in 200 times, so ldm version 6 stays",
        ),
        (-4.0, "not promoted", "ldm version 7 does not become champion", "bits more per image than ldm version 6"),
    ],
)
def test_the_page_says_first_what_was_decided_and_why(tmp_path: Path, gain: float, badge: str, title: str, words: str) -> None:
    champion = nats(RANDOM.normal(-1500, 200, 100))
    noise = RANDOM.normal(0, 5, 100)
    challenger = champion + (noise - noise.mean() + gain)
    decision = decide(challenger, champion)
    frame = pd.DataFrame({"challenger": challenger, "champion": champion})
    decision_page(tmp_path / "d.html", decision, frame, challenger="ldm version 7", champion="ldm version 6")
    page = Page(tmp_path / "d.html")
    body = page.text.partition("override the gate")[0].rpartition("} } ")[2]  # after the style sheet
    assert body.startswith(f"{badge} {title} On 100 images that neither was trained on")
    assert body.index(words) < body.index("Mean improvement") < body.index("Image by image")
    assert f"{decision.lower:+.3g}" in page.text
    assert str(frame.index[(challenger - champion).argmax()]) in page.text
    assert "script" not in page.tags
    # the heights of the bars, by colour, are the shares of images on either side of zero
    gains = (challenger - champion).to_numpy()
    assert page.heights("good") / (page.heights("good") + page.heights("bad")) == pytest.approx((gains > 0).mean(), abs=0.01)
    assert f"{(gains > 0).mean():.0%}" in page.text


def test_a_first_champion_and_nasty_names(tmp_path: Path) -> None:
    decision = decide(nats([-1500.0, -1400.0]), None)
    decision_page(tmp_path / "d.html", decision, None, challenger="<b>ldm</b> version 1", champion=None)
    page = Page(tmp_path / "d.html")
    assert "There was no champion yet, so <b>ldm</b> version 1 takes the place" in page.text
    assert "nan" not in page.text
    assert "b" not in page.tags


def test_models_that_were_not_compared_have_a_page_that_says_why_and_what_to_do(tmp_path: Path) -> None:
    reason = "not comparable: its images are 8x8x1, those of the champion 8x8x3; `ldm registry promote 7` decides by hand"
    decision_page(tmp_path / "d.html", Decision(False, 0.005, reason), None, challenger="ldm version 7", champion="ldm version 6")
    page = Page(tmp_path / "d.html")
    assert "not compared ldm version 7 does not become champion Not comparable: its images are 8x8x1" in page.text
    assert "ldm registry promote 7 decides by hand. ldm version 6 stays champion" in page.text
    assert "nan" not in page.text and "Image by image" not in page.text and "code" in page.tags


def test_a_champion_that_stays_and_a_decision_of_before(tmp_path: Path) -> None:
    for reason, champion, expected in (
        (
            "version 3 is the champion already",
            "m version 3",
            "champion m version 3 stays champion Version 3 is the champion already.",
        ),
        ("decided before", "m version 2", "not promoted m version 3 does not become champion Decided before. m version 2 stays"),
    ):
        decision_page(tmp_path / "d.html", Decision(False, 0.005, reason), None, challenger="m version 3", champion=champion)
        assert expected in Page(tmp_path / "d.html").text


def test_a_bound_that_is_not_finite_is_no_comparison(tmp_path: Path) -> None:
    for champion, stays in ((nats([-2.0, -2.0]), "ldm version 1 stays champion"), (None, "There is no champion")):
        decision = decide(nats([-1.0, float("nan")]), champion)
        name = None if champion is None else "ldm version 1"
        decision_page(tmp_path / "d.html", decision, None, challenger="ldm version 2", champion=name)
        text = Page(tmp_path / "d.html").text
        assert "not promoted" in text and "The challenger's bound is not finite on image '001'" in text and stays in text


@pytest.mark.parametrize("gains", [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-2.0, -2.0], [1e-12, -1e-12]])
def test_degenerate_differences(tmp_path: Path, gains: list[float]) -> None:
    champion = nats([-1500.0] * len(gains))
    frame = pd.DataFrame({"challenger": champion + gains, "champion": champion})
    decision = decide(frame["challenger"], frame["champion"])
    decision_page(tmp_path / "d.html", decision, frame, challenger="a", champion="b")
    assert "nan" not in Page(tmp_path / "d.html").text
