"""What is refused before anything is trained, and disks that fill up."""

import errno
import hashlib
import json
import math
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from blobs import SMALL, draw_blobs, run_stages, shard_blobs
from safetensors.torch import save_file
from tiny import REPOSITORY, environment, metrics, set_params

from ldm.base.errors import InputError, check_space, disk_full
from ldm.config import load_settings
from ldm.data.shards import split_of
from ldm.nets.text import minilm
from ldm.stages.checks import check_captions, check_sizes

EVALUATE = SMALL["evaluate"]


def sharded(root: Path, texts: list[str], test: int = 5, **changes: Any) -> Path:
    """A project with shards of 24 blobs at most, captioned in turn, of which `test` are in the test split."""
    draw_blobs(root / "images", 24, seed=0)
    table = pd.read_csv(root / "images/metadata.csv")
    digests = [hashlib.sha256((root / "images" / name).read_bytes()).hexdigest() for name in table.file_name]
    in_test = pd.Series([split_of(digest, 0.2, 0.2) == "test" for digest in digests])
    kept = ~in_test | (in_test.cumsum() <= test)
    for name in table.file_name[~kept]:
        (root / "images" / name).unlink()
    table["text"] = [texts[i % len(texts)] for i in range(len(table))]
    table[kept].to_csv(root / "images/metadata.csv", index=False)
    return shard_blobs(root, changes)


# splits that are too small


def test_a_test_split_too_small_for_a_metric_is_refused_before_training(tmp_path: Path) -> None:
    root = sharded(tmp_path, ["a blob"], test=2)
    for stage in ("train_vae", "train_unet", "evaluate"):
        with pytest.raises(
            InputError, match=r"evaluate\.metrics\.1: kernel needs 3 images .* train, \d+ val, 2 test images; add"
        ):
            run_stages(root, stage)
    assert not (root / "models/autoencoder").exists() and not (root / ".ldm/work").exists()
    set_params(root, {"evaluate": {**EVALUATE, "metrics": [one for one in metrics(4) if one["kind"] != "kernel"]}})
    check_sizes(root, load_settings(root))


def test_without_shards_there_is_nothing_to_check(tmp_path: Path) -> None:
    """On a machine that has the latents only."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    check_sizes(tmp_path, load_settings(tmp_path))


def test_a_part_of_the_decoder_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    root = sharded(tmp_path, ["a blob"], sample_posterior=["sgld"], posterior={"part": ["conv_outt"]})
    with pytest.raises(InputError, match=r"posterior\.part: the decoder has no 'conv_outt'; it has conv_in"):
        run_stages(root, "train_vae")


# captions that would be cut


LONG = "a red cat that sits on a very long wall beside a house"  # 13 tokens, and a CLS and a SEP


def test_captions_that_would_be_cut_stop_the_run_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as refused:
        sharded(tmp_path, [f"a{i}" for i in range(7)] + [LONG])
    said, printed = str(refused.value), capsys.readouterr().out
    assert "1 of 8 distinct captions would be cut at text.max_tokens 6; the longest has 15 tokens" in said
    assert "raise text.max_tokens, to 15 for all, or text.max_truncated_fraction, now 0.01" in said and "\n" not in said
    assert "tokens: 3 to 15, median 4 (minilm); 1 of 8 distinct captions are longer than text.max_tokens 6" in printed
    assert not list((tmp_path / "data").glob("shards*"))
    set_params(tmp_path, {"text": {"max_truncated_fraction": 0.125}})
    run_stages(tmp_path, "shard")
    assert "1 of 8 distinct captions are longer than text.max_tokens 6" in capsys.readouterr().out


def test_captions_that_would_be_cut_stop_the_run_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards do not depend on `text`: settings may have changed since."""
    root = sharded(tmp_path, [f"a{i}" for i in range(7)] + [LONG], text={"max_truncated_fraction": 1.0})
    set_params(root, {"text": {"max_truncated_fraction": 0.01}})
    with pytest.raises(InputError, match=r"1 of 8 distinct captions would be cut at text\.max_tokens 6; the longest has 15"):
        run_stages(root, "train_vae")
    assert not (root / "models/autoencoder").exists()
    set_params(root, {"text": {"max_truncated_fraction": 0.125}})
    run_stages(root, "train_vae")
    assert "1 of 8 distinct captions are longer than text.max_tokens 6" in capsys.readouterr().out
    set_params(root, {"text": {"max_tokens": 5, "max_truncated_fraction": 0.1}})  # train_vae does not run again for that
    with pytest.raises(InputError, match="1 of 8 distinct captions"):
        run_stages(root, "cache_latents")
    set_params(root, {"text": {"max_tokens": 15, "max_truncated_fraction": 0.0}})
    run_stages(root, "cache_latents")
    manifest = (root / "data/latents/manifest.json").read_text()
    set_params(root, {"text": {"max_truncated_fraction": 0.5}})
    run_stages(root, "cache_latents")
    assert (root / "data/latents/manifest.json").read_text() == manifest  # so nothing is trained again


def test_every_caption_of_an_image_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sharded(tmp_path, ["a blob"])
    table = pd.read_csv(root / "images/metadata.csv")
    table.assign(caption_2=[f"a{i % 8}" for i in range(len(table))], caption_3=LONG).to_csv(
        root / "images/metadata.csv", index=False
    )
    says = "1 of 10 distinct captions would be cut"
    with pytest.raises(InputError, match=says):
        run_stages(root, "shard")
    set_params(root, {"text": {"max_truncated_fraction": 0.1}})
    run_stages(root, "shard")
    assert f"{len(table)} images have several" in capsys.readouterr().out
    set_params(root, {"text": {"max_truncated_fraction": 0.0}})
    with pytest.raises(InputError, match=says):
        check_captions(root, load_settings(root))


def test_of_large_splits_images_from_everywhere_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = sharded(tmp_path, [f"a{i}" for i in range(24)])
    sizes = [stop - start for start, stop in json.loads((root / "data/shards/index.json").read_text())["splits"].values()]
    monkeypatch.setattr("ldm.stages.checks.CAPTIONS", 3)
    every = math.ceil(max(sizes) / 3)
    read = sum(len(range(0, size, every)) for size in sizes)
    counts = check_captions(root, load_settings(root))
    found = f" 0 of {read} distinct captions of one image in {every} are longer"
    assert found in capsys.readouterr().out and read <= 9 < sum(sizes)
    assert counts is not None and 24 * 4 * 2 <= counts.embedded_bytes(width=1) <= 2 * 24 * 4 * 2  # of 3 or 4 tokens each


def test_without_the_encoder_images_are_sharded_and_the_autoencoder_is_trained_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_wheel")
    root = sharded(tmp_path, [LONG])
    assert "tokens: not counted (text minilm: its wheel is missing" in capsys.readouterr().out
    check_captions(root, load_settings(root))
    assert "tokens: not counted (text minilm: its wheel is missing" in capsys.readouterr().out


# full disks


def test_what_does_not_fit_is_said_before_it_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "not/yet/there", free // 2, "pictures")
    with pytest.raises(InputError, match=r"not/yet/there: pictures need .* MB, and .* are free there; make room for .* MB first"):
        check_space(tmp_path / "not/yet/there", 2 * free, "pictures")


def full_file(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"x" * 100_000)


def full_safetensors(path: Path) -> None:
    save_file({"x": torch.zeros(100_000)}, path)


def full_table(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA max_page_count = 4")  # SQLite's own words for a full disk
    database.execute("CREATE TABLE t (x)")
    database.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 100)


def wrapped(path: Path) -> None:
    try:
        full_file(path)
    except OSError as error:
        raise RuntimeError("could not be saved") from error


@pytest.mark.parametrize("write", [full_file, full_safetensors, full_table, wrapped])
def test_errors_of_libraries_that_mean_a_full_disk(write: Any, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(Exception) as caught:
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = disk_full(caught.value, tmp_path)
    assert found and str(found).startswith(f"{tmp_path}: the disk is full (") and "MB are free there; make room" in str(found)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_folder_of_the_file(number: int, tmp_path: Path) -> None:
    found = disk_full(OSError(number, os.strerror(number), str(tmp_path / "below/file")), Path("/"))
    assert str(found).startswith(f"{tmp_path}/below: the disk is full ({os.strerror(number)}), ")
    assert disk_full(OSError(errno.EACCES, "Permission denied"), tmp_path) is None and disk_full(ValueError("x")) is None
    assert disk_full(ValueError("HTTP 413: file too large"), tmp_path) is None


def test_a_stage_on_a_full_disk_ends_with_one_line_and_goes_on_well_afterwards(tmp_path: Path) -> None:
    root = sharded(tmp_path, ["a blob"])
    shutil.rmtree(root / "data/shards")
    command = [sys.executable, "-m", "ldm.stages.shard"]

    def run(limit: str) -> subprocess.CompletedProcess[str]:
        shell = f"ulimit -f {limit}; exec {' '.join(command)}"
        env = environment(PYTHONPATH=str(REPOSITORY), LDM_WORKERS="1")
        return subprocess.run(["bash", "-c", shell], cwd=root, env=env, capture_output=True, text=True, check=False)

    full = run("4")  # blocks
    assert full.returncode == 2 and full.stderr.startswith("error: ") and len(full.stderr.splitlines()) == 1
    assert "the disk is full" in full.stderr and not (root / "data/shards").exists() and not list(root.glob("data/*.partial"))
    assert run("unlimited").returncode == 0 and (root / "data/shards/index.json").is_file()
