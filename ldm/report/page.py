"""The evaluation report: one HTML file with everything in it, no scripts, nothing fetched. Same input, same bytes."""

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

from pandas import DataFrame
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d22; --soft: #65656f; --line: #dfdfe5; --paper: #ffffff; --card: #f5f6f8;
  --good: #2563c9; --bad: #c2571f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ec; --soft: #a0a0ab; --line: #36363d; --paper: #17171a;
  --card: #222226; --good: #6ea2f5; --bad: #ee9360; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1.25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { max-width: 44rem; }
.soft, figcaption, small { color: var(--soft); font-size: .875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .75rem; }
.card { background: var(--card); border-radius: .6rem; padding: .9rem 1.1rem; }
.card h3 { margin: 0; font-size: .875rem; font-weight: 600; color: var(--soft); }
.card strong { display: flex; flex-wrap: wrap; align-items: baseline; column-gap: .5rem; font-size: 1.6rem;
  line-height: 1.35; font-variant-numeric: tabular-nums; }
.card strong small { font-size: .95rem; line-height: 1.4; font-weight: 400; }
.card p { margin: .2rem 0 0; font-size: .875rem; line-height: 1.4; color: var(--soft); }
.card.first { grid-column: 1 / -1; border-left: .3rem solid var(--good); }
.card.first strong { font-size: 2.4rem; line-height: 1.25; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.25rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
.total td { font-weight: 600; border-bottom: 0; }
.settings td { overflow-wrap: anywhere; }
figure { margin: 0 0 2rem; }
figure .wide { border-radius: .6rem; background: #fff; border: 1px solid var(--line); }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { margin-top: .4rem; max-width: 44rem; }
summary { cursor: pointer; font-weight: 600; font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
@media (max-width: 34rem) { .cards { grid-template-columns: 1fr; } th, td { padding-right: .75rem; } }
"""


@dataclass(frozen=True)
class Figure:
    """A PNG on disk and what it shows."""

    title: str
    caption: str
    png_path: str | PathLike[str]


def write_report(
    path: str | PathLike[str],
    *,
    title: str,
    metrics: Mapping[str, float | str],
    figures: Sequence[Figure],
    settings: Mapping[str, Any],
) -> None:
    """Write the report of one evaluation. `metrics` as in `reports/metrics.json`; what is absent is left out."""
    body = [f"<p>{_summary(metrics)}</p>", f'<div class="cards">{"".join(_cards(metrics))}</div>', _terms(metrics)]
    body += [f"<h2>{escape(figure.title)}</h2>{_figure(figure)}" for figure in figures]
    rows = DataFrame(_flat(settings), columns=["setting", "value"])
    numbers = DataFrame([(key, format_value(metrics[key])) for key in sorted(metrics)], columns=["metric", "value"])
    body.append(f"<details><summary>Settings</summary>{table(rows, 'settings')}</details>")
    body.append(f"<details><summary>All metrics</summary>{table(numbers, 'settings')}</details>")
    Path(path).write_text(page(title, "\n".join(body)), encoding="utf-8", newline="\n")


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`, which must be escaped already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def card(name: str, value: str, unit: str, meaning: str, *, first: bool = False) -> str:
    """One headline number with its unit and a line that says what it means."""
    return (
        f'<div class="card{" first" if first else ""}"><h3>{escape(name)}</h3>'
        f"<strong><span>{escape(value)}</span> <small>{escape(unit)}</small></strong><p>{escape(meaning)}</p></div>"
    )


def table(frame: DataFrame, style: str = "", total: bool = False) -> str:
    """An HTML table of `frame` without its index; numbers to the right; `total` sets the last row in bold."""
    number = [frame[column].map(lambda value: isinstance(value, int | float)).all() for column in frame]
    kinds = [' class="number"' if right else "" for right in number]
    head = "".join(f"<th{kind}>{escape(str(name))}</th>" for name, kind in zip(frame, kinds, strict=True))
    cells = [map(escape, _column(frame[column].tolist())) for column in frame]
    rows = [
        "".join(f"<td{kind}>{value}</td>" for value, kind in zip(row, kinds, strict=True)) for row in zip(*cells, strict=True)
    ]
    marks = [' class="total"' if total and index == len(rows) - 1 else "" for index in range(len(rows))]
    lines = "\n".join(f"<tr{mark}>{row}</tr>" for mark, row in zip(marks, rows, strict=True))
    opening = f'<table class="{style}">' if style else "<table>"
    return f'<div class="wide">{opening}\n<tr>{head}</tr>\n{lines}\n</table></div>'


def format_value(value: object) -> str:
    """A value as people read it: floats to four significant digits or as whole numbers, no noise digits."""
    if isinstance(value, float):
        if math.isnan(value):
            return "–"
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(format_value(item) for item in value)
    return "none" if value is None else str(value)


def _column(values: Sequence[Any]) -> list[str]:
    """Values of one column; floats share their decimals: five significant digits of the largest, at most 3."""
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value)]
    decimals = min(3, max(0, 4 - math.floor(math.log10(max(sizes))))) if sizes and max(sizes) > 0 else 0
    return [
        f"{value:,.{decimals}f}" if isinstance(value, float) and math.isfinite(value) else format_value(value) for value in values
    ]


def _summary(metrics: Mapping[str, float | str]) -> str:
    images, what = metrics.get("test_images"), metrics.get("image")
    count = f"{images} held-out images" if images is not None else "Held-out images"
    return escape(f"{count}{f' ({what})' if what else ''}, never seen in training.")


def _cards(metrics: Mapping[str, Any]) -> Iterable[str]:
    has = metrics.keys().__contains__
    if has("bits_per_dim"):
        error = metrics.get("bits_per_dim_se")
        value = f"{metrics['bits_per_dim']:.3f}" + (f" ± {error:.3f}" if error is not None else "")
        yield card(
            "The whole system",
            value,
            "bits/dim" + (" (± standard error)" if error is not None else ""),
            "The most that autoencoder and diffusion model together need to describe one value of a held-out image, "
            "given its prompt: an upper bound on −log p(image | prompt). Lower is better; raw 8-bit pixels take 8. "
            "Compare only models with the same images and the same prompts.",
            first=True,
        )
    if has("prompt_accuracy"):
        judge = f" (it reads {metrics['judge_accuracy']:.1%} of held-out real ones)" if has("judge_accuracy") else ""
        yield card(
            "Prompts followed",
            f"{metrics['prompt_accuracy']:.1%}",
            "of samples",
            f"Samples in which a classifier trained on real images only reads what the prompt says{judge}.",
        )
    if has("unseen_prompt_accuracy"):
        yield card(
            "Unseen phrasings followed",
            f"{metrics['unseen_prompt_accuracy']:.1%}",
            "of samples",
            "The same with prompts that no caption says in these words.",
        )
    if has("variance_ratio"):
        yield card(
            "Variety",
            f"{metrics['variance_ratio']:.2f}",
            "× real",
            "Pixel variance among samples of one label as a share of that among real images. "
            "1 = as varied as real ones, 0 = all the same.",
        )
    if has("fd"):
        yield _distance_card(metrics)
    if has("psnr"):
        yield card(
            "Reconstruction (PSNR)",
            f"{metrics['psnr']:.1f}",
            "dB",
            "How closely the autoencoder alone gives a held-out image back. Higher is better.",
        )


def _distance_card(metrics: Mapping[str, Any]) -> str:
    size = ", ".join(f"{name} = {metrics[key]}" for name, key in (("N", "fd_n"), ("d", "fd_dim")) if key in metrics)
    floor = f", real-against-real floor {metrics['fd_floor']:.3g}" if "fd_floor" in metrics else ""
    return card(
        f"FD-{metrics.get('fd_name', 'features')}, distance to real images",
        f"{metrics['fd']:.3g}",
        f"{size}{floor}".lstrip(", "),
        "Fréchet distance between samples and real images in the feature space named. Lower is better; it is not 0 "
        "for finite N: the floor is what two sets of real images give.",
    )


def _terms(metrics: Mapping[str, Any]) -> str:
    terms = {
        "reconstruction_nats": ("reconstruction", "log p of the pixels, given the latents"),
        "entropy_nats": ("entropy", "how loosely the encoder's posterior pins the latents"),
        "prior_nats": ("prior", "log p of the latents, under the diffusion model"),
        "nats": ("the bound", "their sum: log p(image | prompt) is at least this"),
    }
    rows = [(name, float(metrics[key]), meaning) for key, (name, meaning) in terms.items() if key in metrics]
    if not rows:
        return ""
    frame = DataFrame(rows, columns=["term", "nats per image", "what it is"])
    note = ""
    if "elbo_bits_per_dim" in metrics:
        note = (
            f'<p class="soft">The autoencoder alone, with its own standard normal prior: '
            f"{metrics['elbo_bits_per_dim']:.3f} bits/dim.</p>"
        )
    return f"<h2>What the bound is made of</h2>{table(frame, total='nats' in metrics)}{note}"


def _figure(figure: Figure) -> str:
    data = Path(figure.png_path).read_bytes()
    with Image.open(BytesIO(data)) as image:
        width, height = image.size
    readable = f"min-width: min({width}px, 34rem)"  # on a phone the picture scrolls rather than shrinks to nothing
    return (
        f'<figure><div class="wide"><img src="data:image/png;base64,{b64encode(data).decode()}" width="{width}" '
        f'height="{height}" style="{readable}" alt="{escape(figure.title)}"></div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) in their own order."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _exact(value)))
    return rows


def _exact(value: object) -> str:
    """A setting as it was given: never rounded."""
    if isinstance(value, list | tuple):
        return ", ".join(_exact(item) for item in value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "none" if value is None else str(value)
