"""A U-Net that starts from a trained model: from a registered version or a folder, on the same latents, or refused."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from blobs import draw_blobs, make_project, run_stages
from safetensors.torch import load_file, save_file
from tiny import set_params

from ldm.base.errors import InputError
from ldm.base.options import value_at
from ldm.config import Settings, load_settings, validated
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.options import Diffusion
from ldm.nets.backbone import UNetBackbone, load_backbone
from ldm.registry import versions
from ldm.registry.registration import register
from ldm.registry.versions import describe, lookup
from ldm.stages.checks import check_initial
from ldm.stages.pins import check_pins

WEIGHTS = "diffusion_pytorch_model.safetensors"
ALL = ("train_vae", "cache_latents", "train_unet", "evaluate")
STILL = {"images": 32, "batch_size": 32, "lr": 1e-12}  # a step that moves no weight by more than that


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def distance(one: Path, other: Path) -> float:
    """The largest difference of the weights in two folders."""
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> Path:
    """A project with two versions of one autoencoder: their files are in `first`, `second`; `third` is of another one."""
    root = make_project(tmp_path_factory.mktemp("registered") / "project", {"evaluate": {"metrics": []}})
    (root / "dvc.lock").write_text("schema: '2.0'")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        for name, images, stages in (("first", 64, ALL), ("second", 128, ("train_unet", "evaluate"))):
            set_params(root, {"train_unet": {"images": images}})
            run_stages(root, *stages)
            register(root)
            shutil.copytree(root / "models/ldm", root / name)
    recipe = json.loads((root / "first/model.json").read_text())
    shutil.copytree(root / "first", root / "third")
    (root / "third/model.json").write_text(json.dumps({**recipe, "autoencoder": "f" * 64}))
    return root


@pytest.fixture
def kept(registered, monkeypatch) -> Path:
    """That project, to be read only."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{registered}/mlflow.db")
    return registered


@pytest.fixture
def project(registered, tmp_path, monkeypatch) -> Path:
    """A copy of it, to work in."""
    root = Path(shutil.copytree(registered, tmp_path / "project"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.chdir(root)
    return root


def pin(root: Path, autoencoder: str, unet: str, **train_unet: Any) -> None:
    train = {"train_vae": {"images": 0}, "train_unet": {"init": unet, **train_unet}}
    set_params(root, {"autoencoder": {"pretrained": autoencoder}, **train})


def settings(root: Path, changes: dict[str, Any]) -> Settings:
    """The settings of a project with some keys changed, without writing them."""
    values = yaml.safe_load((root / "params.yaml").read_text())
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (value_at(values, section) if section else values)[last] = value
    return validated(values, root)


# What is taken over


def test_a_run_pinned_to_a_version_has_its_autoencoder_and_starts_from_its_unet(project, capsys):
    """As a nightly run with new images: two versions have this autoencoder, and the former U-Net is the one that is pinned."""
    pin(project, lookup("models:/ldm/1").pinned, lookup("models:/ldm/1").pinned, **STILL)
    check_pins(project, load_settings(project))
    run_stages(project, "pretrained", "train_vae", "cache_latents")
    assert contents(project / "models/autoencoder") == contents(project / "first/autoencoder")  # the likelihood, too
    draw_blobs(project / "images/second", 40, seed=1)
    capsys.readouterr()
    run_stages(project, "shard", "train_vae", "cache_latents")
    assert "4 shards, 2 of them encoded before and reused" in capsys.readouterr().out
    run_stages(project, "train_unet", "evaluate")
    assert distance(project / "models/unet", project / "first/unet") < 1e-9
    assert distance(project / "second/unet", project / "first/unet") > 1e-4
    version = lookup(f"models:/ldm/{register(project).version}")
    assert describe(version)["init"] == lookup("models:/ldm/1").pinned
    assert "init" not in describe(lookup("models:/ldm/1"))
    assert "initial" not in (project / "models/ldm/model.json").read_text()


def test_it_learns_on_from_there(project):
    """Its first losses are those of the trained model; of a start from nothing, they are larger."""
    pin(project, "models:/ldm/1", "models:/ldm/2", images=32, batch_size=32)
    run_stages(project, "pretrained", "train_vae", "cache_latents", "train_unet")
    table = project / "reports/curves/train_unet.csv"
    warm = pd.read_csv(table).loss[0]
    assert 1e-4 < distance(project / "models/unet", project / "second/unet") < 0.1
    set_params(project, {"train_unet": {"init": None}})
    run_stages(project, "pretrained", "train_unet")
    assert warm < 0.9 * pd.read_csv(table).loss[0]


@pytest.mark.parametrize("source", ["models:/ldm/2", "second"])
def test_version_and_folder_give_the_same_files(source, project, monkeypatch):
    """And so does a store whose files have to be fetched."""
    set_params(project, {"train_unet": {"init": source}})
    run_stages(project, "pretrained")
    made = contents(project / "models/initial")
    wanted = {name: blob for name, blob in contents(project / "second").items() if name.startswith(("unet/", "model.json"))}
    assert made == wanted | {"source.txt": f"{source}\n".encode()}
    assert contents(project / "models/pretrained") == {"source.txt": b"none\n"}
    monkeypatch.setattr(versions, "REVISION", "of another MLflow")
    run_stages(project, "pretrained")
    assert contents(project / "models/initial") == made


# Refused


TABLE = "{'kind': '%s', 'sigma_max': 80.0, 'shift': 1.0, 'zero_terminal_snr': False}"
OTHER = {"kind": "transformers", "max_tokens": 6}
MISFITS = [
    ({"autoencoder.latent_channels": 3}, "autoencoder.latent_channels is 3, but it has 2"),
    ({"backbone.block_out_channels": [16, 16]}, "backbone.block_out_channels is [16, 16], but it has [8, 16]"),
    ({"backbone.layers_per_block": 2}, "backbone.layers_per_block is 2, but it has 1"),
    ({"backbone.attention": ["self", "cross"]}, "backbone.attention is ['self', 'cross'], but it has ['none', 'cross']"),
    ({"backbone.transformer_layers_per_block": 2}, "backbone.transformer_layers_per_block is 2, but it has 1"),
    ({"backbone.num_heads": 4}, "backbone.num_heads is 4, but it has 2"),
    ({"backbone.norm_num_groups": 8}, "backbone.norm_num_groups is 8, but it has 4"),
    ({"backbone.qk_norm": True}, "backbone.qk_norm is True, but it has False"),
    ({"diffusion.prediction": "x0"}, "diffusion.prediction is x0, but it has v"),
    ({"diffusion.noise.kind": "linear"}, f"diffusion.noise is {TABLE % 'linear'}, but it has {TABLE % 'cosine'}"),
    ({"text": {**OTHER, "model": "first"}}, "text.kind is transformers, but it has minilm"),
    ({"text": {**OTHER, "model": f"me/text@{'0' * 40}"}}, "text.kind is transformers, but it has minilm"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), MISFITS, ids=[next(iter(changes)) for changes, _ in MISFITS])
def test_what_makes_its_weights_mean_something_else_is_refused_before_the_run(changes, says, kept):
    with pytest.raises(InputError) as error:
        check_pins(kept, settings(kept, {"train_unet.init": "models:/ldm/2", **changes}))
    message, hint = str(error.value), "the rebuild deployment (or train_unet.init: null) starts from nothing"
    assert message == f"train_unet.init models:/ldm/2 is not what params.yaml describes: {says}; {hint}"


@pytest.mark.parametrize(
    "changes", [{"text.max_tokens": 5}, {"text.max_truncated_fraction": 0.5}, {"seed": 1}, {"sampling.steps": 3}]
)
def test_what_leaves_their_meaning_is_not_refused(changes, kept):
    check_pins(kept, settings(kept, {"train_unet.init": "models:/ldm/2", **changes}))


def test_so_does_the_stage_that_fetches_it(project):
    set_params(project, {"train_unet": {"init": "second"}, "diffusion": {"prediction": "flow"}})
    with pytest.raises(InputError, match=r"^train_unet\.init second is .*: diffusion\.prediction is flow, but it has v; the"):
        run_stages(project, "pretrained")


def test_another_autoencoder_is_refused_as_soon_as_its_hash_is_known(project):
    message = r"^train_unet\.init third is .*: the hash of autoencoder is \w{12}, but it has f{12}; the rebuild"
    pin(project, "models:/ldm/1", "third")
    with pytest.raises(InputError, match=message):
        check_pins(project, load_settings(project))
    with pytest.raises(InputError, match=message):
        run_stages(project, "pretrained")
    set_params(project, {"autoencoder": {"pretrained": "first/autoencoder"}})
    with pytest.raises(InputError, match=message):  # a folder, whose hash is known when it is there
        run_stages(project, "pretrained")
    set_params(project, {"train_vae": {"images": 32}})  # an autoencoder that is yet to be trained
    check_pins(project, load_settings(project))
    run_stages(project, "pretrained", "train_vae", "cache_latents")
    with pytest.raises(InputError, match=message):
        run_stages(project, "train_unet")


def test_another_text_encoder_of_that_name_is_refused_by_its_hash(project):
    pin(project, "models:/ldm/1", "models:/ldm/2")
    run_stages(project, "pretrained", "train_vae", "cache_latents")
    manifest = project / "data/latents/manifest.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "text_encoder": "0123456789abcdef"}))
    with pytest.raises(InputError, match=r": the hash of text_encoder is 0123456789ab, but it has \w{12}; the rebuild"):
        run_stages(project, "train_unet")


NOISES = [
    {"kind": "cosine"}, {"kind": "cosine", "sigma_max": 20.0}, {"kind": "cosine", "shift": 2.0}, {"kind": "linear"},
    {"kind": "cosine", "zero_terminal_snr": True}, {"kind": "lognormal"}, {"kind": "uniform"},
    {"kind": "uniform", "sigma_max": 20.0},
]  # fmt: skip


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "edm", "flow"])
def test_noise_levels_may_change_where_the_network_is_told_the_same(prediction, registered, tmp_path):
    """By what the network answers: the same under both sections, at every noise level that both have, or refused."""
    net, x, text = load_backbone(registered / "second/unet").eval(), torch.randn(4, 2, 8, 8), torch.randn(4, 3, 384)
    recipe, sigma, outcomes = json.loads((registered / "second/model.json").read_text()), torch.tensor([0.05, 0.3, 1, 15]), set()
    shutil.copytree(registered / "second/unet", tmp_path / "unet")

    def answers(noise: dict[str, Any]) -> torch.Tensor:
        section = Diffusion.model_validate({"prediction": prediction, "noise": noise})
        with torch.inference_mode():
            return Denoiser(net, prediction, section.noise.build())(x, sigma, context=text)

    for theirs in ({"kind": "cosine"}, {"kind": "loguniform"}):
        (tmp_path / "model.json").write_text(json.dumps({**recipe, "diffusion": {"prediction": prediction, "noise": theirs}}))
        before = answers(theirs)
        for ours in (noise for noise in NOISES if prediction != "eps" or not noise.get("zero_terminal_snr")):
            now = settings(registered, {"diffusion": {"prediction": prediction, "noise": ours}, "train_unet.init": "second"})
            same = torch.allclose(answers(ours), before, atol=1e-5)
            with contextlib.nullcontext() if same else pytest.raises(InputError, match=r"describes: diffusion\.noise is "):
                check_initial(registered, now, tmp_path)
            outcomes.add(same)
    assert outcomes == ({True} if prediction in ("edm", "flow") else {True, False})


@pytest.mark.parametrize(
    "options",
    [
        {"attention": ["self", "cross"], "num_heads": 4},
        {"attention": ["none", "self"], "num_heads": 2},
        {"attention": ["self", "none"], "num_heads": 4},
        {"attention": ["cross", "none"], "num_heads": 8, "qk_norm": True},
        {"attention": ["cross", "self"], "transformer_layers_per_block": 2, "layers_per_block": 2},
    ],
)
def test_a_network_fits_the_settings_that_built_it(options, registered, tmp_path):
    """Also where diffusers' configuration does not keep the number of heads of a level without attention."""
    backbone = {"kind": "unet", "block_out_channels": [8, 16], "norm_num_groups": 4, **options}
    UNetBackbone.model_validate(backbone).build(2, 384).save_pretrained(tmp_path / "unet")
    shutil.copy(registered / "second/model.json", tmp_path)
    check_initial(registered, settings(registered, {"backbone": backbone, "train_unet.init": "second"}), tmp_path)


def test_pins_are_compared_without_reading_weights(project):
    first = lookup("models:/ldm/1")
    assert first.folder
    for file in (first.folder / "artifacts/ldm").rglob("*.safetensors"):
        file.unlink()
    pin(project, first.pinned, first.pinned)
    check_pins(project, load_settings(project))
    with pytest.raises(InputError) as error:
        check_pins(project, settings(project, {"autoencoder.layers_per_block": 2}))
    start = f"autoencoder.pretrained {first.pinned} is not what params.yaml describes: autoencoder.layers_per_block is 2, "
    assert str(error.value).removeprefix(start) == (
        "but it has 1; the rebuild deployment (or autoencoder.pretrained: null) trains one from nothing"
    )


@pytest.mark.parametrize("setting", ["autoencoder.pretrained", "train_unet.init"])
def test_a_version_of_another_registry_is_refused_by_its_hash(setting, project):
    name = f"models:/ldm/1@{'0' * 12}"
    section, _, key = setting.partition(".")
    set_params(project, {section: {key: name}})
    before, found = contents(project / "models/initial"), lookup("models:/ldm/1").pinned.partition("@")[2]
    with pytest.raises(InputError) as error:
        run_stages(project, "pretrained")
    message = f"{setting} {name}: {name}: version 1 of this registry has the hash {found}: another registry was meant"
    assert str(error.value).startswith(message)
    with pytest.raises(InputError, match="another registry was meant"):
        check_pins(project, load_settings(project))
    assert contents(project / "models/initial") == before


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "unet/config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "unet" / WEIGHTS).write_bytes(b"x" * 99), rf"{WEIGHTS} is damaged"),
    ],
)
def test_a_damaged_folder_is_named_with_the_setting(damage, says, project):
    damage(project / "second")
    set_params(project, {"train_unet": {"init": "second"}})
    with pytest.raises(InputError, match=rf"^train_unet\.init second: .*{says}"):
        run_stages(project, "pretrained")


def test_training_wants_the_stage_before_it(project):
    pin(project, "models:/ldm/1", "second")
    run_stages(project, "pretrained", "train_vae", "cache_latents")
    set_params(project, {"train_unet": {"init": "first"}})
    with pytest.raises(InputError, match=r"models/initial: is not train_unet\.init first; run the stage pretrained first"):
        run_stages(project, "train_unet")


def test_other_weights_under_the_same_name_are_another_training(project):
    """The hash of what was fetched is part of what a checkpoint is found by."""
    pin(project, "models:/ldm/1", "second", **STILL)
    run_stages(project, "pretrained", "train_vae", "cache_latents", "train_unet")
    before = distance(project / "models/unet", project / "second/unet")
    weights = load_file(project / "second/unet" / WEIGHTS)
    save_file({key: value + 0.5 for key, value in weights.items()}, project / "second/unet" / WEIGHTS, metadata={"format": "pt"})
    run_stages(project, "pretrained", "train_unet")
    assert before < 1e-9 and distance(project / "models/unet", project / "second/unet") < 1e-6
