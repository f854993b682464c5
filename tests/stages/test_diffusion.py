"""Stages with a diffusion model other than the default one."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from blobs import make_project, run_stages
from safetensors.torch import load_file
from tiny import set_params

from ldm.base.options import value_at
from ldm.model import LatentDiffusion
from ldm.nets.unet import UNet

CHOICES: dict[str, dict[str, Any]] = {
    "flow": {
        "backbone": {"attention": ["self", "cross"], "qk_norm": True, "transformer_layers_per_block": 2},
        "diffusion": {"prediction": "flow", "noise": {"kind": "logitnormal", "shift": 2.0, "sigma_max": 200.0}},
        "train_unet": {"loss_weight": {"kind": "learned"}},
        "sampling": {
            "sampler": {"kind": "heun", "churn": 1.0}, "schedule": "uniform", "guidance": 2.0, "guidance_interval": [0.1, 10.0],
        },
    },
    "zero-terminal v": {
        "diffusion": {"prediction": "v", "noise": {"kind": "scaled_linear", "zero_terminal_snr": True}},
        "train_unet": {"loss_weight": {"kind": "min_snr"}},
        "sampling": {"sampler": {"kind": "ddim", "eta": 0.5}, "schedule": "uniform", "guidance_rescale": 0.7},
    },
    "edm": {
        "diffusion": {"prediction": "edm", "noise": {"kind": "lognormal"}},
        "sampling": {"sampler": {"kind": "langevin", "step": 0.2}, "schedule": "exponential"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Path:
    root = make_project(tmp_path_factory.mktemp("diffusion"), {"train_vae": {"images": 128}})
    run_stages(root, "train_vae", "cache_latents")
    return root


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_goes_from_settings_to_the_saved_system(name, encoded, tmp_path):
    root, chosen = Path(shutil.copytree(encoded, tmp_path / "project")), CHOICES[name]
    set_params(root, chosen)
    run_stages(root, "train_unet", "evaluate")
    metrics = json.loads((root / "reports/metrics.json").read_text())
    assert all(math.isfinite(metrics[key]) for key in ("nats", "bits_per_dim", "fd"))
    model = LatentDiffusion.load(root / "models/ldm")
    recipe = vars(model.recipe)
    assert recipe["diffusion"]["prediction"] == chosen["diffusion"]["prediction"]
    for choice in ("diffusion.noise", "sampling.sampler"):
        assert value_at(chosen, choice).items() <= value_at(recipe, choice).items()
    plain = chosen["sampling"].keys() - {"sampler"}
    assert {key: recipe["sampling"][key] for key in plain} == {key: chosen["sampling"][key] for key in plain}
    assert {key: model.unet.config[key] for key in chosen.get("backbone", {})} == chosen.get("backbone", {})
    assert model.levels.sigma_max == pytest.approx(chosen["diffusion"]["noise"].get("sigma_max", 80.0), rel=0.2)
    weights = load_file(root / "models/unet/diffusion_pytorch_model.safetensors")
    assert weights.keys() == UNet(**model.unet.config).state_dict().keys()  # nothing of what only training needs
    own, spelled_out = model.sample(["a blob"] * 2, seed=1), model.sample(["a blob"] * 2, seed=1, **recipe["sampling"])
    assert torch.equal(own, spelled_out)
    curve = pd.read_csv(root / "reports/curves/train_unet.csv")
    weighted = "loss_weight" in chosen.get("train_unet", {})
    assert ("mse" in curve) == weighted
    unweighted = curve["mse" if weighted else "loss"]
    quarters = curve[[f"loss_noise_q{i}" for i in range(1, 5)]]
    assert quarters.mean(axis=1).to_numpy() == pytest.approx(unweighted.to_numpy(), rel=0.02)  # equally often drawn
    assert (root / "reports/plots/train_unet_noise.png").is_file()
