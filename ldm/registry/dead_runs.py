"""Runs that nobody ends: their process was killed and could not say so."""

from pathlib import Path
from typing import Any

from ldm.base.errors import reason
from ldm.base.paths import TRACKING
from ldm.registry.record import is_open
from ldm.registry.tracking import PARENT, WarnOnce, experiment_id, milliseconds, mlflow_client, short_patience, tagged


def end_dead_runs(workspace: Path, except_run: str | None = None) -> None:
    """Set the RUNNING runs of a project's folder to KILLED. To be called by who alone may work there, whose run is `except_run`.

    A stage may outlive its flow by seconds: a run whose record a living process writes is left to it. Never raises.
    """
    workspace = workspace.resolve()
    try:
        with short_patience():
            client = mlflow_client()
            experiment = experiment_id(client)
            running = client.search_runs([experiment], "attributes.status = 'RUNNING'")
            dead = [run for run in running if run.info.run_id != except_run and _is_dead(run, workspace)]
            for run in sorted(dead, key=lambda run: PARENT not in run.data.tags):  # children first: a parent ends after them
                client.set_terminated(run.info.run_id, "KILLED", _last_sign(client, experiment, run))
    except Exception as error:  # tracking never fails the work
        WarnOnce("runs that were killed stay RUNNING until a later run ends them")(reason(error))


def _is_dead(run: Any, workspace: Path) -> bool:
    tags = run.data.tags  # compared here: MLflow's filters cannot hold every path
    return tags.get("ldm.workspace") == str(workspace) and not is_open(workspace / TRACKING / f"{tags.get('ldm.record')}.jsonl")


def _last_sign(client: Any, experiment: str, run: Any) -> int:
    """When a run was last heard of, in ms: by a metric, or by the end of a child; now, if it never was."""
    stamps = [point.timestamp for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)]
    stamps += [child.info.end_time or 0 for child in tagged(client, experiment, PARENT, run.info.run_id)]
    return max((stamp for stamp in stamps if stamp > run.info.start_time), default=milliseconds())
