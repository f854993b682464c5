"""What a stage refuses at its start, because a later moment or a later stage would fail. Nothing here changes what is made."""

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm.base.errors import InputError, megabytes
from ldm.base.paths import LATENT_STORE, LATENTS, SHARDS
from ldm.config import Settings
from ldm.data.reader import SPLITS, stage_shards
from ldm.nets.text.encoder import Unavailable
from ldm.training.options import Training

CAPTIONS = 1 << 18  # of each split that are read, at most: what takes seconds
SHOWN = 60  # characters of a caption


def check_sizes(root: Path, settings: Settings) -> None:
    """Raise an `InputError` if the splits are too small for a metric. Where there are no shards, there is nothing to check."""
    index = root / SHARDS / "index.json"
    if not index.is_file():
        return
    splits = json.loads(index.read_text(encoding="utf-8"))["splits"]
    sizes = {split: stop - start for split, (start, stop) in sorted(splits.items(), key=lambda item: item[1])}
    for number, metric in enumerate(settings.evaluate.metrics):
        try:
            metric.check_images(min(sizes["train"], sizes["test"]))
        except ValueError as error:
            few = f"the splits have {', '.join(f'{count} {split}' for split, count in sizes.items())} images"
            advice = "add images, raise data.test_fraction, or remove the metric"
            raise InputError(f"evaluate.metrics.{number}: {error}, and {few}; {advice}") from None


def check_part(settings: Settings, decoder: Any) -> None:
    """Raise an `InputError` if the stages `sample_posterior` could not find `posterior.part` in this decoder."""
    if settings.sample_posterior:
        from ldm.langevin.decoder import part_of

        part_of(decoder, settings.posterior.part)


def check_captions(root: Path, settings: Settings, splits: Iterable[str] = SPLITS) -> None:
    """Raise an `InputError` if more distinct captions than `text.max_cut` allows have more tokens than the encoder reads."""
    text = settings.text
    if os.environ.get("RANK", "0") != "0":  # the first rank speaks for all
        return
    try:
        count, most = text.located(root).counter()
    except (ImportError, Unavailable) as error:  # a machine that only trains the autoencoder
        print(f"captions: not compared with text.max_tokens ({error})", flush=True)
        return
    readers = [stage_shards(root, split) for split in splits]
    read = (reader.captions_of(range(min(len(reader), CAPTIONS))) for reader in readers)
    texts = sorted({caption for rows in read for caption in rows.text})
    lengths = count(texts)
    longest = max(range(len(texts)), key=lengths.__getitem__)
    cut = sum(length > text.max_tokens for length in lengths)
    found = f"{cut:,} of {len(texts):,} distinct captions are cut at text.max_tokens {text.max_tokens}"
    found += f"; the longest has {lengths[longest]} tokens"
    if cut <= text.max_cut * len(texts):
        print(f"captions: {found}", flush=True)
        return
    raised = min(lengths[longest], most or lengths[longest])
    advice = f"raise text.max_tokens, to {raised} for {'all' if raised == lengths[longest] else 'all that the encoder reads'}"
    shown = repr(texts[longest][:SHOWN])
    raise InputError(f"{found} ({shown}…); {advice}, or text.max_cut, now {text.max_cut}, if they may be cut")


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise an `InputError` if the disk of `folder`, which may not exist yet, has less than `needed` bytes free."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    if (free := shutil.disk_usage(place).free) < needed:
        raise InputError(f"{folder}: {what} need {megabytes(needed)}, and {megabytes(free)} are free there; make room first")


def check_training_space(work: Path, out: Path, module: Any, options: Training) -> None:
    """`check_space` for the weights of a module and its checkpoints, of which the last stays until the next is complete."""
    weights = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    state = weights * (2 if options.optimizer.kind == "sgld" else 4)  # with the average, and two moments
    checkpoints = min(2, -(-options.images // options.checkpoint_images) - 1)
    check_space(out, weights + checkpoints * state - size_of(work), "weights and checkpoints")


def check_latents_space(root: Path, autoencoder: Any, flip: bool) -> None:
    """`check_space` for the latents of all images, mean and log-variance, unless they are in the store."""
    needed = 0
    for split in ("train", "val"):
        reader = stage_shards(root, split)
        size = reader.preprocessing.image_size
        needed += (1 + (flip and split == "train")) * len(reader) * 8 * math.prod(autoencoder.latent_shape(size, size))
    check_space(root / LATENTS, needed - size_of(root / LATENT_STORE), "latents")


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
