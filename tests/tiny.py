"""A project as a fresh clone would have it, with settings so small that its whole pipeline runs in seconds."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]


def refused(arguments: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """`ldm` with arguments that it refuses: prints the reason, and whether torch was imported by then."""
    code = f"""
import sys, ldm.cli
try:
    ldm.cli.app({arguments}, standalone_mode=False)
except ldm.cli.InputError as error:
    print(error, 'torch' in sys.modules)
"""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)


def metrics(dim: int) -> list[dict[str, Any]]:
    """All metrics, distances in a feature space of so many dimensions."""
    distances = [{"kind": kind, "features": {"kind": "pca", "dim": dim}} for kind in ("frechet", "kernel")]
    return [*distances, *({"kind": kind} for kind in ("psnr", "prompt_accuracy", "variance_ratio", "latents"))]


TINY: dict[str, dict[str, Any]] = {
    "autoencoder": {"block_out_channels": [8, 8, 16]},
    "train_vae": {"images": 512, "batch_size": 32, "checkpoint_images": 256},
    "backbone": {"block_out_channels": [16, 16], "num_heads": 2},
    "train_unet": {"images": 512, "batch_size": 64, "checkpoint_images": 256},
    "sampling": {"steps": 2},
    "evaluate": {"samples": 40, "unseen_samples": 40, "bound_levels": 2, "importance_samples": 2, "metrics": metrics(8)},
}


def set_params(root: Path, changes: dict[str, Any]) -> None:
    """Change settings in `root/params.yaml`; nested sections are merged."""
    path = root / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for name, value in changes.items():
        params[name] = {**params[name], **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def clone(to: Path) -> Path:
    """The repository's files as git sees them (tracked, and new ones it does not ignore), committed in a new repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, to / name)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "clone"]):
        subprocess.run(["git", *command], cwd=to, check=True)
    return to


def environment(**extra: str) -> dict[str, str]:
    """Of a shell with this interpreter's environment active, offline, and with nothing of the user's own set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_", "LDM_", "DVC_", "PYTHONPATH"))}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
    return {**kept, **quiet, **extra}


def with_soak(few: int, many: int) -> list[Any]:
    """Seeds of a loop: the first `few` in `make test`, the rest up to `many` in `make soak`."""
    return [*range(few), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(few, many))]


@contextlib.contextmanager
def careless_numerics() -> Iterator[Callable[[], dict[str, Any]]]:
    """A process that computes fast and inexactly; yields a function that reads how it computes at that moment."""
    import torch

    cudnn = torch.backends.cudnn

    def read() -> dict[str, Any]:
        deterministic, precision = torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision()
        return {"tf32": cudnn.allow_tf32, "benchmark": cudnn.benchmark, "precision": precision, "deterministic": deterministic}

    def write(tf32: bool, benchmark: bool, precision: str, deterministic: int) -> None:
        cudnn.allow_tf32, cudnn.benchmark = tf32, benchmark
        torch.set_float32_matmul_precision(precision)
        torch.set_deterministic_debug_mode(deterministic)

    before = read()
    write(True, True, "high", 0)
    try:
        yield read
    finally:
        write(**before)


def exact(deterministic: bool) -> dict[str, Any]:
    """What `careless_numerics` reads where a stage computes."""
    return {"tf32": False, "benchmark": not deterministic, "precision": "highest", "deterministic": 2 * deterministic}
