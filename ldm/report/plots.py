"""Charts for reports, as PNG files or SVG texts. Same input, same bytes: no dates, no version of the writer, no user's style."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from pandas import DataFrame, Series

COLOURS = ("#2563c9", "#d9622b", "#2e8b57", "#8a4fbf", "#7a7a80")
INK, GRID, GOOD, BAD = "#1d1d22", "#e6e6ea", "#2563c9", "#c2571f"
THEME = {INK: "var(--ink)", GRID: "var(--line)", GOOD: "var(--good)", BAD: "var(--bad)"}  # defined in templates/base.html
STYLE: Any = matplotlib.rcParamsDefault | {
    "axes.axisbelow": True, "axes.grid": True, "axes.prop_cycle": cycler(color=COLOURS), "axes.spines.right": False,
    "axes.spines.top": False, "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold",
    "figure.constrained_layout.use": True, "grid.color": GRID, "legend.frameon": False, "lines.linewidth": 1.6,
    "lines.markersize": 5,
}  # fmt: skip
SVG = STYLE | {"svg.fonttype": "none", "svg.hashsalt": "ldm"}
SVG |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
NUMBERS, WHOLE = FuncFormatter(lambda value, _: f"{value:,g}"), FuncFormatter(lambda value, _: f"{value:,.0f}")


def loss_curves(frame: DataFrame, path: Path, *, title: str, columns: Sequence[str], y_label: str) -> None:
    """Write columns of `frame` against its column `images` as one PNG; rows without a value are left out of a curve."""
    with _chart(path, 3.8, title, "images", y_label) as axes:
        for column in columns:
            curve = frame[["images", column]].dropna()
            axes.plot(curve.images, curve[column], marker="o" if len(curve) <= 12 else "", label=column)
        values = frame[list(columns)].to_numpy(np.float64)
        values = values[np.isfinite(values)]
        if len(values) and values.min() > 0 and values.max() > 10 * values.min():  # else on a linear axis
            axes.set(yscale="log")
            axes.yaxis.set(major_formatter=NUMBERS, minor_formatter=NullFormatter())
        axes.xaxis.set(major_formatter=WHOLE, major_locator=MaxNLocator(6, integer=True))
        if len(columns) > 1:
            axes.legend()


def rate_distortion(frame: DataFrame, path: Path, *, title: str) -> None:
    """Write distortion against rate, bits/dim, a curve a `series`, over lines of equal sum, -ELBO (Alemi et al. 2018)."""
    with _chart(path, 4.8, title, "rate: KL, bits/dim", "distortion: −log p(x | z), bits/dim") as axes:
        for label, curve in frame.groupby("series", sort=False):
            curve = curve.sort_values("rate_bits_per_dim", kind="stable")
            style = "-" if len(curve) > 1 else "none"
            axes.plot(curve.rate_bits_per_dim, curve.distortion_bits_per_dim, marker="o", linestyle=style, label=str(label))
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
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9)


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
        axes.bar_label(axes.barh(channels, values, color=colours, height=0.6), fmt="{:.3g}", padding=4, fontsize=9)
        if low > 0:
            axes.axvline(low, color=COLOURS[1], linewidth=1.0, linestyle="--", label=f"collapsed below {low:g}")
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, fontsize=9)
        axes.set(xlim=(0, 1.12 * max(*values, low, 1e-9)), ylim=(len(values) - 0.4, -0.6))
        axes.set_yticks(channels, [f"channel {channel}" for channel in channels])
        axes.grid(False, axis="y")


@matplotlib.rc_context(STYLE)
def traces(values: np.ndarray, path: Path, *, title: str, names: Sequence[str], y_label: str) -> None:
    """Write `values` (chains, draws, quantities) against the draws as one PNG: a panel for each quantity, which has a name."""
    count = values.shape[2]
    figure = Figure(figsize=(7.5, 1.7 * count + 0.6))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    for axes, chains, name in zip(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0], values.T, names, strict=False):
        axes.plot(chains, linewidth=1.2)
        axes.set_title(name, fontsize=9, fontweight="normal")
        axes.set(ylabel=y_label)
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    axes.set(xlabel="draw, a line for each chain")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _save(figure, path)


def histograms(series: Mapping[str, np.ndarray], path: Path, *, title: str, x_label: str) -> None:
    """Write the distributions of several sets of positive numbers as one PNG, on the same bins of a logarithmic axis."""
    everything = np.concatenate(list(series.values()))
    edges = np.geomspace(everything.min() / 1.05, everything.max() * 1.05, 51)
    with _chart(path, 3.4, title, x_label, "images") as axes:
        for (label, values), colour in zip(series.items(), COLOURS, strict=False):
            counts, _ = np.histogram(values, edges)
            axes.stairs(counts, edges, color=colour, fill=True, alpha=0.35)
            axes.stairs(counts, edges, color=colour, linewidth=1.4, label=label)
        axes.set(xscale="log")
        axes.xaxis.set(major_formatter=NUMBERS, minor_formatter=NullFormatter())
        axes.legend()


@matplotlib.rc_context(SVG)
def differences(values: np.ndarray, *, x_label: str) -> str:
    """A histogram of differences, those above zero in another colour, as an SVG in the colours of the page around it."""
    low, high, mean = min(0.0, float(values.min())), max(0.0, float(values.max())), float(values.mean())
    step = max(high - low, 1e-9) / min(30, max(8, 2 * math.isqrt(len(values))))
    first = math.floor(low / step)
    edges = np.arange(first, max(math.ceil(high / step), first + 1) + 1) * step  # one of them is zero
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    figure = Figure(figsize=(5.0, 2.8))
    axes = figure.add_subplot(xlabel=x_label, ylabel="images")
    colours = [GOOD if middle > 0 else BAD for middle in edges[:-1] + step / 2]
    axes.bar(edges[:-1], counts, 0.94 * step, align="edge", color=colours)
    axes.axvline(0, color=INK, linewidth=1.0)
    axes.axvline(mean, color=INK, linewidth=1.2, linestyle="--", label=f"mean {mean:+.3g}")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=10)
    return _svg(figure)


@contextmanager
def _chart(path: Path, height: float, title: str, x_label: str, y_label: str) -> Iterator[Axes]:
    """One panel, `height` inches high, that is written to `path` when it has been drawn."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, height))
        yield figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=160, metadata={"Software": None})


def _svg(figure: Figure) -> str:
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    return text[text.index("<svg") :]
