"""The latent cache against a plain encoding of each image, and its statistics against numpy in float64."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.data.latents import Latents, open_latents, write_latents
from ldm.data.shards import open_shards, write_shards
from ldm.errors import InputError

SIZE, TOKENS, WIDTH = 8, 5, 3
IDENTITY = {"autoencoder": "a" * 64, "text_encoder": "t" * 64, "text": {"encoder": "toy", "max_tokens": TOKENS}}


def encode(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Two latent channels of half the side: exact arithmetic, so that the size of a batch cannot matter."""
    x = torch.from_numpy(pixels.astype(np.float32))[:, 0]
    quarter = x[:, ::2, ::2] + x[:, 1::2, 1::2]
    return torch.stack([quarter, 3 * quarter + 1], 1) / 64, torch.stack([-quarter / 128, 0 * quarter - 2], 1)


def embed(texts: list[str]) -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[i <= len(text) for i in range(TOKENS)] for text in texts])
    letters = [[[ord(c) / 128, i, len(text)] for i, c in enumerate(text.ljust(TOKENS)[:TOKENS])] for text in texts]
    return torch.tensor(letters) * mask[..., None], mask


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    rows = []
    for number in range(60):
        name = f"{'ab'[number % 2]}/{number:02d}.png"
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(folder / "source" / name)
        rows.append({"file_name": name, "text": ("cat", "a dog", "", "ü")[number % 4]})
    pd.DataFrame(rows).to_csv(folder / "source/metadata.csv", index=False)
    options: dict[str, Any] = {"image_size": SIZE, "channels": 1, "resize_filter": "box", "shard_size": 11, "max_bad_fraction": 0}
    write_shards(folder / "source", folder / "shards", val_fraction=0.2, test_fraction=0.2, **options)
    return folder / "shards"


def cache(shards: Path, out: Path, **options: Any) -> dict[str, Any]:
    return write_latents(shards, out, encode, embed, IDENTITY, lambda done: None, **options)


@pytest.fixture(scope="module")
def latents(shards: Path) -> Path:
    cache(shards, shards.parent / "cached")
    return shards.parent / "cached"


def moments(cached: Latents) -> tuple[np.ndarray, np.ndarray]:
    return cached.mean.double().numpy(), cached.logvar.double().numpy()


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_sample_has_its_moments_and_its_caption(split: str, shards: Path, latents: Path) -> None:
    reader, cached = open_shards(shards, split), open_latents(latents, split)
    assert len(cached) == len(reader) > 0
    for i in range(len(reader)):
        sample = reader[i]
        mean, logvar = encode(sample.image[None])
        text, mask = embed([sample.text])
        assert torch.equal(cached.mean[i], mean[0]) and torch.equal(cached.logvar[i], logvar[0])
        row = cached.caption[i]
        assert torch.equal(cached.text[row], text[0]) and torch.equal(cached.text_mask[row], mask[0])


def test_the_empty_caption_is_last_and_captions_are_kept_once_a_shard(shards: Path, latents: Path) -> None:
    reader, cached = open_shards(shards, "train"), open_latents(latents, "train")
    text, mask = embed([""])
    assert torch.equal(cached.text[-1:], text) and torch.equal(cached.text_mask[-1:], mask)
    distinct = [len(set(reader.captions.text[list(positions)])) for _, positions in reader.shard_positions()]
    assert len(distinct) > 2
    assert len(cached.text) == sum(distinct) + 1


def test_statistics_are_those_of_training_posterior_samples(latents: Path) -> None:
    """z = mean + std n has variance E[var] + Var[mean]; also against samples drawn by numpy."""
    manifest = json.loads((latents / "manifest.json").read_text())
    mean, logvar = moments(open_latents(latents, "train"))
    axes = (0, 2, 3)
    np.testing.assert_allclose(manifest["latent_mean"], mean.mean(axes), rtol=1e-12)
    np.testing.assert_allclose(manifest["latent_std"], np.sqrt(mean.var(axes) + np.exp(logvar).mean(axes)), rtol=1e-12)
    z = mean + np.exp(0.5 * logvar) * np.random.default_rng(0).standard_normal((200, *mean.shape))
    np.testing.assert_allclose(manifest["latent_std"], z.std((0, 1, 3, 4)), rtol=0.01)


def test_the_manifest_names_what_the_latents_were_made_from(shards: Path, latents: Path) -> None:
    manifest = json.loads((latents / "manifest.json").read_text())
    index = json.loads((shards / "index.json").read_text())
    assert {name: manifest[name] for name in IDENTITY} == IDENTITY
    assert manifest["preprocessing"] == index["preprocessing"]
    hashes = [
        hashlib.sha256((shards / shard["name"]).read_bytes()).hexdigest() for shard in index["shards"] if shard["split"] != "test"
    ]
    assert [file["shard_sha256"] for file in manifest["files"]] == hashes
    assert {file["name"] for file in manifest["files"]} | {"empty.safetensors", "manifest.json"} == {
        p.name for p in latents.iterdir()
    }


def test_a_second_run_with_other_batches_gives_the_same_bytes(shards: Path, latents: Path, tmp_path: Path) -> None:
    reports: list[int] = []
    write_latents(shards, tmp_path / "again", encode, embed, IDENTITY, reports.append, batch_size=4)
    for path in latents.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert reports == sorted(reports)
    assert reports[-1] == sum(len(open_shards(shards, split)) for split in ("train", "val"))


def test_a_failure_leaves_what_was_there(shards: Path, latents: Path) -> None:
    before = {path.name: path.read_bytes() for path in latents.iterdir()}
    calls = []

    def fail_later(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return encode(pixels)

    with pytest.raises(RuntimeError, match="out of memory"):
        write_latents(shards, latents, fail_later, embed, IDENTITY, lambda done: None)
    assert {path.name: path.read_bytes() for path in latents.iterdir()} == before
    cache(shards, latents)  # and the next run is not hindered
    assert {path.name: path.read_bytes() for path in latents.iterdir()} == before


def test_latents_of_another_autoencoder_are_refused_by_name(latents: Path) -> None:
    assert len(open_latents(latents, "val", autoencoder="a" * 64, text_encoder="t" * 64))
    with pytest.raises(InputError, match=r"manifest\.json: autoencoder is a+, expected b+: .*run `cache_latents` again"):
        open_latents(latents, "train", autoencoder="b" * 64)


def test_absent_latents_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"latents/manifest\.json: not found; run the `cache_latents` stage"):
        open_latents(tmp_path / "latents", "train")
