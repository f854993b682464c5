"""The autoencoder beside diffusers' own, and its Gaussian beside torch.distributions."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL as Theirs
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

from ldm.errors import InputError
from ldm.nets.autoencoder import AutoencoderKL, DiagonalGaussian

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "block_out_channels": [8, 12], "norm_num_groups": 4}
CASES = [
    pytest.param(TINY, (16, 16), id="grey"),
    pytest.param(
        {
            "in_channels": 3,
            "out_channels": 5,
            "latent_channels": 3,
            "block_out_channels": [9, 15, 21],
            "layers_per_block": 2,
            "norm_num_groups": 3,
        },
        (24, 40),
        id="odd",
    ),
    pytest.param(TINY | {"mid_block_add_attention": False, "block_out_channels": [8] * 4}, (8, 24), id="no-attention"),
    pytest.param(TINY | {"block_out_channels": [8]}, (5, 7), id="one-level"),
]


def make_theirs(config: dict) -> Theirs:
    levels = len(config["block_out_channels"])
    torch.manual_seed(0)
    net = Theirs(**config, down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    for name, value in net.named_parameters():  # random scales and biases too, so that no swapped key goes unnoticed
        if value.dim() == 1:
            torch.nn.init.normal_(value, mean=float(name.endswith("weight")), std=0.2)
    return net.eval()


def public(net: Theirs) -> dict:
    """diffusers' configuration without its notes to itself."""
    return {key: value for key, value in json.loads(net.to_json_string()).items() if not key.startswith("_")}


def assert_equal_outputs(ours: AutoencoderKL, theirs: Theirs, size: tuple[int, int]) -> None:
    x = torch.randn(2, ours.config["in_channels"], *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=1e-5, atol=1e-5)
        decoded = ours.decode(expected.mean)
        torch.testing.assert_close(decoded, theirs.decode(expected.mean).sample, rtol=1e-5, atol=1e-5)
        nhwc = ours.to(memory_format=torch.channels_last).decode(expected.mean)
        torch.testing.assert_close(nhwc, decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "size"), CASES)
def test_outputs_equal_diffusers_both_ways(config: dict, size: tuple[int, int], tmp_path: Path) -> None:
    theirs = make_theirs(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    assert {key: ours.config[key] for key in config} == config
    assert_equal_outputs(ours, theirs, size)
    ours.save_pretrained(tmp_path / "ours")
    back, info = Theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_outputs(ours, back.eval(), size)
    assert public(back) == public(theirs)


def test_stable_diffusion_keys_and_shapes() -> None:
    config = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2}
    config["block_out_channels"] = [128, 256, 512, 512]
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(**config), make_theirs(config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert (len(ours.state_dict()), sum(p.numel() for p in ours.parameters())) == (248, 83_653_863)


def test_saving_is_deterministic_and_carries_what_it_does_not_use(tmp_path: Path) -> None:
    theirs = make_theirs(TINY)
    theirs.register_to_config(scaling_factor=0.13025)
    theirs.save_pretrained(tmp_path / "theirs")
    net = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    net.save_pretrained(tmp_path / "a")
    net.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "b")
    AutoencoderKL.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    for name in ("config.json", WEIGHTS):
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abc"}) == 1
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["scaling_factor"] == 0.13025
    assert not any("version" in key for key in config)


def test_attention_keys_of_old_checkpoints_are_read(tmp_path: Path) -> None:
    net = AutoencoderKL(**TINY)
    net.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for key, value in state.items()}
    assert not any("to_q" in key for key in state)
    save_file(state, tmp_path / WEIGHTS)
    assert AutoencoderKL.from_pretrained(tmp_path).state_dict().keys() == net.state_dict().keys()


def test_removed_added_and_misshapen_keys_are_named(tmp_path: Path) -> None:
    AutoencoderKL(**TINY).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    key = "decoder.up_blocks.0.resnets.1.conv2.weight"
    for broken in (
        {k: v for k, v in state.items() if k != key},
        state | {"encoder.extra.weight": torch.zeros(1)},
        state | {key: state[key][:-1].clone()},
    ):
        save_file(broken, tmp_path / WEIGHTS)
        with pytest.raises(InputError, match="encoder.extra.weight" if "encoder.extra.weight" in broken else key):
            AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "relu"}, "act_fn"),
        ({"use_quant_conv": False}, "use_quant_conv"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"a_key_of_the_future": 3}, "a_key_of_the_future"),
        ({"_class_name": "VQModel"}, "_class_name"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"block_out_channels": 5}, "config.json"),
        ({"block_out_channels": [], "down_block_types": [], "up_block_types": []}, "config.json"),
    ],
)
def test_unsupported_configurations_are_named(change: dict, named: str, tmp_path: Path) -> None:
    AutoencoderKL(**TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=named):
        AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_missing_and_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    AutoencoderKL(**TINY).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"[1, 2")
    with pytest.raises(InputError, match=name):
        AutoencoderKL.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        AutoencoderKL.from_pretrained(tmp_path)


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    net = AutoencoderKL(**TINY)
    net.half().save_pretrained(tmp_path)
    assert {p.dtype for p in AutoencoderKL.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_logvar_is_clamped_and_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    net = AutoencoderKL(**TINY)
    posterior = net.encode(torch.randn(2, 1, 8, 8))
    net.decode(posterior.sample(torch.randn_like(posterior.mean))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if "to_k.bias" not in n)
    torch.nn.init.constant_(net.quant_conv.bias, 1e3)
    assert net.encode(torch.randn(2, 1, 8, 8)).logvar.unique().tolist() == [20.0]
    torch.nn.init.constant_(net.quant_conv.bias, -1e3)
    assert net.encode(torch.randn(2, 1, 8, 8)).logvar.unique().tolist() == [-30.0]


def test_gaussian_against_torch_distributions() -> None:
    random = torch.Generator().manual_seed(0)
    mean, logvar, z, noise = torch.randn(4, 3, 2, 5, 7, generator=random, dtype=torch.float64)
    ours, theirs = DiagonalGaussian(mean, 3 * logvar), Normal(mean, (1.5 * logvar).exp())
    torch.testing.assert_close(ours.std, theirs.stddev)
    torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    standard = Normal(torch.zeros_like(mean), 1.0)
    torch.testing.assert_close(ours.kl(), kl_divergence(theirs, standard))
    torch.testing.assert_close(ours.sample(noise), mean + noise * theirs.stddev)
