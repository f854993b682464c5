"""The setting `autoencoder.pretrained` -> models/pretrained, in diffusers' format; nothing but a note where it is not set."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ldm.config import load_settings
from ldm.errors import InputError
from ldm.files import replacing
from ldm.stages.runtime import stage_main
from ldm.tracking import stage_run, use_default_store

OUT = "models/pretrained"


@contextlib.contextmanager
def located(root: Path, name: str) -> Iterator[Path]:
    """The folder that a setting names, fetched from the registry or the hub where it is not on this disk."""
    if name.startswith("models:/"):
        from ldm import registry

        use_default_store(root)
        with registry.downloaded(name) as model:
            yield model / "autoencoder"
    elif "@" in name:
        with tempfile.TemporaryDirectory() as folder:
            yield _from_hub(name, Path(folder))
    else:
        yield root / name


def _from_hub(name: str, to: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, place = name.partition("@")
    commit, _, within = place.partition("/")
    try:
        prefix = f"{within}/" if within else ""
        snapshot_download(repository, revision=commit, allow_patterns=[f"{prefix}*.json", f"{prefix}*.safetensors"], local_dir=to)
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"autoencoder.pretrained {name}: the hub does not give it ({reason}); check the name, or your access"
        ) from error
    return to / within


def run(root: Path) -> None:
    settings = load_settings(root)
    name = settings.autoencoder.pretrained
    with stage_run("pretrained", {"pretrained": name}), replacing(root / OUT) as partial:
        (partial / "source.txt").write_text(f"{name or 'none'}\n")
        if name:
            from ldm.bayes.likelihoods import FILE
            from ldm.nets.autoencoder import load_autoencoder

            with located(root, name) as folder:
                load_autoencoder(folder).save_pretrained(partial)
                if (folder / FILE).is_file():
                    shutil.copy(folder / FILE, partial)
    print(f"pretrained: {name or 'none'}", flush=True)


if __name__ == "__main__":
    stage_main("pretrained", run)
