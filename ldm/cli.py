"""The command line: `ldm run`, `doctor`, `gc`, `sample`, `interpolate`, and the groups in `ldm/commands/`."""

import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm import environment
from ldm.base.errors import InputError, disk_full
from ldm.commands import autoencoder, checkpoints, data, registry, shared
from ldm.commands.shared import Model, Out, SamplingCommand, Seed, Set, write_images

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
app.add_typer(data.app, name="data", help="Images and shards: check, stats, drift, ingest, purge.")
app.add_typer(autoencoder.app, name="autoencoder", help="A model's autoencoder alone: sample, reconstruct, traverse.")
app.add_typer(checkpoints.app, name="checkpoints", help="Unfinished trainings: list, adopt, drop.")
app.add_typer(registry.app, name="registry", help="Registered models: list, show, register, promote, roll back.")


@app.callback()
def about() -> None:
    """Latent diffusion models: raw captioned images in, a registered model out.

    Settings that change results are in `params.yaml`. Where things run is environment: `MLFLOW_TRACKING_URI` (default: the
    project's own `mlflow.db`), `PREFECT_API_URL` (default: a temporary server), `LDM_DEVICE` (default: a GPU where there is one).
    """


@app.command()
def run(
    ingest: Annotated[Path | None, typer.Option(help="A folder to ingest first; see `ldm data ingest`.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change params.yaml first, e.g. train_unet.lr=1e-3.")
    ] = None,
) -> None:
    """Bring the whole pipeline up to date, once, here, and register the model.

    Runs the stages of `dvc.yaml` that are out of date, registers the result, lets the gate decide whether it becomes
    `models:/ldm@champion`, and prints a summary. What was interrupted continues from its last checkpoint.

    Exit codes: 0 done, 1 a stage failed, 2 bad input (one line says what to mend), 130 interrupted. Environment:
    `LDM_STAGE_RETRIES` (default 1), `LDM_STAGE_TIMEOUT` (seconds a stage; default none).
    """
    root = shared.project()
    arguments = ["--ingest", str(ingest.absolute())] if ingest else []
    if assignments:
        from ldm.config import change_settings
        from ldm.versioning.repository import alone

        with alone(root):  # a run that is under way would train its later stages under other settings than it recorded
            for line in change_settings(root, assignments):
                print(f"params.yaml: {line}", flush=True)
    os.chdir(root)
    # Become the flow: a parent in between would have to pass every signal on, and could die before it.
    os.execv(sys.executable, [sys.executable, "-m", "flows.run", *arguments])


@app.command()
def doctor() -> None:
    """Check what a run needs: Python, code, device, disk, git, DVC, MLflow, Prefect, settings, data. Exit code 1 with a fault."""
    from ldm.doctor import examine

    faults = 0
    for level, subject, text in examine(shared.project()):
        print(f"{level:<9}{subject:<13}{text}", flush=True)
        faults += level == "fault"
    if faults:
        raise typer.Exit(1)


@app.command()
def gc(
    keep: Annotated[int, typer.Option(min=1, help="How many versions, runs and, of each schedule, branches stay.")] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
) -> None:
    """Remove what accumulates, but for what the last runs and every version with an alias need.

    What goes: older versions and runs with their files, branches of scheduled runs, objects of DVC's cache that nothing names any
    more, latents, unfinished trainings untouched for a month, half-written files, worktrees that git does not know. A DVC remote
    is not touched. What is in use stays, and the table says so.
    """
    from ldm.collection.retention import collect_garbage, summary

    if rows := summary(collect_garbage(shared.project(), keep, dry_run=dry_run)):
        shared.table(rows)
    print("dry run: nothing was removed" if dry_run else "removed" if rows else "nothing to remove")


@app.command(cls=SamplingCommand)
def sample(
    prompt: Annotated[list[str], typer.Option(help="What the image shows; may be given several times.")],
    out: Out,
    n: Annotated[int, typer.Option("-n", min=1, help="Images a prompt.")] = 1,
    model: Model = None,
    seed: Seed = 0,
    first: Annotated[int, typer.Option(min=0, help="Number of the first image: each depends on seed and number only.")] = 0,
    negative: Annotated[str, typer.Option(help="A prompt that guidance leads away from.")] = "",
    guide: Annotated[str | None, typer.Option(help="A weaker model of the same latents that guidance leads away from.")] = None,
    size: shared.ImageSize = None,
    assignments: Set = None,
) -> None:
    """Draw images for prompts. What is not set is the model's own default."""
    from ldm.data.shapes import from_text
    from ldm.diffusion.options import check_guided

    shape = from_text(size) if size else None
    with shared.found_model(model) as (folder, recipe), shared.found_model(guide) if guide else nullcontext() as other:
        options = shared.sampling(recipe, assignments)
        check_guided(recipe, options, negative, other[1] if other else None)
        loaded, weaker = shared.load(folder), shared.load(other[0]) if other else None
    prompts = [text for text in prompt for _ in range(n)]
    typer.echo(f"drawing {shared.counted(len(prompts))} …", err=True)
    with shared.warnings_as_lines():
        drawn: dict[str, Any] = {"negative": negative, "guide": weaker, "size": shape, "seed": seed, "first": first}
        images = loaded.sample(prompts, **drawn, **options.model_dump())
    write_images(images, out, prompt if len(prompt) > 1 else None, first=first)


@app.command(cls=SamplingCommand)
def interpolate(
    a: Annotated[str, typer.Argument(help="A prompt, or the file of an image.")],
    b: Annotated[str, typer.Argument(help="Another prompt, or the file of another image.")],
    out: Out,
    n: Annotated[int, typer.Option("-n", min=2, help="Images, the two ends included.")] = 8,
    linear: Annotated[bool, typer.Option("--linear", help="Join two images by a line, not by a great circle.")] = False,
    model: Model = None,
    seed: Seed = 0,
    assignments: Set = None,
) -> None:
    """Walk from one prompt, or one image, to another.

    Two images are joined by a great circle between their latents. Two prompts are joined by a line between their text
    embeddings, and every image starts from the same noise.
    """
    from ldm.data.images import SUFFIXES

    for end in (a, b):
        if Path(end).suffix.lower() in SUFFIXES:  # not a prompt
            shared.check_file(Path(end))
    files = [Path(end).is_file() for end in (a, b)]
    if files[0] != files[1]:
        raise InputError(f"{a!r} and {b!r}: one is a file and one is not; give two images or two prompts")
    if linear and not files[0]:
        raise InputError("--linear joins two images; prompts are always joined by a line")
    with shared.found_model(model) as (folder, recipe):
        options = shared.sampling(recipe, assignments)
        pixels = [shared.read_image(Path(end), recipe) for end in (a, b) if files[0]]
        loaded = shared.load(folder)
    import torch

    first, last = map(torch.tensor, pixels) if pixels else (a, b)
    with shared.warnings_as_lines():
        images = loaded.interpolate(first, last, n, linear=linear, seed=seed, **options.model_dump())
    write_images(images, out)


def main() -> None:
    """Entry point: bad input, or a full disk, is one line and exit code 2."""
    environment.set_up()
    try:
        app()
    except Exception as error:
        refusal = error if isinstance(error, InputError) else disk_full(error, Path.cwd(), Path(tempfile.gettempdir()))
        if refusal is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
