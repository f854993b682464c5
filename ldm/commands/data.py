"""`ldm data …`: images and shards."""

import os
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.base.errors import InputError
from ldm.commands.shared import checked, project, table

if TYPE_CHECKING:
    from pandas import DataFrame

    from ldm.nets.text.encoder import Text

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


def _found(path: Path | None) -> Path:
    """The path, or else the project's shards; `InputError` if there is nothing."""
    from ldm.base.paths import SHARDS

    found = path or Path(os.path.relpath(project() / SHARDS))
    if not found.exists():
        advice = "give the path of a folder" if path else "`ldm run` makes it, or give the path of another folder"
        raise InputError(f"{found}: no such folder; {advice}")
    return found


@app.command()
def check(path: Annotated[Path | None, typer.Argument(help="A folder of shards; else the project's own.")] = None) -> None:
    """Verify every hash and offset of a shard folder, and decode every image. Exit code 1 if something is wrong."""
    from ldm.data.inspect import check_shards

    path, problems = _found(path), 0
    for problem in check_shards(path):
        print(problem)
        problems += 1
    if problems:
        print(f"problems: {problems}; copy the shards again, or write them anew (dvc repro --force shard)", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{path}: every hash, offset and image is as the index says")


@app.command()
def stats(
    path: Annotated[Path | None, typer.Argument(help="A folder of shards, images or tars; else the project's shards.")] = None,
    sheet: Annotated[Path, typer.Option(callback=checked, help="Contact sheet to write.")] = Path("contact_sheet.png"),
) -> None:
    """Counts, sizes and caption lengths of a collection, before or after sharding, and a contact sheet of some images."""
    from ldm.config import load_settings
    from ldm.data.inspect import inspect
    from ldm.report.grid import image_grid

    try:
        settings = load_settings(project())
        limits = settings.data.model_dump(include={"min_side", "max_pixels", "captions"})
    except InputError:  # not in a project
        settings, limits = None, {}
    place = _found(path)
    if sheet.resolve().is_relative_to(place.resolve()):
        raise InputError(f"--sheet {sheet}: lies in {place}, and would be one of its images next time; give another place")
    found = inspect(place, **limits)
    lines = found.summary()
    if settings and len(found.images):
        lines.append(("tokens", _tokens(settings.text.located(project()), found.images)))
    for name, value in lines:
        print(f"{name:<12}{value}")
    if len(found.sheet):
        image_grid(found.sheet, min(8, len(found.sheet)), sheet)
        print(f"{'sheet':<12}{sheet}")


def _tokens(text: "Text", images: "DataFrame") -> str:
    """How many tokens the captions have for the project's text encoder, or why that is not known here."""
    from ldm.data.caption_columns import captions_in
    from ldm.data.tokens import NOT_HERE, count_tokens

    try:
        return str(count_tokens(text, chain(*captions_in(images))))
    except (*NOT_HERE, InputError) as error:
        return f"not counted ({error})"


@app.command()
def drift(
    folder: Annotated[Path, typer.Argument(help="Images, with captions or without.")],
    sampler: Annotated[str | None, typer.Option(help="sgld or sghmc; else the first of `sample_posterior`.")] = None,
) -> None:
    """Are new images like those that the model was trained on? Exit code 1 if not.

    An image's score is how much its bound varies over posterior samples of the decoder's weights, compared with the test images.
    The samples come from the stage sample_posterior: set `sample_posterior: [sgld]` in params.yaml and run the pipeline.
    """
    from ldm.collection.drift import drift

    found = drift(project(), folder, sampler)
    for line in found.lines():
        print(line)
    if found.drifted:
        raise typer.Exit(1)


@app.command()
def ingest(
    folder: Annotated[Path, typer.Argument(help="Images, with a metadata.csv or metadata.jsonl, or a .txt beside each.")],
    settle: Annotated[float, typer.Option(min=0, help="Seconds without a change after which a file counts as complete.")] = 10,
) -> None:
    """Move what is new in a watched folder into a dated batch of the collection `data.path`, versioned by DVC.

    Images that are damaged, in the collection already, without a caption or still being written stay where they are;
    NOT_INGESTED.csv there says why, and what is new in it is printed. A call that is killed loses nothing; the next one
    continues. `ldm run --ingest FOLDER` ingests and then runs the pipeline.
    """
    from ldm.collection.ingest import ingest

    for line in ingest(project(), folder, settle=settle).lines():
        print(line)


@app.command()
def purge(
    image: Annotated[str, typer.Argument(help="Its file_name in the collection, or the sha256 of its file.")],
    remote: Annotated[str | None, typer.Option(help="A DVC remote; else the default one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what there is.")] = False,
) -> None:
    """Delete the old copies of an image that was removed from the collection, and list the models that saw it.

    First delete it from the collection and run the pipeline, so that nothing current holds it. This deletes its file and every
    shard and latents file made from it, in DVC's cache and remote. Such a shard holds other images too, so old commits can no
    longer be checked out whole. The versions that saw the image get a tag, `ldm.purged`.
    """
    from ldm.collection.purge import UNTOUCHED, purge

    purged = purge(project(), image, remote=remote, dry_run=dry_run)
    for line in (*purged.lines(), *purged.notes):
        print(line)
    if len(purged.versions):
        table(purged.versions.astype(str).to_dict("records"))
    print("dry run: nothing was deleted" if dry_run else "deleted", f"not touched: {UNTOUCHED}", sep="; ")
