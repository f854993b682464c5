"""Where the outs of a project come from, as tags of its MLflow run and of a registered version."""

import contextlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.base.errors import InputError
from ldm.base.files import file_hash
from ldm.base.paths import METRICS, PLOTS, REPORT, SAMPLES, SHARDS
from ldm.config import load_settings
from ldm.registry.tracking import Run, stage_run

ADOPTED = "adopted.json"  # in an out that several states of the code have trained


def pipeline_run(
    root: Path, params: Mapping[str, Any], name: str = "pipeline", records: Path | None = None
) -> contextlib.AbstractContextManager[Run]:
    """The run of a whole pipeline, parent of its stages' runs; with `records`, to be delivered later."""
    tags = {key: value for key, value in lineage(root).items() if key.startswith("ldm.git")}
    return stage_run(name, params, tags=tags | {"ldm.workspace": str(root.resolve())}, records=records)


def log_results(run: Run, root: Path) -> None:
    """Record on a pipeline's run what its stages made: lineage, the data set, metrics, plots and the report."""
    run.send("tag", lineage(root))
    if (index := root / SHARDS / "index.json").is_file():
        splits = json.loads(index.read_text(encoding="utf-8"))["splits"]
        profile = {f"{split}_images": stop - start for split, (start, stop) in splits.items()}
        run.send("dataset", "shards", file_hash(index)[:32], str(index.relative_to(root)), profile)
    if (root / METRICS).is_file():
        run.log(numbers(root / METRICS), images_seen=0, at=measured_at(root))
    for path in (METRICS, REPORT, SAMPLES, PLOTS):
        if (root / path).exists():
            run.artifact(root / path, "plots" if path == PLOTS else None)


def lineage(root: Path) -> dict[str, str]:
    """Where the outs in `root` come from, as tags: commit, `dvc.lock`, data index. What does not exist is left out."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], cwd=root, stderr=subprocess.DEVNULL, text=True, timeout=30).strip()

    tags = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        tags["ldm.git_commit"] = git("rev-parse", "HEAD")
        dirty = git("status", "--porcelain", "--", ".", *(f":(exclude,literal){path}" for path in _rewritten(root)))
        tags["ldm.git_dirty"] = str(bool(dirty)).lower()
    for tag, path in (("ldm.dvc_lock", root / "dvc.lock"), ("ldm.data_index", root / SHARDS / "index.json")):
        if path.is_file():
            tags[tag] = file_hash(path)
    return tags


def _rewritten(root: Path) -> list[str]:
    """What git versions and a run itself rewrites, its ingest included; relative to the project."""
    found = ["dvc.lock", "reports"]
    with contextlib.suppress(InputError, ValueError):  # settings that cannot be read; a collection elsewhere
        collection = (root / load_settings(root).data.path).resolve().relative_to(root.resolve())
        found += [f"{collection}.dvc", str(collection.parent / ".gitignore")]
    return found


def measured_at(root: Path) -> int:
    """When `METRICS` was written, in ms: as often as its numbers are logged, MLflow stores them once."""
    return (root / METRICS).stat().st_mtime_ns // 1_000_000


def numbers(path: Path) -> dict[str, float]:
    """The numeric entries of a flat JSON file of metrics."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


def adopted(out: Path) -> str | None:
    """The states of the code that trained an out, in one line; None where it was one."""
    if not (out / ADOPTED).is_file():
        return None
    found = json.loads((out / ADOPTED).read_text(encoding="utf-8"))
    return described(found["stage"], found["adopted"])


def described(stage: str, steps: Iterable[dict[str, Any]]) -> str:
    """Adopted checkpoints as one line for people."""
    parts = [f"up to {step['reached']:,} by code {step['code'][:8]}, then {', '.join(step['changed'])} changed" for step in steps]
    return f"{stage}: {'; '.join(parts)}"
