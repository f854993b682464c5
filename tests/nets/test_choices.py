"""The networks that settings can name: what is built, and what a folder of weights is loaded as."""

from pathlib import Path

import pytest
import torch

from ldm.base.errors import InputError
from ldm.nets.autoencoder import AutoencoderKL, VQModel
from ldm.nets.backbone import UNetBackbone, load_backbone
from ldm.nets.regulariser import Kl, Vq
from ldm.nets.unet import UNet

UNET = UNetBackbone(block_out_channels=(8, 16), attention=("none", "cross"), num_heads=2, norm_num_groups=4, qk_norm=True)
SHAPE = {"in_channels": 1, "out_channels": 2, "latent_channels": 3, "block_out_channels": [8, 16], "norm_num_groups": 4}


def test_a_unet_is_built_for_latents_and_a_text_and_comes_back_from_its_folder(tmp_path: Path) -> None:
    net = UNET.build(3, 5).eval()
    assert type(net) is UNet
    options = UNET.model_dump(mode="json", exclude={"kind"})
    assert {**options, "in_channels": 3, "out_channels": 3, "cross_attention_dim": 5}.items() <= net.config.items()
    net.save_pretrained(tmp_path)
    again = load_backbone(tmp_path).eval()
    given = torch.randn(2, 3, 4, 4), torch.tensor([1.0, 9.0]), torch.randn(2, 6, 5)
    with torch.no_grad():
        assert torch.equal(again(*given), net(*given))


def test_a_folder_of_another_network_is_named(tmp_path: Path) -> None:
    Kl().build(**SHAPE).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"config\.json: _class_name is 'AutoencoderKL'; expected UNet2DConditionModel$"):
        load_backbone(tmp_path)


def test_latents_that_cannot_be_halved_are_refused() -> None:
    UNET.check(6)
    with pytest.raises(ValueError, match=r"latents of side 5 are no multiple of 2, as needed by backbone\.block_out_channels"):
        UNET.check(5)


def test_a_regulariser_builds_its_autoencoder() -> None:
    assert type(Kl(beta=0.5).build(**SHAPE)) is AutoencoderKL
    vq = Vq(num_vq_embeddings=7).build(**SHAPE)
    assert type(vq) is VQModel
    assert vq.quantize.embedding.weight.shape == (7, 3)
