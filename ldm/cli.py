"""The command line: `ldm run`, `sample`, `interpolate`, `autoencoder …`, `data …`, `checkpoints …`, `registry …`."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.base.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(data_app, name="data", help="Images and shards: check, stats, drift, ingest, purge.")
autoencoder_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(autoencoder_app, name="autoencoder", help="A model's autoencoder alone: sample, reconstruct, traverse.")
checkpoints_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(checkpoints_app, name="checkpoints", help="Unfinished trainings: list, adopt, drop.")
registry_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(registry_app, name="registry", help="Registered models: list, show, register, promote, roll back.")

Model = Annotated[
    str | None,
    typer.Option(help="`models:/NAME@ALIAS`, `models:/NAME/VERSION`, or the folder of a saved model. The champion otherwise."),
]
Seed = Annotated[int, typer.Option(help="Same seed, same images.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps; the model's own default otherwise.")]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="Classifier-free guidance; 1 is none. The model's default otherwise.")
]
Sampler = Annotated[
    str | None, typer.Option(help="ddpm, ddim, euler, heun, dpmpp_2m or langevin; the model's own default otherwise.")
]
Name = Annotated[str | None, typer.Option(help="Registered model; `registry.name` of params.yaml otherwise.")]


@app.callback()
def about() -> None:
    """Latent diffusion models: raw captioned images in, a registered model out.

    Settings that change results are in `params.yaml`. Where things run is environment: `MLFLOW_TRACKING_URI` (default: the
    project's own `mlflow.db`), `PREFECT_API_URL` (default: a temporary server), `LDM_DEVICE` (default: a GPU where there is one).
    """


@app.command()
def run(
    ingest: Annotated[Path | None, typer.Option(help="First take in what is new in this folder; see `ldm data ingest`.")] = None,
) -> None:
    """Bring the whole pipeline up to date, once, here, and register the model.

    Runs the stages of `dvc.yaml` that are out of date, registers the result, lets the gate decide whether it becomes
    `models:/ldm@champion`, and prints a summary. What is up to date is not run again; what was interrupted goes on
    from its last checkpoint.

    Exit codes: 0 done, 1 a stage failed, 2 bad input (one line says what to mend), 130 interrupted.

    Environment: `LDM_STAGE_RETRIES` (default 1), `LDM_STAGE_TIMEOUT` (seconds a stage; default none).
    """
    arguments = ["--ingest", str(ingest.absolute())] if ingest else []
    os.chdir(_root())
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
    steps: Steps = None,
    sampler: Sampler = None,
    schedule: Annotated[str | None, typer.Option(help="Noise levels of the steps: karras, exponential or uniform.")] = None,
    eta: Annotated[float | None, typer.Option(help="Of ddim: 0 is deterministic, 1 is ddpm.")] = None,
    churn: Annotated[float | None, typer.Option(help="Of heun: noise added on the way.")] = None,
    guidance: Guidance = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="Noise levels with guidance; `0 1e9`: all.")
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="0 to 1: brings guided estimates back to the deviation of unguided ones.")
    ] = None,
    negative: Annotated[str, typer.Option(help="A prompt that guidance leads away from.")] = "",
    guide: Annotated[
        str | None, typer.Option(help="A weaker model of the same autoencoder and data, to be led away from (autoguidance).")
    ] = None,
) -> None:
    """Draw images for prompts from a registered or saved model. What is left open is the model's own default.

    Example: `ldm sample --prompt "a handwritten seven" -n 16 --out seven.png`
    """
    _check_out(out)
    loaded = _load(model)
    weaker = None if guide is None else _load(guide)
    prompts = [text for text in prompt for _ in range(n)]
    _say(f"drawing {_images(len(prompts))} …")
    images = loaded.sample(
        prompts,
        negative=negative,
        guide=weaker,
        seed=seed,
        first=first,
        steps=steps,
        sampler=sampler,
        schedule=schedule,
        eta=eta,
        churn=churn,
        guidance=guidance,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
    )
    _write(images, out, prompt if len(prompt) > 1 else None)


@app.command()
def interpolate(
    a: Annotated[str, typer.Argument(help="A prompt, or the file of an image.")],
    b: Annotated[str, typer.Argument(help="Another of the same kind.")],
    out: Annotated[Path, typer.Option(help="A `.png`: one strip; any other name: a folder of PNGs.")],
    n: Annotated[int, typer.Option("-n", min=2, help="Images, the two ends included.")] = 8,
    linear: Annotated[bool, typer.Option("--linear", help="Join two images by a line, not by a great circle.")] = False,
    model: Model = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
) -> None:
    """Walk from one prompt, or one image, to another.

    Two images are joined through the latent space, along a great circle between their latents. Two prompts are joined
    between their text embeddings, every image from the same noise.

    Example: `ldm interpolate "a handwritten three" "a handwritten eight" -n 8 --out walk.png`
    """
    _check_out(out)
    from ldm.data.images import SUFFIXES

    files = [Path(end).is_file() for end in (a, b)]
    for end, is_file in zip((a, b), files, strict=True):
        if not is_file and Path(end).suffix.lower() in SUFFIXES:  # so it is meant as a file
            raise InputError(f"{end}: no such file")
    if files[0] != files[1]:
        raise InputError(f"{a!r} and {b!r}: one is a file and one is not; give two images or two prompts")
    if linear and not files[0]:
        raise InputError("--linear joins two images; prompts are always joined by a line")
    loaded = _load(model)
    first, last = (_read_image(end, loaded) for end in (a, b)) if files[0] else (a, b)
    images = loaded.interpolate(first, last, n, linear=linear, seed=seed, steps=steps, guidance=guidance, sampler=sampler)
    _write(images, out)


@autoencoder_app.command("sample")
def sample_autoencoder(
    out: Annotated[Path, typer.Option(help="A `.png`: one image, or a sheet of several; any other name: a folder of PNGs.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Images.")] = 16,
    model: Model = None,
    seed: Seed = 0,
) -> None:
    """Draw latents from the autoencoder's own prior and images from its likelihood, without the diffusion model.

    How far these are from real images is what the diffusion model is there to learn.

    Example: `ldm autoencoder sample -n 16 --out prior.png`
    """
    _check_out(out)
    _write(_load(model).sample_prior(n, seed=seed), out)


@autoencoder_app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Files of images.")],
    out: Annotated[Path, typer.Option(help="A `.png`: a sheet, originals beside; any other name: a folder of PNGs.")],
    model: Model = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="Keep the images' own size, and work on tiles of this many pixels a side.")
    ] = None,
) -> None:
    """Encode images and give back what the decoder makes of their latents.

    Images are prepared as for training. With `--tile` they keep their size (rounded down to the autoencoder's factor),
    however large, and only what was given back is written.

    Example: `ldm autoencoder reconstruct a.png b.png --out pairs.png`
    """
    _check_out(out)
    for path in images:
        if not path.is_file():
            raise InputError(f"{path}: not a file")
    loaded = _load(model)
    import torch

    from ldm.model import BATCH

    if tile is None:
        shown = torch.stack([_read_image(str(path), loaded) for path in images])
        back = torch.cat([loaded.decode(loaded.encode(part).mean) for part in shown.split(BATCH)])
        if out.suffix == ".png":
            _write(torch.stack([shown, back], 1).flatten(0, 1), out, columns=["real", "given back"] * min(4, len(images)))
        else:
            _write(back, out)
        return
    if len(images) > 1 and out.suffix == ".png":
        raise InputError(f"--out {out}: images of different sizes make no sheet; give a folder (a name without a suffix)")
    whole = [_read_image(str(path), loaded, whole=True) for path in images]
    _write([loaded.decode(loaded.encode(image[None], tile).mean, tile)[0] for image in whole], out)


@autoencoder_app.command()
def traverse(
    image: Annotated[Path, typer.Argument(help="File of an image.")],
    out: Annotated[Path, typer.Option(help="A `.png`: a row for each latent channel; any other name: a folder of PNGs.")],
    n: Annotated[int, typer.Option("-n", min=2, help="Images a channel; an odd number has the unshifted one in its middle.")] = 7,
    reach: Annotated[float, typer.Option(min=0, help="Standard deviations to either side.")] = 3.0,
    model: Model = None,
) -> None:
    """Shift one latent channel after the other, to see what each does to an image.

    Example: `ldm autoencoder traverse a.png --out channels.png`
    """
    _check_out(out)
    if not image.is_file():
        raise InputError(f"{image}: no such file")
    loaded = _load(model)
    images = loaded.traverse(_read_image(str(image), loaded), n, reach=reach)
    shifts = [f"{-reach + 2 * reach * i / (n - 1):.3g}".replace("-", "−") for i in range(n)]
    _write(images, out, [f"channel {i}" for i in range(len(images) // n)], shifts)


@data_app.command()
def check(path: Annotated[Path, typer.Argument(help="A folder of shards.")] = Path("data/shards")) -> None:
    """Verify every hash and offset of a shard folder, and decode every image. Exit code 1 where something is wrong.

    Example: `ldm data check data/shards`
    """
    from ldm.data.inspect import check_shards

    problems = 0
    for problem in check_shards(path):
        print(problem)
        problems += 1
    if problems:
        print(f"problems: {problems}; copy the shards again, or write them anew (dvc repro --force shard)", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{path}: every hash, offset and image is as the index says")


@data_app.command()
def stats(
    path: Annotated[Path, typer.Argument(help="A folder of shards, of images or of tars.")] = Path("data/shards"),
    sheet: Annotated[Path, typer.Option(help="Where the contact sheet goes.")] = Path("contact_sheet.png"),
) -> None:
    """Counts, sizes and caption lengths of a collection, before or after sharding, and a contact sheet of some images.

    Example: `ldm data stats data/raw/source`
    """
    _check_out(sheet, "--sheet")
    from ldm.config import find_root, load_settings
    from ldm.data.inspect import inspect
    from ldm.report.grid import image_grid

    try:
        limits = load_settings(find_root()).data.model_dump(include={"min_side", "max_pixels"})
    except InputError:  # outside of a project there are none
        limits = {}
    found = inspect(path, **limits)
    for name, value in found.summary():
        print(f"{name:<12}{value}")
    if len(found.sheet):
        image_grid(found.sheet, min(8, len(found.sheet)), sheet)
        print(f"{'sheet':<12}{sheet}")


@data_app.command("drift")
def drift_of(
    folder: Annotated[Path, typer.Argument(help="Images, with captions or without.")],
    sampler: Annotated[
        str | None,
        typer.Option(help="Whose posterior samples score them: sgld or sghmc; the first of `sample_posterior` otherwise."),
    ] = None,
) -> None:
    """Are new images like those that the model was trained on? Exit code 1 where they are not.

    Each is scored by how much its bound varies over posterior samples of the decoder's weights, beside the test images. It takes
    several unlike images to be sure that images are unlike; those beyond the limit are named in any case.
    The samples are those of the stage sample_posterior: set `sample_posterior: [sgld]` in params.yaml and run the pipeline.

    Example: `ldm data drift ~/inbox`
    """
    from ldm.collection.drift import drift

    found = drift(_root(), folder, sampler)
    for line in found.lines():
        print(line)
    if found.drifted:
        raise typer.Exit(1)


@data_app.command("ingest")
def ingest_folder(
    folder: Annotated[Path, typer.Argument(help="Images, with a metadata.csv or metadata.jsonl, or a .txt beside each.")],
    settle: Annotated[float, typer.Option(min=0, help="Seconds without a change after which a file counts as complete.")] = 10,
) -> None:
    """Move what is new in a watched folder into a dated batch of the collection `data.path`, versioned by DVC.

    Images that are in the collection already, have no caption yet or are still being written stay where they are. A call
    that is killed loses nothing; the next one goes on. `ldm run --ingest FOLDER` does this first and then runs the pipeline.

    Example: `ldm data ingest ~/inbox`
    """
    from ldm.collection.ingest import ingest

    for line in ingest(_root(), folder, settle=settle).lines():
        print(line)


@data_app.command("purge")
def purge_image(
    image: Annotated[str, typer.Argument(help="Its file_name in the collection, or the sha256 of its file.")],
    remote: Annotated[str | None, typer.Option(help="A DVC remote; the default one otherwise.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what there is.")] = False,
) -> None:
    """Delete the old copies of an image that was removed from the collection, and list the models that saw it.

    First delete it from the collection and run the pipeline: it then is in nothing that is current. This deletes its file
    and every shard and latents file made of it from DVC's cache and remote; such a shard holds other images too, so that old
    commits can no longer be checked out whole. The versions that saw it get a tag, `ldm.purged`.

    Example: `ldm data purge 2025-03-01/0042.png --dry-run`
    """
    from ldm.collection.purge import UNTOUCHED, purge

    purged = purge(_root(), image, remote=remote, dry_run=dry_run)
    for line in (*purged.lines(), *purged.notes):
        print(line)
    if len(purged.versions):
        _table(list(purged.versions.columns), purged.versions.astype(str).to_numpy().tolist())
    print("dry run: nothing was deleted" if dry_run else "deleted", f"not touched: {UNTOUCHED}", sep="; ")


@checkpoints_app.command("list")
def list_checkpoints() -> None:
    """Unfinished trainings, the newest last: how far each got, and whether a run would go on from it.

    `ready`: a run with the same settings and inputs goes on from it. `running`: it is being trained. `changed: …`: the code or a
    library has changed since; a run would start from nothing, unless the checkpoint is adopted. `other settings: …`: a run
    would go on from it if params.yaml had those again.
    """
    from ldm.config import load_settings
    from ldm.stages import work

    found, settings = work.works(_root()), load_settings(_root())
    if not found:
        print("no unfinished trainings")
        return
    _table(
        ["key", "stage", "reached", "size", "written", "state"],
        [
            [one.key[:8], one.stage, one.progress, _size(one.size), f"{one.written:%Y-%m-%d %H:%M}", one.state(settings)]
            for one in found
        ],
    )


@checkpoints_app.command("adopt")
def adopt_checkpoint(
    key: Annotated[str, typer.Argument(help="The beginning of its key, as `ldm checkpoints list` shows it.")],
) -> None:
    """Let the next run go on from a checkpoint that was written under other code.

    Use it if the change does not matter to what the training computes. The run in MLflow and the registered version get the tag
    `ldm.adopted`, which says what had changed.
    """
    from ldm.config import load_settings
    from ldm.stages import work

    taken = work.adopt(_root(), key)
    print(f"{taken.stage}: adopted as {taken.key[:8]}; the next run goes on after {taken.progress}")
    if others := taken.other_settings(load_settings(_root())):
        print(f"{taken.stage}: if params.yaml has its settings again: {', '.join(others)}")


@checkpoints_app.command("drop")
def drop_checkpoint(
    keys: Annotated[list[str] | None, typer.Argument(help="Beginnings of keys, as `ldm checkpoints list` shows them.")] = None,
    changed: Annotated[bool, typer.Option("--changed", help="All that were written under other code.")] = False,
) -> None:
    """Delete unfinished trainings."""
    from ldm.stages import work

    root = _root()
    chosen = [work.find(root, key) for key in keys or []]
    chosen += [one for one in work.works(root) if changed and one.changes() and not work.is_running(one)]
    chosen = list({one.key: one for one in chosen}.values())
    if not chosen and not changed:
        raise InputError("name checkpoints by their keys, or give --changed; `ldm checkpoints list` shows them")
    for one in chosen:
        line = f"dropped {one.key[:8]}: {one.stage}, {one.progress}, {_size(one.size)}"
        work.drop(one)
        print(line)
    if not chosen:
        print("no checkpoints under other code")


@registry_app.command("list")
def list_versions(name: Name = None) -> None:
    """Registered versions, newest first, with their aliases and bits per dimension."""
    from ldm.registry import versions as registry

    name = _name(name)
    found = registry.find({}, name)
    if not found:
        raise InputError(f"model {name!r} has no versions; `ldm run` registers one")
    rows = []
    for one in found:
        bits = one.tags[registry.BITS]
        number = bits if bits == registry.NO_BOUND else f"{float(bits):.4f}"
        row = [str(one.version), ", ".join(one.aliases), f"{one.created:%Y-%m-%d %H:%M}", number, one.tags[registry.IMAGE]]
        rows.append([*row, one.tags.get("ldm.git_commit", "")[:8]])
    _table(["version", "aliases", "created", "bits_per_dim", "image", "git_commit"], rows)


@registry_app.command()
def show(
    model: Annotated[str | None, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION, else the champion.")] = None,
) -> None:
    """One version: aliases, where it came from, how it was evaluated."""
    from ldm.registry import versions as registry

    _in_project()
    found = registry.lookup(model or _champion())
    rows = {"version": found.uri, "aliases": ", ".join(found.aliases), "created": f"{found.created:%Y-%m-%d %H:%M} UTC"}
    rows |= {"run": found.run_id or "", **{key.removeprefix("ldm."): value for key, value in sorted(found.tags.items())}}
    for key, value in rows.items():
        print(f"{key:<16}{value}")


@registry_app.command()
def register() -> None:
    """Register the model of the project folder and let the gate decide, after a plain `dvc repro`.

    The same files are never registered twice. `ldm run` does this by itself.
    """
    from ldm.registry import versions as registry

    root = _in_project()
    registered = registry.register(root)
    decision = registry.gate_and_promote(root, registered.version)
    print(f"version {registered.version} ({'new' if registered.created else 'registered before'})")
    print(f"gate: {'promoted: ' if decision.promote else ''}{decision.reason}")


@registry_app.command()
def promote(version: Annotated[int, typer.Argument(help="Version number.")], name: Name = None) -> None:
    """Make a version champion by hand, whatever the gate said; the champion so far becomes `previous`."""
    from ldm.registry import versions as registry

    registry.promote(version, _name(name))
    print(f"version {version} is champion")


@registry_app.command()
def rollback(name: Name = None) -> None:
    """Swap `champion` and `previous`."""
    from ldm.registry import versions as registry

    print(f"version {registry.rollback(_name(name))} is champion")


def _root() -> Path:
    from ldm.config import find_root

    return find_root()


def _in_project() -> Path:
    """The project folder, with its own MLflow store as the default."""
    from ldm.registry.tracking import use_default_store

    root = _root()
    use_default_store(root)
    return root


def _name(name: str | None) -> str:
    from ldm.config import load_settings

    root = _in_project()
    return name or load_settings(root).registry.name


def _champion() -> str:
    return f"models:/{_name(None)}@champion"


def _load(model: str | None) -> "LatentDiffusion":
    model = model or _champion()
    _say(f"loading {model} …")
    if model.startswith("models:"):
        from ldm.registry import versions as registry

        if "MLFLOW_TRACKING_URI" not in os.environ:
            _in_project()
        place: contextlib.AbstractContextManager[Path] = registry.downloaded(model)
    elif (Path(model) / "model.json").is_file():
        place = contextlib.nullcontext(Path(model))
    else:
        raise InputError(f"{model}: holds no model.json; give models:/NAME@ALIAS, models:/NAME/VERSION or a saved model's folder")
    with place as folder:
        # OpenMP's threads sleep while they wait for work; by default they spin, which on a busy machine takes most of the time.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from ldm.base.device import default_device
        from ldm.model import LatentDiffusion

        return LatentDiffusion.load(folder, default_device())


def _read_image(path: str, model: "LatentDiffusion", whole: bool = False) -> "Tensor":
    """An image file as the model was shown its training images, uint8 (C, H, W); or as large as it is, of whole latents."""
    import torch

    from ldm.data import images

    prepared = images.Preprocessing(**model.recipe.preprocessing)
    try:
        blob = Path(path).read_bytes()
        if not whole:
            return torch.tensor(prepared.as_seen(blob))
        pixels = images.to_array(images.decode(blob, channels=prepared.channels, background=prepared.background))
    except images.UnreadableImage as error:
        raise InputError(f"{path}: not a readable image ({error})") from None
    factor = model.autoencoder.factor
    if min(pixels.shape[1:]) < factor:
        raise InputError(f"{path}: its shorter side is less than the {factor} pixels of one latent")
    height, width = (side // factor * factor for side in pixels.shape[1:])
    return torch.tensor(pixels[:, :height, :width])


def _check_out(out: Path, option: str = "--out") -> None:
    if not out.absolute().parent.is_dir():
        raise InputError(f"{option} {out}: the folder {out.parent} does not exist")
    if out.suffix not in ("", ".png"):
        raise InputError(f"{option} {out}: write a .png, or a folder (a name without a suffix)")
    if out.suffix and out.is_dir():
        raise InputError(f"{option} {out}: is a folder; give a file name, or a folder without a suffix")


def _write(images: Any, out: Path, rows: list[str] | None = None, columns: list[str] | None = None) -> None:
    """Write uint8 images (C, H, W) each, all of one size where they make a sheet, whose rows and columns may have labels."""
    from ldm.data.images import from_array, to_png

    pixels = [image.numpy() for image in images]
    if out.suffix != ".png":
        out.mkdir(exist_ok=True)
        for i, image in enumerate(pixels):
            (out / f"{i:04d}.png").write_bytes(to_png(from_array(image)))
    elif len(pixels) == 1:
        out.write_bytes(to_png(from_array(pixels[0])))
    else:
        import numpy as np

        from ldm.report.grid import image_grid

        width = len(columns) if columns else len(pixels) // len(rows) if rows else min(8, len(pixels))
        image_grid(np.stack(pixels), width, out, row_labels=rows, column_labels=columns)
    print(f"{_images(len(pixels))} written to {out}")


def _images(count: int) -> str:
    return f"{count} {'image' if count == 1 else 'images'}"


def _table(columns: list[str], rows: list[list[str]]) -> None:
    """Left-aligned columns; a table on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say(what: str) -> None:
    """What is being done, on stderr: stdout is for results."""
    print(what, file=sys.stderr, flush=True)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def main() -> None:
    """Entry point: bad input is one line and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
