"""Where to compute: environment, not a setting, because it does not change what is meant."""

import os

import torch

from ldm.errors import InputError


def default_device() -> torch.device:
    """`LDM_DEVICE` where it is set, else a GPU where there is one, else the CPU."""
    name = os.environ.get("LDM_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"LDM_DEVICE {name}: not usable here ({reason}); use cpu, or unset it") from None
    return torch.device(name)
