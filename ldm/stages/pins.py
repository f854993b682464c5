"""Whether the models that the settings pin are what the other settings describe: asked before a run, without their weights."""

import shutil
import tempfile
from pathlib import Path

import torch

from ldm.config import Settings
from ldm.diffusion.options import read_recipe
from ldm.nets.autoencoder import load_autoencoder
from ldm.stages.checks import check_initial
from ldm.stages.pretrained import part_of_model
from ldm.stages.train_vae import build, check_same


def check_pins(root: Path, settings: Settings) -> None:
    """Raise an `InputError` if stages would refuse the version in `autoencoder.pretrained`, or the model in `train_unet.init`.

    What only a stage can know, such as the hash of an autoencoder that is yet to be trained, is left to it.
    """
    pretrained, init, autoencoder = settings.autoencoder.pretrained or "", settings.train_unet.init, None
    if pretrained.startswith("models:/"):
        with part_of_model(root, pretrained, "autoencoder/config.json") as file, torch.device("meta"):
            check_same(build(settings)[0], load_autoencoder(file.parent, shape_only=True), pretrained)
        with part_of_model(root, pretrained, "model.json") as file:
            autoencoder = read_recipe(file.parent).autoencoder
    if init:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("model.json", "unet/config.json"):
                with part_of_model(root, init, name) as file:
                    copy = Path(folder) / name
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, copy)
            check_initial(root, settings, Path(folder), pretrained=autoencoder)
