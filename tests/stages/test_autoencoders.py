"""Stages with an autoencoder other than the default one: VQ, Bernoulli, a scale for each pixel, trained without a likelihood."""

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from blobs import make_project, run_stages
from scipy import stats
from tiny import set_params

from flows.summary import Step, markdown, summarise
from ldm.base.errors import InputError
from ldm.bayes.likelihoods.likelihood import load_likelihood
from ldm.config import load_settings
from ldm.data.reader import open_shards
from ldm.evaluation.gate import Decision
from ldm.nets.autoencoder import AutoencoderKL, DiagonalGaussian, VQModel, load_autoencoder
from ldm.registry.registration import Registered
from ldm.stages import training
from ldm.stages.train_vae import measured
from ldm.training.fit import learning_rate
from ldm.training.optimizers import Sgld

ALL = ("train_vae", "cache_latents", "train_unet", "evaluate")


def metrics(root: Path) -> dict[str, float]:
    return json.loads((root / "reports/metrics.json").read_text())


def held_out(root: Path, split: str) -> np.ndarray:
    reader = open_shards(root / "data/shards", split)
    return reader.images(range(len(reader))).astype(np.float64)


def encoded_and_decoded(net: AutoencoderKL, pixels: np.ndarray) -> tuple[DiagonalGaussian, np.ndarray]:
    """Posteriors of images, and the decoder's output for a draw from each, float64."""
    posterior = net.encode(torch.tensor(pixels / 127.5 - 1).float())
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    return posterior, net.decode(posterior.sample(noise)).double().numpy()


def log_mass(values: Any, pixels: np.ndarray) -> np.ndarray:
    """Log-probability of 8-bit values under a distribution of scipy's over [-1, 1], the outermost reaching to infinity."""
    upper = np.where(pixels == 255, 1, values.cdf((pixels + 0.5) / 127.5 - 1))
    lower = np.where(pixels == 0, 0, values.cdf((pixels - 0.5) / 127.5 - 1))
    return np.log(np.maximum(upper - lower, 1e-300))


@pytest.fixture(scope="module")
def vq(tmp_path_factory) -> Path:
    root = make_project(tmp_path_factory.mktemp("vq"), {"autoencoder": {"regulariser": {"kind": "vq", "num_vq_embeddings": 32}}})
    run_stages(root, *ALL)
    return root


def test_a_vq_model_reports_rate_and_distortion_and_no_bound_of_the_system(vq):
    assert isinstance(load_autoencoder(vq / "models/ldm/autoencoder"), VQModel)
    found = metrics(vq)
    assert found["rate_bits_per_dim"] == pytest.approx(math.log2(32) * 8 * 8 / 16**2)  # 32 codes, 8x8 latents, 16x16 pixels
    assert found["elbo_bits_per_dim"] == pytest.approx(found["rate_bits_per_dim"] + found["distortion_bits_per_dim"])
    none = {"nats", "bits_per_dim", "bits_per_dim_se", "importance_bits_per_dim", "entropy_nats", "prior_nats", "active_units"}
    assert not none & found.keys()
    assert {"psnr", "fd", "kd"} <= found.keys()
    bounds = pd.read_csv(vq / "reports/bounds.csv")
    assert list(bounds.columns) == ["key", "reconstruction", "rate", "dims"] and len(bounds) == found["test_images"]
    bits = (bounds.rate - bounds.reconstruction) / bounds.dims / math.log(2)
    assert bits.mean() == pytest.approx(found["elbo_bits_per_dim"])


@torch.inference_mode()
def test_the_distortion_of_a_vq_model_is_that_of_its_nearest_codes(vq):
    net, likelihood = load_autoencoder(vq / "models/autoencoder"), load_likelihood(vq / "models/autoencoder")
    pixels = held_out(vq, "test")
    h = net.encode(torch.tensor(pixels / 127.5 - 1).float()).mean.double()
    codes = net.quantize.embedding.weight.double()
    nearest = (h.movedim(1, -1)[..., None, :] - codes).square().sum(-1).argmin(-1)
    means = net.decoder(net.post_quant_conv(codes[nearest].movedim(-1, 1).float())).double().numpy()
    nats = log_mass(stats.logistic(means, math.exp(likelihood.log_scale)), pixels)
    assert metrics(vq)["distortion_bits_per_dim"] == pytest.approx(-nats.mean() / math.log(2), rel=1e-4)


def test_the_report_and_the_summary_of_a_vq_model_say_what_there_is(vq):
    page = (vq / "reports/report.html").read_text()
    assert "rate_bits_per_dim" in page and "Rate and distortion" in page and "The whole system" not in page
    decision = Decision(promote=False, n=0, mean=math.nan, se=math.nan, lower=math.nan, level=0.05, reason="not comparable")
    summary = summarise(
        vq, load_settings(vq), [Step("evaluate", "executed", 1.0)], (), Registered(1, created=True), decision, None, []
    )
    bound = dict(summary.results)["bits/dim"]
    assert "VQ" in bound and bound.startswith(f"{metrics(vq)['elbo_bits_per_dim']:.2f} ± ")
    assert "not promoted: not comparable" in markdown(summary, vq)


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    """Images of 0 and 255, and an autoencoder that gives each pixel's probability of being 255."""
    changes = {"train_vae": {"likelihood": {"kind": "bernoulli"}}}
    root = make_project(tmp_path_factory.mktemp("bernoulli"), changes, binary=True)
    run_stages(root, "train_vae")
    return root


@torch.inference_mode()
def test_binary_images_cost_what_their_logits_say(binary):
    net, likelihood = load_autoencoder(binary / "models/autoencoder"), load_likelihood(binary / "models/autoencoder")
    assert likelihood.kind == "bernoulli"
    pixels = held_out(binary, "val")
    assert set(np.unique(pixels)) == {0, 255}
    posterior, output = encoded_and_decoded(net, pixels)
    probability = 1 / (1 + np.exp(-output))
    reconstruction = stats.bernoulli(probability).logpmf(pixels > 0).reshape(len(pixels), -1).sum(1)
    kl = posterior.kl().double().flatten(1).sum(1).numpy()
    same, found = measured(net, likelihood, open_shards(binary / "data/shards", "val"), seed=0)
    assert same is likelihood  # there is no scale to be fitted
    assert found["kl_nats"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["reconstruction_nats"] == pytest.approx(reconstruction.mean(), rel=0.05)  # another draw from the posteriors
    assert found["elbo_bits_per_dim"] < 1  # better than no idea


@pytest.mark.soak
def test_binary_images_go_through_the_whole_pipeline(binary):
    run_stages(binary, *ALL[1:])
    found = metrics(binary)
    assert 0 < found["elbo_bits_per_dim"] < 1 and math.isfinite(found["bits_per_dim"])


def test_grey_images_are_refused_by_a_bernoulli_likelihood(tmp_path):
    root = make_project(tmp_path, {"train_vae": {"likelihood": {"kind": "bernoulli"}}})
    with pytest.raises(InputError, match="needs images of 0 and 255 only, found"):
        run_stages(root, "train_vae")
    assert not (root / "models/autoencoder").exists()


@pytest.fixture(scope="module")
def per_pixel(tmp_path_factory) -> Path:
    changes = {"train_vae": {"likelihood": {"kind": "discretized_gaussian", "scale": "per_pixel", "log_scale": -2.0}}}
    root = make_project(tmp_path_factory.mktemp("per pixel"), changes)
    run_stages(root, "train_vae")
    return root


@torch.inference_mode()
def test_a_decoder_gives_each_pixel_its_scale(per_pixel):
    net, likelihood = load_autoencoder(per_pixel / "models/autoencoder"), load_likelihood(per_pixel / "models/autoencoder")
    assert (likelihood.kind, likelihood.scale) == ("discretized_gaussian", "per_pixel")
    pixels = held_out(per_pixel, "val")
    _, output = encoded_and_decoded(net, pixels)
    means, raw = output.reshape(len(pixels), 2, 1, 16, 16).swapaxes(0, 1)
    scales = np.exp(-2.5 + 4.5 * np.tanh((-2.0 + raw + 2.5) / 4.5))  # between e^-7 and e^2, e^-2 where raw is 0
    assert np.log(scales).std() > 0.1
    nats = log_mass(stats.norm(means, scales), pixels).reshape(len(pixels), -1).sum(1)
    same, found = measured(net, likelihood, open_shards(per_pixel / "data/shards", "val"), seed=0)
    assert same is likelihood
    assert found["reconstruction_nats"] == pytest.approx(nats.mean(), rel=0.02)  # another draw from the posteriors


@pytest.mark.soak
def test_a_scale_for_each_pixel_goes_through_the_whole_pipeline(per_pixel):
    run_stages(per_pixel, *ALL[1:])
    assert math.isfinite(metrics(per_pixel)["bits_per_dim"])


@pytest.mark.parametrize(("scale", "measured_by"), [("learned", "discretized_logistic"), ("per_pixel", "discretized_gaussian")])
def test_what_was_trained_on_a_density_is_measured_by_a_likelihood_of_8_bit_pixels(scale, measured_by, tmp_path):
    root = make_project(
        tmp_path, {"train_vae": {"likelihood": {"kind": "gaussian", "scale": scale, "log_scale": -2.0}, "images": 64}}
    )
    run_stages(root, "train_vae")
    found = load_likelihood(root / "models/autoencoder")
    assert (found.kind, found.scale) == (measured_by, scale)


@pytest.mark.soak
def test_the_papers_objective_goes_through_the_whole_pipeline(tmp_path):
    changes = {"likelihood": {"kind": "laplace", "log_scale": -2.0}, "objective": {"kind": "ldm"}, "images": 64}
    root = make_project(tmp_path, {"train_vae": changes})
    run_stages(root, *ALL)
    assert math.isfinite(metrics(root)["bits_per_dim"])


SGLD = {
    "train_vae": {
        "images": 512, "lr": 1e-8, "checkpoint_images": 128, "ema_halflife_images": 0,
        "optimizer": {"kind": "sgld", "temperature": 0.5, "prior_precision": 3.0},
    }
}  # fmt: skip


def autoencoder_files(root: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in (root / "models/autoencoder").iterdir()}
    return {**files, "curve": (root / "reports/curves/train_vae.csv").read_bytes()}


def test_an_autoencoder_sampled_by_langevin_dynamics(tmp_path, monkeypatch):
    """From a trained one, as dynamics take long to get anywhere: stopped and resumed it is the same, byte for byte."""
    root = make_project(tmp_path / "project", {})
    run_stages(root, "train_vae")
    shutil.copytree(root / "models/autoencoder", root / "trained")
    before = load_autoencoder(root / "trained").state_dict()
    set_params(root, SGLD)
    set_params(root, {"autoencoder": {"pretrained": "trained"}})
    built, build = [], Sgld.build
    monkeypatch.setattr(Sgld, "build", lambda *given: built.append(build(*given)) or built[-1])
    run_stages(root, "pretrained", "train_vae")
    expected = autoencoder_files(root)
    shutil.rmtree(root / "models/autoencoder")
    asked = iter([False] * 5 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(training, "stop_at_checkpoint", lambda: contextlib.nullcontext(lambda: next(asked, False)))
        with pytest.raises(KeyboardInterrupt, match="after 192 images"):
            run_stages(root, "train_vae")
    assert not (root / "models/autoencoder").exists()
    run_stages(root, "train_vae")
    assert autoencoder_files(root) == expected

    images = len(open_shards(root / "data/shards", "train"))
    assert len(built) == 3
    for optimizer in built:
        assert optimizer.defaults.items() >= {"num_data": images * 16 * 16, "temperature": 0.5, "prior_precision": 3.0}.items()
    # Next to the injected noise, of 16 steps along half a cosine, drift is little.
    schedule = load_settings(root).train_vae
    variance = 0.5 * sum(learning_rate(schedule, images_seen) for images_seen in range(0, 512, 32))
    after = load_autoencoder(root / "models/autoencoder").state_dict()
    moved = torch.cat([(after[name] - value).flatten() for name, value in before.items()])
    assert float(moved.std()) == pytest.approx(math.sqrt(variance), rel=0.2)
    curve = pd.read_csv(root / "reports/curves/train_vae.csv")
    assert abs(curve.loss.iloc[-4:].mean() - curve.loss.iloc[:4].mean()) < 0.2 * curve.loss.mean()
