"""The stage that samples weights: what it leaves, its numbers computed anew, a kill in mid-work, its place in the pipeline."""

import contextlib
import copy
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from blobs import run_stages
from PIL import Image
from scipy.special import logsumexp
from tiny import REPOSITORY, environment, set_params, with_soak

from flows.summary import Step, summarise
from ldm.base.errors import InputError
from ldm.base.pixels import to_float
from ldm.config import load_settings
from ldm.data.reader import ShardReader, open_shards
from ldm.evaluation.gate import Decision
from ldm.evaluation.posterior import average_bound
from ldm.langevin.chains import Draws
from ldm.langevin.decoder import CHECKPOINT_STEPS, DecoderPosterior
from ldm.model import LatentDiffusion
from ldm.nets.diffusers import network_hash
from ldm.registry.registration import Registered
from ldm.stages import sample_posterior
from ldm.stages.stage import NAMES
from ldm.versioning.repository import Node, ancestors, read_graph

PLOTS = ("reconstructions", "samples", "scores", "traces")


def found(root: Path, sampler: str = "sghmc") -> dict:
    return json.loads((root / f"reports/posterior/{sampler}.json").read_text())


def draws(root: Path, sampler: str = "sghmc") -> tuple[Draws, dict]:
    return Draws.load(root / f"models/posterior/{sampler}/samples.safetensors")


def outs(root: Path) -> dict[str, bytes]:
    files = [file for folder in ("models/posterior", "reports/posterior") for file in (root / folder).rglob("*")]
    return {str(file.relative_to(root)): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture(scope="module")
def loaded(sampled) -> tuple[LatentDiffusion, ShardReader]:
    return LatentDiffusion.load(sampled / "models/ldm"), open_shards(sampled / "data/shards", "test")


def test_what_it_leaves(sampled, loaded):
    expected = {"models/posterior/sghmc/samples.safetensors", "models/posterior/sghmc/scores.csv", "reports/posterior/sghmc.json"}
    assert outs(sampled).keys() == expected | {f"reports/posterior/sghmc/{name}.png" for name in PLOTS}
    for name in PLOTS:
        pixels = np.asarray(Image.open(sampled / f"reports/posterior/sghmc/{name}.png").convert("L"))
        assert min(pixels.shape) > 50 and pixels.std() > 1
    scores = pd.read_csv(sampled / "models/posterior/sghmc/scores.csv")
    assert scores.key.tolist() == loaded[1].captions.key.tolist() and (scores.score > 0).all()
    assert not list((sampled / ".ldm/work/sample_posterior").glob("*/checkpoint"))


def test_metrics_are_finite_and_say_what_was_done(sampled):
    metrics = found(sampled)
    warnings = ("convergence_warnings", "step_size_warnings")
    assert all(math.isfinite(value) for name, value in metrics.items() if name not in ("sampler", "summary", *warnings))
    assert metrics["sampler"] == "sghmc" and metrics["draws"] == 8
    assert metrics["lr"] > 0 and metrics["inflation"] > 1 and -1 < metrics["contraction"] < 1
    assert all(0 <= metrics[f"ood_auroc_{name}"] <= 1 for name in ("rotated", "inverted", "noise"))
    assert len(metrics["convergence_warnings"]) == 2  # 8 draws are far too few


def test_draws_are_of_the_last_block_and_the_output(sampled, loaded):
    values, about = draws(sampled)
    decoder = loaded[0].autoencoder.decoder
    expected = {n: p for n, p in decoder.named_parameters() if n.startswith(("up_blocks.1.", "conv_norm_out.", "conv_out."))}
    assert {name: tuple(v.shape) for name, v in values.values.items()} == {n: (2, 4, *p.shape) for n, p in expected.items()}
    assert sum(p.numel() for p in expected.values()) == found(sampled)["weights"]
    assert about == {"autoencoder": network_hash(sampled / "models/ldm/autoencoder"), "sampler": "sghmc"}
    for name, value in values.values.items():
        assert (value.flatten(0, 1) != expected[name]).flatten(1).any(1).all(), name  # every draw left the trained weights
        assert len(torch.unique(value.flatten(0, 1), dim=0)) == 8, name


def by_hand(root: Path, model: LatentDiffusion, test: ShardReader) -> np.ndarray:
    """log p(x | z, θ) of the test images under the trained weights and then each draw, in a decoder that has them as its own."""
    images = torch.from_numpy(test.images(range(len(test))))
    x, z = to_float(images), model.bound_latents(images, test.captions.key.tolist(), seed=0)
    net = copy.deepcopy(model.autoencoder)
    rows = []
    for one in ({}, *draws(root)[0]):
        net.decoder.load_state_dict({**model.autoencoder.decoder.state_dict(), **one})
        with torch.no_grad():
            rows.append(model.likelihood.log_prob(x, net.decode(z)).double().flatten(1).sum(1).numpy())
    return np.stack(rows)


def test_the_average_is_no_worse_than_its_draws_and_stands_beside_the_evaluations_bound(sampled, loaded):
    metrics, rows = found(sampled), by_hand(sampled, *loaded)
    assert metrics["bits_per_dim"] == pytest.approx(json.loads((sampled / "reports/metrics.json").read_text())["bits_per_dim"])
    gain = logsumexp(rows[1:], axis=0) - math.log(8) - rows[0]
    assert metrics["gain_nats"] == pytest.approx(gain.mean(), rel=1e-3)
    assert metrics["gain_nats_se"] == pytest.approx(gain.std(ddof=1) / len(gain) ** 0.5, rel=1e-3)
    bits = 1 / (16 * 16 * math.log(2))
    assert metrics["average_bits_per_dim"] == pytest.approx(metrics["bits_per_dim"] - gain.mean() * bits)
    each = metrics["bits_per_dim"] - (rows[1:].mean(0) - rows[0]).mean() * bits
    assert metrics["draw_bits_per_dim"] == pytest.approx(each)
    assert metrics["average_bits_per_dim"] < metrics["draw_bits_per_dim"]  # Jensen's inequality


@pytest.mark.parametrize("how", ["another model's", "other images'"])
def test_bounds_that_belong_to_something_else_are_refused(how, sampled, loaded, tmp_path):
    bounds = pd.read_csv(sampled / "reports/bounds.csv")
    if how == "another model's":
        bounds["reconstruction"] += 5.0  # nats, of about a thousand
    else:
        bounds = bounds[1:]
    model, test = loaded
    posterior = DecoderPosterior(model.autoencoder, model.likelihood, draws(sampled)[0])
    with pytest.raises(InputError, match=r"bounds\.csv: is not of this model and these test images; run `dvc repro evaluate`"):
        average_bound(posterior, bounds, test, partial(model.bound_latents, seed=0), tmp_path)


def test_chains_that_diverge_are_bad_input(sampled, tmp_path):
    root = Path(shutil.copytree(sampled, tmp_path / "project"))
    set_params(root, {"posterior": {"lr": 1e30}})
    with pytest.raises(InputError, match=r"diverged by step \d+; set a smaller posterior\.lr, or null"):
        run_stages(root, "sample_posterior sghmc")


# the end of a process

LONG = {"part": ["conv_out"], "burn_in": 10, "thin": 40, "draws": 5, "batch_size": 1}


def start(root: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "ldm.stages.sample_posterior", "sghmc"]
    return subprocess.Popen(command, cwd=root, env=environment(PYTHONPATH=str(REPOSITORY)), **options)


@pytest.fixture(scope="module")
def undisturbed(sampled, tmp_path_factory) -> Path:
    root = Path(shutil.copytree(sampled, tmp_path_factory.mktemp("undisturbed") / "project"))
    set_params(root, {"posterior": LONG})
    run_stages(root, "sample_posterior sghmc")
    return root


@pytest.mark.parametrize("seed", with_soak(1, 6))
def test_a_killed_run_goes_on_to_the_same_bytes(seed, undisturbed, tmp_path):
    """The kill comes as long after the second checkpoint as a seeded share of the time from the first to the second."""
    root = Path(shutil.copytree(undisturbed, tmp_path / "killed"))
    for folder in ("models/posterior", "reports/posterior"):
        shutil.rmtree(root / folder)
    work, seen = root / ".ldm/work/sample_posterior", []
    first = start(root)
    for number in (1, 2):
        while not list(work.glob(f"*/checkpoint/{number * CHECKPOINT_STEPS:012d}")):
            assert first.poll() is None, "it ended before two of its checkpoints were seen"
            time.sleep(0.005)
        seen.append(time.monotonic())
    time.sleep(float(np.random.default_rng(seed).uniform(0.05, 0.9)) * (seen[1] - seen[0]))
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    kept = max(int(path.name) for path in work.glob("*/checkpoint/*") if path.name.isdigit())
    assert 2 * CHECKPOINT_STEPS <= kept <= 3 * CHECKPOINT_STEPS and not outs(root)  # of 210 steps
    again = start(root, stdout=subprocess.PIPE, text=True)
    lines = again.communicate(timeout=120)[0]
    assert again.returncode == 0 and "burn-in:" not in lines  # which the checkpoint has behind it
    assert outs(root) == outs(undisturbed)


def test_a_run_that_was_stopped_goes_on_and_replaces_what_was_there(sampled, tmp_path, monkeypatch):
    """As SIGTERM asks for it: the chains end at a checkpoint, after one of four draws."""
    root = Path(shutil.copytree(sampled, tmp_path / "project"))
    (root / "reports/posterior/sghmc/old.png").touch()
    before, asked = outs(root), iter([False] * 6 + [True])
    with monkeypatch.context() as patch:
        stopping = contextlib.nullcontext(lambda: next(asked, False))
        patch.setattr(sample_posterior, "stop_at_checkpoint", lambda: stopping)
        with pytest.raises(KeyboardInterrupt, match="stopped at a checkpoint after 7 steps"):
            run_stages(root, "sample_posterior sghmc")
    assert outs(root) == before
    run_stages(root, "sample_posterior sghmc")
    assert outs(root) == outs(sampled)


# in the pipeline


@pytest.mark.parametrize(
    ("samplers", "expected"), [([], []), (["sgld", "sghmc"], ["sample_posterior@sgld", "sample_posterior@sghmc"])]
)
def test_each_sampler_of_the_settings_is_a_stage_after_the_evaluation(samplers, expected, tmp_path):
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    set_params(tmp_path, {"sample_posterior": samplers})
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, env=environment(), check=True)
    graph = read_graph(tmp_path)
    assert [stage.name for stage in graph if stage.name.startswith("sample_posterior")] == expected
    needed = [stage.name for stage in ancestors(graph, "evaluate")]
    assert needed == list(NAMES[:-1])
    assert [stage.name for stage in graph if "evaluate" in stage.needs] == expected  # the flow runs these after the gate
    for stage in graph[len(graph) - len(expected) :]:
        assert f"models/posterior/{stage.name.partition('@')[2]}" in stage.outs and "evaluate" in stage.upstream


def test_the_summary_of_a_run_names_the_average(sampled):
    decision = Decision(promote=True, n=0, mean=math.nan, se=math.nan, lower=math.nan, level=0.05, reason="no champion yet")
    step = Step("evaluate", "executed", 1.0)
    outs = ("reports/posterior/sghmc", "reports/posterior/sghmc.json", "models/posterior/sghmc")
    others = (Node("sample_posterior@sghmc", outs),)
    results = summarise(sampled, load_settings(sampled), [step], others, Registered(1, created=True), decision, 1, []).results
    line = dict(results)["sample_posterior@sghmc"]
    metrics = found(sampled)
    doubts = len(metrics["convergence_warnings"]) + len(metrics["step_size_warnings"])
    assert line == f"{metrics['average_bits_per_dim']:.4f} bits/dim averaged over 8 samples; {doubts} warnings"
