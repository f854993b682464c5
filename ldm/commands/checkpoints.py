"""`ldm checkpoints …`: unfinished trainings."""

from typing import Annotated

import typer

from ldm.base.errors import InputError
from ldm.commands.shared import project, table

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
Key = Annotated[str, typer.Argument(help="The beginning of its key, as `ldm checkpoints list` shows it.")]
Keys = Annotated[list[str] | None, typer.Argument(help="Beginnings of keys, as `ldm checkpoints list` shows them.")]


@app.command("list")
def list_checkpoints() -> None:
    """Unfinished trainings, the newest last: how far each got, and whether a run would continue from it.

    `ready`: a run with the same settings and inputs continues from it. `running`: it is being trained. `changed: …`: the code or
    a library has changed since; a run would start from nothing, unless the checkpoint is adopted. `other settings: …`: a run
    would continue from it if params.yaml had those again.
    """
    from ldm.config import load_settings
    from ldm.stages import work

    root = project()
    if not (found := work.works(root)):
        print("no unfinished trainings")
        return
    settings = load_settings(root)
    table([
        {"key": one.key[:8], "stage": one.stage, "reached": one.progress, "size": f"{one.size / 1e6:,.1f} MB",
         "written": f"{one.written:%Y-%m-%d %H:%M}", "state": one.state(settings)}
        for one in found
    ])  # fmt: skip


@app.command()
def adopt(key: Key) -> None:
    """Let the next run continue from a checkpoint that was written under other code.

    Use it if the change does not affect what the training computes. The run in MLflow and the registered version get the tag
    `ldm.adopted`, which says what had changed.
    """
    from ldm.stages.work import adopt

    adopted = adopt(project(), key)
    print(f"{adopted.stage}: adopted as {adopted.key[:8]}; the next run with its settings goes on after {adopted.progress}")


@app.command()
def drop(
    keys: Keys = None, changed: Annotated[bool, typer.Option("--changed", help="All that were written under other code.")] = False
) -> None:
    """Delete unfinished trainings."""
    from ldm.stages import work

    root = project()
    if not keys and not changed:
        raise InputError("name checkpoints by their keys, or give --changed; `ldm checkpoints list` shows them")
    chosen = [work.find(root, key) for key in keys or []]
    chosen += [one for one in work.works(root) if changed and one.changes() and not work.is_running(one)]
    for one in {one.key: one for one in chosen}.values():
        line = f"dropped {one.key[:8]}: {one.stage}, {one.progress}"
        work.drop(one)
        print(line)
    if not chosen:
        print("no checkpoints under other code")
