"""An autoencoder that was trained elsewhere: where it comes from, used as it is, fine-tuned, refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from blobs import draw_blobs, make_project, run_stages
from hub import Hub, serving
from safetensors.torch import load_file
from scipy import stats
from tiny import environment, set_params

from ldm.base.errors import InputError
from ldm.bayes.likelihoods.likelihood import load_likelihood
from ldm.config import load_settings
from ldm.data.reader import open_shards
from ldm.nets.autoencoder import AutoencoderKL, VQModel
from ldm.registry.registration import register
from ldm.stages.train_vae import build, check_same, start

WEIGHTS, CURVE = "diffusion_pytorch_model.safetensors", "reports/curves/train_vae.csv"
COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stage(root: Path, name: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"ldm.stages.{name}"]
    return subprocess.run(command, cwd=root, env=environment(**extra), capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A project with an autoencoder of its own, and in `theirs` the same as diffusers writes it: without a likelihood."""
    root = make_project(tmp_path_factory.mktemp("trained"), {})
    run_stages(root, "train_vae")
    diffusers.AutoencoderKL.from_pretrained(root / "models/autoencoder").save_pretrained(root / "theirs")
    shutil.copytree(root / "models/autoencoder", root / "ours")
    return root


@pytest.fixture(scope="module")
def as_it_is(trained, tmp_path_factory) -> Path:
    """Another project that uses what diffusers wrote as it is, up to its report."""
    root = Path(shutil.copytree(trained, tmp_path_factory.mktemp("as it is") / "project"))
    shutil.rmtree(root / "models")
    set_params(root, {"autoencoder": {"pretrained": "theirs"}, "train_vae": {"images": 0}})
    run_stages(root, "pretrained", "train_vae")
    cached = stage(root, "cache_latents")  # in a process of its own: its code is part of the store's keys
    assert "2 shards, 0 of them encoded before" in cached.stdout, cached.stderr
    run_stages(root, "train_unet", "evaluate")
    return root


@pytest.fixture
def project(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "project"))


# Used as it is


def test_what_diffusers_wrote_is_used_bit_for_bit(as_it_is):
    theirs = load_file(as_it_is / "theirs" / WEIGHTS)
    for folder in ("models/pretrained", "models/autoencoder", "models/ldm/autoencoder"):
        ours = load_file(as_it_is / folder / WEIGHTS)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (as_it_is / "models/pretrained/source.txt").read_text() == "theirs\n"


def test_the_later_stages_work_with_it(as_it_is):
    assert (as_it_is / CURVE).read_text() == "images,loss\n"
    metrics = json.loads((as_it_is / "reports/metrics.json").read_text())
    assert metrics["elbo_bits_per_dim"] == pytest.approx(metrics["rate_bits_per_dim"] + metrics["distortion_bits_per_dim"])
    assert np.isfinite([metrics["bits_per_dim"], metrics["psnr"]]).all()
    report = (as_it_is / "reports/report.html").read_text()
    assert "Training the U-Net" in report and "Training the autoencoder" not in report
    assert "Latent channels" in report and "Rate and distortion" not in report  # of a training that was none


@torch.inference_mode()
def test_its_scale_is_the_likeliest_of_the_validation_images(as_it_is):
    """By diffusers' network and scipy's logistic distribution, in float64."""
    val = open_shards(as_it_is / "data/shards", "val")
    pixels = val.images(range(len(val))).astype(np.float64)
    net = diffusers.AutoencoderKL.from_pretrained(as_it_is / "theirs")
    posterior = net.encode(torch.tensor(pixels / 127.5 - 1).float()).latent_dist
    means = net.decode(posterior.sample(torch.Generator().manual_seed(0))).sample.double().numpy()

    def nats(scale: float) -> float:
        values = stats.logistic(means, scale)
        upper = np.where(pixels == 255, 1, values.cdf((pixels + 0.5) / 127.5 - 1))
        lower = np.where(pixels == 0, 0, values.cdf((pixels - 0.5) / 127.5 - 1))
        return float(np.log(np.maximum(upper - lower, 1e-300)).sum())

    found = load_likelihood(as_it_is / "models/autoencoder")
    assert (found.kind, found.scale) == ("discretized_logistic", "learned")
    scales = np.exp(np.linspace(-6, 0, 121))
    best = scales[np.argmax([nats(scale) for scale in scales])]
    assert float(found.log_scale) == pytest.approx(np.log(best), abs=0.1)


def test_a_likelihood_that_came_along_is_kept_whatever_the_settings_would_train(project):
    """A version of the registry, or a folder of ours, was measured with it."""
    changes = {"images": 0, "likelihood": {"kind": "discretized_gaussian"}}
    set_params(project, {"autoencoder": {"pretrained": "ours"}, "train_vae": changes})
    before = contents(project / "ours")
    run_stages(project, "pretrained", "train_vae")
    assert contents(project / "models/autoencoder") == before


# Fine-tuned


def test_fine_tuning_starts_from_its_weights_and_likelihood(project):
    scratch = pd.read_csv(project / CURVE).loss
    set_params(project, {"autoencoder": {"pretrained": "ours"}, "train_vae": {"images": 64, "warmup_images": 0}})
    run_stages(project, "pretrained", "train_vae")
    tuned = pd.read_csv(project / CURVE)
    assert list(tuned.images) == [32, 64]
    assert tuned.loss[0] == pytest.approx(scratch.iloc[-4:].mean(), rel=0.1)
    assert tuned.loss[0] < 0.75 * scratch[0]
    before, after = (load_file(project / folder / WEIGHTS) for folder in ("ours", "models/autoencoder"))
    moved = torch.cat([(after[key] - before[key]).flatten() for key in before])
    assert 0 < moved.abs().max() < 0.1
    assert load_likelihood(project / "models/autoencoder").log_scale != load_likelihood(project / "ours").log_scale


def test_another_kind_of_likelihood_starts_anew(project):
    changes = {"likelihood": {"kind": "discretized_gaussian", "log_scale": -1.5}}
    set_params(project, {"autoencoder": {"pretrained": "ours"}, "train_vae": changes})
    run_stages(project, "pretrained")
    likelihood = start(project, load_settings(project))[1]
    assert (likelihood.kind, likelihood.log_scale.item()) == ("discretized_gaussian", -1.5)


# From the registry


def test_a_registered_version_gives_the_same_latents_so_that_only_new_images_are_encoded(as_it_is, tmp_path, monkeypatch):
    root = Path(shutil.copytree(as_it_is, tmp_path / "project"))
    address = f"sqlite:///{root}/mlflow.db"
    for key, value in {"MLFLOW_TRACKING_URI": address, "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(root)
    (root / "dvc.lock").write_text("schema: '2.0'")
    assert register(root).version == 1
    before = json.loads((root / "data/latents/manifest.json").read_text())

    draw_blobs(root / "images/second", 40, seed=1)
    for folder in ("pretrained", "autoencoder"):
        shutil.rmtree(root / "models" / folder)
    set_params(root, {"autoencoder": {"pretrained": "models:/ldm/1"}})
    run_stages(root, "shard", "pretrained", "train_vae")
    assert contents(root / "models/autoencoder") == contents(as_it_is / "models/autoencoder")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    cached = stage(root, "cache_latents")
    after = json.loads((root / "data/latents/manifest.json").read_text())
    assert after["autoencoder"] == before["autoencoder"]
    assert "4 shards, 2 of them encoded before and reused" in cached.stdout, cached.stderr
    assert {file["sha256"] for file in before["files"]} < {file["sha256"] for file in after["files"]}

    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    set_params(root, {"autoencoder": {"pretrained": "models:/ldm/7"}})
    made = contents(root / "models/pretrained")
    with pytest.raises(InputError, match=r"autoencoder\.pretrained models:/ldm/7: model 'ldm' has no version 7"):
        run_stages(root, "pretrained")
    assert contents(root / "models/pretrained") == made


# From the hub


class Models(Hub):
    """As much of the hub's API as downloads ask for: one model, `me/system`, at one commit."""

    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        path, api, resolve = self.path.split("?")[0], "/api/models/me/system", f"/me/system/resolve/{COMMIT}/"
        self.asked.append(path)
        if path == f"{api}/revision/{COMMIT}":
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": "me/system", "sha": COMMIT, "siblings": siblings, "tags": []}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            self.answer_tree()
        elif (name := path.removeprefix(resolve)) in self.files:
            self.answer(self.files[name], ETag=f'"{name}"', X_Repo_Commit=COMMIT)
        else:
            entry = path.startswith((resolve, f"{api}/tree/{COMMIT}"))
            self.answer(None, X_Error_Code="EntryNotFound" if entry else "RevisionNotFound")


@pytest.fixture
def hub(trained, tmp_path) -> Iterator[dict[str, str]]:
    """The environment in which the hub is a server that has the autoencoder in `vae`, beside files that nobody needs."""
    Models.files = {f"vae/{name}": blob for name, blob in contents(trained / "ours").items()}
    Models.files |= dict.fromkeys((WEIGHTS, f"unet/{WEIGHTS}", "vae/diffusion_pytorch_model.fp16.safetensors"), b"gigabytes")
    Models.asked = []
    with serving(Models) as served:
        yield {**served, "HF_HOME": str(tmp_path / "home")}


def test_the_hub_is_read_at_its_commit_and_no_more_of_it_than_needed(project, hub):
    set_params(project, {"autoencoder": {"pretrained": f"me/system@{COMMIT}/vae"}})
    result = stage(project, "pretrained", **hub)
    assert result.returncode == 0, result.stderr
    made = contents(project / "models/pretrained")
    assert {name: made[name] for name in made if name != "source.txt"} == contents(project / "ours")
    fetched = {Path(path).name for path in Models.asked if "/resolve/" in path}
    assert fetched == {"config.json", WEIGHTS, "likelihood.safetensors"}

    set_params(project, {"autoencoder": {"pretrained": f"me/system@{OTHER}/vae"}})
    result = stage(project, "pretrained", **hub)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"error: autoencoder.pretrained me/system@{OTHER}/vae: the hub does not give it")
    assert contents(project / "models/pretrained") == made


@pytest.mark.soak
def test_a_commit_that_was_fetched_once_needs_no_network(project, hub):
    set_params(project, {"autoencoder": {"pretrained": f"me/system@{COMMIT}/vae"}})
    assert stage(project, "pretrained", **hub).returncode == 0
    made = contents(project / "models/pretrained")
    again = stage(project, "pretrained", **hub | {"HF_HUB_OFFLINE": "1"})
    assert again.returncode == 0 and contents(project / "models/pretrained") == made, again.stderr


# Refused


def test_settings_that_do_not_describe_it_are_all_named_with_both_values(project):
    changes = {
        "regulariser": {"kind": "vq"},
        "latent_channels": 3,
        "block_out_channels": [8, 8],
        "layers_per_block": 2,
        "norm_num_groups": 2,
        "attention": [1],
        "mid_block_add_attention": True,
        "pretrained": "theirs",
    }
    set_params(project, {"autoencoder": changes, "data": {"channels": 3}})
    run_stages(project, "pretrained")
    with pytest.raises(InputError) as error:
        start(project, load_settings(project))
    head, _, rest = str(error.value).partition(": ")
    assert head == "autoencoder.pretrained theirs is not what params.yaml describes"
    assert set(rest.split("; ")) == {
        "autoencoder.regulariser.kind is vq, but it has kl",
        "autoencoder.latent_channels is 3, but it has 2",
        "autoencoder.block_out_channels is [8, 8], but it has [8, 16]",
        "autoencoder.layers_per_block is 2, but it has 1",
        "autoencoder.norm_num_groups is 2, but it has 4",
        "autoencoder.attention is [1], but it has []",
        "autoencoder.mid_block_add_attention is True, but it has False",
        "data.channels is 3, but it has 1",
        "out_channels (by data.channels and train_vae.likelihood.scale) is 3, but it has 1",
        "the rebuild deployment (or autoencoder.pretrained: null) trains one from nothing",
    }


def test_a_scale_for_each_pixel_needs_a_decoder_that_gives_one(project):
    changes = {"likelihood": {"kind": "gaussian", "scale": "per_pixel"}, "images": 0}
    set_params(project, {"autoencoder": {"pretrained": "theirs"}, "train_vae": changes})
    run_stages(project, "pretrained")
    with pytest.raises(
        InputError, match=r"out_channels \(by data\.channels and train_vae\.likelihood\.scale\) is 2, but it has 1; "
    ):
        run_stages(project, "train_vae")
    assert (project / "models/autoencoder").is_dir()  # the earlier one


def test_what_no_setting_speaks_of_may_be_as_it_is(project):
    """1x1 convolutions around the latents, and codes of other channels than the layers before them."""
    settings = load_settings(project)
    described, _ = build(settings)
    shape = {"block_out_channels": [8, 16], "norm_num_groups": 4, "mid_block_add_attention": False}
    check_same(described, AutoencoderKL(1, 1, 2, **shape, use_quant_conv=False, use_post_quant_conv=False), "bare")
    set_params(project, {"autoencoder": {"regulariser": {"kind": "vq", "num_vq_embeddings": 32}}})
    described, _ = build(load_settings(project))
    check_same(described, VQModel(1, 1, 5, **shape, num_vq_embeddings=32, vq_embed_dim=2), "codes of 2 channels")
    with pytest.raises(InputError, match=r"codes is not .*: autoencoder\.regulariser\.num_vq_embeddings is 32, but it has 64; "):
        check_same(described, VQModel(1, 1, 2, **shape, num_vq_embeddings=64), "codes")


def test_training_wants_the_stage_before_it(project):
    set_params(project, {"autoencoder": {"pretrained": "theirs"}})
    with pytest.raises(InputError, match=r"models/pretrained: is not autoencoder\.pretrained theirs; run the stage pretrained"):
        start(project, load_settings(project))
    run_stages(project, "pretrained")
    set_params(project, {"autoencoder": {"pretrained": "ours"}})
    with pytest.raises(InputError, match=r"is not autoencoder\.pretrained ours; run the stage pretrained first"):
        start(project, load_settings(project))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / WEIGHTS).unlink(), rf"{WEIGHTS} is missing"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), rf"{WEIGHTS} is damaged"),
        (lambda folder: (folder / "config.json").write_text('{"_class_name": "AutoencoderDC"}'), "is 'AutoencoderDC'"),
    ],
)  # fmt: skip
def test_a_folder_that_holds_none_is_named_with_the_setting(damage, says, project):
    set_params(project, {"autoencoder": {"pretrained": "theirs"}})
    damage(project / "theirs")
    before = contents(project / "models")
    with pytest.raises(InputError, match=rf"^autoencoder\.pretrained theirs: .*({says})"):
        run_stages(project, "pretrained")
    assert contents(project / "models") == before and len(os.listdir(project / "models")) == 3  # no part of a folder
