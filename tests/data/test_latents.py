"""The latent cache against a plain encoding of each image, and its statistics against numpy in float64."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.memory import Parts
from ldm.data.caption_columns import all_captions
from ldm.data.encoding import write_latents
from ldm.data.latents import EMPTY, Latents, open_latents
from ldm.data.reader import ShardReader, open_shards
from ldm.data.shards import write_shards

SIZE, TOKENS, WIDTH = 8, 5, 3
TEXT = {"text_encoder": "t" * 64, "text_width": WIDTH, "text": {"encoder": "toy", "max_tokens": TOKENS}}
IDENTITY = {"autoencoder": "a" * 64, **TEXT}


def encode(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Two latent channels of half the side: exact arithmetic, so that the size of a batch cannot matter."""
    x = torch.from_numpy(pixels.astype(np.float32))[:, 0]
    quarter = x[:, ::2, ::2] + x[:, 1::2, 1::2]
    return torch.stack([quarter, 3 * quarter + 1], 1) / 64, torch.stack([-quarter / 128, 0 * quarter - 2], 1)


def embed(texts: list[str]) -> tuple[Tensor, Tensor]:
    """A token more than letters; numbers that bfloat16 has."""
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
        captions = (["cat"], ["a dog", "dog"], [""], ["ü"])[number % 4]
        rows.append({"file_name": name, "text": captions})
    (folder / "source/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"image_size": SIZE, "channels": 1, "resize_filter": "box", "shard_size": 11, "max_bad_fraction": 0}
    write_shards(folder / "source", folder / "shards", val_fraction=0.2, test_fraction=0.2, **options)
    return folder / "shards"


def splits(shards: Path) -> dict[str, ShardReader]:
    return {split: open_shards(shards, split) for split in ("train", "val")}


def cache(shards: Path, out: Path, store: Path | None = None, encode: Any = encode, **options: Any) -> dict[str, Any]:
    """The manifest, and under `reused` how many files came from the store."""
    defaults = {"code": "c", "progress": lambda done: None, "divide": Parts(torch.device("cpu")), "texts": all_captions}
    options = {**defaults, "embed": embed, "identity": IDENTITY, "store": store or out.with_name(out.name + "-store"), **options}
    manifest, reused = write_latents(splits(shards), out, encode, **options)
    return manifest | {"reused": reused}


@pytest.fixture(scope="module")
def latents(shards: Path) -> Path:
    cache(shards, shards.parent / "cached")
    return shards.parent / "cached"


def moments(cached: Latents) -> tuple[np.ndarray, np.ndarray]:
    mean, logvar = cached.moments(np.arange(len(cached)))
    return mean.double().numpy(), logvar.double().numpy()


def caption_of(cached: Latents, image: int, draw: int) -> tuple[Tensor, Tensor]:
    text, mask = cached.embeddings(cached.captions(np.array([image]), np.array([draw], dtype=np.uint64)))
    return text[0], mask[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_sample_has_its_moments_and_its_captions(split: str, shards: Path, latents: Path) -> None:
    reader, cached = open_shards(shards, split), open_latents(latents, split)
    assert len(cached) == len(reader) > 0
    several = 0
    for i in range(len(reader)):
        sample = reader[i]
        mean, logvar = encode(sample.image[None])
        found = cached.moments(np.array([i]))
        assert torch.equal(found[0], mean) and torch.equal(found[1], logvar)
        captions = all_captions({"text": sample.text} | sample.meta)
        several += len(captions) > 1
        for draw in range(6):
            text, mask = embed([captions[draw % len(captions)]])
            (here, kept), length = caption_of(cached, i, draw), int(mask.sum())
            assert kept.all() and len(here) == length
            assert torch.equal(here.float(), text[0, :length])
    assert several > 0


def test_batches_are_padded_to_their_longest_caption(latents: Path) -> None:
    cached = open_latents(latents, "train")
    text, mask = cached.embeddings(np.arange(5))
    lengths = [int(cached.embeddings(np.array([row]))[1].sum()) for row in range(5)]
    assert text.shape == (5, max(lengths), WIDTH) and mask.sum(1).tolist() == lengths and len(set(lengths)) > 2
    assert (text[~mask] == 0).all()
    shorter = [row for row in range(5) if lengths[row] < max(lengths)]
    assert cached.embeddings(np.array(shorter))[0].shape[1] == max(lengths[row] for row in shorter)


def test_each_caption_is_kept_once_and_the_empty_one_is_the_first(shards: Path, latents: Path) -> None:
    readers, cached = splits(shards), open_latents(latents, "train")
    text, mask = embed([""])
    found, admitted = cached.embeddings(np.array([EMPTY]))
    assert torch.equal(found.float(), text[:, :1]) and admitted.sum() == mask.sum() == 1
    manifest = json.loads((latents / "manifest.json").read_text())
    kept = sum(file["count"] for file in manifest["files"] if file["split"] == "captions")
    assert kept == len(
        {text for reader in readers.values() for row in reader.captions.to_dict("records") for text in all_captions(row)}
    )
    numbers = {
        int(cached.captions(np.array([i]), np.array([d], dtype=np.uint64))[0]) for i in range(len(cached)) for d in range(2)
    }
    assert numbers <= set(range(kept))


def test_captions_may_be_kept_as_text(shards: Path, tmp_path: Path) -> None:
    cache(shards, tmp_path / "out", embed=None)
    reader, cached = open_shards(shards, "train"), open_latents(tmp_path / "out", "train")
    assert not cached.embedded and cached.width == WIDTH
    index = np.arange(len(reader))
    for draw in range(2):
        drawn = cached.texts(cached.captions(index, np.full(len(index), draw, dtype=np.uint64)))
        captions = [all_captions(row) for row in reader.captions.to_dict("records")]
        assert drawn == [found[draw % len(found)] for found in captions]
    assert cached.texts(np.array([EMPTY])) == [""]


def test_augmented_captions_are_further_captions(shards: Path, tmp_path: Path) -> None:
    cache(shards, tmp_path / "out", embed=None, texts=lambda row: [*all_captions(row), f"{row['text']}!"])
    reader, cached = open_shards(shards, "train"), open_latents(tmp_path / "out", "train")
    for i, row in enumerate(reader.captions.to_dict("records")):
        expected = [*all_captions(row), f"{row['text']}!"]
        numbers = cached.captions(np.full(len(expected), i), np.arange(len(expected), dtype=np.uint64))
        assert cached.texts(numbers) == expected


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
    assert [file["shard_sha256"] for file in manifest["files"] if file["split"] != "captions"] == hashes
    assert {file["shard_sha256"] for file in manifest["files"]} == set(hashes)
    names = {file["name"] for file in manifest["files"]} | {"index.safetensors", "manifest.json"}
    assert names == {path.name for path in latents.iterdir()}
    for file in manifest["files"]:
        assert hashlib.sha256((latents / file["name"]).read_bytes()).hexdigest() == file["sha256"]


def test_a_second_run_with_other_batches_gives_the_same_bytes(
    shards: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[int] = []
    counted, seen = counting()
    monkeypatch.setenv("LDM_MEMORY_GB", "1e-5")  # of a few images
    cache(shards, tmp_path / "again", progress=reports.append, encode=counted)
    assert max(seen) < 11 and len(set(seen)) > 1
    for path in latents.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert reports == sorted(reports)
    assert reports[-1] == sum(len(open_shards(shards, split)) for split in ("train", "val"))


def test_what_the_store_has_does_not_change_how_the_rest_is_encoded(shards: Path, tmp_path: Path) -> None:
    """With a network, whose sums a batch of another size rounds otherwise: as after a kill, or on the next night."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 32, 3, 2, 1), torch.nn.SiLU(), torch.nn.Conv2d(32, 4, 3, 1, 1))

    @torch.inference_mode()
    def network(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        mean, logvar = net(torch.from_numpy(pixels.astype(np.float32))).chunk(2, 1)
        return mean, logvar

    cache(shards, tmp_path / "whole", encode=network)
    store = shutil.copytree(tmp_path / "whole-store", tmp_path / "half")
    for path in sorted(store.iterdir())[::2]:
        path.unlink()
    manifest = cache(shards, tmp_path / "again", store, network)
    assert 0 < manifest["reused"] < of_images(manifest)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_the_manifest_says_which_captions_images_have(shards: Path, tmp_path: Path) -> None:
    """The same captions in the same files, with other images: training is another one."""
    first = cache(shards, tmp_path / "out", texts=lambda row: [*all_captions(row), "dog"])
    other = cache(shards, tmp_path / "other", texts=lambda row: [*all_captions(row), *(["dog"] * (row["text"] != "cat"))])
    assert [file["sha256"] for file in first["files"]] == [file["sha256"] for file in other["files"]]
    assert first["index"] == hashlib.sha256((tmp_path / "out/index.safetensors").read_bytes()).hexdigest() != other["index"]


@pytest.mark.parametrize("as_text", [False, True])
def test_collections_without_captions(as_text: bool, shards: Path, tmp_path: Path) -> None:
    cache(shards, tmp_path / "out", texts=lambda row: [""], **({"embed": None} if as_text else {}))
    cached = open_latents(tmp_path / "out", "train")
    captions = cached.captions(np.arange(3), np.arange(3, dtype=np.uint64))
    assert captions.tolist() == [EMPTY] * 3
    if as_text:
        assert cached.texts(captions) == [""] * 3
    else:
        assert cached.embeddings(captions)[0].shape == (3, 1, WIDTH)


def test_a_failure_leaves_what_was_there(shards: Path, latents: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in latents.iterdir()}
    calls = []

    def fail_later(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return encode(pixels)

    with pytest.raises(RuntimeError, match="out of memory"):
        cache(shards, latents, tmp_path / "an empty store", encode=fail_later)
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


# the store: what was encoded before is not encoded again, and what left the shards leaves the store


def counting() -> tuple[Any, list[int]]:
    seen: list[int] = []

    def count(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        seen.append(len(pixels))
        return encode(pixels)

    return count, seen


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def grown(shards: Path, tmp_path: Path, names: list[str], gone: str | None = None) -> Path:
    """Shards of the same images, with those of a new folder `c`, and without `gone`."""
    source = shutil.copytree(shards.parent / "source", tmp_path / "source", dirs_exist_ok=True)
    table = pd.read_json(source / "metadata.jsonl", lines=True)
    random = np.random.default_rng(9)
    for name in names:
        (source / name).parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(source / name)
    table = pd.concat([table, pd.DataFrame({"file_name": names, "text": [["new"] for _ in names]})]).drop_duplicates("file_name")
    if gone:
        (source / gone).unlink()
    table[table.file_name != gone].to_json(source / "metadata.jsonl", orient="records", lines=True)
    options: dict[str, Any] = {"image_size": SIZE, "channels": 1, "resize_filter": "box", "shard_size": 11, "max_bad_fraction": 0}
    write_shards(source, tmp_path / "shards", val_fraction=0.2, test_fraction=0.2, **options)
    return tmp_path / "shards"


def of_images(manifest: dict[str, Any]) -> int:
    return sum(file["split"] != "captions" for file in manifest["files"])


def test_only_new_shards_are_encoded(shards: Path, tmp_path: Path) -> None:
    store, (count, seen) = tmp_path / "store", counting()
    first = cache(shards, tmp_path / "out", store, count)
    images = sum(file["count"] for file in first["files"] if file["split"] != "captions")
    assert first["reused"] == 0 and seen[0] == 1 and sum(seen[1:]) == images  # the memory of one is measured before
    seen.clear()
    again = cache(shards, tmp_path / "out", store, count)
    assert again["reused"] == of_images(first) and not seen
    more = grown(shards, tmp_path, [f"c/{n:02d}.png" for n in range(30)])
    manifest = cache(more, tmp_path / "out", store, count)
    new = [file for file in manifest["files"] if file["name"].split("-")[1] == "c"]
    assert manifest["reused"] == of_images(first) == of_images(manifest) - sum(file["split"] != "captions" for file in new)
    assert sum(seen[1:]) == sum(file["count"] for file in new if file["split"] != "captions") > 0
    assert [file["count"] for file in new if file["split"] == "captions"] == [1]  # "new", once
    cache(more, tmp_path / "fresh", tmp_path / "empty store")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(("change", "again"), [
    ("autoencoder", "images"), ("text_encoder", "captions"), ("text", "captions"), ("code", "all"), ("flip", "train"),
])  # fmt: skip
def test_nothing_stale_is_reused_and_nothing_else_is_made_again(change: str, again: str, shards: Path, tmp_path: Path) -> None:
    first = cache(shards, tmp_path / "out", tmp_path / "store")
    options: dict[str, Any] = {"code": "another"} if change == "code" else {"flip": True} if change == "flip" else {}
    identity = IDENTITY | ({change: "another"} if change in IDENTITY else {})
    manifest = cache(shards, tmp_path / "out", tmp_path / "store", identity=identity, **options)
    splits = {"images": ("train", "val"), "captions": ("captions",), "train": ("train",), "all": ("train", "val", "captions")}[
        again
    ]
    made = sum(file["split"] in splits for file in first["files"])
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == len(first["files"]) + made
    assert manifest["reused"] == sum(file["split"] not in (*splits, "captions") for file in first["files"])


def test_a_file_of_the_store_that_was_altered_is_encoded_again(shards: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    cache(shards, tmp_path / "out", store)
    sound = contents(tmp_path / "out")
    victim = sorted(store.iterdir())[0]
    names = {file["sha256"]: file["name"] for file in json.loads((tmp_path / "out/manifest.json").read_text())["files"]}
    blob = victim.read_bytes()
    victim.unlink()  # or the out, a link to the same bytes, would be altered too
    victim.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    manifest = cache(shards, tmp_path / "out", store)
    assert manifest["reused"] == of_images(manifest) - (".captions." not in names[victim.stem.rpartition("-")[2]])
    assert contents(tmp_path / "out") == sound


def test_an_image_that_was_removed_is_in_no_shard_and_no_latents(shards: Path, tmp_path: Path) -> None:
    before = grown(shards, tmp_path, [])
    store, gone = tmp_path / "store", open_shards(before)[7].meta["file_name"]
    cache(before, tmp_path / "out", store)
    mean, _ = encode(open_shards(before).images([7]))
    needle = mean.numpy().tobytes()

    def holders() -> list[Path]:
        return [path for path in tmp_path.rglob("*.safetensors") if needle in path.read_bytes()]

    assert len(holders()) == 2  # the out and the store
    after = grown(shards, tmp_path, [], gone)
    manifest = cache(after, tmp_path / "out", store)
    assert gone not in open_shards(after).captions.file_name.tolist()
    assert [path.parent for path in holders()] == [store]  # which other checkouts share: `ldm gc` and purge clear it
    assert 0 < manifest["reused"] < of_images(manifest)


def test_flips_are_a_second_encoding_of_training_images(shards: Path, tmp_path: Path) -> None:
    cache(shards, tmp_path / "out", flip=True)
    plain = open_latents(tmp_path / "out", "val")
    assert len(plain) == len(open_shards(shards, "val"))
    reader, cached = open_shards(shards, "train"), open_latents(tmp_path / "out", "train")
    assert len(cached) == 2 * len(reader)
    row = 0
    for _, positions in reader.shard_positions():
        for mirrored in (False, True):
            for i in positions:
                pixels = reader.images([i])
                mean, logvar = encode(pixels[..., ::-1].copy() if mirrored else pixels)
                text, mask = embed([reader[i].text])
                found = cached.moments(np.array([row]))
                assert torch.equal(found[0], mean) and torch.equal(found[1], logvar)
                here, _ = caption_of(cached, row, 0)
                assert torch.equal(here.float(), text[0, : mask.sum()])
                row += 1
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    mean, _ = moments(cached)
    np.testing.assert_allclose(manifest["latent_mean"], mean.mean((0, 2, 3)), rtol=1e-12)
