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
from ldm.versioning.repository import Node

if TYPE_CHECKING:
    from ldm.evaluation.gate import Decision
    from ldm.registry.registration import Registered

Lines = list[tuple[str, str]]  # each with what it is about


@dataclass(frozen=True)
class Summary:
    """A finished run: what was done, how good the model is and what became of it, where to look, commands to try."""

    steps: list[Step]
    results: Lines
    places: Lines
    next: tuple[str, ...]


def summarise(
    root: Path, settings: Settings, steps: list[Step], others: tuple[Node, ...], registered: "Registered", decision: "Decision",
    champion: int | None, notes: Lines,
) -> Summary:  # fmt: skip
    """`others` are the stages beside the registered model: the `summary` of their metrics is a result."""
    name, is_champion = settings.registry.name, champion == registered.version
    uri, prompt = f"models:/{name}/{registered.version}", _first_caption(root / SHARDS)
    headlines = [(value, " ".join(value.shown()).strip()) for value in read_values(root / METRICS_TABLE) if value.headline]
    width = max((len(number) for _, number in headlines), default=0)
    results = [(v.title, f"{number:<{width}}  {f'({v.note})' if v.note else ''}".rstrip()) for v, number in headlines]
    places = [("samples", SAMPLES), ("report", REPORT), ("decision", DECISION)]
    for stage, out in ((node.name, out) for node in others for out in node.outs if (root / out).exists()):
        if (root / out).is_dir() and out.startswith("reports/"):
            places.append((stage, out))
        elif out.endswith(".json") and (text := json.loads((root / out).read_text(encoding="utf-8")).get("summary")):
            results.append((stage, text))
    results += notes
    results += [("adopted", line) for out in (AUTOENCODER, UNET) if (line := lineage.adopted(root / out))]
    results.append(("model", f"{uri} ({'new' if registered.created else 'registered before'})"))
    verdict = "champion" if is_champion else "not promoted"
    results.append(("gate", f"{'promoted' if decision.promote else verdict}: {decision.reason}"))
    uri = f"models:/{name}@champion" if is_champion else uri
    commands = (f'ldm sample --model {uri} --prompt "{prompt}" -n 16 --out samples.png', "ldm registry list", "make ui")
    return Summary(steps, results, [place for place in places if (root / place[1]).exists()], commands)


def show(summary: Summary) -> None:
    """Print aligned lines, in colour on a terminal."""
    from rich.console import Console

    console, lines = Console(highlight=False, soft_wrap=True), summary.results + summary.places
    width = max(14, *(len(step.name) for step in summary.steps), *(len(what) for what, _ in lines)) + 2
    print()
    for step in summary.steps:
        status = f"[{'green' if step.status == 'executed' else 'dim'}]{step.words:<12}[/]"
        console.print(f"{step.name:<{width}}{status}{step.seconds:>8.1f} s  {step.memory:>9}".rstrip())
    print("", *(f"{what:<{width}}{value}" for what, value in lines), sep="\n")
    print("\nnext:", *summary.next, sep="\n  ")


def markdown(summary: Summary, root: Path) -> str:
    """The summary as Prefect's artifact, with a link to the report."""
    lines = ["| stage | status | seconds | peak memory |", "|---|---|---:|---:|"]
    lines += [f"| {step.name} | {step.words} | {step.seconds:.1f} | {step.memory} |" for step in summary.steps]
    lines += ["", "| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in summary.results)]
    lines += ["", *(f"- [{what}]({(root / place).as_uri()})" for what, place in summary.places)]
    return "\n".join(lines)


def _first_caption(shards: Path) -> str:
    """Some caption of the data, as a prompt to try."""
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt") and (file := tar.extractfile(member)):
                    return file.read().decode("utf-8").strip() or "…"
    return "…"
