"""params.yaml: what is wrong is said with the file, the key and what to do."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.base.errors import InputError
from ldm.config import find_root, load_settings

ROOT = Path(__file__).resolve().parents[1]
VALUES = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
VALUES["data"] |= {"image_size": 32}
VALUES["autoencoder"] |= {"block_out_channels": [32, 64, 64], "norm_num_groups": 8}
VALUES["unet"] |= {"block_out_channels": [64, 96], "attention": ["none", "cross"], "num_heads": 4, "norm_num_groups": 8}
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


def complaint(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        load_settings(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / 'params.yaml'}: ")
    assert "\n" not in message
    return message.removeprefix(f"{folder / 'params.yaml'}: ")


def test_the_projects_own_settings_are_read_as_written() -> None:
    assert load_settings(ROOT).model_dump(mode="json") == yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def test_latents_are_halved_after_the_first_level(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, {})).latent_size == 8


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
        ({"unet.num_heads": GONE}, ["missing key unet.num_heads"]),
        ({"diffusion": GONE}, ["missing key diffusion"]),
        ({"train_vae.images": "many"}, ["train_vae.images", "found 'many'", "integer"]),
        ({"train_vae.batch_size": 1.5}, ["train_vae.batch_size", "found 1.5", "integer"]),
        ({"train_unet.lr": 0}, ["train_unet.lr", "found 0", "greater than 0"]),
        ({"train_unet.lr": float("inf")}, ["train_unet.lr", "found inf", "finite"]),
        ({"train_unet.lr": float("nan")}, ["train_unet.lr", "found nan"]),
        ({"data.channels": 4}, ["data.channels", "found 4", "1 or 3"]),
        ({"data.path": 7}, ["data.path", "found 7", "string"]),
        ({"diffusion.kind": "epsilon"}, ["diffusion.kind", "found 'epsilon'", "'eps'"]),
        ({"data.val_fraction": 1.0}, ["data.val_fraction", "found 1.0", "less than 1"]),
        ({"unet": 3}, ["unet", "found 3"]),
        ({"unet": None}, ["unet", "found None"]),
        ({"unet.block_out_channels": [64, "x"]}, ["unet.block_out_channels.1", "found 'x'"]),
        ({"unet.block_out_channels": 64}, ["unet.block_out_channels", "found 64"]),
        ({"autoencoder.block_out_channels": []}, ["autoencoder.block_out_channels", "at least 1"]),
        # sizes that do not fit each other
        ({"data.image_size": 30}, ["data.image_size 30", "factor 4"]),
        ({"data.image_size": 36}, ["latents of side 9", "unet.block_out_channels"]),
        ({"data.val_fraction": 0.5, "data.test_fraction": 0.5}, ["data", "val_fraction + test_fraction", "below 1"]),
        ({"unet.block_out_channels": [64, 96, 96]}, ["unet", "attention", "block_out_channels"]),
        ({"unet.attention": ["none", "self_attention"]}, ["unet.attention.1", "found 'self_attention'", "'cross'"]),
        ({"unet.norm_num_groups": 7}, ["unet.block_out_channels has 64", "norm_num_groups 7"]),
        ({"autoencoder.norm_num_groups": 5}, ["autoencoder.block_out_channels has 32", "norm_num_groups 5"]),
        ({"unet.num_heads": 5}, ["unet.block_out_channels has 64", "num_heads 5"]),
        # the autoencoder: which, and where from
        ({"autoencoder.regulariser": "gan"}, ["autoencoder.regulariser", "found 'gan'", "'kl' or 'vq'"]),
        ({"autoencoder.attention": [0, 3]}, ["attention is [0, 3]", "0 to 2"]),
        ({"autoencoder.attention": [1, 1]}, ["attention is [1, 1]", "once each"]),
        ({"autoencoder.regulariser": "vq", "train_vae.beta": 2.0}, ["train_vae.beta is 1", "vq"]),
        ({"autoencoder.attention": [-1]}, ["autoencoder.attention.0", "found -1"]),
        ({"autoencoder.num_vq_embeddings": 0}, ["autoencoder.num_vq_embeddings", "found 0"]),
        ({"autoencoder.pretrained": ""}, ["autoencoder.pretrained", "found ''"]),
        ({"autoencoder.pretrained": "no/such"}, ["autoencoder.pretrained", "'no/such'", "neither a folder", "ID@COMMIT"]),
        ({"autoencoder.pretrained": "me/vae@main"}, ["autoencoder.pretrained", "'me/vae@main'", "40 hex digits"]),
        ({"autoencoder.pretrained": f"me/vae@{'a' * 39}"}, ["autoencoder.pretrained", "40 hex digits"]),
        ({"autoencoder.pretrained": "models:/x@champion"}, ["pretrained models:/x@champion", "write models:/NAME/VERSION"]),
        ({"autoencoder.pretrained": "models:/x/latest"}, ["pretrained models:/x/latest", "write models:/NAME/VERSION"]),
        ({"train_vae.images": 0}, ["train_vae.images is 0", "autoencoder.pretrained"]),
        ({"train_unet.images": 0}, ["train_unet.images is 0"]),
        # how it is trained
        ({"train_vae.likelihood": "discretised_logistic"}, ["train_vae.likelihood", "'discretized_logistic'"]),
        ({"train_vae.scale": "per-pixel"}, ["train_vae.scale", "found 'per-pixel'", "'per_pixel'"]),
        ({"train_vae.likelihood": "laplace", "train_vae.scale": "per_pixel"}, ["scale per_pixel", "found laplace"]),
        ({"train_vae.log_scale": float("nan")}, ["train_vae.log_scale", "found nan"]),
        ({"train_vae.beta": -1}, ["train_vae.beta", "found -1"]),
        ({"train_vae.free_bits": float("inf")}, ["train_vae.free_bits", "found inf"]),
        ({"train_vae.objective": "ldm"}, ["objective ldm", "likelihood: laplace", "scale: learned"]),
        ({"train_vae.ldm.discriminator_weigth": 1}, ["did you mean train_vae.ldm.discriminator_weight?"]),
        ({"train_vae.ldm.perceptual_sha256": "0" * 64}, ["train_vae.ldm", "perceptual_sha256", "null for `random`"]),
        ({"train_vae.ldm.perceptual": "vgg"}, ["train_vae.ldm", "perceptual_sha256 is the sha256"]),
        ({"train_vae.ldm.perceptual": "vgg", "train_vae.ldm.perceptual_sha256": "0" * 64},
         ["train_vae.ldm.perceptual", "found 'vgg'", "neither random nor a file"]),
        ({"diffusion.kind": "eps", "diffusion.zero_terminal_snr": True}, ["zero_terminal_snr", "kind eps", "take another kind"]),
        ({"diffusion.noise": "uniform", "diffusion.zero_terminal_snr": True}, ["zero_terminal_snr", "noise uniform has none"]),
        ({"diffusion.shift": 0}, ["diffusion.shift", "found 0"]),
        ({"diffusion.shift": 17}, ["diffusion.shift", "found 17"]),
        ({"diffusion.noise": "loguniform", "diffusion.shift": 2}, ["shift changes nothing for noise loguniform"]),
        ({"train_unet.loss_weight": "snr"}, ["train_unet.loss_weight", "found 'snr'", "'min_snr'"]),
        # how it is sampled
        ({"sampling.sampler": "plms"}, ["sampling.sampler", "found 'plms'", "'langevin'"]),
        ({"sampling.eta": 0.5}, ["eta is an option of ddim", "with sampler dpmpp_2m"]),
        ({"sampling.churn": 5}, ["churn is an option of heun"]),
        ({"sampling.guidance_interval": [3, 2]}, ["guidance_interval is [3.0, 2.0]", "lower noise level first"]),
        ({"sampling.guidance_interval": [3]}, ["sampling.guidance_interval.1"]),
        ({"sampling.guidance_rescale": 1.1}, ["sampling.guidance_rescale", "found 1.1"]),
        ({"precision": "fp16"}, ["precision", "found 'fp16'", "'bf16'"]),
        ({"evaluate.importance_samples": 0}, ["evaluate.importance_samples", "found 0"]),
        # posteriors of weights
        ({"autoencoder.optimizer": "sgld", "autoencoder.regulariser": "vq"}, ["optimizer sgld", "regulariser kl"]),
        (
            {"autoencoder.optimizer": "sgld", "train_vae.objective": "ldm", "train_vae.likelihood": "laplace"},
            ["optimizer sgld", "objective elbo"],
        ),
        ({"autoencoder.optimizer": "sgld", "train_vae.weight_decay": 0.1}, ["weight_decay is 0", "sgld.prior_precision"]),
        ({"autoencoder.optimizer": "sgld", "train_vae.free_bits": 0.5}, ["optimizer sgld", "free_bits 0"]),
        ({"autoencoder.optimizer": "psgld"}, ["autoencoder.optimizer", "found 'psgld'", "'sgld'"]),
        ({"sample_posterior": ["sgld"], "autoencoder.regulariser": "vq"}, ["sample_posterior needs", "leave the list empty"]),
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


@pytest.mark.parametrize("name", ["vae", "models:/my-ldm.2/13", f"me/vae@{'0f' * 20}", f"me/system@{'0f' * 20}/vae"])
def test_a_pretrained_autoencoder_is_a_folder_a_version_or_a_commit(name: str, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    settings = load_settings(write(tmp_path, {"autoencoder.pretrained": name, "train_vae.images": 0}))
    assert settings.autoencoder.pretrained == name


def test_the_ldm_objective_and_per_pixel_scales_have_their_likelihoods(tmp_path: Path) -> None:
    load_settings(write(tmp_path, {"train_vae.objective": "ldm", "train_vae.likelihood": "laplace"}))
    load_settings(write(tmp_path, {"train_vae.likelihood": "discretized_gaussian", "train_vae.scale": "per_pixel"}))


def test_every_problem_is_said_at_once(tmp_path: Path) -> None:
    message = complaint(write(tmp_path, {"seed": -1, "unet.num_heads": GONE, "data.shard_sise": 3}))
    assert all(words in message for words in ("seed: found -1", "missing key unet.num_heads", "did you mean data.shard_size?"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: [0\ndata: 1\n", ["YAML", "line 2"]),
        ("\tseed: 0\n", ["YAML", "line 1"]),
        ("- 1\n- 2\n", ["expected keys and values", "list"]),
        ("", ["expected keys and values", "NoneType"]),
        ("1: 2\n", ["missing key seed", "found 1"]),
    ],
)
def test_a_file_that_is_no_mapping(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    message = complaint(tmp_path)
    for words in expected:
        assert words in message


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
