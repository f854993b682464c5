"""The discretised logistic against scipy in float64, and the edges of 8-bit images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import logistic

from ldm.bayes.likelihoods import BIN, DiscretizedLogistic, to_float, to_uint8
from ldm.errors import InputError

VALUES = np.arange(256) * 2 / 255 - 1


def reference(mean: float, log_scale: float) -> np.ndarray:
    """Log-probabilities of the 256 values: differences of the CDF, or of its complement above the mean, in logs."""
    scale = np.exp(log_scale)
    upper, lower = VALUES + 1 / 255, VALUES - 1 / 255
    upper[-1], lower[0] = np.inf, -np.inf
    right = mean < VALUES
    big = np.where(right, logistic.logsf(lower, mean, scale), logistic.logcdf(upper, mean, scale))
    small = np.where(right, logistic.logsf(upper, mean, scale), logistic.logcdf(lower, mean, scale))
    return big + np.log1p(-np.exp(small - big))


def log_probs(mean: float, log_scale: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    likelihood = DiscretizedLogistic(log_scale).to(dtype)
    return likelihood.log_prob(torch.from_numpy(VALUES).to(dtype), torch.tensor(mean, dtype=dtype)).detach()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(mean=st.floats(-3, 3), log_scale=st.floats(-8, 3))
def test_the_256_probabilities_sum_to_one_and_are_scipys(mean, log_scale):
    log_scale = float(np.float32(log_scale))  # the parameter starts as float32
    found = log_probs(mean, log_scale)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found, reference(mean, log_scale), rtol=1e-9, atol=1e-10)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(mean=st.floats(-1.5, 1.5), log_scale=st.floats(-7, 2))
def test_float32_is_close_to_float64(mean, log_scale):
    mean, log_scale = (float(np.float32(value)) for value in (mean, log_scale))
    found = log_probs(mean, log_scale, torch.float32)
    assert found.exp().sum().item() == pytest.approx(1, abs=5e-4)
    np.testing.assert_allclose(found, reference(mean, log_scale), rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("log_scale", [-12.0, -3.0, 4.0])
def test_values_and_gradients_are_finite_in_the_far_tails(mean, log_scale, dtype):
    likelihood = DiscretizedLogistic(log_scale).to(dtype)
    means = torch.full((256,), mean, dtype=dtype, requires_grad=True)
    found = likelihood.log_prob(torch.from_numpy(VALUES).to(dtype), means)
    found.sum().backward()
    assert found.isfinite().all()
    assert (found <= 1e-6).all()
    assert means.grad.isfinite().all()
    assert likelihood.log_scale.grad.isfinite()
    if abs(mean) >= 30:  # moving the mean towards a value helps still; the outermost ones reach to infinity
        assert (means.grad[1:-1] * -np.sign(mean) > 0).all()


def test_gradients_are_those_of_finite_differences():
    likelihood = DiscretizedLogistic(-3.0).double()
    x = torch.from_numpy(VALUES[[0, 1, 100, 127, 254, 255]])
    mean = torch.tensor([-0.98, -1.05, 0.3, 0.0, 1.02, 0.5], dtype=torch.float64, requires_grad=True)

    def log_prob(mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(likelihood, {"log_scale": log_scale}, (x, mean))

    likelihood.forward = likelihood.log_prob
    assert torch.autograd.gradcheck(log_prob, (mean, torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)))


def test_a_density_instead_of_probabilities_would_be_noticed():
    """Planted: at a small scale the density times the bin width is no probability."""
    mean, scale = VALUES[140], np.exp(-6.5)
    assert abs(logistic.pdf(VALUES, mean, scale).sum() * BIN - 1) > 0.1
    assert log_probs(mean, -6.5).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_pixels_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_float(pixels)
    assert (x.min(), x.max()) == (-1, pytest.approx(1))
    np.testing.assert_allclose(x.flatten(), VALUES, atol=1e-6)
    assert torch.equal(to_uint8(x), pixels)
    assert torch.equal(to_float(pixels.numpy()), x)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_saved_beside_the_autoencoder(tmp_path):
    DiscretizedLogistic(-1.25).save_pretrained(tmp_path)
    assert DiscretizedLogistic.from_pretrained(tmp_path).log_scale.item() == -1.25
    with pytest.raises(InputError, match=r"nowhere/likelihood\.safetensors is missing"):
        DiscretizedLogistic.from_pretrained(tmp_path / "nowhere")
