"""The real training stages, killed between two checkpoints and run again: the same outs, byte for byte."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blobs import run_stages
from photographs import write_photographs
from tiny import REPOSITORY, TINY, clone, environment, set_params, with_soak

from ldm.base.errors import InputError
from ldm.base.paths import AUTOENCODER, VAE_CURVE
from ldm.config import load_settings
from ldm.registry import lineage
from ldm.registry.lineage import ADOPTED
from ldm.stages.evaluate import assemble
from ldm.stages.training import training
from ldm.stages.work import works

OUTS = {
    "train_vae": ("models/autoencoder", "reports/curves/train_vae.csv"),
    "train_unet": ("models/unet", "reports/curves/train_unet.csv"),
}
LENGTHS = {"images": 1280, "batch_size": 32, "checkpoint_images": 256}
LDM = {
    "kind": "ldm", "perceptual": "random", "perceptual_sha256": None, "perceptual_weight": 0.1, "discriminator_weight": 0.5,
    "discriminator_start": 128, "discriminator_channels": 8, "discriminator_layers": 1,
}  # fmt: skip
PAPER = {
    "autoencoder": {"regulariser": {"kind": "kl", "beta": 1e-6}},
    "train_vae": {"objective": LDM, "likelihood": {"kind": "laplace"}},
}
PICTURES = {
    "data": {"path": "photographs", "channels": 3, "shapes": {"kind": "buckets", "step": 8}},
    "text": {"max_tokens": 20, "cache": False},
    "cache_latents": {"flip": True},
}
TWO = {"LDM_PROCESSES": "2"}
PAIRS = {  # stage, settings, environment
    "train_vae": ("train_vae", {}, TWO),
    "train_unet": ("train_unet", {}, TWO),
    "learned weight": ("train_unet", {"loss_weight": {"kind": "learned"}}, TWO),
    "shared model": ("train_unet", {}, {**TWO, "LDM_SHARD_MODEL": "1"}),
}


def start(root: Path, stage: str, **extra: str) -> subprocess.Popen[str]:
    """The stage's process; what it says on stderr, and nothing on stdout, is piped."""
    command, env = [sys.executable, "-m", f"ldm.stages.{stage}"], environment(**extra)
    return subprocess.Popen(command, cwd=root, env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A project whose training nobody disturbed, with checkpoints that leave much to redo."""
    root = clone(tmp_path_factory.mktemp("undisturbed") / "project")
    set_params(root, TINY)
    set_params(root, {"train_vae": LENGTHS, "train_unet": LENGTHS})
    run_stages(root, "source", "shard", "pretrained", "train_vae", "cache_latents", "train_unet")
    return root


@pytest.fixture(scope="module")
def adversarial(trained, tmp_path_factory) -> Path:
    """The same with the latent diffusion paper's objective: the discriminator is at work before the first checkpoint."""
    root = Path(shutil.copytree(trained, tmp_path_factory.mktemp("adversarial") / "project"))
    set_params(root, PAPER)
    run_stages(root, "train_vae")
    return root


@pytest.fixture(scope="module")
def warm(trained, tmp_path_factory) -> Path:
    """The same, its U-Net trained on from the model that it made, in `saved`."""
    root = Path(shutil.copytree(trained, tmp_path_factory.mktemp("warm") / "project"))
    assemble(root, load_settings(root))
    (root / "models/ldm").rename(root / "saved")
    set_params(root, {"train_unet": {"init": "saved"}})
    run_stages(root, "pretrained", "train_unet")
    assert contents(root, "train_unet") != contents(trained, "train_unet")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Photographs of several shapes, with one or two captions each, which the U-Net's training embeds itself."""
    root = clone(tmp_path_factory.mktemp("pictures") / "project")
    write_photographs(root / "photographs", 60, longest=20)
    set_params(root, TINY)
    set_params(root, {"train_vae": LENGTHS, "train_unet": LENGTHS, **PICTURES})
    run_stages(root, "shard", "pretrained", "train_vae", "cache_latents", "train_unet")
    return root


@pytest.fixture(scope="module")
def pairs(trained, tmp_path_factory) -> Callable[[str], Path]:
    """Projects in which two processes trained, each made when it is first asked for."""
    made: dict[str, Path] = {}

    def pair(name: str) -> Path:
        if name not in made:
            stage, settings, extra = PAIRS[name]
            made[name] = Path(shutil.copytree(trained, tmp_path_factory.mktemp("pair") / "project"))
            set_params(made[name], {stage: settings})
            undisturbed = start(made[name], stage, **extra)
            undisturbed.communicate(timeout=120)
            assert undisturbed.returncode == 0
        return made[name]

    return pair


def contents(root: Path, stage: str) -> dict[str, bytes]:
    files = [file for out in OUTS[stage] for file in sorted((root / out).rglob("*") if (root / out).is_dir() else [root / out])]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def killed_in_mid_work(undisturbed: Path, root: Path, stage: str, seed: int, **extra: str) -> int:
    """A copy whose stage is killed at a seeded moment between two of its checkpoints; the images that the former one holds.

    The moment lies within the time that the stage took from its first checkpoint to its second, after the second. Of several
    ranks, one is killed.
    """
    first, (before, after) = started(undisturbed, root, stage, checkpoints=2, **extra)
    time.sleep(float(np.random.default_rng(seed).uniform(0.05, 0.9)) * (after - before))
    assert first.poll() is None, "it ended before it was killed"
    others, ranks = children(first.pid), int(extra.get("LDM_PROCESSES", 1))
    assert len(others) >= ranks or ranks == 1
    os.kill(others[seed % ranks] if ranks > 1 else first.pid, signal.SIGKILL)
    error = first.communicate(timeout=60)[1]
    assert first.returncode == (-signal.SIGKILL if ranks == 1 else 1)
    assert ranks == 1 or error.splitlines()[-1] == f"error: process {seed % ranks} of this training ended with exit code -9"
    all_end(others)  # data loaders end by themselves
    assert not any((root / out).exists() for out in OUTS[stage])
    kept, every = latest_checkpoint(root / ".ldm/work" / stage), LENGTHS["checkpoint_images"]
    assert 2 * every <= kept <= LENGTHS["images"] - 2 * every, "it was not killed between two checkpoints"
    return kept


def started(undisturbed: Path, root: Path, stage: str, checkpoints: int, **extra: str) -> tuple[Any, list[float]]:
    """A copy whose stage has written some checkpoints: its process, and when each was seen."""
    shutil.copytree(undisturbed, root)
    for out in OUTS[stage]:
        shutil.rmtree(root / out) if (root / out).is_dir() else (root / out).unlink()
    first = start(root, stage, **extra)
    seen = []
    for number in range(1, checkpoints + 1):
        while latest_checkpoint(root / ".ldm/work" / stage) < number * LENGTHS["checkpoint_images"]:
            assert first.poll() is None, "it ended before its checkpoints were seen"
            time.sleep(0.005)
        seen.append(time.monotonic())
    return first, seen


def all_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 40
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlived the one that started it"
        time.sleep(0.05)


def latest_checkpoint(work: Path) -> int:
    return max((int(path.name) for path in work.glob("*/checkpoint/*") if path.name.isdigit()), default=0)


def children(pid: int) -> list[int]:
    return [int(child) for thread in Path(f"/proc/{pid}/task").iterdir() for child in (thread / "children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def resumed(root: Path, stage: str, kept: int, **extra: str) -> dict[str, bytes]:
    command = [sys.executable, "-m", f"ldm.stages.{stage}"]
    again = subprocess.run(command, cwd=root, env=environment(**extra), capture_output=True, text=True, check=True)
    assert f"resuming after {kept} images" in again.stdout
    return contents(root, stage)


@pytest.mark.parametrize("stage", OUTS)
@pytest.mark.parametrize("seed", with_soak(0, 11))  # in `make test`, those below are killed
def test_a_killed_stage_that_runs_again_makes_the_same_outs(stage, seed, trained, tmp_path):
    kept = killed_in_mid_work(trained, tmp_path / "killed", stage, seed)
    assert resumed(tmp_path / "killed", stage, kept) == contents(trained, stage)


@pytest.mark.parametrize("stage", [pytest.param("train_vae", marks=pytest.mark.soak), "train_unet"])
def test_a_checkpoint_outlives_an_edit_that_changes_nothing_and_is_adopted_after_one_that_may(stage, trained, tmp_path):
    root = tmp_path / "killed"
    kept = killed_in_mid_work(trained, root, stage, seed=20)
    shutil.copytree(root, tmp_path / "edited")
    for name in ("training/fit.py", "registry/tracking.py", "nets/blocks.py"):
        path = root / "ldm" / name
        path.write_text("# a comment\n" + path.read_text())
    assert resumed(root, stage, kept) == contents(trained, stage)

    root = tmp_path / "edited"
    with (root / "ldm/training/fit.py").open("a") as file:
        file.write("\n_EDITED = True\n")
    anew = run_again(root, stage)
    assert "resuming" not in anew.stdout and contents(root, stage) == contents(trained, stage)
    said = re.search(r"under other code: (.+), after ([\d,]+) of 1,280", anew.stderr)
    assert said and int(said[2].replace(",", "")) == kept and (root / said[1] / "checkpoint").is_dir()
    assert f"{stage}: changed since: ldm.training.fit\n" in anew.stderr
    command = re.search(r"type `ldm (checkpoints adopt \w+)`", anew.stderr)
    assert command and not (root / OUTS[stage][0] / ADOPTED).exists()
    adopted = [sys.executable, "-m", "ldm.cli", *command[1].split()]
    subprocess.run(adopted, cwd=root, env=environment(), capture_output=True, check=True)
    again = run_again(root, stage)
    assert f"resuming after {kept} images" in again.stdout and "other code" not in again.stderr
    notes = {f"{out}/{ADOPTED}" for out in OUTS[stage] if not out.endswith(".csv")}
    assert {name: value for name, value in contents(root, stage).items() if name not in notes} == contents(trained, stage)
    assert all("then ldm.training.fit changed" in str(lineage.adopted((root / name).parent)) for name in notes)


def run_again(root: Path, stage: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"ldm.stages.{stage}"]
    return subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=True)


@pytest.mark.parametrize("seed", with_soak(1, 6))
def test_so_does_training_against_a_discriminator(seed, adversarial, tmp_path):
    kept = killed_in_mid_work(adversarial, tmp_path / "killed", "train_vae", seed)
    assert kept > LDM["discriminator_start"]  # it was being trained
    assert resumed(tmp_path / "killed", "train_vae", kept) == contents(adversarial, "train_vae")


@pytest.mark.parametrize("seed", with_soak(1, 6))
def test_so_does_training_that_starts_from_a_model(seed, warm, tmp_path):
    kept = killed_in_mid_work(warm, tmp_path / "killed", "train_unet", seed)
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    assert resumed(tmp_path / "killed", "train_unet", kept) == contents(warm, "train_unet")

    root, weights = tmp_path / "other", "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(warm / "models" / weights, root / "saved" / weights)  # the name stands for another model
    run_stages(root, "pretrained")
    anew = start(root, "train_unet")
    while len(works(root, "train_unet")) < 2:
        assert anew.poll() is None, "it went on from the checkpoint"
        time.sleep(0.01)
    anew.kill()
    anew.communicate()


@pytest.mark.parametrize("stage", [pytest.param("train_vae", marks=pytest.mark.soak), "train_unet"])
@pytest.mark.parametrize("seed", with_soak(1, 6))
def test_so_does_training_on_several_shapes_and_captions(stage, seed, pictures, tmp_path):
    kept = killed_in_mid_work(pictures, tmp_path / "killed", stage, seed)
    assert resumed(tmp_path / "killed", stage, kept) == contents(pictures, stage)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("train_unet", 0),
        *(pytest.param(name, seed, marks=pytest.mark.soak) for name in ("train_vae", "train_unet") for seed in range(1, 11)),
        *(pytest.param(name, 1, marks=pytest.mark.soak) for name in ("learned weight", "shared model")),
    ],
)
def test_so_do_two_processes_of_which_one_is_killed(name, seed, pairs, tmp_path):
    """Byte-identical to two that nobody disturbed; one process rounds its sums in another order."""
    stage, _, extra = PAIRS[name]
    kept = killed_in_mid_work(pairs(name), tmp_path / "killed", stage, seed, **extra)
    assert resumed(tmp_path / "killed", stage, kept, **extra) == contents(pairs(name), stage)


@pytest.mark.parametrize("how", ["signal", *(pytest.param(how, marks=pytest.mark.soak) for how in ("owner", "kill"))])
def test_all_ranks_stop_at_the_same_checkpoint_and_go_on_from_it(how, pairs, tmp_path):
    """When the process that started them is signalled, when its owner closes the pipe, and when it is killed with 9."""
    owned = {"LDM_OWNER_PIPE": "1"} if how == "owner" else {}
    root = tmp_path / "stopped"
    first, _ = started(pairs("train_unet"), root, "train_unet", checkpoints=1, **TWO, **owned)
    ranks = children(first.pid)
    if how == "owner":
        first.stdin.close()
    else:
        first.send_signal(signal.SIGTERM if how == "signal" else signal.SIGKILL)
    error = first.stderr.read()
    assert first.wait() == (-signal.SIGKILL if how == "kill" else 130)
    assert len(ranks) == 2
    all_end(ranks)
    kept = latest_checkpoint(root / ".ldm/work/train_unet")
    assert error == f"train_unet: stopped at a checkpoint after {kept} images\n"
    if how == "kill":
        assert resumed(root, "train_unet", kept, **TWO) == contents(pairs("train_unet"), "train_unet")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LDM_SHARD_MODEL": "yes"}, "LDM_SHARD_MODEL is 'yes'; set it to 1, or unset it"),
        ({"WORLD_SIZE": "3"}, r"train_vae\.batch_size 32 cannot be shared by 3 processes; make it a multiple"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_they_meet(variables, message, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(REPOSITORY)
    settings = settings.model_copy(update={"train_vae": settings.train_vae.model_copy(update={"batch_size": 32})})
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    work = training(tmp_path, "train_vae", settings, {}, torch.device("cpu"), AUTOENCODER, VAE_CURVE)
    with pytest.raises(InputError, match=message), work:
        raise AssertionError("it began")


def test_what_all_ranks_refuse_is_said_once(trained):
    first = start(trained, "train_vae", LDM_PROCESSES="3")
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 2
    assert error == "error: train_vae.batch_size 32 cannot be shared by 3 processes; make it a multiple\n"


def test_a_process_that_dies_takes_the_others_along(trained, tmp_path):
    """Before they have found each other, where the others would wait for half an hour."""
    root = Path(shutil.copytree(trained, tmp_path / "project"))
    # another setting that changes nothing
    first = start(root, "train_vae", LDM_PROCESSES="2", LDM_GRADIENT_CHECKPOINTING="1")
    while len(others := children(first.pid)) < 2:
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(others[1], signal.SIGKILL)
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 1
    assert error.splitlines()[-1] == "error: process 1 of this training ended with exit code -9"
