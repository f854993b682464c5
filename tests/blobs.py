"""A project of small pictures of blobs, whose stages run in this process, in seconds."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tiny import REPOSITORY, metrics, set_params

SIZE = 16
SMALL: dict[str, Any] = {
    "data": {"path": "images", "image_size": SIZE, "resize_filter": "box", "val_fraction": 0.2, "test_fraction": 0.2},
    "text": {"max_tokens": 6},
    "autoencoder": {"latent_channels": 2, "block_out_channels": [8, 16], "norm_num_groups": 4},
    "train_vae": {
        "images": 512,
        "batch_size": 32,
        "warmup_images": 64,
        "ema_halflife_images": 100,
        "likelihood": {"kind": "discretized_logistic", "log_scale": -2.0},
    },
    "backbone": {"block_out_channels": [8, 16], "num_heads": 2, "norm_num_groups": 4},
    "train_unet": {"images": 64, "batch_size": 32, "warmup_images": 0},
    "sampling": {"steps": 2},
    "evaluate": {"samples": 8, "bound_levels": 2, "importance_samples": 2, "metrics": metrics(4)},
}


def draw_blobs(folder: Path, count: int, seed: int, binary: bool = False) -> None:
    """Captioned grey images of a soft blob each; of the values 0 and 255 alone where they are to be binary."""
    folder.mkdir(parents=True)
    random, places = np.random.default_rng(seed), np.arange(SIZE)
    names = [f"{number:03d}.png" for number in range(count)]
    for name in names:
        x, y, width = random.uniform(4, 12), random.uniform(4, 12), random.uniform(2, 4)
        blob = 255 * np.exp(-((places - x) ** 2 + (places[:, None] - y) ** 2) / (2 * width**2))
        Image.fromarray((255 * (blob > 127) if binary else blob).astype(np.uint8)).save(folder / name)
    pd.DataFrame({"file_name": names, "text": "a blob"}).to_csv(folder / "metadata.csv", index=False)


def make_project(root: Path, changes: dict[str, Any], binary: bool = False) -> Path:
    """A project of 160 blobs, sharded."""
    draw_blobs(root / "images/first", 160, seed=0, binary=binary)
    return shard_blobs(root, changes)


def shard_blobs(root: Path, changes: dict[str, Any]) -> Path:
    """Make a project of the blobs in `root`, and shard them."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, root)
    set_params(root, SMALL)
    set_params(root, changes)
    run_stages(root, "code", "shard", "pretrained")
    return root


def run_stages(root: Path, *names: str) -> None:
    """As `python -m ldm.stages.NAME` in the project's folder would, but for what that does to a process; "NAME ARGUMENT", too."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        for name in names:
            stage, *arguments = name.split()
            importlib.import_module(f"ldm.stages.{stage}").run(root, *arguments)
    finally:
        torch.use_deterministic_algorithms(deterministic)
