"""What a run of the pipeline says at its end, on the console and in Prefect."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.supervise import Step
from ldm.base.paths import AUTOENCODER, DECISION, METRICS_TABLE, REPORT, SAMPLES, SHARDS, UNET
from ldm.config import Settings
from ldm.evaluation.value import read_values
from ldm.registry import lineage
from ldm.report.numbers import shown
from ldm.versioning.graph import Node

if TYPE_CHECKING:
    from ldm.evaluation.gate import Decision
    from ldm.registry.registration import Registered


@dataclass(frozen=True)
class Summary:
    """A finished run: what was done, how good the model is, what became of it, where to look."""

    steps: tuple[Step, ...]
    results: tuple[tuple[str, str], ...]
    places: tuple[tuple[str, str], ...]
    next: tuple[str, ...]


def summarise(
    root: Path,
    settings: Settings,
    steps: list[Step],
    others: tuple[Node, ...],
    registered: "Registered",
    decision: "Decision",
    champion: int | None,
    notes: list[tuple[str, str]],
) -> Summary:
    name = settings.registry.name
    model = f"models:/{name}/{registered.version} ({'new' if registered.created else 'registered before'})"
    verdict = "promoted" if decision.promote else "not promoted"
    if champion == registered.version and not decision.promote:
        verdict = "champion"
    results = [
        *_headlines(root / METRICS_TABLE),
        *_said(root, others),
        *notes,
        *(("adopted", line) for out in (AUTOENCODER, UNET) if (line := lineage.adopted(root / out))),
        ("model", model),
        ("gate", f"{verdict}: {decision.reason}"),
    ]
    places = [("samples", SAMPLES), ("report", REPORT), ("decision", DECISION)]
    places += [(node.name, out) for node in others for out in node.outs if (root / out).is_dir() and out.startswith("reports/")]
    prompt = first_caption(root / SHARDS) or "…"
    uri = f"models:/{name}@champion" if champion == registered.version else f"models:/{name}/{registered.version}"
    commands = (f'ldm sample --model {uri} --prompt "{prompt}" -n 16 --out samples.png', "ldm registry list", "make ui")
    existing = tuple((what, place) for what, place in places if (root / place).exists())
    return Summary(tuple(steps), tuple(results), existing, commands)


def show(summary: Summary) -> None:
    """Print aligned lines, in colour on a terminal."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    print()
    lines = (*summary.results, *summary.places)
    width = max(14, *(len(step.name) for step in summary.steps), *(len(what) for what, _ in lines)) + 2
    for step in summary.steps:
        status = f"[{'green' if step.status == 'executed' else 'dim'}]{step.status:<12}[/]"
        console.print(f"{step.name:<{width}}{status}{step.seconds:>8.1f} s  {_memory(step.peak_bytes):>9}".rstrip())
    print()
    for what, value in lines:
        print(f"{what:<{width}}{value}")
    print("\nnext:")
    for command in summary.next:
        print(f"  {command}")


def markdown(summary: Summary, root: Path) -> str:
    """The summary as Prefect's artifact, with a link to the report."""
    lines = ["| stage | status | seconds | peak memory |", "|---|---|---:|---:|"]
    lines += [f"| {step.name} | {step.status} | {step.seconds:.1f} | {_memory(step.peak_bytes)} |" for step in summary.steps]
    lines += ["", "| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in summary.results)]
    lines += ["", *(f"- [{what}]({(root / place).as_uri()})" for what, place in summary.places)]
    return "\n".join(lines)


def first_caption(shards: Path) -> str | None:
    """Some caption of the data, as a prompt to try."""
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".txt") else None
                if file:
                    return file.read().decode("utf-8").strip()
    return None


def _headlines(table: Path) -> list[tuple[str, str]]:
    """The headline numbers with their units, and facts about them in a column of its own."""
    values = [value for value in read_values(table) if value.headline]
    numbers = [" ".join(shown(value)).strip() for value in values]
    width = max(map(len, numbers), default=0)
    notes = [f"({value.note})" if value.note else "" for value in values]
    return [(v.title, f"{number:<{width}}  {note}".rstrip()) for v, number, note in zip(values, numbers, notes, strict=True)]


def _said(root: Path, others: tuple[Node, ...]) -> list[tuple[str, str]]:
    """What stages beside the registered model say of themselves: the entry `summary` of their metrics."""
    files = [(node.name, root / out) for node in others for out in node.outs if out.endswith(".json")]
    found = [(name, json.loads(file.read_text(encoding="utf-8"))) for name, file in files if file.is_file()]
    return [(name, values["summary"]) for name, values in found if "summary" in values]


def _memory(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size else ""
