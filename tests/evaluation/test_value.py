"""Values as a table and as numbers."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from ldm.base.errors import InputError
from ldm.evaluation.value import Value, as_numbers, read_values, write_values

VALUES = [
    Value(name="bits_per_dim", value=1 / 3, error=0.1, unit="bits/dim", title="b", reading='Lower, "better".', headline=True),
    Value(name="psnr", value=math.nan, title="PSNR", reading="a, b", note="N = 2, d = 3"),
    Value(name="active_units", value=58, title="units", reading="Ψ"),
]


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_values(tmp_path / "metrics.csv", VALUES)
    first, second, third = read_values(tmp_path / "metrics.csv")
    assert (first, third) == (VALUES[0], VALUES[2])
    assert math.isnan(second.value) and second.note == "N = 2, d = 3" and second.error is None and second.unit == ""
    frame = pd.read_csv(tmp_path / "metrics.csv")
    assert list(frame) == ["name", "value", "error", "unit", "title", "reading", "note", "headline"]
    assert frame.headline.tolist() == [True, False, False]


def test_numbers_have_their_standard_errors_beside_them() -> None:
    numbers = as_numbers(VALUES)
    assert list(numbers) == ["bits_per_dim", "psnr", "active_units", "bits_per_dim_se"]
    assert json.loads(json.dumps(numbers))["bits_per_dim"] == 1 / 3


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match=r"evaluate.metrics: two numbers are called psnr; give one of them another name"):
        as_numbers([*VALUES, VALUES[1]])
