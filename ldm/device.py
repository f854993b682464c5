"""Where to compute: environment, not a setting, because it does not change what is meant."""

import os

import torch


def default_device() -> torch.device:
    """`LDM_DEVICE` where it is set, else a GPU where there is one, else the CPU."""
    return torch.device(os.environ.get("LDM_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
