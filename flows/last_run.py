"""What became of the last run in a folder, written there by the run itself.

A server that was away, or whose worker died, still calls a run alive that is dead, or that has ended. Who holds the lock of the
folder, or sees that there is no process, knows better; this file says which of the two it is.
"""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.supervise import StageFailed
from ldm.base.errors import InputError
from ldm.base.files import write_text

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import State

FILE = ".ldm/run.json"


def begin(folder: Path, flow_run: str | None) -> None:
    _write(folder, {"flow_run": flow_run})


def end(folder: Path, state: "State[Any]") -> None:
    _write(folder, read(folder) | {"type": state.type.value, "name": state.name, "message": state.message})


def failed(error: InputError | StageFailed) -> "State[Any]":
    """A state, not an exception, whose traceback would hide the one line that says what to do."""
    from prefect.states import Failed

    if isinstance(error, StageFailed):
        return Failed(message=error.said or f"{error}; the next run goes on from its last checkpoint")
    return Failed(message=str(error))


def read(folder: Path) -> dict[str, Any]:
    """Empty if there was no run, or the file is damaged."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
    return {}


def true_state(run: "FlowRun", entry: dict[str, Any], tries: int = 0) -> "State[Any] | None":
    """The state of a run without a process, given what it wrote; None if that is what the server says.

    One that died is to be tried again, if it was started less than `tries` times.
    """
    from prefect.states import AwaitingRetry, Cancelled, Crashed, State

    told = run.state
    if told and told.is_final() and not told.is_crashed():
        return None
    if entry.get("flow_run") == str(run.id) and "type" in entry:
        return State(type=entry["type"], name=entry["name"], message=entry["message"])
    if told and told.is_cancelling():
        return Cancelled(message="it was cancelled, and its process has ended")
    if run.run_count < tries:
        return AwaitingRetry(message="its process died; it goes on from its last checkpoint")
    if told and told.is_crashed():
        return None
    return Crashed(message="its process died; the next run goes on from its last checkpoint")


def settle(folder: Path, client: "SyncPrefectClient") -> str | None:
    """Tell the server the true state of the last run in a folder that this process has locked; returns what it did not know."""
    from prefect.exceptions import ObjectNotFound

    with contextlib.suppress(ObjectNotFound):  # of another server's database
        if (last := read(folder)).get("flow_run"):
            run = client.read_flow_run(UUID(last["flow_run"]))
            if state := true_state(run, last):
                client.set_flow_run_state(run.id, state, force=True)
                return f"{run.name}: {state.name}, {state.message}"
    return None


def _write(folder: Path, entry: dict[str, Any]) -> None:
    (folder / FILE).parent.mkdir(exist_ok=True)
    write_text(folder / FILE, json.dumps(entry))
