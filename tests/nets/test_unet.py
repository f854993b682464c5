"""The U-Net beside diffusers' own."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel as Theirs
from safetensors.torch import load_file, save_file

from ldm.errors import InputError
from ldm.nets.unet import UNet, timestep_features

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 2,
    "cross_attention": [False, True],
    "cross_attention_dim": 12,
    "num_heads": 2,
    "norm_num_groups": 4,
}
ODD = {
    "in_channels": 3,
    "out_channels": 5,
    "block_out_channels": [9, 18, 36],
    "layers_per_block": 1,
    "cross_attention": [True, False, True],
    "cross_attention_dim": 7,
    "num_heads": [3, 2, 9],
    "norm_num_groups": 3,
    "use_linear_projection": True,
    "transformer_layers_per_block": 2,
}
DEEP = TINY | {"block_out_channels": [8, 8, 16, 16], "cross_attention": [True, True, False, False]}
SD15 = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention": [True, True, True, False],
    "cross_attention_dim": 768,
    "num_heads": 8,
}
SD21 = SD15 | {"cross_attention_dim": 1024, "num_heads": [5, 10, 20, 20], "use_linear_projection": True}


def make_theirs(config: dict) -> Theirs:
    rest = {key: value for key, value in config.items() if key not in ("cross_attention", "num_heads")}
    attends = config["cross_attention"]
    torch.manual_seed(0)
    net = Theirs(
        **rest,
        attention_head_dim=config["num_heads"],
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
    )
    for name, value in net.named_parameters():  # random scales and biases too, so that no swapped key goes unnoticed
        if value.dim() == 1:
            torch.nn.init.normal_(value, mean=float(name.endswith("weight")), std=0.2)
    return net.eval()


def inputs(config: dict, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(3, config["in_channels"], *size, generator=random)
    context = torch.randn(3, 5, config["cross_attention_dim"], generator=random)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])  # the last one masked throughout
    return x, torch.tensor([0.0, 17.25, 998.7]), context, mask


def public(net: Theirs) -> dict:
    """diffusers' configuration without its notes to itself."""
    return {key: value for key, value in json.loads(net.to_json_string()).items() if not key.startswith("_")}


def assert_equal_outputs(ours: UNet, theirs: Theirs, size: tuple[int, int]) -> None:
    x, timesteps, context, mask = inputs(ours.config, size)
    with torch.no_grad():
        plain = ours(x, timesteps, context)
        torch.testing.assert_close(plain, theirs(x, timesteps, context).sample, rtol=1e-5, atol=1e-5)
        masked = ours(x, timesteps, context, mask)
        expected = theirs(x, timesteps, context, encoder_attention_mask=mask).sample
        torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-5)
        assert (masked - plain)[1].abs().max() > 1e-4
        nhwc = ours.to(memory_format=torch.channels_last)(x, timesteps, context, mask)
        torch.testing.assert_close(nhwc, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        pytest.param(TINY, (8, 8), id="tiny"),
        pytest.param(TINY | {"use_linear_projection": True}, (7, 5), id="linear"),
        pytest.param(ODD, (6, 10), id="odd"),
        pytest.param(DEEP, (9, 13), id="deep"),
    ],
)
def test_outputs_equal_diffusers_both_ways(config: dict, size: tuple[int, int], tmp_path: Path) -> None:
    theirs = make_theirs(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet.from_pretrained(tmp_path / "theirs")
    assert {key: ours.config[key] for key in config} == config
    assert_equal_outputs(ours, theirs, size)
    ours.save_pretrained(tmp_path / "ours")
    back, info = Theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_outputs(ours, back.eval(), size)
    assert public(back) == public(theirs)


def test_gradients_equal_diffusers(tmp_path: Path) -> None:
    theirs = make_theirs(TINY)
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    x, timesteps, context, mask = inputs(TINY, (6, 8))
    ours(x, timesteps, context, mask).square().mean().backward()
    theirs(x, timesteps, context, encoder_attention_mask=mask).sample.square().mean().backward()
    expected = {name: value.grad for name, value in theirs.named_parameters()}
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("config", "count"), [(SD15, 859_520_964), (SD21, 865_910_724)], ids=["sd1.5", "sd2.1"])
def test_stable_diffusion_keys_and_shapes(config: dict, count: int) -> None:
    with torch.device("meta"):
        ours, theirs = UNet(**config), make_theirs(config)
        out = ours(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, config["cross_attention_dim"]))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert (len(ours.state_dict()), sum(p.numel() for p in ours.parameters())) == (686, count)
    assert out.shape == (1, 4, 64, 64)


def test_published_configurations_are_read(tmp_path: Path) -> None:
    """A configuration as an old diffusers wrote it: few keys, the rest at their defaults, some that change nothing."""
    net = UNet(**TINY | {"cross_attention": [True, True], "layers_per_block": 2, "num_heads": 8})
    net.save_pretrained(tmp_path)
    old = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [8, 16],
        "cross_attention_dim": 12,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "norm_num_groups": 4,
        "sample_size": 64,
        "upcast_attention": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    ours = UNet.from_pretrained(tmp_path)
    assert ours.config == net.config
    assert ours.carried == {"sample_size": 64, "upcast_attention": True}


def test_removed_and_added_keys_are_named(tmp_path: Path) -> None:
    UNet(**TINY).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    save_file({k: v for k, v in state.items() if k != key}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=f"misses key {key}"):
        UNet.from_pretrained(tmp_path)
    save_file(state | {"class_embedding.weight": torch.zeros(3)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"unexpected key class_embedding\.weight"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}, "up_block_types"),
        ({"attention_head_dim": [1, 2, 4]}, "num_heads"),
        ({"attention_head_dim": 3}, "num_heads"),
        ({"block_out_channels": [8, 16, 16]}, "cross_attention"),
        ({"cross_attention_dim": [12, 12]}, "config.json"),
        ({"layers_per_block": [2, 2]}, "config.json"),
    ],
)
def test_unsupported_configurations_are_named(change: dict, named: str, tmp_path: Path) -> None:
    UNet(**TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=named):
        UNet.from_pretrained(tmp_path)


def test_config_rebuilds_the_network_and_saving_is_deterministic(tmp_path: Path) -> None:
    net = UNet(**ODD | {"block_out_channels": tuple(ODD["block_out_channels"])})
    assert net.config == ODD
    again = UNet(**net.config)
    again.load_state_dict(net.state_dict())
    net.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_timestep_features_are_cosines_then_sines() -> None:
    features = timestep_features(torch.tensor([2.5]), 5)
    second = 2.5 / 100  # 10000^(-1/2)
    expected = torch.tensor([[2.5, second]]).cos().tolist()[0] + torch.tensor([[2.5, second]]).sin().tolist()[0] + [0.0]
    torch.testing.assert_close(features, torch.tensor([expected]))


def test_a_masked_token_has_no_influence() -> None:
    torch.manual_seed(0)
    net = UNet(**TINY)
    x, timesteps, context, mask = inputs(TINY, (4, 4))
    changed = context.masked_fill(~mask[..., None], 9.0)
    with torch.no_grad():
        difference = net(x, timesteps, context, mask) - net(x, timesteps, changed, mask)
    assert difference[:2].abs().max() == 0
