"""`ldm registry …`: registered models."""

from typing import Annotated

import typer

from ldm.base.errors import InputError
from ldm.commands.shared import Name, model_name, project, table

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
Shown = Annotated[str | None, typer.Argument(help="VERSION, models:/NAME@ALIAS or models:/NAME/VERSION; else the champion.")]


@app.command("list")
def list_versions(name: Name = None) -> None:
    """Registered versions, newest first: aliases, bits per dimension, the gate's decision."""
    from ldm.registry.versions import find, overview

    name = model_name(name)
    if not (rows := [overview(version) for version in find({}, name)]):
        raise InputError(f"model {name!r} has no versions; `ldm run` registers one")
    table(rows)


@app.command()
def show(model: Shown = None) -> None:
    """One version: aliases, where it came from, how it was evaluated, why it was promoted or not."""
    from ldm.registry.versions import describe, lookup

    project(tracked=True)
    if not model or model.isdecimal():
        model = f"models:/{model_name()}{f'/{model}' if model else '@champion'}"
    for key, value in describe(lookup(model)).items():
        print(f"{key:<16}{value}")


@app.command()
def register() -> None:
    """Register the model of the project folder, unless it is, and let the gate decide. `ldm run` does this by itself."""
    from ldm.registry.registration import gate_and_promote, register

    root = project(tracked=True)
    registered = register(root)
    decision = gate_and_promote(root, registered.version)
    print(f"version {registered.version} ({'new' if registered.created else 'registered before'})")
    print(f"gate: {'promoted' if decision.promote else 'not promoted'}: {decision.reason}")


@app.command()
def promote(version: Annotated[int, typer.Argument(help="Version number.")], name: Name = None) -> None:
    """Make a version champion by hand, whatever the gate decided; the champion so far becomes `previous`."""
    from ldm.registry.registration import promote

    promote(version, model_name(name))
    print(f"version {version} is champion")


@app.command()
def rollback(name: Name = None) -> None:
    """Swap `champion` and `previous`."""
    from ldm.registry.registration import rollback

    print(f"version {rollback(model_name(name))} is champion")
