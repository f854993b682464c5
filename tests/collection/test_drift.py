"""New images against the test images: on the command line, and in the flow."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from blobs import SIZE, draw_blobs
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import hypergeom
from tiny import REPOSITORY, careless_numerics, exact, set_params

from ldm.collection import drift as module
from ldm.collection.drift import LEVEL, drift, samplers
from ldm.data.reader import stage_shards
from ldm.langevin.decoder import DecoderPosterior


@pytest.fixture(scope="module")
def inbox(tmp_path_factory) -> Path:
    """Folders of new images: blobs as the model knows them, the same ones inverted, and noise."""
    folder, random = tmp_path_factory.mktemp("inbox"), np.random.default_rng(0)
    for name in ("alike", "inverted", "noise"):
        draw_blobs(folder / name, 40, seed=5)
    for path in (folder / "inverted").glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    for path in (folder / "noise").glob("*.png"):
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def copy(sampled, tmp_path) -> Path:
    """Of what drift reads of the project, to be changed."""
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / "project").mkdir(exist_ok=True)
        shutil.copy(sampled / name, tmp_path / "project")
    shutil.copytree(sampled / "models", tmp_path / "project/models")
    return tmp_path / "project"


def test_images_like_the_test_images_do_not_drift(sampled, inbox, ldm):
    found = ldm(sampled, "data", "drift", str(inbox / "alike"))
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and found.stderr == ""
    assert lines[0] == "40 images; 0 unreadable"
    assert lines[1].startswith("no drift: ") and "of 40 images score beyond 99% of the test images" in lines[1]


def test_inverted_images_drift_and_the_farthest_is_named_first(sampled, inbox, ldm):
    found = ldm(sampled, "data", "drift", str(inbox / "inverted"), "--sampler", "sghmc")
    lines = found.stdout.splitlines()
    assert found.returncode == 1 and found.stderr == ""
    assert lines[1].startswith("drift: ") and lines[1].endswith("; look at them")
    scores = drift(sampled, inbox / "inverted").scores
    assert lines[2].split(":")[0].strip() == scores.file_name[scores.score.idxmax()] and len(lines) == 7
    assert scores.score.is_monotonic_decreasing and sorted(scores.file_name) == [f"{i:03d}.png" for i in range(40)]


def test_each_image_has_its_own_score(sampled, inbox, tmp_path):
    """The same alone as among others, and under another name; noise scores above blobs."""
    (tmp_path / "one").mkdir()
    shutil.copy(inbox / "noise/007.png", tmp_path / "one/some noise.PNG")
    (alone,) = drift(sampled, tmp_path / "one").scores.itertuples(index=False)
    among = drift(sampled, inbox / "noise").scores.set_index("file_name").score
    assert alone.file_name == "some noise.PNG" and alone.score == pytest.approx(among["007.png"], rel=1e-3)
    assert among.median() > drift(sampled, inbox / "alike").scores.score.median()


def test_scores_are_computed_as_the_stage_computes_those_of_the_test_images(sampled, monkeypatch):
    """So the test images themselves have the scores that the stage found."""
    scores, found = DecoderPosterior.scores, []
    reference = pd.read_csv(sampled / "models/posterior/sghmc/scores.csv")
    test = stage_shards(sampled, "test")
    names = test.captions.set_index("key").file_name[reference.key].tolist()
    with careless_numerics() as read:
        monkeypatch.setattr(DecoderPosterior, "scores", lambda self, images: found.append(read()) or scores(self, images))
        table = drift(sampled, sampled / "images").scores.set_index("file_name").score
    assert found == [exact(True)]
    assert np.allclose(table[names], reference.score, rtol=1e-3)


def test_the_chance_is_that_of_drawing_so_many_from_both_together(sampled, inbox):
    """Fisher's exact test by the hypergeometric distribution."""
    found = drift(sampled, inbox / "noise")
    reference = np.loadtxt(sampled / "models/posterior/sghmc/scores.csv", delimiter=",", skiprows=1, usecols=1)
    limit = np.quantile(reference, 0.99)
    above = int((reference > limit).sum())
    assert found.limit == pytest.approx(limit) and found.beyond == (found.scores.score > limit).sum()
    chance = hypergeom(len(reference) + 40, found.beyond + above, 40).sf(found.beyond - 1)
    assert found.p_value == pytest.approx(chance) and found.drifted == (chance < LEVEL)


def test_captions_are_not_needed_and_bad_files_are_counted(sampled, inbox, tmp_path, ldm):
    folder = tmp_path / "new"
    (folder / "below").mkdir(parents=True)
    for number in range(5):
        shutil.copy(inbox / f"alike/{number:03d}.png", folder / "below")
    (folder / "cut.png").write_bytes((folder / "below/000.png").read_bytes()[:60])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.md").write_text("not meant as one")
    os.symlink(inbox / "noise/000.png", folder / "outside.png")  # as in a collection, refused
    found = ldm(sampled, "data", "drift", str(folder))
    assert found.returncode == 0
    assert found.stdout.splitlines()[0] == "7 images; 2 unreadable"
    assert set(drift(sampled, folder).scores.file_name) == {f"below/{number:03d}.png" for number in range(5)}


def test_of_many_images_some_are_drawn(sampled, inbox, monkeypatch):
    monkeypatch.setattr(module, "MOST", 10)
    first, again = drift(sampled, inbox / "alike"), drift(sampled, inbox / "alike")
    assert len(first.scores) == 10 and first.found == 40 and first.scores.equals(again.scores)
    assert first.lines()[0] == "40 images, 10 of them scored, at random; 0 unreadable"


@pytest.mark.parametrize("content", ["nothing", "text", "no folder"])
def test_a_folder_without_images(content, sampled, tmp_path, ldm):
    if content != "no folder":
        (tmp_path / "new").mkdir()
    if content == "text":
        (tmp_path / "new/a.png").write_text("no image")
    found = ldm(sampled, "data", "drift", str(tmp_path / "new"))
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1
    assert ("no such folder" if content == "no folder" else "holds no readable images") in found.stderr


def test_without_posterior_samples_it_says_how_to_get_them(copy, inbox, ldm):
    found = ldm(copy, "data", "drift", str(inbox / "alike"), "--sampler", "sgld")
    assert found.returncode == 2
    assert found.stderr.endswith("models/posterior: no posterior samples of sgld; it has sghmc\n")
    shutil.rmtree(copy / "models/posterior")
    found = ldm(copy, "data", "drift", str(inbox / "alike"))
    assert found.returncode == 2
    assert found.stderr.endswith("no posterior samples; set sample_posterior: [sgld] in params.yaml and run the pipeline\n")


def test_samples_of_another_decoder_are_refused(copy, inbox, ldm):
    path = copy / "models/posterior/sghmc/samples.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    save_file(load_file(path), path, metadata={"about": json.dumps({**about, "autoencoder": "0" * 64})})
    found = ldm(copy, "data", "drift", str(inbox / "alike"))
    assert found.returncode == 2
    assert found.stderr.endswith("its samples are of another decoder than models/ldm; run `dvc repro`\n")


def test_what_earlier_settings_left_behind_is_not_used(tmp_path: Path) -> None:
    """DVC leaves the outs of a stage that has gone from the list; they are of the model of that time."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    for sampler in ("sghmc", "sgld"):
        (tmp_path / "models/posterior" / sampler).mkdir(parents=True)
        for name in ("samples.safetensors", "scores.csv"):
            (tmp_path / "models/posterior" / sampler / name).touch()
    for asked in ([], ["sgld"], ["sgld", "sghmc"]):
        set_params(tmp_path, {"sample_posterior": asked})
        assert samplers(tmp_path) == asked
    (tmp_path / "models/posterior/sgld/scores.csv").unlink()
    assert samplers(tmp_path) == ["sghmc"]


# in the flow


@pytest.fixture
def check(monkeypatch):
    """The flow's task as a function, whose log goes to Python's."""
    from flows import pipeline

    monkeypatch.setattr(pipeline, "get_run_logger", lambda: logging.getLogger("drift"))
    return pipeline.check_drift.fn


def test_the_flow_warns_of_images_that_drift(check, sampled, inbox, caplog):
    batch = os.path.relpath(inbox / "inverted", sampled)
    with caplog.at_level(logging.WARNING, "drift"):
        assert check(str(sampled), batch).startswith("drift: ")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 7
    assert caplog.messages == drift(sampled, inbox / "inverted").lines()


def test_the_flow_says_nothing_of_images_that_do_not(check, sampled, inbox, caplog):
    assert check(str(sampled), os.path.relpath(inbox / "alike", sampled)).startswith("no drift: ")
    assert not [record for record in caplog.records if record.name == "drift"]


def test_the_flow_goes_on_where_drift_cannot_be_checked(check, copy, inbox, caplog):
    shutil.rmtree(copy / "models/posterior/sghmc")
    assert check(str(copy), str(inbox / "alike")) == "not checked"
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("drift: not checked: ") and "no posterior samples" in message
