"""params.yaml: what is wrong is said with the file, the key and what to do."""

import contextlib
import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.base.errors import InputError
from ldm.base.options import Key, keys
from ldm.config import Settings, change_settings, find_root, load_settings
from ldm.versioning.repository import read_yaml

ROOT = Path(__file__).resolve().parents[1]
VALUES = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
VALUES["data"] |= {"image_size": 32}
VALUES["autoencoder"] |= {"block_out_channels": [32, 64, 64], "norm_num_groups": 8}
VALUES["backbone"] |= {"block_out_channels": [64, 96], "attention": ["none", "cross"], "num_heads": 4, "norm_num_groups": 8}
GONE = object()


def write(folder: Path, edits: dict[str, Any]) -> Path:
    """`params.yaml` of the project with dotted keys changed, added or (GONE) removed."""
    values = copy.deepcopy(VALUES)
    for key, value in edits.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        if value is GONE:
            del section[name]
        else:
            section[name] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return folder


def leaves(values: Any, key: str = "") -> dict[str, Any]:
    """All values by their dotted keys. A list is one value, unless it holds choices."""
    if isinstance(values, list | tuple) and values and isinstance(values[0], dict):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {key[1:]: str(values)}
    return {k: v for name, value in values.items() for k, v in leaves(value, f"{key}.{name}").items()}


def complaint(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        load_settings(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / 'params.yaml'}: ")
    assert "\n" not in message
    return message.removeprefix(f"{folder / 'params.yaml'}: ")


def test_the_projects_own_settings_are_read_as_written() -> None:
    written = leaves(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    assert written.items() <= leaves(load_settings(ROOT).model_dump(mode="json")).items()  # options also have defaults


def test_latents_are_halved_after_the_first_level(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, {})).autoencoder.factor == 4


def test_settings_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings(write(tmp_path, {})).data.image_size = 64  # type: ignore[misc]


def test_a_rate_without_a_decimal_point_is_a_number(tmp_path: Path) -> None:
    assert isinstance(yaml.safe_load("2e-3"), str)  # to YAML 1.1
    write(tmp_path, {"train_vae.lr": "2e-3"})
    assert load_settings(tmp_path).train_vae.lr == 0.002


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({"data.image_sise": 32}, ["unknown key data.image_sise", "did you mean data.image_size?"]),
        ({"evaluat": {}}, ["unknown key evaluat", "did you mean evaluate?"]),
        ({"registry.zzz": 1}, ["unknown key registry.zzz", "known here: name, level"]),
        ({"backbone.attention": GONE}, ["missing key backbone.attention"]),
        ({"diffusion": GONE}, ["missing key diffusion"]),
        ({"backbone.num_headz": 3}, ["unknown key backbone.num_headz", "did you mean backbone.num_heads?"]),
        ({"train_vae.images": "many"}, ["train_vae.images", "found 'many'", "integer"]),
        ({"train_vae.batch_size": 1.5}, ["train_vae.batch_size", "found 1.5", "integer"]),
        ({"train_unet.lr": 0}, ["train_unet.lr", "found 0", "greater than 0"]),
        ({"train_unet.lr": float("inf")}, ["train_unet.lr", "found inf", "finite"]),
        ({"train_unet.lr": float("nan")}, ["train_unet.lr", "found nan"]),
        ({"data.channels": 4}, ["data.channels", "found 4", "1 or 3"]),
        ({"data.path": 7}, ["data.path", "found 7", "string"]),
        ({"diffusion.prediction": "epsilon"}, ["diffusion.prediction", "found 'epsilon'", "'eps'"]),
        ({"data.val_fraction": 1.0}, ["data.val_fraction", "found 1.0", "less than 1"]),
        ({"train_unet": 3}, ["train_unet", "found 3"]),
        ({"backbone": 3}, ["backbone", "found 3"]),
        ({"backbone": None}, ["backbone", "found None"]),
        ({"backbone.block_out_channels": [64, "x"]}, ["backbone.block_out_channels.1", "found 'x'"]),
        ({"backbone.block_out_channels": 64}, ["backbone.block_out_channels", "found 64"]),
        ({"autoencoder.block_out_channels": []}, ["autoencoder.block_out_channels", "at least 1"]),
        # sizes that do not fit each other
        ({"data.image_size": 30}, ["data.image_size 30", "factor 4"]),
        ({"data.image_size": 36}, ["latents of side 9", "are no multiple of 2, as needed by backbone.block_out_channels"]),
        # shapes: sides are multiples of what the networks need
        ({"data.shapes": "round"}, ["data.shapes.kind: found 'round'", "'square', 'buckets'"]),
        ({"data.shapes": "buckets"}, ["data.shapes.step 64 does not divide data.image_size 32", "set data.shapes.step to"]),
        ({"data.shapes": {"kind": "buckets", "max_aspect": 0.5}}, ["data.shapes.max_aspect", "found 0.5"]),
        ({"data.shapes": {"kind": "square", "step": 8}}, ["unknown key data.shapes.step", "known here: kind"]),
        (
            {"data.shapes": {"kind": "buckets", "step": 2}},
            ["data.shapes has images of side 22", "autoencoder's factor 4", "set data.shapes.step to a multiple of 4"],
        ),
        (
            {"data.shapes": {"kind": "buckets", "step": 4}},
            ["data.shapes has images of side 28, but latents of side 7", "set data.shapes.step to a larger divisor"],
        ),
        ({"data.val_fraction": 0.5, "data.test_fraction": 0.5}, ["data", "val_fraction + test_fraction", "below 1"]),
        ({"backbone.block_out_channels": [64, 96, 96]}, ["backbone", "attention", "block_out_channels"]),
        ({"backbone.attention": ["none", "self_attention"]}, ["backbone.attention.1", "found 'self_attention'", "'cross'"]),
        ({"backbone.norm_num_groups": 7}, ["backbone: block_out_channels has 64", "norm_num_groups 7"]),
        ({"autoencoder.norm_num_groups": 5}, ["autoencoder: block_out_channels [32, 64, 64]", "norm_num_groups 5"]),
        ({"backbone.num_heads": 5}, ["backbone: block_out_channels has 64", "num_heads 5"]),
        # the autoencoder: which, and where from
        ({"autoencoder.regulariser": {"kind": "gan"}}, ["autoencoder.regulariser.kind", "found 'gan'", "'kl', 'vq'"]),
        ({"autoencoder.regulariser": "gan"}, ["autoencoder.regulariser.kind: found 'gan'", "'kl', 'vq'"]),
        ({"autoencoder.regulariser": ["vq"]}, ["autoencoder.regulariser: found ['vq']", "write {kind: NAME} and its options"]),
        ({"autoencoder.attention": [0, 3]}, ["attention is [0, 3]", "0 to 2"]),
        ({"autoencoder.attention": [1, 1]}, ["attention is [1, 1]", "once each"]),
        (
            {"autoencoder.regulariser": {"kind": "vq", "beta": 2.0}},
            ["unknown key autoencoder.regulariser.beta", "known here: kind, num_vq_embeddings"],
        ),
        ({"autoencoder.attention": [-1]}, ["autoencoder.attention.0", "found -1"]),
        (
            {"autoencoder.regulariser": {"kind": "vq", "num_vq_embeddings": 0}},
            ["autoencoder.regulariser.num_vq_embeddings", "found 0"],
        ),
        ({"autoencoder.pretrained": ""}, ["autoencoder.pretrained", "found ''"]),
        ({"autoencoder.pretrained": "no/such"}, ["autoencoder.pretrained", "'no/such'", "neither a folder", "ID@COMMIT"]),
        ({"autoencoder.pretrained": "me/vae@main"}, ["autoencoder.pretrained", "'me/vae@main'", "40 hex digits"]),
        ({"autoencoder.pretrained": f"me/vae@{'a' * 39}"}, ["autoencoder.pretrained", "40 hex digits"]),
        ({"autoencoder.pretrained": "models:/x@champion"}, ["autoencoder.pretrained: found 'models:/x@champion'", "a version"]),
        ({"autoencoder.pretrained": "models:/x/latest"}, ["autoencoder.pretrained: found 'models:/x/latest'", "VERSION@HASH"]),
        ({"autoencoder.pretrained": f"models:/x/1@{'a' * 11}"}, ["autoencoder.pretrained: found 'models:/x/1@", "12 or more"]),
        ({"train_unet.init": ""}, ["train_unet.init", "found ''"]),
        ({"train_unet.init": "models:/x@champion"}, ["train_unet.init: found 'models:/x@champion'; a stage needs a version"]),
        ({"train_unet.init": f"models:/x/1@{'A' * 12}"}, ["train_unet.init: found 'models:/x/1@AAA", "12 or more"]),
        ({"train_unet.init": "no/such"}, ["train_unet.init: found 'no/such', neither models:/NAME/VERSION nor a folder"]),
        ({"train_unet.init": f"me/system@{'0f' * 20}"}, ["train_unet.init: found 'me/system@0f", "nor a folder"]),
        ({"train_vae.images": 0}, ["train_vae.images is 0", "autoencoder.pretrained"]),
        ({"train_unet.images": 0}, ["train_unet.images: found 0; Input should be greater than 0"]),
        # how it is trained
        ({"train_vae.likelihood.kind": "discretised_logistic"}, ["train_vae.likelihood.kind", "'discretized_logistic'"]),
        ({"train_vae.likelihood.scale": "per-pixel"}, ["train_vae.likelihood.scale", "found 'per-pixel'", "'per_pixel'"]),
        (
            {"train_vae.likelihood.kind": "laplace", "train_vae.likelihood.scale": "per_pixel"},
            ["train_vae.likelihood.scale: found 'per_pixel'", "'learned' or 'fixed'"],
        ),
        ({"train_vae.likelihood.kind": "bernoulli"}, ["unknown key train_vae.likelihood.scale", "known here: kind"]),
        ({"train_vae.likelihood.log_scale": float("nan")}, ["train_vae.likelihood.log_scale", "found nan"]),
        ({"autoencoder.regulariser.beta": -1}, ["autoencoder.regulariser.beta", "found -1"]),
        ({"autoencoder.regulariser.free_bits": float("inf")}, ["autoencoder.regulariser.free_bits", "found inf"]),
        ({"train_vae.objective.kind": "ldm"}, ["objective ldm", "set likelihood {kind: laplace}"]),
        (
            {"train_vae.objective": {"kind": "elbo", "discriminator_weight": 1}},
            ["unknown key train_vae.objective.discriminator_weight", "known here: kind"],
        ),
        (
            {"train_vae.objective": {"kind": "ldm", "discriminator_weigth": 1}},
            ["did you mean train_vae.objective.discriminator_weight?"],
        ),
        (
            {"train_vae.objective": {"kind": "ldm", "perceptual_sha256": "0" * 64}},
            ["train_vae.objective", "perceptual_sha256", "null for `random`"],
        ),
        ({"train_vae.objective": {"kind": "ldm", "perceptual": "vgg"}}, ["train_vae.objective: perceptual_sha256 is"]),
        (
            {
                "train_vae.likelihood": {"kind": "laplace"},
                "train_vae.objective": {"kind": "ldm", "perceptual": "vgg", "perceptual_sha256": "0" * 64},
            },
            ["train_vae.objective.perceptual", "found 'vgg'", "neither random nor a file"],
        ),
        (
            {"diffusion.prediction": "eps", "diffusion.noise.zero_terminal_snr": True},
            ["diffusion: zero_terminal_snr", "prediction eps", "take another prediction"],
        ),
        (
            {"diffusion.noise": {"kind": "uniform", "zero_terminal_snr": True}},
            ["unknown key diffusion.noise.zero_terminal_snr", "known here: kind, sigma_max, shift"],
        ),
        ({"diffusion.noise.shift": 0}, ["diffusion.noise.shift", "found 0"]),
        ({"diffusion.noise.shift": 17}, ["diffusion.noise.shift", "found 17"]),
        (
            {"diffusion.noise": {"kind": "loguniform", "shift": 2}},
            ["unknown key diffusion.noise.shift", "known here: kind, sigma_max"],
        ),
        ({"train_unet.loss_weight.kind": "snr"}, ["train_unet.loss_weight.kind", "found 'snr'", "'min_snr'"]),
        ({"train_unet.loss_weight.gamma": 5}, ["unknown key train_unet.loss_weight.gamma", "known here: kind"]),
        ({"train_unet.optimizer.kind": "sgld"}, ["train_unet.optimizer.kind: found 'sgld'", "'adamw'"]),
        ({"text": {"kind": "transformers", "model": "no/such", "max_tokens": 4}},
         ["text.model: found 'no/such'", "neither a folder nor ID@COMMIT"]),
        *(
            ({"text": {"kind": "transformers", "model": f"me/it{version}", "max_tokens": 4}}, ["text.model", "a branch moves"])
            for version in ("@main", "", "@", "@v1.0", f"@{'a' * 39}", f"@{'A' * 40}", "@refs/pr/1")
        ),
        ({"text.max_tokens": 2}, ["text.max_tokens: found 2"]),
        ({"text.max_tokens": 513}, ["text.max_tokens: found 513", "less than or equal to 512"]),
        ({"text.max_truncated_fraction": -0.1}, ["text.max_truncated_fraction: found -0.1"]),
        ({"text.max_truncated_fraction": 1.5}, ["text.max_truncated_fraction: found 1.5"]),
        # what could not be measured
        ({"evaluate.samples": 2}, ["evaluate.metrics.1: features.dim 32", "evaluate.samples is 2"]),
        ({"evaluate.samples": 32}, ["evaluate.metrics.1: features.dim 32", "evaluate.samples is 32"]),
        (
            {"evaluate.samples": 2, "evaluate.metrics": [{"kind": "psnr"}, {"kind": "kernel"}]},
            ["evaluate.metrics.1: kernel needs 3 samples, and evaluate.samples is 2"],
        ),
        (
            {"evaluate.samples": 2000, "evaluate.metrics": [{"kind": "frechet", "features": {"kind": "pca", "dim": 1025}}]},
            ["evaluate.metrics.0: features.dim 1025 is more than the 1024 values of an image"],
        ),
        ({"text.model": "me/encoder@main"}, ["unknown key text.model", "known here: kind, max_tokens"]),
        # how it is sampled
        ({"sampling.sampler.kind": "plms"}, ["sampling.sampler.kind", "found 'plms'", "'langevin'"]),
        ({"sampling.sampler.eta": 0.5}, ["unknown key sampling.sampler.eta", "known here: kind"]),
        ({"sampling.sampler": {"kind": "ddim", "churn": 5}}, ["unknown key sampling.sampler.churn", "known here: kind, eta"]),
        ({"sampling.guidance_interval": [3, 2]}, ["guidance_interval is [3.0, 2.0]", "lower noise level first"]),
        ({"sampling.guidance_interval": [3]}, ["sampling.guidance_interval.1"]),
        ({"sampling.guidance_rescale": 1.1}, ["sampling.guidance_rescale", "found 1.1"]),
        ({"precision": "fp16"}, ["precision", "found 'fp16'", "'bf16'"]),
        ({"evaluate.importance_samples": 0}, ["evaluate.importance_samples", "found 0"]),
        # posteriors of weights
        ({"train_vae.optimizer.kind": "sgld", "autoencoder.regulariser.kind": "vq"}, ["optimizer sgld", "regulariser kl"]),
        (
            {"train_vae.optimizer.kind": "sgld", "train_vae.objective.kind": "ldm", "train_vae.likelihood": {"kind": "laplace"}},
            ["optimizer sgld", "objective elbo"],
        ),
        (
            {"train_vae.optimizer": {"kind": "sgld", "weight_decay": 0.1}},
            ["unknown key train_vae.optimizer.weight_decay", "known here: kind, prior_precision, temperature"],
        ),
        ({"train_vae.optimizer.kind": "sgld", "autoencoder.regulariser.free_bits": 0.5}, ["optimizer sgld", "free_bits 0"]),
        ({"train_vae.optimizer.kind": "psgld"}, ["train_vae.optimizer.kind", "found 'psgld'", "'sgld'"]),
        (
            {"sample_posterior": ["sgld"], "autoencoder.regulariser.kind": "vq"},
            ["sample_posterior needs", "leave the list empty"],
        ),
        ({"sample_posterior": ["sgld", "sgld"]}, ["sample_posterior is ['sgld', 'sgld']", "once"]),
        ({"sample_posterior": ["nuts"]}, ["sample_posterior.0", "found 'nuts'", "'sghmc'"]),
        ({"posterior.chains": 1}, ["posterior.chains", "found 1"]),
        ({"posterior.draws": 3}, ["posterior.draws", "found 3"]),
        ({"posterior.lr": 0}, ["posterior.lr", "found 0"]),
        ({"posterior.friction": 1.5}, ["posterior.friction", "found 1.5"]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(edits: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    message = complaint(write(tmp_path, edits))
    for words in expected:
        assert words in message


@pytest.mark.parametrize(
    "name", ["vae", "models:/my-ldm.2/13", f"models:/ldm/7@{'0f' * 6}", f"me/vae@{'0f' * 20}", f"me/system@{'0f' * 20}/vae"]
)
def test_a_pretrained_autoencoder_is_a_folder_a_version_or_a_commit(name: str, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    settings = load_settings(write(tmp_path, {"autoencoder.pretrained": name, "train_vae.images": 0}))
    assert settings.autoencoder.pretrained == name


@pytest.mark.parametrize("name", ["saved", "models:/my-ldm.2/13", f"models:/ldm/7@{'0f' * 6}", f"models:/ldm/7@{'0f' * 32}"])
def test_a_model_to_start_from_is_a_folder_or_a_version(name: str, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/model.json").write_text("{}")
    assert load_settings(write(tmp_path, {"train_unet.init": name})).train_unet.init == name


def test_the_ldm_objective_and_per_pixel_scales_have_their_likelihoods(tmp_path: Path) -> None:
    load_settings(write(tmp_path, {"train_vae.objective.kind": "ldm", "train_vae.likelihood": {"kind": "laplace"}}))
    load_settings(write(tmp_path, {"train_vae.likelihood": {"kind": "discretized_gaussian", "scale": "per_pixel"}}))


def test_every_problem_is_said_at_once(tmp_path: Path) -> None:
    message = complaint(write(tmp_path, {"seed": -1, "backbone.attention": GONE, "data.shard_sise": 3}))
    assert all(
        words in message for words in ("seed: found -1", "missing key backbone.attention", "did you mean data.shard_size?")
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: [0\ndata: 1\n", ["YAML", "line 2"]),
        ("\tseed: 0\n", ["YAML", "line 1"]),
        ("- 1\n- 2\n", ["expected keys and values", "list"]),
        ("", ["expected keys and values", "NoneType"]),
        ("1: 2\n", ["unknown key 1: known here: seed"]),
    ],
)
def test_a_file_that_is_no_mapping(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    message = complaint(tmp_path)
    for words in expected:
        assert words in message


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("seed: 0\ndata: {}\nseed: 1\n", 3, "seed"),
        ("data:\n  path: a\n  margin: 0\n  path: b\n", 4, "path"),
        ("a: {b: 1, b: 2}", 1, "b"),
    ],
)
def test_a_key_twice_is_named_with_its_line(text: str, line: int, key: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    assert f"line {line}: the key {key} is there a second time; keep one of the two" in complaint(tmp_path)


@pytest.mark.parametrize("written", ["10", "010", "0o12", "0xA", "1_0", "+10"])
def test_a_number_is_to_us_what_it_is_to_dvc(written: str, tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("seed: 0 ", f"seed: {written} "))
    assert load_settings(tmp_path).seed == read_yaml(tmp_path / "params.yaml")["seed"] == 10


@pytest.mark.parametrize("name", [".", "..", "...", ".hidden", "a/b", "a:b", "", " "])
def test_names_that_mlflow_refuses_are_refused_before_a_run(name: str, project: Path) -> None:
    from mlflow import MlflowException
    from mlflow.utils.validation import _validate_model_name

    with contextlib.suppress(MlflowException):  # refused there as well
        _validate_model_name(name)
        assert name in ("...", ".hidden")  # which our look-ups in SQLite leave to MLflow
    with pytest.raises(InputError, match=r"registry.name"):
        change_settings(project, [f"registry.name='{name}'"])


def test_a_missing_or_foreign_file(tmp_path: Path) -> None:
    assert "not found" in complaint(tmp_path)
    (tmp_path / "params.yaml").write_bytes(b"seed: \xff\xfe")
    assert "YAML" in complaint(tmp_path)


def test_the_root_is_found_from_below(tmp_path: Path) -> None:
    below = write(tmp_path, {}) / "models" / "autoencoder"
    below.mkdir(parents=True)
    with pytest.raises(InputError, match=r"no dvc\.yaml and params\.yaml here or above"):
        find_root(below)
    (tmp_path / "dvc.yaml").touch()
    assert find_root(below) == tmp_path.resolve()


def test_every_key_is_listed(tmp_path: Path) -> None:
    """The keys of the settings as they are, and of all that is not chosen."""
    listed = {key.name: key for key in keys(Settings)}
    others = {
        "autoencoder.regulariser": {"kind": "vq"},
        "evaluate.metrics": [{"kind": "frechet", "features": {"kind": "pca", "dim": 8}}],
        "data.source": {"kind": "huggingface", "dataset": "x"},
        "sampling.sampler": {"kind": "heun"},
        "text": {"kind": "transformers", "model": f"me/encoder@{'0' * 40}", "max_tokens": 4},
        "train_vae.likelihood": {"kind": "laplace"},
        "train_vae.objective": {"kind": "ldm"},
        "train_unet.loss_weight": {"kind": "min_snr"},
    }
    for changes in ({"evaluate.metrics": VALUES["evaluate"]["metrics"][:1]}, others):
        assert leaves(load_settings(write(tmp_path, changes)).model_dump()).keys() <= listed.keys()
    assert listed["train_unet.loss_weight.gamma"] == Key("train_unet.loss_weight.gamma", float, (), ("min_snr",))
    assert listed["precision"].values == ("auto", "fp32", "bf16")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


def changed_lines(project: Path) -> dict[str, str]:
    """Lines of `params.yaml`, old and new, that differ from the repository's before their comments."""
    lines = ((folder / "params.yaml").read_text().splitlines() for folder in (ROOT, project))
    changed = [(old.partition(" #"), new.partition(" #")) for old, new in zip(*lines, strict=True) if old != new]
    assert all(old[2] == new[2] for old, new in changed)
    return {old[0].strip(): new[0].strip() for old, new in changed}


def test_changing_settings_keeps_comments_and_formatting(project: Path) -> None:
    changes = change_settings(
        project,
        [
            "train_unet.lr=1e-3",
            "sampling.sampler.kind=heun",
            "sampling.sampler.churn=3",
            "autoencoder.block_out_channels=[16, 32, 48]",
            "sampling.guidance_interval=[0.1, 3]",
            "data.background='#000000'",
            "text.max_tokens=16",
            "evaluate.metrics.1.features.dim=8",
        ],
    )
    assert changed_lines(project) == {
        "lr: 2.0e-3": "lr: 0.001",
        "sampler: {kind: dpmpp_2m}": "sampler: {kind: heun, churn: 3}",
        "block_out_channels: [16, 32, 64]": "block_out_channels: [16, 32, 48]",
        "guidance_interval: null": "guidance_interval: [0.1, 3]",
        'background: "#ffffff"': 'background: "#000000"',
        "- {kind: frechet, features: {kind: pca, dim: 32}}": "- {kind: frechet, features: {kind: pca, dim: 8}}",
    }
    assert changes == [
        "train_unet.lr: 0.002, now 0.001",
        "sampling.sampler: {kind: dpmpp_2m}, now {kind: heun, churn: 3}",
        "autoencoder.block_out_channels: [16, 32, 64], now [16, 32, 48]",
        "sampling.guidance_interval: null, now [0.1, 3]",
        "data.background: '#ffffff', now '#000000'",
        "evaluate.metrics.1.features.dim: 32, now 8",
    ]  # and not text.max_tokens, which was 16


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["train_unet.lr=1e-3", "train_unet.images=0"], "params.yaml: train_unet.images: found 0; Input"),
        (["train_unet.lr=1e-3", "train_unet.learning_rate=1"], "params.yaml: unknown key train_unet.learning_rate"),
        (["sampling.sampler=huen"], "params.yaml: sampling.sampler.kind: found 'huen'; known are "),
        (["registry.name=007"], "params.yaml: registry.name: found 7"),  # as DVC takes it
        (["seed=2026-01-01"], "params.yaml: seed: found datetime.date"),
        (["evaluate.metrics.-1.kind=psnr"], "there is no -1 in evaluate.metrics.-1.kind"),
        (["evaluate.metrics=[{kind: psnr}, {kind: psnr}]"], "metrics: two are called psnr; give one of them another name"),
        (["train_unet.lr=[1"], "--set train_unet.lr=[1: not readable as YAML"),
        (["seed"], "--set 'seed': write KEY=VALUE"),
    ],
)
def test_settings_that_would_not_be_valid_are_not_written(assignments: list[str], expected: str, project: Path) -> None:
    with pytest.raises(InputError) as error:
        change_settings(project, assignments)
    assert expected in str(error.value)
    assert (project / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_settings_that_are_wrong_can_be_mended(project: Path) -> None:
    file = project / "params.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: x"))
    with pytest.raises(InputError, match="seed: found 'x'"):
        load_settings(project)
    assert change_settings(project, ["seed=3"]) == ["seed: x, now 3"]
    assert load_settings(project).seed == 3
    last = file.read_text().count("\n") + 1
    file.write_text(file.read_text() + "seed: 4\n")
    with pytest.raises(InputError, match=rf"params\.yaml: line {last}: the key seed is there a second time"):
        change_settings(project, ["seed=5"])


def test_a_link_to_the_settings_stays_one(project: Path) -> None:
    (project / "params.yaml").rename(project / "shared.yaml")
    (project / "params.yaml").symlink_to("shared.yaml")
    change_settings(project, ["seed=3"])
    assert (project / "params.yaml").is_symlink() and load_settings(project).seed == 3


def test_all_that_is_wrong_is_said_at_once(project: Path) -> None:
    file = project / "params.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: x\nsed: 1").replace("num_heads:", "heads:"))
    with pytest.raises(InputError) as error:
        load_settings(project)
    for words in ("unknown key sed: did you mean seed?", "seed: found 'x'", "unknown key backbone.heads"):
        assert words in str(error.value)


def test_reading_settings_waits_for_no_heavy_library() -> None:
    code = "import pathlib, sys, ldm.config; ldm.config.load_settings(pathlib.Path()); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "pandas", "scipy", "sklearn", "mlflow", "matplotlib", "transformers", "tokenizers", "PIL"}
    assert "ldm.nets.backbone" in loaded
    assert not heavy & set(loaded)
