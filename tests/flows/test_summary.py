"""What a run says at its end, from metrics that it does not know."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import REPOSITORY

from flows.summary import Step, Summary, markdown, show, summarise
from ldm.config import load_settings
from ldm.evaluation.gate import Decision
from ldm.evaluation.value import Value, write_values

VALUES = [
    Value(name="bits_per_dim", value=2.88567, error=0.00984, unit="bits/dim", title="bits/dim", reading="", headline=True,
          note="353 test images of 32x32x1, lanczos, given their captions"),
    Value(name="nats", value=-2048.2, unit="nats", title="bound", reading=""),
    Value(name="psnr", value=41.4626, unit="dB", title="PSNR", reading="", headline=True),
    Value(name="made_up", value=0.99, unit="share", title="something new", reading="", note="N = 4", headline=True),
]  # fmt: skip


def summary(root: Path, promote: bool = True, champion: int | None = 3) -> Summary:
    (root / "reports").mkdir(exist_ok=True)
    write_values(root / "reports/metrics.csv", VALUES)
    (root / "reports/report.html").touch()
    registered: Any = SimpleNamespace(version=3, created=True)
    decision = Decision(promote=promote, n=9, mean=1.0, se=0.1, lower=0.7, level=0.005, reason="the reason")
    steps = [Step("code", "cached", 0.2), Step("evaluate", "executed", 12.34, 3 * 2**20)]
    notes = [("new images", "no drift")]
    return summarise(root, load_settings(REPOSITORY), steps, (), registered, decision, champion, notes)


def test_headline_numbers_are_aligned_with_their_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(summary(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert "bits/dim        2.8857 ± 0.0098  (353 test images of 32x32x1, lanczos, given their captions)" in lines
    assert "PSNR            41.46 dB" in lines
    assert "something new   99.0%            (N = 4)" in lines
    assert not any("bound" in line for line in lines)
    assert "code            cached           0.2 s" in lines
    assert "evaluate        executed        12.3 s      3 MiB" in lines
    assert "new images      no drift" in lines and "model           models:/ldm/3 (new)" in lines
    assert "report          reports/report.html" in lines and not any("decision.html" in line for line in lines)


@pytest.mark.parametrize(
    ("promote", "champion", "verdict"), [(True, 3, "promoted"), (False, 2, "not promoted"), (False, 3, "champion")]
)
def test_the_verdict_and_the_command_to_try(tmp_path: Path, promote: bool, champion: int, verdict: str) -> None:
    found = summary(tmp_path, promote, champion)
    assert dict(found.results)["gate"] == f"{verdict}: the reason"
    assert ("models:/ldm@champion" if champion == 3 else "models:/ldm/3") in found.next[0]


def test_the_artifact_has_the_same_lines(tmp_path: Path) -> None:
    text = markdown(summary(tmp_path), tmp_path)
    assert (
        "| evaluate | executed | 12.3 | 3 MiB |" in text and f"- [report]({(tmp_path / 'reports/report.html').as_uri()})" in text
    )
    for what, value in summary(tmp_path).results:
        assert f"| {what} | {value} |" in text


def test_a_number_that_is_missing_is_a_dash(tmp_path: Path) -> None:
    VALUES.append(Value(name="broken", value=math.nan, title="broken", reading="", headline=True))
    try:
        assert dict(summary(tmp_path).results)["broken"] == "–"
    finally:
        VALUES.pop()


def test_what_other_stages_say_of_themselves(tmp_path: Path) -> None:
    (tmp_path / "reports/posterior").mkdir(parents=True)
    (tmp_path / "reports/posterior/sgld.json").write_text(json.dumps({"summary": "0.18 nats gained"}))
    nodes: Any = (SimpleNamespace(name="sample_posterior@sgld", outs=("reports/posterior/sgld.json", "reports/posterior")),)
    write_values(tmp_path / "reports/metrics.csv", VALUES)
    registered: Any = SimpleNamespace(version=3, created=False)
    decision = Decision(promote=False, n=0, mean=math.nan, se=math.nan, lower=math.nan, level=0.005, reason="no")
    found = summarise(tmp_path, load_settings(REPOSITORY), [], nodes, registered, decision, None, [])
    assert dict(found.results)["sample_posterior@sgld"] == "0.18 nats gained"
    assert ("sample_posterior@sgld", "reports/posterior") in found.places
    assert dict(found.results)["model"] == "models:/ldm/3 (registered before)"
