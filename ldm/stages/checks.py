"""What a stage refuses at its start, because a later moment or a later stage would fail. Nothing here changes what is made."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.base.errors import InputError, check_space
from ldm.base.options import chosen
from ldm.base.paths import LATENT_STORE, LATENTS, SHARDS
from ldm.config import Settings
from ldm.data.caption_columns import captions_in
from ldm.data.reader import SPLITS, stage_shards
from ldm.data.tokens import CAPTIONS, NOT_HERE, TokenCounts, count_tokens
from ldm.nets.text.encoder import NOT_IDENTITY, Text
from ldm.training.options import Training


def check_sizes(root: Path, settings: Settings) -> None:
    """Raise an `InputError` if the splits are too small for a metric. Where there are no shards, there is nothing to check."""
    index = root / SHARDS / "index.json"
    if not index.is_file():
        return
    splits = json.loads(index.read_text(encoding="utf-8"))["splits"]
    sizes = {split: stop - start for split, (start, stop) in sorted(splits.items(), key=lambda item: item[1])}
    most = settings.evaluate.test_images
    for number, metric in enumerate(settings.evaluate.metrics):
        try:
            metric.check_images(min(sizes["train"], sizes["test"], most))
        except ValueError as error:
            few = f"the splits have {', '.join(f'{count} {split}' for split, count in sizes.items())} images"
            few += f", and evaluate.test_images is {most}" if most < sizes["test"] else ""
            advice = "add images, raise data.test_fraction or evaluate.test_images, or remove the metric"
            raise InputError(f"evaluate.metrics.{number}: {error}, and {few}; {advice}") from None


def check_part(settings: Settings, decoder: Any) -> None:
    """Raise an `InputError` if the stages `sample_posterior` could not find `posterior.part` in this decoder."""
    if settings.sample_posterior:
        from ldm.langevin.decoder import part_of

        part_of(decoder, settings.posterior.part)


def check_fetched(folder: Path, setting: str, name: str) -> None:
    """Raise an `InputError` if the stage `pretrained` has not written what the setting names to `folder`."""
    source = folder / "source.txt"
    if not source.is_file() or source.read_text() != f"{name}\n":
        raise InputError(f"{folder}: is not {setting} {name}; run the stage pretrained first")


def check_initial(
    root: Path, settings: Settings, folder: Path, latents: Mapping[str, Any] | None = None, pretrained: str | None = None
) -> None:
    """Raise an `InputError` if the weights of a saved model's U-Net would mean something else under these settings.

    `latents` is the manifest of those that it is to be trained on. Before there are any, `pretrained` is the hash of what
    `autoencoder.pretrained` names. Noise levels may be others, as long as the network is told the same time for each.
    """
    import torch

    from ldm.diffusion.options import Diffusion, read_recipe
    from ldm.nets.backbone import load_backbone

    recipe, net = read_recipe(folder), load_backbone(folder / "unet", shape_only=True)
    with torch.device("meta"):
        described = settings.backbone.build(settings.autoencoder.latent_channels, net.config["cross_attention_dim"])
    pairs = {key: (value, _shape(net).get(key)) for key, value in _shape(described).items()}
    ours, theirs = settings.diffusion, Diffusion.model_validate(recipe.diffusion)
    pairs["diffusion.prediction"] = ours.prediction, theirs.prediction
    if not _same_times(ours, theirs):
        pairs["diffusion.noise"] = ours.noise.model_dump(), theirs.noise.model_dump()
    pairs |= _texts(settings.text.located(root), recipe.text["options"])
    hashes = {"autoencoder": recipe.autoencoder, "text_encoder": recipe.text["sha256"]}
    known = latents or ({"autoencoder": pretrained} if pretrained and not settings.train_vae.images else {})
    pairs |= {f"the hash of {name}": (known[name][:12], there[:12]) for name, there in hashes.items() if name in known}
    if differ := [f"{key} is {here}, but it has {there}" for key, (here, there) in pairs.items() if here != there]:
        hint = "the rebuild deployment (or train_unet.init: null) starts from nothing"
        name = settings.train_unet.init
        raise InputError(f"train_unet.init {name} is not what params.yaml describes: {'; '.join(differ)}; {hint}")


def _shape(net: Any) -> dict[str, Any]:
    """The constructor's arguments of a backbone as its folder would have them, by the keys of the settings."""
    config = net.from_diffusers(net.DEFAULTS | net.to_diffusers(net.config))
    named = {f"backbone.{key}": value for key, value in config.items() if key not in ("in_channels", "out_channels")}
    return {"the class of the backbone": net.CLASS, "autoencoder.latent_channels": config["in_channels"], **named}


def _same_times(ours: Any, theirs: Any) -> bool:
    """Whether under two sections `diffusion` a network is told the same time at each noise level that both have."""
    import torch

    from ldm.diffusion.denoiser import Denoiser

    one, other = (Denoiser(torch.nn.Identity(), section.prediction, section.noise.build()) for section in (ours, theirs))
    sigma = one.levels.table[one.levels.table <= other.levels.sigma_max]
    return torch.allclose(one.scalings(sigma).noise, other.scalings(sigma).noise)


def _texts(text: Text, options: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What decides about an embedding of the options of two text encoders. Of one in a folder, the hash of its files does."""
    other: Text = chosen(Text, options)
    only = {"kind"} if text.folder() or text.kind != other.kind else None
    here, there = (found.model_dump(include=only, exclude={"max_tokens", *NOT_IDENTITY}) for found in (text, other))
    return {f"text.{key}": (here[key], there[key]) for key in here}


def check_captions(root: Path, settings: Settings, splits: Iterable[str] = SPLITS) -> TokenCounts | None:
    """`check_lengths` for the captions of these splits, of at most `CAPTIONS` images of each, evenly spread."""
    if os.environ.get("RANK", "0") != "0":  # the first rank speaks for all
        return None
    readers = [stage_shards(root, split) for split in splits]
    every = -(-max(map(len, readers)) // CAPTIONS)
    read = (reader.captions_of(range(0, len(reader), every)) for reader in readers)
    return check_lengths(root, settings, (text for rows in read for captions in captions_in(rows) for text in captions), every)


def check_lengths(root: Path, settings: Settings, captions: Iterable[str], every: int = 1) -> TokenCounts | None:
    """Print how many tokens captions have; `InputError` if more than `text.max_truncated_fraction` allows would be cut.

    None where the encoder is not on this machine.
    """
    try:
        counts = count_tokens(settings.text.located(root), captions, every)
    except NOT_HERE as error:  # a machine that only shards, or trains the autoencoder
        print(f"tokens: not counted ({error})", flush=True)
        return None
    print(f"tokens: {counts}", flush=True)
    counts.check()
    return counts


def check_training_space(work: Path, out: Path, module: Any, options: Training) -> None:
    """`check_space` for the weights of a module and its checkpoints, of which the last stays until the next is complete."""
    weights = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    state = weights * (2 if options.optimizer.kind == "sgld" else 4)  # with the average, and two moments
    checkpoints = min(2, -(-options.images // options.checkpoint_images) - 1)
    check_space(out, weights + checkpoints * state - size_of(work), "weights and checkpoints")


def check_latents_space(root: Path, autoencoder: Any, flip: bool, embeddings: int) -> None:
    """`check_space` for the latents of all images, mean and log-variance, and embeddings, unless they are in the store."""
    needed = embeddings
    for split in ("train", "val"):
        for shape, positions in stage_shards(root, split).shapes.items():
            needed += (1 + (flip and split == "train")) * len(positions) * 8 * math.prod(autoencoder.latent_shape(*shape))
    check_space(root / LATENTS, needed - size_of(root / LATENT_STORE), "latents")


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
