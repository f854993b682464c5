"""What several commands use. What imports pydantic, MLflow or torch is imported inside functions: `ldm --help` is quick."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.base.errors import InputError

if TYPE_CHECKING:
    from numpy import ndarray as Array

    from ldm.diffusion.options import Recipe, Sampling
    from ldm.model import LatentDiffusion


class SamplingCommand(typer.core.TyperCommand):
    """A command with `--set`, whose help names the sampling settings. They are read only when the help is shown."""

    def format_help(self, context: Any, formatter: Any) -> None:
        from ldm.base.options import keys
        from ldm.diffusion.options import Sampling

        option: Any = next(param for param in self.params if param.name == "assignments")
        option.help += " Keys: "
        for key in keys(Sampling):
            about = ", ".join(map(str, key.values)) or ("of " + ", ".join(key.kinds) if key.kinds else "")
            option.help += f"`{key.name}` ({about}), " if about else f"`{key.name}`, "
        option.help = option.help.removesuffix(", ") + "."
        super().format_help(context, formatter)


def checked(param: typer.CallbackParam, out: Path) -> Path:
    """Where images are to be written; `InputError` before anything is computed if they cannot be."""
    option, sheet = f"{param.opts[0]} {out}", param.name == "sheet"
    if not out.name:
        raise InputError(f"{option}: give the name of a .png{'' if sheet else ', or of a folder'}")
    if out.suffix != ".png" and (out.suffix or sheet):
        raise InputError(f"{option}: write a .png{'' if sheet else ', or a folder (a name without a suffix)'}")
    try:
        if not out.absolute().parent.is_dir():
            raise InputError(f"{option}: the folder {out.parent} does not exist")
        if out.is_symlink() and not out.exists():
            raise InputError(f"{option}: is a link to nothing; remove it, or give another name")
        if out.suffix and out.is_dir():
            raise InputError(f"{option}: is a folder; give a file name, or a folder without a suffix")
        if out.exists() and not (out.is_file() if out.suffix else out.is_dir()):
            found = "a file" if out.is_file() else "neither a file nor a folder"
            raise InputError(f"{option}: is {found}; write a .png, or a new folder")
        if not out.suffix and out.exists() and (first := next(out.iterdir(), None)):
            raise InputError(f"{option}: is not empty, {first.name} is there; give a new folder, or an empty one")
        if out.is_file():
            out.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=out if out.is_dir() else out.absolute().parent).close()
    except OSError as error:
        raise InputError(f"{option}: {error.strerror}; give another place") from None
    return out


Model = Annotated[str | None, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION or a saved folder; else the champion.")]
Name = Annotated[str | None, typer.Option(help="Registered model; else `registry.name` of params.yaml.")]
Out = Annotated[Path, typer.Option(callback=checked, help="A `.png`: one image or a sheet; else a new folder of PNGs.")]
Seed = Annotated[int, typer.Option(help="Same seed, same images.")]
ImageSize = Annotated[str | None, typer.Option("--size", metavar="WIDTHxHEIGHT", help="Of the images; else the data's square.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a sampling setting of the model.")]


def project(tracked: bool = False) -> Path:
    """The project's folder; if `tracked`, its own MLflow store becomes the default."""
    from ldm.config import find_root
    from ldm.registry.tracking import use_default_store

    root = find_root()
    if tracked:
        use_default_store(root)
    return root


def model_name(name: str | None = None) -> str:
    from ldm.config import load_settings

    root = project(tracked=True)
    return name or load_settings(root).registry.name


@contextlib.contextmanager
def found_model(model: str | None) -> Iterator[tuple[Path, "Recipe"]]:
    """The folder and recipe of the model of that name or folder, or of the champion. torch is not imported."""
    from ldm.diffusion.options import read_recipe

    model = model or f"models:/{model_name()}@champion"
    typer.echo(f"loading {model} …", err=True)
    with contextlib.ExitStack() as stack:
        folder = Path(model)
        if model.startswith("models:"):
            from ldm.registry.versions import downloaded

            if "MLFLOW_TRACKING_URI" not in os.environ:
                project(tracked=True)
            folder = stack.enter_context(downloaded(model))
        elif not (folder / "model.json").is_file():
            raise InputError(f"{model}: holds no model.json; give models:/NAME@ALIAS, models:/NAME/VERSION or a saved folder")
        yield folder, read_recipe(folder)


def load(folder: Path) -> "LatentDiffusion":
    """The model in a folder, on the default device."""
    # OpenMP's threads sleep while they wait for work; by default they spin, which on a busy machine takes most of the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ldm.base.device import default_device
    from ldm.model import LatentDiffusion

    return LatentDiffusion.load(folder, default_device())


def sampling(recipe: "Recipe", assignments: list[str] | None) -> "Sampling":
    """The model's sampling settings with those of `--set`, also as params.yaml calls them."""
    from ldm.base.options import assigned
    from ldm.diffusion.options import changed_sampling

    changes = [assignment.removeprefix("sampling.") for assignment in assignments or ()]
    return changed_sampling(assigned(recipe.sampling, changes), {})


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print each warning as one line on stderr."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
        yield


def check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the file of an image")


def read_image(path: Path, recipe: "Recipe", whole: bool = False) -> "Array":
    """An image prepared as for training, uint8 (C, H, W); if `whole`, in its own size."""
    from ldm.data import images

    prepared = images.Preprocessing(**recipe.preprocessing)
    try:
        blob = path.read_bytes()
        if not whole:
            return prepared.as_seen(blob)
        return images.to_array(images.decode(blob, channels=prepared.channels, background=prepared.background))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the file of an image") from None
    except images.UnreadableImage as error:
        raise InputError(f"{path}: not a readable image ({error})") from None


def write_images(
    images: Any, out: Path, rows: list[str] | None = None, columns: list[str] | None = None, first: int = 0
) -> None:  # fmt: skip
    """Write uint8 images (C, H, W): PNGs numbered from `first`, one PNG, or a sheet with labelled rows and columns."""
    from ldm.data.images import from_array, to_png

    pixels = [image.numpy() for image in images]
    if out.suffix and len(pixels) > 1:
        from ldm.report.grid import image_grid

        width = len(columns) if columns else len(pixels) // len(rows) if rows else min(8, len(pixels))
        image_grid(pixels, width, out, row_labels=rows, column_labels=columns)
    else:
        if not out.suffix:
            out.mkdir(exist_ok=True)
        for number, image in enumerate(pixels, start=first):
            (out if out.suffix else out / f"{number:04d}.png").write_bytes(to_png(from_array(image)))
    print(f"{counted(len(pixels))} written to {out}")


def counted(count: int) -> str:
    return f"{count} {'image' if count == 1 else 'images'}"


def table(rows: list[Any]) -> None:
    """Print rows under the names of their columns."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in ({name: name for name in widths}, *rows):
        print("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip())
