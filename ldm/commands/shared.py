"""What several commands use. What imports pydantic, MLflow or torch is imported inside functions: `ldm --help` is quick."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.base.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

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
    option = f"{param.opts[0]} {out}"
    if not out.absolute().parent.is_dir():
        raise InputError(f"{option}: the folder {out.parent} does not exist")
    if out.suffix not in ("", ".png"):
        raise InputError(f"{option}: write a .png, or a folder (a name without a suffix)")
    if out.suffix and out.is_dir():
        raise InputError(f"{option}: is a folder; give a file name, or a folder without a suffix")
    return out


Model = Annotated[str | None, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION or a saved folder; else the champion.")]
Name = Annotated[str | None, typer.Option(help="Registered model; else `registry.name` of params.yaml.")]
Out = Annotated[Path, typer.Option(callback=checked, help="A `.png`: one image or a sheet; any other name: a folder of PNGs.")]
Seed = Annotated[int, typer.Option(help="Same seed, same images.")]
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


def load_model(model: str | None) -> "LatentDiffusion":
    """The model of that name or folder, or the champion, on the default device."""
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
        # OpenMP's threads sleep while they wait for work; by default they spin, which on a busy machine takes most of the time.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from ldm.base.device import default_device
        from ldm.model import LatentDiffusion

        return LatentDiffusion.load(folder, default_device())


def sampling(model: "LatentDiffusion", assignments: list[str] | None) -> dict[str, Any]:
    """The model's sampling settings with those of `--set`, also as params.yaml calls them."""
    from ldm.base.options import assigned
    from ldm.diffusion.options import changed_sampling

    changes = [assignment.removeprefix("sampling.") for assignment in assignments or ()]
    return changed_sampling(assigned(model.recipe.sampling, changes), {}).model_dump()


def check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the file of an image")


def read_image(path: Path, model: "LatentDiffusion", whole: bool = False) -> "Tensor":
    """An image prepared as for training, uint8 (C, H, W); if `whole`, in its own size rounded down to whole latents."""
    import torch

    from ldm.data import images

    prepared = images.Preprocessing(**model.recipe.preprocessing)
    try:
        blob = path.read_bytes()
        if not whole:
            return torch.tensor(prepared.as_seen(blob))
        pixels = images.to_array(images.decode(blob, channels=prepared.channels, background=prepared.background))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the file of an image") from None
    except images.UnreadableImage as error:
        raise InputError(f"{path}: not a readable image ({error})") from None
    factor = model.autoencoder.factor
    if min(pixels.shape[1:]) < factor:
        raise InputError(f"{path}: its shorter side is less than the {factor} pixels of one latent")
    height, width = (side // factor * factor for side in pixels.shape[1:])
    return torch.tensor(pixels[:, :height, :width])


def write_images(images: Any, out: Path, rows: list[str] | None = None, columns: list[str] | None = None) -> None:
    """Write uint8 images (C, H, W) as a folder of PNGs, one PNG, or a sheet with labelled rows and columns."""
    from ldm.data.images import from_array, to_png

    pixels = [image.numpy() for image in images]
    if out.suffix and len(pixels) > 1:
        import numpy as np

        from ldm.report.grid import image_grid

        width = len(columns) if columns else len(pixels) // len(rows) if rows else min(8, len(pixels))
        image_grid(np.stack(pixels), width, out, row_labels=rows, column_labels=columns)
    else:
        if not out.suffix:
            out.mkdir(exist_ok=True)
        for i, image in enumerate(pixels):
            (out if out.suffix else out / f"{i:04d}.png").write_bytes(to_png(from_array(image)))
    print(f"{counted(len(pixels))} written to {out}")


def counted(count: int) -> str:
    return f"{count} {'image' if count == 1 else 'images'}"


def table(rows: list[Any]) -> None:
    """Print rows under the names of their columns."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in ({name: name for name in widths}, *rows):
        print("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip())
