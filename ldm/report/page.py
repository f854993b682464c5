"""Pages: one HTML file with everything in it, no scripts, nothing fetched. Same input, same bytes."""

import math
from base64 import b64encode
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pandas import DataFrame
from PIL import Image

from ldm.data.images import from_array, to_png
from ldm.report.plots import differences

SHOWN = 3  # images that gain most, and as many that lose most, on the page of a decision


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill in a page of `templates/`. Pictures are PNG files, or uint8 pixels (C, H, W)."""
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"embedded": _embedded, "opened": Image.open}
    environment.filters["as_yaml"] = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    path.write_text(environment.get_template(template).render(values), encoding="utf-8", newline="\n")


def decision_page(path: Path, decision: Any, frame: DataFrame | None, *, challenger: str, champion: str | None) -> None:
    """Write a `ldm.evaluation.gate.Decision` and why. `frame`: nats of both models by image key; None: not compared."""
    values: dict[str, Any] = {}
    if frame is not None and champion is not None and math.isfinite(decision.mean):
        gains = (frame.challenger - frame.champion).sort_values(kind="stable", ascending=False)
        keys = list(dict.fromkeys([*gains.index[:SHOWN], *gains.index[-SHOWN:]]))
        values = {"bits": abs(decision.mean) / math.log(2), "share": abs(decision.mean / float(frame.champion.mean()))}
        values["better"], values["chart"] = float((gains > 0).mean()), differences(gains.to_numpy(), x_label="improvement, nats")
        values["changes"] = [(key, gains[key], frame.challenger[key], frame.champion[key]) for key in keys]
    write_page(path, "decision.html", decision=decision, challenger=challenger, champion=champion, **values)


def _embedded(picture: Path | np.ndarray) -> str:
    png = picture.read_bytes() if isinstance(picture, Path) else to_png(from_array(picture))
    return f"data:image/png;base64,{b64encode(png).decode()}"
