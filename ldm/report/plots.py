"""Pictures that go into a README or a report. Same input, same bytes: no dates, no version of the writer."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from os import PathLike

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from pandas import DataFrame, Series

COLOURS = ("#2563c9", "#d9622b", "#2e8b57", "#8a4fbf", "#7a7a80")


@matplotlib.rc_context(matplotlib.rcParamsDefault)  # not the user's own style
def loss_curves(
    frame: DataFrame,
    path: str | PathLike[str],
    *,
    title: str,
    columns: Sequence[str],
    x: str = "images_seen",
    y_label: str = "",
) -> None:
    """Write the `columns` of `frame` against its column `x` as one PNG; rows without a value are left out of a curve.

    The y axis is logarithmic where all values are positive and the largest is over ten times the smallest.
    """
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for column, colour in zip(columns, cycle(COLOURS), strict=False):
        curve = frame[[x, column]].dropna()
        marker = "o" if len(curve) <= 12 else ""
        axes.plot(curve[x], curve[column], color=colour, linewidth=1.6, marker=marker, markersize=4, label=column)
    values = frame[list(columns)].to_numpy(np.float64)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _dress(axes, title, x.replace("_", " "), y_label)
    if len(columns) > 1:
        axes.legend(frameon=False)
    _save(figure, path)


@matplotlib.rc_context(matplotlib.rcParamsDefault)
def rate_distortion(
    frame: DataFrame,
    path: str | PathLike[str],
    *,
    title: str,
    rate: str = "kl_bits_per_dim",
    distortion: str = "reconstruction_bits_per_dim",
    series: str = "series",
) -> None:
    """Write each row's distortion -log p(x | z) against its rate KL(q(z | x) || p(z)), both in bits/dim, as one PNG.

    Rows of one value of the column `series` are a curve in the order of their rate. Grey lines of slope -1 join what has the
    same sum, which is the code length -ELBO (Alemi et al. 2018, "Fixing a broken ELBO"): the lower left is better.
    """
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for (label, curve), colour in zip(frame.groupby(series, sort=False), cycle(COLOURS), strict=False):
        curve = curve.sort_values(rate, kind="stable")
        (line,) = axes.plot(curve[rate], curve[distortion], color=colour, marker="o", markersize=5, label=str(label))
        line.set(linewidth=1.6, linestyle="-" if len(curve) > 1 else "none")
    axes.set_xlim(_room(frame[rate]))
    axes.set_ylim(_room(frame[distortion]))
    _iso_lines(axes)
    _dress(axes, title, "rate: KL, bits/dim", "distortion: −log p(x | z), bits/dim")
    axes.grid(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9)
    _save(figure, path)


def _room(values: Series) -> tuple[float, float]:
    """Limits of an axis with some room around the values, which may be one, and none below 0 unless they are."""
    low, high = float(values.min()), float(values.max())
    room = max(0.12 * (high - low), 0.1)
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _iso_lines(axes: Axes) -> None:
    """Lines of equal rate + distortion across the axes as they stand, each with its sum near its upper end."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    label = "same sum, −ELBO"
    for total in MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(left + bottom, right + top):
        first, last = max(left, total - top), min(right, total - bottom)
        if last - first < 0.08 * (right - left):  # a corner, or not in sight
            continue
        axes.plot([first, last], [total - first, total - last], color="#d4d4da", linewidth=0.9, zorder=0, label=label)
        label = "_"  # the others are not in the legend
        at = first + 0.03 * (right - left)
        _note(axes, f"{total:g}", (at, total - at), "#8a8a92")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


@matplotlib.rc_context(matplotlib.rcParamsDefault)
def channel_bars(
    values: Sequence[float], path: str | PathLike[str], *, title: str, y_label: str = "KL, nats per image", low: float = 0.0
) -> None:
    """Write one bar a latent channel as one PNG; those below `low` (collapsed ones) stand out, with the line they miss.

    The axis is logarithmic where they differ more than tenfold.
    """
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    colours = [COLOURS[1] if value < low else COLOURS[0] for value in values]
    axes.bar(range(len(values)), values, color=colours, width=0.7)
    for channel, value in enumerate(values if len(values) <= 16 else ()):
        _note(axes, f"{value:.3g}", (channel, max(value, low)), colours[channel], above=8)
    if low > 0:
        axes.axhline(low, color=COLOURS[1], linewidth=1.0, linestyle="--", label=f"collapsed below {low:g}")
        axes.legend(frameon=False)
    least, most = min(values), max(*values, low, 1e-9)
    if 0 < least < most / 10:
        axes.set_yscale("log")
        axes.set_ylim(least / 2, 3 * most)
    else:
        axes.set_ylim(0, 1.2 * most)
    axes.set_xlim(-0.6, len(values) - 0.4)
    _dress(axes, title, "latent channel", y_label)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.grid(False, axis="x")
    _save(figure, path)


@matplotlib.rc_context(matplotlib.rcParamsDefault)
def traces(values: np.ndarray, path: str | PathLike[str], *, title: str, names: Sequence[str], y_label: str) -> None:
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


@matplotlib.rc_context(matplotlib.rcParamsDefault)
def histograms(series: Mapping[str, np.ndarray], path: str | PathLike[str], *, title: str, x_label: str) -> None:
    """Write the distributions of several sets of positive numbers as one PNG, on the same bins of a logarithmic axis."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    everything = np.concatenate(list(series.values()))
    edges = np.geomspace(everything.min() / 1.05, everything.max() * 1.05, 51)
    for (label, values), colour in zip(series.items(), cycle(COLOURS), strict=False):
        counts, _ = np.histogram(values, edges)
        axes.stairs(counts, edges, color=colour, fill=True, alpha=0.35)
        axes.stairs(counts, edges, color=colour, linewidth=1.4, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _dress(axes, title, x_label, "images")
    axes.legend(frameon=False)
    _save(figure, path)


def _note(axes: Axes, text: str, point: tuple[float, float], colour: str, above: float = 0) -> None:
    """A few characters centred on a point, or `above` typographic points over it, on white."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    offset = (0, above)
    axes.annotate(text, point, offset, textcoords="offset points", ha="center", va="center", fontsize=8, color=colour, bbox=box)


def _dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#e6e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | PathLike[str]) -> None:
    figure.savefig(path, format="png", dpi=160, metadata={"Software": None})
