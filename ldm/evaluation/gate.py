"""Does a challenger become champion? A paired one-sided t-test on held-out images, and the page that explains it.

Throughout, "nats" are a model's lower bound on log p(image | prompt), per image: higher is better. Both models are
read on the same images with the same noise, so that the differences vary far less than the values.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pandas import DataFrame, Series
from scipy.special import stdtrit

from ldm.report.page import card, page, table


@dataclass(frozen=True)
class Decision:
    """The outcome of the gate. Improvements are challenger − champion in nats per image; NaN where there are none."""

    promote: bool
    n: int  # images compared
    mean: float  # mean improvement
    se: float  # its standard error
    lower: float  # one-sided lower confidence limit of the mean improvement
    level: float  # chance of promoting a challenger that is no better
    reason: str


def decide(challenger: Series, champion: Series | None, level: float = 0.005) -> Decision:
    """Promote if the lower Student-t confidence limit of the mean paired improvement is above zero.

    `challenger` and `champion` hold nats by image key, in any order; keys that differ are a ValueError. Without a
    champion a challenger whose bound is finite is promoted.
    """
    if not 0 < level < 0.5:
        raise ValueError(f"level must be between 0 and 0.5, found {level}")
    _check_nats("challenger", challenger)
    if champion is not None:
        _check_nats("champion", champion)
        _check_keys(challenger, champion)

    def untested(promote: bool, reason: str) -> Decision:
        return Decision(promote, len(challenger), math.nan, math.nan, math.nan, level, reason)

    for name, nats in (("challenger", challenger), ("champion", champion)):
        if nats is not None and not np.isfinite(nats).all():
            key = nats.index[~np.isfinite(nats)][0]
            return untested(False, f"the {name}'s bound is not finite on image {key!r}")
    if champion is None and len(challenger):
        return untested(True, "no champion yet")
    if champion is None or len(challenger) < 2:
        return untested(False, f"{len(challenger)} image(s) cannot show an improvement: at least 2 are needed")

    gains = improvements(challenger, champion)
    n, mean = len(gains), float(gains.mean())
    se = float(gains.std(ddof=1)) / math.sqrt(n)
    lower = mean - float(stdtrit(n - 1, 1 - level)) * se  # Student-t quantile
    promote = lower > 0
    limit = f"the lower limit of the improvement, {lower:.3g} nats per image at level {level:g}, is"
    return Decision(promote, n, mean, se, lower, level, f"{limit} {'above' if promote else 'not above'} zero")


def improvements(challenger: Series, champion: Series) -> NDArray[np.float64]:
    """Challenger − champion in nats, image by image in the challenger's order."""
    gains: NDArray[np.float64] = challenger.to_numpy(np.float64) - champion.loc[challenger.index].to_numpy(np.float64)
    return gains


def decision_page(
    path: str | PathLike[str],
    decision: Decision,
    frame: DataFrame | None,
    *,
    challenger: str,
    champion: str | None,
) -> None:
    """Write the decision as one self-contained HTML page that also says it in plain words.

    `frame` has one row per image key and the columns `challenger` and `champion` (nats), or is None where nothing
    was compared. `challenger` and `champion` are the models' names, e.g. "ldm version 7".
    """
    title = f"{challenger} {'becomes' if decision.promote else 'does not become'} champion"
    body = [f"<p>{escape(_sentence(decision, frame, challenger, champion))}</p>"]
    if math.isfinite(decision.mean):
        body.append(f'<div class="cards">{"".join(_cards(decision))}</div>')
    if frame is not None and champion is not None and math.isfinite(decision.mean):
        gains = improvements(frame["challenger"], frame["champion"])
        body.append(f"<h2>Image by image</h2>{_histogram(gains, challenger)}")
        body.append(_largest_changes(frame, challenger, champion))
    Path(path).write_text(page(title, "\n".join(body)), encoding="utf-8", newline="\n")


def _check_nats(name: str, nats: Series) -> None:
    repeated = nats.index[nats.index.duplicated()]
    if len(repeated):
        raise ValueError(f"the {name} has image {repeated[0]!r} more than once")
    mean = nats[np.isfinite(nats)].mean()
    if mean > 0:
        raise ValueError(
            f"the {name}'s nats are {mean:.4g} on average: a lower bound on log p of 8-bit images cannot be "
            "positive, so these look like code lengths"
        )


def _check_keys(challenger: Series, champion: Series) -> None:
    for name, other, extra in (
        ("champion", "challenger", challenger.index.difference(champion.index)),
        ("challenger", "champion", champion.index.difference(challenger.index)),
    ):
        if len(extra):
            raise ValueError(
                f"image {extra[0]!r} has a value of the {other} but none of the {name} ({len(extra)} such): "
                "evaluate both on the same images"
            )


def _sentence(decision: Decision, frame: DataFrame | None, challenger: str, champion: str | None) -> str:
    if champion is None and decision.promote:
        return f"There was no champion yet, so {challenger} takes the place: its bound is finite on {decision.n} images."
    if champion is None or frame is None or not math.isfinite(decision.mean):
        outcome = "becomes champion" if decision.promote else "stays a challenger"
        return f"{challenger} {outcome}: {decision.reason}."
    share = abs(decision.mean / float(frame["champion"].mean()))
    fewer = "fewer" if decision.mean > 0 else "more"
    found = (
        f"On {decision.n} images that neither was trained on, {challenger} needs "
        f"{abs(decision.mean) / math.log(2):.3g} bits {fewer} per image than {champion} to describe them "
        f"({share:.2%} {fewer})."
    )
    odds = f"{1 / decision.level:.0f}"
    if decision.promote:
        return f"{found} Less than once in {odds} times would a model that is no better look this good, so it takes over."
    if decision.mean > 0:
        luck = f"A model that is no better would look this good by luck more than once in {odds} times"
        return f"{found} {luck}, so {champion} stays."
    return f"{found} So {champion} stays."


def _cards(decision: Decision) -> Iterable[str]:
    yield card(
        "Mean improvement",
        f"{decision.mean:+.3g} ± {decision.se:.2g}",
        "nats per image (± standard error)",
        f"Challenger minus champion, paired over {decision.n} images. Above zero, the challenger is better.",
    )
    yield card(
        "Lower confidence limit",
        f"{decision.lower:+.3g}",
        "nats per image",
        f"One-sided Student-t limit at level {decision.level:g} with {decision.n - 1} degrees of freedom. "
        "The challenger is promoted if it is above zero.",
    )


def _histogram(gains: NDArray[np.float64], challenger: str) -> str:
    """Paired improvements as an inline SVG figure."""
    edges, counts = _bins(gains)
    width, height, base = 640, 255, 200
    better, mean = float((gains > 0).mean()), float(gains.mean())

    def x(value: float) -> float:
        return float(10 + (value - edges[0]) / (edges[-1] - edges[0]) * (width - 20))

    bars = [
        f'<rect x="{x(left) + 0.5:.1f}" y="{base - bar:.1f}" width="{max(x(right) - x(left) - 1, 1):.1f}" '
        f'height="{bar:.1f}" fill="var(--{"good" if left + right > 0 else "bad"})"/>'
        for left, right, bar in zip(edges[:-1], edges[1:], counts / counts.max() * (base - 30), strict=True)
    ]
    mean_x = min(max(x(mean), 70), width - 70)  # the words stay inside the picture
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" style="width: 100%; max-width: {width}px" role="img" '
        f'aria-label="Histogram of paired improvements"><g font-size="19" fill="var(--soft)" text-anchor="middle">\n'
        f"{''.join(bars)}\n"
        f'<line x1="10" x2="{width - 10}" y1="{base}" y2="{base}" stroke="var(--line)"/>'
        f'{_mark(x(0), base)}<text x="{x(0):.1f}" y="{base + 22}">0</text>'
        f'{_mark(x(mean), base, dashes="6 4")}<text x="{mean_x:.1f}" y="15">mean {mean:+.3g}</text>'
        f'<text x="{width - 10}" y="{base + 46}" text-anchor="end">{edges[-1]:+.3g}</text>'
        f'<text x="10" y="{base + 46}" text-anchor="start">{edges[0]:+.3g}</text>'
        f'<text x="{width / 2}" y="{base + 46}">improvement, nats</text></g></svg>'
        f"<figcaption>{escape(challenger)} is better on {better:.0%} of the images (right of zero). Height: images."
        "</figcaption></figure>"
    )


def _bins(gains: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Edges of equal bins, one of them at zero, so that every bar is on one side of it; and the counts."""
    low, high = min(0.0, float(gains.min())), max(0.0, float(gains.max()))
    step = max(high - low, 1e-9) / min(30, max(8, 2 * math.isqrt(len(gains))))
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    edges = np.arange(first, last + 1, dtype=np.float64) * step
    return edges, np.histogram(gains.clip(edges[0], edges[-1]), edges)[0]


def _mark(x: float, base: float, dashes: str = "none") -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="22" y2="{base}" stroke="var(--ink)" stroke-width="1.5" '
        f'stroke-dasharray="{dashes}"/>'
    )


def _largest_changes(frame: DataFrame, challenger: str, champion: str) -> str:
    """The three images that gain and lose most, for those who want to look."""
    gains = (frame["challenger"] - frame["champion"]).sort_values(kind="stable", ascending=False)
    keys = list(dict.fromkeys([*gains.index[:3], *gains.index[-3:]]))
    rows = [(str(key), float(gains[key]), float(frame["challenger"][key]), float(frame["champion"][key])) for key in keys]
    changes = DataFrame(rows, columns=["image", "improvement (nats)", challenger, champion])
    return f"<h2>Largest gains and losses</h2>{table(changes)}"
