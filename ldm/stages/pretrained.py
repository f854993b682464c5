"""The setting `autoencoder.pretrained` -> models/pretrained, in diffusers' format; nothing but a note where it is not set."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ldm.base.errors import InputError
from ldm.base.files import replacing
from ldm.base.paths import PRETRAINED
from ldm.base.progress import Progress
from ldm.config import HUB, load_settings
from ldm.registry.tracking import stage_run, use_default_store
from ldm.registry.versions import downloaded
from ldm.stages.stage import stage_main, stage_params


def run(root: Path) -> None:
    settings = load_settings(root)
    name = settings.autoencoder.pretrained
    with stage_run("pretrained", stage_params(root, "pretrained", settings)), replacing(root / PRETRAINED) as partial:
        (partial / "source.txt").write_text(f"{name or 'none'}\n")
        if name:
            from ldm.bayes.likelihoods.likelihood import FILE
            from ldm.nets.autoencoder import load_autoencoder
            from ldm.nets.diffusers import CONFIG, WEIGHTS

            try:
                with Progress(f"pretrained: {name}"), _located(root, name, (CONFIG, WEIGHTS, FILE)) as folder:
                    load_autoencoder(folder).save_pretrained(partial)
                    if (folder / FILE).is_file():
                        shutil.copy(folder / FILE, partial)
            except InputError as error:
                raise InputError(f"autoencoder.pretrained {name}: {error}") from error
    print(f"pretrained: {name or 'none'}", flush=True)


@contextlib.contextmanager
def _located(root: Path, name: str, files: tuple[str, ...]) -> Iterator[Path]:
    """The folder that a setting names, with its `files` fetched from the registry or the hub if it is not on this disk."""
    if name.startswith("models:/"):
        use_default_store(root)
        with downloaded(name) as model:
            yield model / "autoencoder"
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
