"""Charts for reports, as PNG files or SVG texts. Same input, same bytes: no dates, no version of the writer, no user's style."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from pandas import DataFrame, Series

COLOURS = ("#2563c9", "#d9622b", "#2e8b57", "#8a4fbf", "#7a7a80")
INK, GRID, GOOD, BAD = "#1d1d22", "#e6e6ea", "#2563c9", "#c2571f"
THEME = {INK: "var(--ink)", GRID: "var(--line)", GOOD: "var(--good)", BAD: "var(--bad)"}  # defined in templates/base.html
SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "ldm", "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
       "xtick.color": INK, "ytick.color": INK}  # fmt: skip
NUMBERS, WHOLE = FuncFormatter(lambda value, _: f"{value:,g}"), FuncFormatter(lambda value, _: f"{value:,.0f}")


def loss_curves(frame: DataFrame, path: Path, *, title: str, columns: Sequence[str], y_label: str) -> None:
    """Write columns of `frame` against its column `images` as one PNG; rows without a value are left out of a curve."""
    with _chart(path, 3.8, title, "images", y_label) as axes:
        for column, colour in zip(columns, cycle(COLOURS), strict=False):
            curve = frame[["images", column]].dropna()
            style: Any = {"linewidth": 1.6, "marker": "o" if len(curve) <= 12 else "", "markersize": 4}
            axes.plot(curve.images, curve[column], color=colour, label=column, **style)
        values = frame[list(columns)].to_numpy(np.float64)
        values = values[np.isfinite(values)]
        if len(values) and values.min() > 0 and values.max() > 10 * values.min():  # else on a linear axis
            axes.set(yscale="log")
            axes.yaxis.set(major_formatter=NUMBERS, minor_formatter=NullFormatter())
        axes.xaxis.set(major_formatter=WHOLE, major_locator=MaxNLocator(6, integer=True))
        if len(columns) > 1:
            axes.legend(frameon=False)


def rate_distortion(frame: DataFrame, path: Path, *, title: str) -> None:
    """Write distortion -log p(x | z) against rate KL(q(z | x) || p(z)), both in bits/dim, as one PNG.

    Columns `rate_bits_per_dim`, `distortion_bits_per_dim` and `series`, a curve each. Grey lines of slope -1 join what has the
    same sum, the code length -ELBO (Alemi et al. 2018, "Fixing a broken ELBO"): the lower left is better.
    """
    with _chart(path, 4.8, title, "rate: KL, bits/dim", "distortion: −log p(x | z), bits/dim") as axes:
        for (label, curve), colour in zip(frame.groupby("series", sort=False), cycle(COLOURS), strict=False):
            curve = curve.sort_values("rate_bits_per_dim", kind="stable")
            style: Any = {"linewidth": 1.6, "linestyle": "-" if len(curve) > 1 else "none", "marker": "o", "markersize": 5}
            axes.plot(curve.rate_bits_per_dim, curve.distortion_bits_per_dim, color=colour, label=str(label), **style)
        (left, right), (bottom, top) = _room(frame.rate_bits_per_dim), _room(frame.distortion_bits_per_dim)
        axes.set(xlim=(left, right), ylim=(bottom, top))
        label = "same sum, −ELBO"
        for total in MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(left + bottom, right + top):
            first, last = max(left, total - top), min(right, total - bottom)
            if last - first < 0.08 * (right - left):  # a corner, or not in sight
                continue
            axes.plot([first, last], [total - first, total - last], color="#d4d4da", linewidth=0.9, zorder=0, label=label)
            label = "_"  # the others are not in the legend
            at = first + 0.03 * (right - left)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            axes.annotate(f"{total:g}", (at, total - at), ha="center", va="center", fontsize=8, color="#8a8a92", bbox=box)
        axes.grid(False)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9)


def _room(values: Series) -> tuple[float, float]:
    """Limits of an axis with some room around the values, which may be one, and none below 0 unless they are."""
    low, high = float(values.min()), float(values.max())
    room = max(0.12 * (high - low), 0.1)
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def channel_bars(values: Sequence[float], path: Path, *, title: str, low: float = 0.0) -> None:
    """Write one bar a latent channel, KL in nats per image, as one PNG; those below `low` (collapsed) stand out."""
    channels = range(len(values))
    colours = [COLOURS[1] if value < low else COLOURS[0] for value in values]
    with _chart(path, 0.86 + 0.3 * len(values), title, "KL, nats per image", "") as axes:
        axes.barh(channels, values, color=colours, height=0.6)
        style: Any = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        for channel, value, colour in zip(channels, values, colours, strict=True):
            axes.annotate(f"{value:.3g}", (value, channel), (4, 0), color=colour, **style)
        if low > 0:
            axes.axvline(low, color=COLOURS[1], linewidth=1.0, linestyle="--", label=f"collapsed below {low:g}")
            axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, fontsize=9)
        axes.set(xlim=(0, 1.12 * max(*values, low, 1e-9)), ylim=(len(values) - 0.4, -0.6))
        axes.set_yticks(channels, [f"channel {channel}" for channel in channels])
        axes.grid(False, axis="y")


@matplotlib.rc_context(matplotlib.rcParamsDefault)
def traces(values: np.ndarray, path: Path, *, title: str, names: Sequence[str], y_label: str) -> None:
    """Write `values` (chains, draws, quantities) against the draws as one PNG: a panel for each quantity, which has a name."""
    count = values.shape[2]
    figure = Figure(figsize=(7.5, 1.7 * count + 0.6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    for number, axes in enumerate(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]):
        for chain, colour in zip(values[..., number], cycle(COLOURS), strict=False):
            axes.plot(chain, color=colour, linewidth=1.2)
        _dress(axes, "", "draw, a line for each chain" if number == count - 1 else "", y_label)
        axes.set_title(names[number], loc="left", fontsize=9)
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _save(figure, path)


def histograms(series: Mapping[str, np.ndarray], path: Path, *, title: str, x_label: str) -> None:
    """Write the distributions of several sets of positive numbers as one PNG, on the same bins of a logarithmic axis."""
    everything = np.concatenate(list(series.values()))
    edges = np.geomspace(everything.min() / 1.05, everything.max() * 1.05, 51)
    with _chart(path, 3.4, title, x_label, "images") as axes:
        for (label, values), colour in zip(series.items(), cycle(COLOURS), strict=False):
            counts, _ = np.histogram(values, edges)
            axes.stairs(counts, edges, color=colour, fill=True, alpha=0.35)
            axes.stairs(counts, edges, color=colour, linewidth=1.4, label=label)
        axes.set(xscale="log")
        axes.xaxis.set(major_formatter=NUMBERS, minor_formatter=NullFormatter())
        axes.legend(frameon=False)


@matplotlib.rc_context(matplotlib.rcParamsDefault | SVG)
def differences(values: np.ndarray, *, x_label: str) -> str:
    """A histogram of differences, those above zero in another colour, as an SVG in the colours of the page around it."""
    low, high, mean = min(0.0, float(values.min())), max(0.0, float(values.max())), float(values.mean())
    step = max(high - low, 1e-9) / min(30, max(8, 2 * math.isqrt(len(values))))
    first = math.floor(low / step)
    edges = np.arange(first, max(math.ceil(high / step), first + 1) + 1) * step  # one of them is zero
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    figure = Figure(figsize=(5.0, 2.8), layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, "", x_label, "images")
    colours = [GOOD if middle > 0 else BAD for middle in edges[:-1] + step / 2]
    axes.bar(edges[:-1], counts, 0.94 * step, align="edge", color=colours)
    axes.axvline(0, color=INK, linewidth=1.0)
    axes.axvline(mean, color=INK, linewidth=1.2, linestyle="--", label=f"mean {mean:+.3g}")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=10)
    return _svg(figure)


@contextmanager
def _chart(path: Path, height: float, title: str, x_label: str, y_label: str) -> Iterator[Axes]:
    """One panel, `height` inches high, that is written to `path` when it has been drawn."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(7.5, height), layout="constrained")
        axes = figure.add_subplot()
        _dress(axes, title, x_label, y_label)
        yield axes
        _save(figure, path)


def _dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set(xlabel=x_label, ylabel=y_label, axisbelow=True)
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=160, metadata={"Software": None})


def _svg(figure: Figure) -> str:
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    return text[text.index("<svg") :]
