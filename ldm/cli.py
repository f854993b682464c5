"""The command line: `ldm run`, `sample`, `interpolate`, and the groups in `ldm/commands/`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ldm.base.errors import InputError
from ldm.commands import autoencoder, checkpoints, data, registry
from ldm.commands.shared import (
    Model,
    Seed,
    Set,
    changed,
    check_out,
    counted,
    load_model,
    project,
    read_image,
    say,
    write_images,
)

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
    ingest: Annotated[
        Path | None, typer.Option(help="First move what is new in this folder into the collection; see `ldm data ingest`.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of params.yaml first, such as train_unet.lr=1e-3."),
    ] = None,
) -> None:
    """Bring the whole pipeline up to date, once, here, and register the model.

    Runs the stages of `dvc.yaml` that are out of date, registers the result, lets the gate decide whether it becomes
    `models:/ldm@champion`, and prints a summary. What is up to date is not run again; what was interrupted goes on
    from its last checkpoint.

    Exit codes: 0 done, 1 a stage failed, 2 bad input (one line says what to mend), 130 interrupted.

    Environment: `LDM_STAGE_RETRIES` (default 1), `LDM_STAGE_TIMEOUT` (seconds a stage; default none).
    """
    arguments = ["--ingest", str(ingest.absolute())] if ingest else []
    root = project()
    if assignments:
        from ldm.config import change_settings

        for line in change_settings(root, assignments):
            print(f"params.yaml: {line}", flush=True)
    os.chdir(root)
    # Become the flow: a parent in between would have to pass every signal on, and could die before it.
    os.execv(sys.executable, [sys.executable, "-m", "flows.run", *arguments])


@app.command()
def sample(
    prompt: Annotated[list[str], typer.Option(help="What the image shows; may be given several times.")],
    out: Annotated[Path, typer.Option(help="A `.png`: one image, or a sheet of several; any other name: a folder of PNGs.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Images a prompt.")] = 1,
    model: Model = None,
    seed: Seed = 0,
    first: Annotated[int, typer.Option(min=0, help="Number of the first image: each depends on seed and number alone.")] = 0,
    negative: Annotated[str, typer.Option(help="A prompt that guidance leads away from.")] = "",
    guide: Annotated[
        str | None, typer.Option(help="A weaker model of the same autoencoder and data, to be led away from (autoguidance).")
    ] = None,
    assignments: Set = None,
) -> None:
    """Draw images for prompts from a registered or saved model. What is not set is the model's own default.

    Example: `ldm sample --prompt "a handwritten seven" -n 16 --set steps=32 --out seven.png`
    """
    check_out(out)
    loaded = load_model(model)
    sampling = changed(loaded, assignments)
    weaker = None if guide is None else load_model(guide)
    prompts = [text for text in prompt for _ in range(n)]
    say(f"drawing {counted(len(prompts))} …")
    images = loaded.sample(prompts, negative=negative, guide=weaker, seed=seed, first=first, **sampling)
    write_images(images, out, prompt if len(prompt) > 1 else None)


@app.command()
def interpolate(
    a: Annotated[str, typer.Argument(help="A prompt, or the file of an image.")],
    b: Annotated[str, typer.Argument(help="Another of the same kind.")],
    out: Annotated[Path, typer.Option(help="A `.png`: one strip; any other name: a folder of PNGs.")],
    n: Annotated[int, typer.Option("-n", min=2, help="Images, the two ends included.")] = 8,
    linear: Annotated[bool, typer.Option("--linear", help="Join two images by a line, not by a great circle.")] = False,
    model: Model = None,
    seed: Seed = 0,
    assignments: Set = None,
) -> None:
    """Walk from one prompt, or one image, to another.

    Two images are joined through the latent space, along a great circle between their latents. Two prompts are joined
    between their text embeddings, every image from the same noise.

    Example: `ldm interpolate "a handwritten three" "a handwritten eight" -n 8 --out walk.png`
    """
    check_out(out)
    from ldm.data.images import SUFFIXES

    files = [Path(end).is_file() for end in (a, b)]
    for end, is_file in zip((a, b), files, strict=True):
        if not is_file and Path(end).suffix.lower() in SUFFIXES:  # so it is meant as a file
            raise InputError(f"{end}: no such file")
    if files[0] != files[1]:
        raise InputError(f"{a!r} and {b!r}: one is a file and one is not; give two images or two prompts")
    if linear and not files[0]:
        raise InputError("--linear joins two images; prompts are always joined by a line")
    loaded = load_model(model)
    first, last = (read_image(Path(end), loaded) if files[0] else end for end in (a, b))
    images = loaded.interpolate(first, last, n, linear=linear, seed=seed, **changed(loaded, assignments))
    write_images(images, out)


def main() -> None:
    """Entry point: bad input is one line and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
