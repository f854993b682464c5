"""The settings `autoencoder.pretrained` and `train_unet.init` -> models/pretrained, models/initial; a note alone if not set."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ldm.base.errors import InputError
from ldm.base.files import replacing
from ldm.base.paths import INITIAL, PRETRAINED
from ldm.base.progress import Progress
from ldm.config import HUB, load_settings
from ldm.registry.tracking import stage_run, use_default_store
from ldm.registry.versions import downloaded
from ldm.stages.checks import check_initial
from ldm.stages.stage import stage_main, stage_params


def run(root: Path) -> None:
    settings = load_settings(root)
    pretrained, init = settings.autoencoder.pretrained, settings.train_unet.init
    with stage_run("pretrained", stage_params(root, "pretrained", settings)):
        with _written(root / PRETRAINED, "autoencoder.pretrained", pretrained) as out:
            if pretrained:
                _fetch_autoencoder(root, pretrained, out)
        with _written(root / INITIAL, "train_unet.init", init) as out:
            if init:
                _fetch_unet(root, init, out)
        if init:
            from ldm.nets.diffusers import network_hash

            check_initial(root, settings, root / INITIAL, pretrained=network_hash(root / PRETRAINED) if pretrained else None)
    print(f"pretrained: autoencoder {pretrained or 'none'}, U-Net {init or 'none'}", flush=True)


@contextlib.contextmanager
def _written(folder: Path, setting: str, name: str | None) -> Iterator[Path]:
    """An out to be filled, with a note of what the setting names; an `InputError` within names the setting."""
    with replacing(folder) as partial:
        (partial / "source.txt").write_text(f"{name or 'none'}\n")
        try:
            with Progress(f"pretrained: {name}") if name else contextlib.nullcontext():
                yield partial
        except InputError as error:
            raise InputError(f"{setting} {name}: {error}") from error


def _fetch_autoencoder(root: Path, name: str, out: Path) -> None:
    """Write an autoencoder in diffusers' format, with its likelihood if it has one."""
    from ldm.bayes.likelihoods.likelihood import FILE
    from ldm.nets.autoencoder import load_autoencoder
    from ldm.nets.diffusers import CONFIG, WEIGHTS

    with _located(root, name, (CONFIG, WEIGHTS, FILE)) as folder:
        load_autoencoder(folder).save_pretrained(out)
        if (folder / FILE).is_file():
            shutil.copy(folder / FILE, out)


def _fetch_unet(root: Path, name: str, out: Path) -> None:
    """Write the U-Net of a saved model, and its recipe."""
    from ldm.nets.backbone import load_backbone

    with part_of_model(root, name, "model.json") as file:
        shutil.copyfile(file, out / file.name)
    with part_of_model(root, name, "unet") as folder:
        load_backbone(folder).save_pretrained(out / "unet")


def part_of_model(root: Path, name: str, part: str) -> contextlib.AbstractContextManager[Path]:
    """A file or folder of a saved model: of a registered version, or in a folder on this disk."""
    if not name.startswith("models:/"):
        return contextlib.nullcontext(root / name / part)
    use_default_store(root)
    return downloaded(name, part)


@contextlib.contextmanager
def _located(root: Path, name: str, files: tuple[str, ...]) -> Iterator[Path]:
    """The folder that a setting names, with its `files` fetched from the registry or the hub if it is not on this disk."""
    if name.startswith("models:/"):
        with part_of_model(root, name, "autoencoder") as folder:
            yield folder
    elif re.fullmatch(HUB, name):
        from huggingface_hub import snapshot_download

        repository, _, place = name.partition("@")
        commit, _, within = place.partition("/")
        wanted = [f"{within}/{file}".lstrip("/") for file in files]  # others may be many gigabytes
        try:
            folder = snapshot_download(repository, revision=commit, allow_patterns=wanted)  # or from its cache: no network
        except (OSError, ValueError) as error:
            found = str(error).splitlines()[0]
            raise InputError(f"the hub does not give it ({found}); check the name, or your access") from error
        yield Path(folder) / within
    else:
        yield root / name


if __name__ == "__main__":
    stage_main("pretrained", run)
