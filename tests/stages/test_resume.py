"""The real training stages, killed between two checkpoints and run again: the same outs, byte for byte."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY, clone, environment, set_params, with_soak

OUTS = {
    "train_vae": ("models/autoencoder", "reports/curves/train_vae.csv"),
    "train_unet": ("models/unet", "models/unet_raw", "reports/curves/train_unet.csv"),
}


def start(root: Path, stage: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", f"ldm.stages.{stage}"], cwd=root, env=environment())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A project whose training nobody disturbed, with checkpoints that leave much to redo."""
    root = clone(tmp_path_factory.mktemp("undisturbed") / "project")
    set_params(root, TINY)
    lengths = {"images": 1536, "batch_size": 32, "checkpoint_images": 512}
    set_params(root, {"train_vae": lengths, "train_unet": lengths})
    for stage in ("source", "shard", "train_vae", "cache_latents", "train_unet"):
        assert start(root, stage).wait(timeout=120) == 0
    return root


def contents(root: Path, stage: str) -> dict[str, bytes]:
    files = [file for out in OUTS[stage] for file in sorted((root / out).rglob("*") if (root / out).is_dir() else [root / out])]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


@pytest.mark.parametrize("stage", OUTS)
@pytest.mark.parametrize("seed", with_soak(1, 5))
def test_a_killed_stage_that_runs_again_makes_the_same_outs(stage, seed, trained, tmp_path):
    root = Path(shutil.copytree(trained, tmp_path / "killed"))
    for out in OUTS[stage]:
        shutil.rmtree(root / out) if (root / out).is_dir() else (root / out).unlink()
    first = start(root, stage)
    work = root / ".ldm/work" / stage
    while not any(path.name.isdigit() for path in work.glob("*/checkpoint/*")):
        assert first.poll() is None, "it ended before its first checkpoint was seen"
        time.sleep(0.01)
    time.sleep(float(np.random.default_rng(seed).uniform(0.02, 0.3)))  # into the work after the checkpoint
    assert first.poll() is None, "it ended before it was killed"
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert not any((root / out).exists() for out in OUTS[stage])
    kept = [path.name for path in work.glob("*/checkpoint/*") if path.name.isdigit()]
    again = subprocess.run(
        [sys.executable, "-m", f"ldm.stages.{stage}"], cwd=root, env=environment(), capture_output=True, text=True, check=True
    )
    assert f"resuming after {int(max(kept))} images" in again.stdout
    assert contents(root, stage) == contents(trained, stage)
