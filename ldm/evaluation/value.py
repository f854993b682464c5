"""A measured number with its unit and how to read it; `reports/metrics.csv` has a row for each."""

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number. Report, summary and tracker show it by these fields and know nothing else about it."""

    name: str  # key in metrics.json; its standard error has the key NAME_se
    value: float
    error: float | None = None  # standard error
    unit: str = ""  # "share" is shown in percent
    title: str
    reading: str  # what it is, and whether lower or higher is better
    note: str = ""  # facts of this run, such as the number of images
    headline: bool = False  # shown first, and in the summary of a run

    def shown(self) -> tuple[str, str]:
        """Number and unit as people read them, to two digits of the error: ("2.8857 ± 0.0098", "bits/dim"), ("99.0%", "")."""
        if not math.isfinite(self.value):
            return "–", ""
        if self.unit == "share":
            return f"{self.value:.1%}", ""
        unit = "" if self.unit == self.title else self.unit
        if self.error and math.isfinite(self.error):
            decimals = max(0, 1 - math.floor(math.log10(self.error)))
            return f"{self.value:,.{decimals}f} ± {self.error:,.{decimals}f}", unit
        return f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.4g}", unit


def described(numbers: dict[str, float], about: dict[str, tuple[str, str, str]], headlines: dict[str, str]) -> list[Value]:
    """The numbers that `about` gives unit, title and reading of, in its order. Those in `headlines` come with a note."""
    return [
        Value(name=name, value=numbers[name], error=numbers.get(f"{name}_se"), unit=unit, title=title, reading=reading,
              note=headlines.get(name, ""), headline=name in headlines)
        for name, (unit, title, reading) in about.items() if name in numbers
    ]  # fmt: skip


def write_values(path: Path, values: Sequence[Value]) -> None:
    import pandas as pd

    pd.DataFrame([asdict(value) for value in values]).to_csv(path, index=False, lineterminator="\n")


def read_values(path: Path) -> list[Value]:
    def value(row: dict[str, Any]) -> Value:
        error = float(row["error"]) if row["error"] else None
        return Value(**row | {"value": float(row["value"] or "nan"), "error": error, "headline": row["headline"] == "True"})

    with path.open(encoding="utf-8", newline="") as file:
        return [value(row) for row in csv.DictReader(file)]


def as_numbers(values: Sequence[Value]) -> dict[str, float]:
    """Values and standard errors by name; `InputError` if two have the same name."""
    pairs = [(v.name, v.value) for v in values] + [(f"{v.name}_se", v.error) for v in values if v.error is not None]
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"evaluate.metrics: two numbers are called {repeated[0]}; give one of them another name, or remove it")
    return dict(pairs)
