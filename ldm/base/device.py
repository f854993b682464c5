"""Where to compute: environment, not a setting, because it does not change what is meant."""

import ctypes
import os

import torch

from ldm.base.errors import InputError


def default_device() -> torch.device:
    """`LDM_DEVICE` where it is set, else a GPU where there is one, else the CPU."""
    name = os.environ.get("LDM_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"LDM_DEVICE {name}: not usable here ({str(error).splitlines()[0]}); use cpu, or unset it") from None
    return torch.device(name)


def set_up(deterministic: bool) -> torch.device:
    """The device of a stage, with deterministic kernels if asked for."""
    # `use_deterministic_algorithms` does the same and imports the compiler, which takes longer than importing torch
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: bounds and latents are compared to more than 10 bits
    torch.set_float32_matmul_precision("highest")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = default_device()
    if device.type == "cpu":
        reuse_freed_memory()
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return device


def reuse_freed_memory() -> None:
    """Keep what is freed for the next allocation. By default, glibc returns large blocks, and the kernel clears them again."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
