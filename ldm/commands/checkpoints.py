"""`ldm checkpoints …`: unfinished trainings."""

from typing import Annotated

import typer

from ldm.base.errors import InputError
from ldm.commands.shared import project, table

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


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
    found, settings = work.works(root), load_settings(root)
    if not found:
        print("no unfinished trainings")
        return
    rows = [
        {"key": one.key[:8], "stage": one.stage, "reached": one.progress, "size": f"{one.size / 1e6:,.1f} MB",
         "written": f"{one.written:%Y-%m-%d %H:%M}", "state": one.state(settings)}
        for one in found
    ]  # fmt: skip
    table(rows)


@app.command()
def adopt(key: Annotated[str, typer.Argument(help="The beginning of its key, as `ldm checkpoints list` shows it.")]) -> None:
    """Let the next run continue from a checkpoint that was written under other code.

    Use it if the change does not affect what the training computes. The run in MLflow and the registered version get the tag
    `ldm.adopted`, which says what had changed.
    """
    from ldm.config import load_settings
    from ldm.stages import work

    root = project()
    adopted = work.adopt(root, key)
    print(f"{adopted.stage}: adopted as {adopted.key[:8]}; the next run goes on after {adopted.progress}")
    if others := adopted.other_settings(load_settings(root)):
        print(f"{adopted.stage}: if params.yaml has its settings again: {', '.join(others)}")


@app.command()
def drop(
    keys: Annotated[list[str] | None, typer.Argument(help="Beginnings of keys, as `ldm checkpoints list` shows them.")] = None,
    changed: Annotated[bool, typer.Option("--changed", help="All that were written under other code.")] = False,
) -> None:
    """Delete unfinished trainings."""
    from ldm.stages import work

    root = project()
    chosen = [work.find(root, key) for key in keys or []]
    chosen += [one for one in work.works(root) if changed and one.changes() and not work.is_running(one)]
    chosen = list({one.key: one for one in chosen}.values())
    if not chosen and not changed:
        raise InputError("name checkpoints by their keys, or give --changed; `ldm checkpoints list` shows them")
    for one in chosen:
        line = f"dropped {one.key[:8]}: {one.stage}, {one.progress}"
        work.drop(one)
        print(line)
    if not chosen:
        print("no checkpoints under other code")
