"""The U-Nets beside diffusers' own."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention as TheirAttention
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.base.errors import InputError
from ldm.nets.blocks import Attention, ImageAttention
from ldm.nets.unet import UnconditionalUNet, UNet, timestep_features

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 2,
    "attention": ["none", "cross"],
    "cross_attention_dim": 12,
    "num_heads": 2,
    "norm_num_groups": 4,
}
ODD = {
    "in_channels": 3,
    "out_channels": 5,
    "block_out_channels": [9, 18, 36],
    "layers_per_block": 1,
    "attention": ["cross", "none", "cross"],
    "cross_attention_dim": 7,
    "num_heads": [3, 2, 9],
    "norm_num_groups": 3,
    "use_linear_projection": True,
    "transformer_layers_per_block": 2,
}
DEEP = TINY | {"block_out_channels": [8, 8, 16, 16], "attention": ["cross", "cross", "none", "none"]}
SELF = TINY | {"attention": ["self", "cross"], "num_heads": [4, 2]}  # diffusers: 2 channels a head, and 2 heads
SELVES = TINY | {"block_out_channels": [8, 16, 16, 16], "attention": ["none", "self", "self", "cross"], "num_heads": [2, 4, 4, 8]}
INNERMOST = TINY | {"attention": ["none", "self"], "num_heads": 4}  # 4 heads of 4 channels, and 4 in the middle
INPAINTING = TINY | {"in_channels": 9, "num_class_embeds": 3}
SD15 = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention": ["cross", "cross", "cross", "none"],
    "cross_attention_dim": 768,
    "num_heads": 8,
}
SD21 = SD15 | {"cross_attention_dim": 1024, "num_heads": [5, 10, 20, 20], "use_linear_projection": True}
IMAGES = {
    "in_channels": 3,
    "out_channels": 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 2,
    "attention": ["none", "self"],
    "cross_attention_dim": None,
    "num_heads": [1, 4],
    "norm_num_groups": 4,
}
CELEBA = IMAGES | {  # the latent diffusion paper's, of CelebA-HQ
    "out_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "attention": ["none", "self", "self", "self"],
    "num_heads": [1, 14, 21, 28],
    "norm_num_groups": 32,
}
NAMES = {"none": "", "self": "Attn", "cross": "CrossAttn"}
Theirs = UNet2DConditionModel | UNet2DModel


def make_theirs(config: dict, head_dim: int | list[int] | None = None) -> Theirs:
    """diffusers' network, with `head_dim` (by default: `num_heads`) as its `attention_head_dim`."""
    kinds = config["attention"]
    rest = {key: value for key, value in config.items() if key not in ("attention", "num_heads")}
    rest |= {
        "attention_head_dim": head_dim or config["num_heads"],
        "down_block_types": tuple(f"{NAMES[kind]}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{NAMES[kind]}UpBlock2D" for kind in reversed(kinds)),
    }
    if config["cross_attention_dim"] is None:
        rest |= {"attention_head_dim": head_dim}
        del rest["cross_attention_dim"]
    torch.manual_seed(0)
    net = (UNet2DConditionModel if config["cross_attention_dim"] else UNet2DModel)(**rest)
    for name, value in net.named_parameters():  # random scales and biases too, so that no swapped key goes unnoticed
        if value.dim() == 1:
            torch.nn.init.normal_(value, mean=float(name.endswith("weight")), std=0.2)
    return net.eval()


def inputs(config: dict, size: tuple[int, int]) -> dict[str, Tensor]:
    """What `config` has inputs for; where there are more channels in than out, the rest is `concat`."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(3, config["in_channels"], *size, generator=random)
    given = {"x": x, "timesteps": torch.tensor([0.0, 17.25, 998.7])}
    if config["in_channels"] > config["out_channels"]:
        given |= {"x": x[:, : config["out_channels"]], "concat": x[:, config["out_channels"] :]}
    if config["cross_attention_dim"]:
        mask = torch.arange(5) < torch.tensor([[5], [2], [0]])  # the last one masked throughout
        given |= {"context": torch.randn(3, 5, config["cross_attention_dim"], generator=random), "context_mask": mask}
    if config.get("num_class_embeds"):
        given |= {"class_labels": torch.tensor([2, 0, 2])}
    return given


def expected(theirs: Theirs, given: dict[str, Tensor]) -> Tensor:
    """What diffusers computes of the same."""
    names = {"context": "encoder_hidden_states", "context_mask": "encoder_attention_mask", "class_labels": "class_labels"}
    sample = torch.cat([given[name] for name in ("x", "concat") if name in given], dim=1)
    return theirs(sample, given["timesteps"], **{names[key]: given[key] for key in names if key in given}).sample


def public(net: Theirs) -> dict:
    """diffusers' configuration without its notes to itself."""
    return {key: value for key, value in json.loads(net.to_json_string()).items() if not key.startswith("_")}


def assert_equal_outputs(ours: UNet, theirs: Theirs, size: tuple[int, int]) -> None:
    given = inputs(ours.config, size)
    with torch.no_grad():
        outputs = ours(**given)
        torch.testing.assert_close(outputs, expected(theirs, given), rtol=1e-5, atol=1e-5)
        nhwc = ours.to(memory_format=torch.channels_last)(**given)
        torch.testing.assert_close(nhwc, outputs, rtol=1e-5, atol=1e-5)
        if given.pop("context_mask", None) is not None:
            plain = ours(**given)
            torch.testing.assert_close(plain, expected(theirs, given), rtol=1e-5, atol=1e-5)
            assert (outputs - plain)[1].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("config", "head_dim", "size"),
    [
        pytest.param(TINY, None, (8, 8), id="tiny"),
        pytest.param(TINY | {"use_linear_projection": True}, None, (7, 5), id="linear"),
        pytest.param(ODD, None, (6, 10), id="odd"),
        pytest.param(DEEP, None, (9, 13), id="deep"),
        pytest.param(SELF, 2, (7, 5), id="self"),
        pytest.param(SELVES, [2, 4, 4, 8], (8, 16), id="selves"),
        pytest.param(INNERMOST, 4, (4, 6), id="innermost"),
        pytest.param(INPAINTING, None, (7, 5), id="inpainting-classes"),
        pytest.param(IMAGES, 4, (6, 8), id="unconditional"),
        pytest.param(
            IMAGES | {"attention": ["self", "none"], "num_heads": 1, "num_class_embeds": 3}, None, (4, 6), id="one-head"
        ),
        pytest.param(IMAGES | {"attention": ["self", "self"], "num_heads": [2, 4]}, 4, (4, 6), id="unconditional-selves"),
    ],
)
def test_outputs_equal_diffusers_both_ways(
    config: dict, head_dim: int | list[int] | None, size: tuple[int, int], tmp_path: Path
) -> None:
    theirs, kind = make_theirs(config, head_dim), UNet if config["cross_attention_dim"] else UnconditionalUNet
    theirs.save_pretrained(tmp_path / "theirs")
    ours = kind.from_pretrained(tmp_path / "theirs")
    assert {key: ours.config[key] for key in config} == config
    assert_equal_outputs(ours, theirs, size)
    ours.save_pretrained(tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_outputs(ours, back.eval(), size)
    assert public(back) == public(theirs)


@pytest.mark.parametrize(
    ("config", "head_dim"), [(TINY, None), (SELF | {"num_class_embeds": 3, "in_channels": 6}, 2), (IMAGES, 4)]
)
def test_gradients_equal_diffusers(config: dict, head_dim: int | None, tmp_path: Path) -> None:
    theirs = make_theirs(config, head_dim)
    theirs.save_pretrained(tmp_path)
    ours = (UNet if config["cross_attention_dim"] else UnconditionalUNet).from_pretrained(tmp_path)
    given = inputs(config, (6, 8))
    ours(**given).square().mean().backward()
    expected(theirs, given).square().mean().backward()
    gradients = {name: value.grad for name, value in theirs.named_parameters()}
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("config", "head_dim", "keys", "count"),
    [(SD15, None, 686, 859_520_964), (SD21, None, 686, 865_910_724), (CELEBA, 32, 432, 274_056_163)],
    ids=["sd1.5", "sd2.1", "ldm-celebahq-256"],
)
def test_published_keys_and_shapes(config: dict, head_dim: int | None, keys: int, count: int) -> None:
    width = config["cross_attention_dim"]
    with torch.device("meta"):
        ours, theirs = (UNet if width else UnconditionalUNet)(**config), make_theirs(config, head_dim)
        out = ours(torch.empty(1, config["in_channels"], 64, 64), torch.empty(1), torch.empty(1, 77, width) if width else None)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert (len(ours.state_dict()), sum(p.numel() for p in ours.parameters())) == (keys, count)
    assert out.shape == (1, config["out_channels"], 64, 64)


def test_published_configurations_are_read(tmp_path: Path) -> None:
    """A configuration as an old diffusers wrote it: few keys, the rest at their defaults, some that change nothing."""
    net = UNet(**TINY | {"attention": ["cross", "cross"], "layers_per_block": 2, "num_heads": 8})
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
    with pytest.raises(InputError, match=f"Missing key.*{key}"):
        UNet.from_pretrained(tmp_path)
    save_file(state | {"class_embedding.weight": torch.zeros(3)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"Unexpected key.*class_embedding\.weight"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"num_class_embeds": 10}, "Missing key.*class_embedding.weight"),
        ({"down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}, "up_block_types"),
        ({"down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": [4, 2]}, "attention_head_dim"),
        ({"down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": 3}, "attention_head_dim"),
        ({"transformer_layers_per_block": [1, 2, 1]}, "transformer_layers_per_block"),
        ({"attention_head_dim": [1, 2, 4]}, "attention_head_dim has 3"),
        ({"attention_head_dim": 3}, "num_heads"),
        ({"block_out_channels": [8, 16, 16]}, "down_block_types has 2 values for 3"),
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
    assert net.config == ODD | {"num_class_embeds": None, "qk_norm": False}
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
    given = inputs(TINY, (4, 4))
    changed = given["context"].masked_fill(~given["context_mask"][..., None], 9.0)
    with torch.no_grad():
        difference = net(**given) - net(**given | {"context": changed})
    assert difference[:2].abs().max() == 0


@pytest.mark.parametrize("context_channels", [None, 7])
def test_qk_norm_equals_diffusers_attention(context_channels: int | None) -> None:
    torch.manual_seed(0)
    options = {"cross_attention_dim": context_channels, "heads": 3, "dim_head": 4, "bias": False, "qk_norm": "rms_norm"}
    theirs = TheirAttention(12, **options)
    for norm in (theirs.norm_q, theirs.norm_k):
        torch.nn.init.normal_(norm.weight)
    ours = Attention(12, 3, context_channels, qk_norm=True)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(2, 5, 12)
    context = None if context_channels is None else torch.randn(2, 4, context_channels)
    torch.testing.assert_close(ours(tokens, context), theirs(tokens, context), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "kind", "change"),
    [
        pytest.param(TINY, UNet, {"qk_norm": True, "attention": ["self", "cross"]}, id="qk_norm"),
        pytest.param(TINY, UNet, {"attention": ["self", "cross"]}, id="self-cross"),
        pytest.param(TINY, UNet, {"attention": ["none", "self"]}, id="innermost-self"),
        pytest.param(IMAGES, UnconditionalUNet, {"qk_norm": True}, id="unconditional-qk_norm"),
        pytest.param(IMAGES, UnconditionalUNet, {"attention": ["self", "self"], "num_heads": 2}, id="unconditional-widths"),
    ],
)
def test_what_diffusers_cannot_compute_it_refuses_to_open(config: dict, kind: type[UNet], change: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = kind(**config | change)
    for name, value in net.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            torch.nn.init.normal_(value)
    net.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    given = inputs(net.config, (4, 6))
    assert again.config == net.config
    assert torch.equal(again(**given), net(**given))
    theirs = UNet2DConditionModel if kind is UNet else UNet2DModel
    with pytest.raises((TypeError, ValueError)):
        theirs.from_pretrained(tmp_path)


def test_qk_norm_bounds_the_logits() -> None:
    """Queries and keys a thousand times as large give the same attention."""
    torch.manual_seed(0)
    layer, x = ImageAttention(8, 4, 1e-5, heads=2, qk_norm=True), torch.randn(2, 8, 3, 3)
    with torch.no_grad():
        before = layer(x)
        for linear in (layer.to_q, layer.to_k):
            linear.weight *= 1e3
            linear.bias *= 1e3
        torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-4)


def test_checkpointing_gives_the_same_gradients_with_every_option() -> None:
    torch.manual_seed(0)
    config = TINY | {"attention": ["self", "cross"], "in_channels": 6, "num_class_embeds": 3, "qk_norm": True}
    net, given = UNet(**config), inputs(config, (6, 5))
    gradients = []
    for checkpointing in (False, True):
        net.set_gradient_checkpointing(checkpointing)
        net.zero_grad()
        net(**given).square().mean().backward()
        gradients.append({name: value.grad for name, value in net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 or "to_k.bias" in name, name  # a key's bias moves all logits of a query alike
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (TINY | {"num_class_embeds": 3}, {"class_labels": None}, "class_labels is missing.*num_class_embeds is 3"),
        (TINY, {"class_labels": torch.tensor([0, 1, 2])}, "class_labels is given.*num_class_embeds is None"),
        (TINY, {"context": None}, "context is missing.*cross_attention_dim is 12"),
        (IMAGES, {"context": torch.zeros(3, 5, 12)}, "context is given"),
        (TINY | {"in_channels": 6}, {"concat": None}, "4 channels, expected 6"),
        (TINY, {"concat": torch.zeros(3, 1, 4, 4)}, "5 channels, expected 4"),
    ],
)
def test_missing_and_unexpected_inputs_are_named(config: dict, change: dict, named: str) -> None:
    net = (UNet if config["cross_attention_dim"] else UnconditionalUNet)(**config)
    with pytest.raises(InputError, match=named):
        net(**inputs(config, (4, 4)) | change)


@pytest.mark.parametrize(
    ("kind", "config", "named"),
    [
        (UNet, TINY | {"attention": ["none", "image"]}, "attention has 'image'"),
        (UNet, TINY | {"attention": ["cross"]}, "attention has 1 values for 2"),
        (UNet, TINY | {"cross_attention_dim": None}, "cross_attention_dim is missing"),
        (UnconditionalUNet, TINY, "UnconditionalUNet reads no text"),
        (UnconditionalUNet, IMAGES | {"cross_attention_dim": 4}, "UnconditionalUNet reads no text"),
        (UnconditionalUNet, IMAGES | {"num_heads": [1, 3]}, "16 is not a multiple of num_heads = 3"),
    ],
)
def test_impossible_arguments_are_named(kind: type[UNet], config: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        kind(**config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("freq_shift", 1), ("norm_eps", 1e-6), ("downsample_padding", 0), ("center_input_sample", True), ("attention_head_dim", 3)],
)
def test_unsupported_unconditional_configurations_are_named(key: str, value: float, tmp_path: Path) -> None:
    UnconditionalUNet(**IMAGES).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{key} = {value}"):
        UnconditionalUNet.from_pretrained(tmp_path)
