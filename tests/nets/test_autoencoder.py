"""The autoencoders beside diffusers' own, and their Gaussian beside torch.distributions."""

import json
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

import ldm.nets
from ldm.base.errors import InputError
from ldm.nets.autoencoder import Autoencoder, AutoencoderKL, Codebook, DiagonalGaussian, VQModel, load_autoencoder

Theirs = diffusers.AutoencoderKL | diffusers.VQModel
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "block_out_channels": [8, 12], "norm_num_groups": 4}
TINY_VQ = TINY | {"num_vq_embeddings": 16, "vq_embed_dim": 5}
ODD = {
    "in_channels": 3,
    "out_channels": 5,
    "latent_channels": 3,
    "block_out_channels": [9, 15, 21],
    "layers_per_block": 2,
    "norm_num_groups": 3,
}
F32 = TINY | {"block_out_channels": [4] * 6, "norm_num_groups": 1}  # more groups of so few values amplify rounding
NO_CONVOLUTIONS = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}  # as Stable Diffusion 3
CASES = [
    pytest.param(AutoencoderKL, TINY, (16, 16), id="kl-grey"),
    pytest.param(AutoencoderKL, ODD, (24, 40), id="kl-odd-channels"),
    pytest.param(AutoencoderKL, ODD | {"attention": [False, True, True]}, (25, 39), id="kl-attention-odd-sides"),
    pytest.param(AutoencoderKL, TINY | {"mid_block_add_attention": False, "block_out_channels": [8] * 4}, (8, 24), id="kl-plain"),
    pytest.param(AutoencoderKL, TINY | {"block_out_channels": [8]}, (5, 7), id="kl-f1"),
    pytest.param(AutoencoderKL, F32, (32, 71), id="kl-f32"),
    pytest.param(AutoencoderKL, TINY | NO_CONVOLUTIONS, (9, 8), id="kl-without-quant-conv"),
    pytest.param(AutoencoderKL, TINY | {"use_quant_conv": False}, (9, 8), id="kl-without-one-quant-conv"),
    pytest.param(VQModel, TINY_VQ, (16, 17), id="vq-grey"),
    pytest.param(VQModel, ODD | {"attention": [True, False, True]}, (24, 40), id="vq-attention"),
    pytest.param(VQModel, F32 | {"mid_block_add_attention": False}, (70, 32), id="vq-f32"),
]
RGB = {"in_channels": 3, "out_channels": 3, "layers_per_block": 2}
STABLE_DIFFUSION = RGB | {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}
VQ_F4 = RGB | {"latent_channels": 3, "block_out_channels": [128, 256, 512], "num_vq_embeddings": 8192}
VQ_F8 = RGB | {"latent_channels": 4, "block_out_channels": [128, 256, 256, 512], "num_vq_embeddings": 16384}
VQ_F8 |= {"attention": [False, False, False, True]}
PUBLISHED = [  # with the number of keys and of parameters
    pytest.param(AutoencoderKL, STABLE_DIFFUSION, (16, 24), (248, 83_653_863), id="stable-diffusion"),
    pytest.param(VQModel, VQ_F4, (24, 16), (205, 55_322_782), id="vq-f4"),
    pytest.param(VQModel, VQ_F8, (24, 40), (299, 67_717_295), id="vq-f8", marks=pytest.mark.soak),
]


def make_theirs(kind: type[Autoencoder], config: dict) -> Theirs:
    """diffusers' model of our arguments, every weight, bias and scale random, so that no swapped key goes unnoticed."""
    attention = config.get("attention") or [False] * len(config["block_out_channels"])
    types = {
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)),
    }
    with torch.device("meta"):  # diffusers' own initialisation takes seconds
        net = getattr(diffusers, kind.__name__)(**{k: v for k, v in config.items() if k != "attention"}, **types)
    net.to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    for name, value in net.named_parameters():
        matrix = value.dim() > 1 and "quantize" not in name
        width = (3 / value[0].numel()) ** 0.5 if matrix else 1.7 if "quantize" in name else 0.3
        value.data.uniform_(-width, width, generator=random).add_(float(value.dim() == 1 and name.endswith("weight")))
    return net.eval()


def public(net: Theirs) -> dict:
    """diffusers' configuration without its notes to itself."""
    return {key: value for key, value in json.loads(net.to_json_string()).items() if not key.startswith("_")}


@torch.no_grad()
def assert_equal_outputs(ours: Autoencoder, theirs: Theirs, size: tuple[int, int]) -> None:
    x = torch.randn(2, ours.config["in_channels"], *size, generator=torch.Generator().manual_seed(1))
    posterior, expected = ours.encode(x), theirs.encode(x)
    if isinstance(ours, AutoencoderKL):
        latents = expected.latent_dist.mean
        torch.testing.assert_close(posterior.logvar, expected.latent_dist.logvar, rtol=1e-5, atol=1e-5)
    else:
        latents = expected.latents
        assert posterior.logvar.unique().tolist() == [-30.0]
        assert_equal_quantisation(ours, theirs, latents)
    torch.testing.assert_close(posterior.mean, latents, rtol=1e-5, atol=1e-5)
    assert posterior.mean.shape == posterior.logvar.shape == (2, *ours.latent_shape(*size))
    decoded = ours.decode(latents)
    torch.testing.assert_close(decoded, theirs.decode(latents).sample, rtol=1e-5, atol=1e-5)
    nhwc = ours.to(memory_format=torch.channels_last).decode(latents)
    torch.testing.assert_close(nhwc, decoded, rtol=1e-5, atol=1e-5)


def assert_equal_quantisation(ours: VQModel, theirs: diffusers.VQModel, h: torch.Tensor) -> None:
    quantizer = VectorQuantizer(*theirs.quantize.embedding.weight.shape, beta=0.25, legacy=False)  # diffusers' model: True
    quantizer.load_state_dict(theirs.quantize.state_dict())
    found, (latents, commitment, (_, _, indices)) = ours.quantize(h), quantizer(h)
    assert torch.equal(found.indices.flatten(), indices)
    torch.testing.assert_close(found.latents, latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.commitment.mean(), commitment, rtol=1e-5, atol=1e-5)


def assert_exchanged(kind: type[Autoencoder], config: dict, size: tuple[int, int], folder: Path) -> Autoencoder:
    """Saved by diffusers and loaded by us, saved by us and loaded by diffusers: the same outputs and configuration."""
    theirs = make_theirs(kind, config)
    theirs.save_pretrained(folder / "theirs")
    ours = load_autoencoder(folder / "theirs")
    assert type(ours) is kind
    assert {key: ours.config[key] for key in config} == config
    assert_equal_outputs(ours, theirs, size)
    ours.save_pretrained(folder / "ours")
    back, info = type(theirs).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_outputs(ours, back.eval(), size)
    assert public(back) == public(theirs)
    return ours


@pytest.mark.parametrize(("kind", "config", "size"), CASES)
def test_outputs_equal_diffusers_both_ways(kind: type[Autoencoder], config: dict, size: tuple[int, int], tmp_path: Path) -> None:
    assert_exchanged(kind, config, size, tmp_path)


@pytest.mark.parametrize(("kind", "config", "size", "counts"), PUBLISHED)
def test_published_configurations(kind: type[Autoencoder], config: dict, size: tuple[int, int], counts: tuple[int, int]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # hundreds of megabytes, which pytest would keep
        net = assert_exchanged(kind, config, size, Path(folder))
    assert (len(net.state_dict()), sum(p.numel() for p in net.parameters())) == counts


@st.composite
def configurations(draw: st.DrawFn) -> tuple[type[Autoencoder], dict]:
    groups, levels, kind = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.sampled_from([AutoencoderKL, VQModel]))
    few, either = st.integers(1, 3), st.booleans()
    config = {name: draw(few) for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block")}
    config["block_out_channels"] = draw(st.lists(few.map(lambda n: n * groups), min_size=levels, max_size=levels))
    config["attention"] = draw(st.none() | st.lists(either, min_size=levels, max_size=levels))
    config |= {"norm_num_groups": groups, "mid_block_add_attention": draw(either)}
    if kind is VQModel:
        return kind, config | {"num_vq_embeddings": draw(few), "vq_embed_dim": draw(st.none() | few)}
    return kind, config | {"use_quant_conv": draw(either), "use_post_quant_conv": draw(either)}


@settings(max_examples=25, deadline=None)
@given(configurations())
def test_any_configuration_has_diffusers_keys_shapes_and_types(drawn: tuple[type[Autoencoder], dict]) -> None:
    kind, config = drawn
    with torch.device("meta"):
        ours = kind(**config)
    theirs = make_theirs(kind, config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    written = kind.to_diffusers(ours.config)
    assert written == {key: public(theirs)[key] for key in written}
    assert kind.from_diffusers(public(theirs)) == ours.config


@pytest.mark.parametrize(
    ("kind", "config", "carried"),
    [
        (AutoencoderKL, TINY, {"scaling_factor": 0.13025, "shift_factor": 0.1}),
        (VQModel, TINY_VQ, {"scaling_factor": 0.3, "lookup_from_codebook": True}),
    ],
)
def test_saving_is_deterministic_and_carries_what_it_does_not_use(
    kind: type[Autoencoder], config: dict, carried: dict, tmp_path: Path
) -> None:
    theirs = make_theirs(kind, config)
    theirs.register_to_config(**carried)
    theirs.save_pretrained(tmp_path / "theirs")
    net = kind.from_pretrained(tmp_path / "theirs")
    net.save_pretrained(tmp_path / "a")
    net.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "b")
    kind.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    for name in ("config.json", WEIGHTS):
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abc"}) == 1
    written = json.loads((tmp_path / "a/config.json").read_text())
    assert carried.items() <= written.items()
    assert not any("version" in key for key in written)


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
        ({"norm_type": "spatial"}, "norm_type"),
        ({"down_block_types": ["DownEncoderBlock2D", "KDownBlock2D"]}, "KDownBlock2D"),
        ({"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types"),  # no mirror of the encoder
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


@pytest.mark.parametrize("found", ["AutoencoderTiny", None])
def test_autoencoders_of_another_class_are_refused(found: str | None, tmp_path: Path) -> None:
    AutoencoderKL(**TINY).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": found}))
    with pytest.raises(InputError, match=rf"config.json: _class_name is {found!r}; expected AutoencoderKL or VQModel"):
        load_autoencoder(tmp_path)


def test_attention_of_a_wrong_length_is_named() -> None:
    with pytest.raises(InputError, match=r"attention has 1 values for 2 of block_out_channels"):
        AutoencoderKL(**TINY, attention=[True])


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


@pytest.mark.parametrize("distances", [2**24, 100])  # all points at once, and part by part
def test_nearest_codes_against_brute_force(distances: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.nets.autoencoder.DISTANCES", distances)
    torch.manual_seed(0)
    book, h = Codebook(37, 3), torch.randn(2, 3, 5, 7)
    torch.nn.init.normal_(book.embedding.weight)
    points, codes = h.double().permute(0, 2, 3, 1).numpy(), book.embedding.weight.detach().double().numpy()
    expected = np.square(points[..., None, :] - codes).sum(-1).argmin(-1)  # (B, H, W)
    found = book(h)
    np.testing.assert_array_equal(found.indices.numpy(), expected)
    np.testing.assert_array_equal(found.latents.detach().permute(0, 2, 3, 1).numpy(), codes[expected].astype(np.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.nearest(h), found.indices)


def test_commitment_and_straight_through_gradients_in_closed_form() -> None:
    """Equation 3 of van den Oord et al. 2017: each of its terms moves its own side only."""
    torch.manual_seed(0)
    book, h = Codebook(6, 3).double(), torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(book.embedding.weight)
    found, weights = book(h), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    apart = h.detach() - found.latents.detach()
    torch.testing.assert_close(found.commitment, 1.25 * apart.square().mean((1, 2, 3)))
    ((found.latents * weights).sum() + found.commitment.sum()).backward()
    torch.testing.assert_close(h.grad, weights + 2 * 0.25 * apart / 60)  # as if quantisation were the identity
    expected = torch.zeros(6, 3, dtype=torch.float64)
    expected.index_add_(0, found.indices.flatten(), (-2 * apart / 60).permute(0, 2, 3, 1).flatten(0, 2))
    torch.testing.assert_close(book.embedding.weight.grad, expected)


def test_every_parameter_of_a_vq_model_learns() -> None:
    torch.manual_seed(0)
    net = VQModel(**TINY_VQ, attention=[True, False])
    x = torch.randn(2, 1, 8, 8)
    h = net.encode(x).mean
    ((net.decode(h) - x).square().mean() + net.quantize(h).commitment.mean()).backward()
    still = [n for n, p in net.named_parameters() if "to_k.bias" not in n and (p.grad is None or not p.grad.any())]
    assert not still
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_public_names_are_importable() -> None:
    assert (ldm.nets.VQModel, ldm.nets.load_autoencoder) == (VQModel, load_autoencoder)


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
