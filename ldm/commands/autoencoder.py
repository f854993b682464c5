"""`ldm autoencoder …`: a model's autoencoder alone."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.base.errors import InputError
from ldm.commands.shared import Model, Out, Seed, check_file, found_model, load, read_image, write_images

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
Side = Annotated[int | None, typer.Option(min=1, help="Keep the images' size; work on tiles of this many pixels a side.")]


@app.command()
def sample(
    out: Out, n: Annotated[int, typer.Option("-n", min=1, help="Images.")] = 16, model: Model = None, seed: Seed = 0
) -> None:
    """Draw latents from the autoencoder's prior and images from its likelihood, without the diffusion model."""
    with found_model(model) as (folder, _):
        loaded = load(folder)
    write_images(loaded.sample_prior(n, seed=seed), out)


@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Files of images.")], out: Out, model: Model = None, tile: Side = None
) -> None:
    """Encode images and decode their latents. A sheet shows each image beside its reconstruction.

    Images are prepared as for training. With `--tile` they keep their size (rounded down to the autoencoder's factor),
    however large, and only the reconstructions are written.
    """
    for path in images:
        check_file(path)
    if tile and len(images) > 1 and out.suffix == ".png":
        raise InputError(f"--out {out}: images of different sizes make no sheet; give a folder (a name without a suffix)")
    with found_model(model) as (folder, recipe):
        pixels = [read_image(path, recipe, whole=tile is not None) for path in images]
        loaded = load(folder)
    import torch

    factor = loaded.autoencoder.factor
    for path, (_, height, width) in zip(images, (array.shape for array in pixels), strict=True):
        if min(height, width) < factor:
            raise InputError(f"{path}: its shorter side is less than the {factor} pixels of one latent")
    real = [torch.tensor(x[:, : x.shape[1] // factor * factor, : x.shape[2] // factor * factor]) for x in pixels]
    reconstructed = [loaded.decode(loaded.encode(image[None], tile).mean, tile)[0] for image in real]
    if tile or out.suffix != ".png":
        write_images(reconstructed, out)
    else:
        pairs = [image for pair in zip(real, reconstructed, strict=True) for image in pair]
        write_images(pairs, out, columns=["real", "reconstructed"] * min(4, len(images)))


@app.command()
def traverse(
    image: Annotated[Path, typer.Argument(help="File of an image.")],
    out: Out,
    n: Annotated[int, typer.Option("-n", min=2, help="Images a channel; of an odd number, the middle one is not shifted.")] = 7,
    reach: Annotated[float, typer.Option(min=0, max=100, help="Standard deviations to either side.")] = 3.0,
    model: Model = None,
) -> None:
    """Shift one latent channel after the other, to see what each does to an image. A sheet has a row for each channel."""
    check_file(image)
    with found_model(model) as (folder, recipe):
        pixels = read_image(image, recipe)
        loaded = load(folder)
    import torch

    images = loaded.traverse(torch.tensor(pixels), n, reach=reach)
    shifts = [f"{-reach + 2 * reach * i / (n - 1):.3g}".replace("-", "−") for i in range(n)]
    write_images(images, out, [f"channel {i}" for i in range(len(images) // n)], shifts)
