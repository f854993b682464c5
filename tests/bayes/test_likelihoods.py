"""Every likelihood against scipy in float64: log-probabilities, samples, and the edges of 8-bit images."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from scipy.stats import bernoulli, chisquare, kstest, laplace, logistic, norm
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.options import kinds
from ldm.base.pixels import BIN, to_float, to_uint8
from ldm.bayes.likelihoods.discrete import Bernoulli
from ldm.bayes.likelihoods.family import Family
from ldm.bayes.likelihoods.likelihood import LOG_SCALES, Likelihood, as_discrete, load_likelihood

VALUES = np.arange(256) * 2 / 255 - 1
DISCRETE = {"discretized_gaussian": norm, "discretized_logistic": logistic}  # kind and the continuous family
CONTINUOUS = {"gaussian": norm, "laplace": laplace}
PER_PIXEL = ("gaussian", *DISCRETE)  # a Laplace likelihood has no scale per pixel, and a Bernoulli none at all
discretized = pytest.mark.parametrize("kind", DISCRETE)


def make(kind: str, **options) -> Likelihood:
    return kinds(Family)[kind](**options).build()


def reference(kind: str, mean: float, log_scale: float) -> np.ndarray:
    """Log-probabilities of the 256 values: differences of the CDF, or of its complement above the mean, in logs."""
    family, scale = DISCRETE[kind], np.exp(log_scale)
    upper, lower = VALUES + 1 / 255, VALUES - 1 / 255
    upper[-1], lower[0] = np.inf, -np.inf
    right = mean < VALUES
    big = np.where(right, family.logsf(lower, mean, scale), family.logcdf(upper, mean, scale))
    small = np.where(right, family.logsf(upper, mean, scale), family.logcdf(lower, mean, scale))
    with np.errstate(divide="ignore"):
        return big + np.log1p(-np.exp(small - big))


def log_probs(kind: str, mean: float, log_scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    likelihood = make(kind, log_scale=log_scale).to(dtype)
    return likelihood.log_prob(torch.from_numpy(VALUES).to(dtype), torch.tensor(mean, dtype=dtype)).detach()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@discretized
@settings(max_examples=100, deadline=None, derandomize=True)
@given(mean=st.floats(-3, 3), log_scale=st.floats(-12, 6))
def test_the_256_probabilities_sum_to_one(kind, mean, log_scale):
    assert log_probs(kind, mean, log_scale).exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert log_probs(kind, mean, log_scale, torch.float32).double().exp().sum().item() == pytest.approx(1, abs=1e-5)


@discretized
@settings(max_examples=100, deadline=None, derandomize=True)
@given(mean=st.floats(-3, 3), log_scale=st.floats(-8, 6))
def test_probabilities_are_scipys(kind, mean, log_scale):
    mean, log_scale = (float(np.float32(value)) for value in (mean, log_scale))  # the parameter starts as float32
    expected = reference(kind, mean, log_scale)
    np.testing.assert_allclose(log_probs(kind, mean, log_scale), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_probs(kind, mean, log_scale, torch.float32), expected, rtol=1e-4, atol=1e-3)


@discretized
@pytest.mark.parametrize("mean", [-0.3, 0.0, 3.7 / 255])
@pytest.mark.parametrize("log_scale", [-12.0, -9.0])
def test_a_scale_far_below_a_bin_gives_all_to_one_value_or_two(kind, mean, log_scale):
    nearest = np.abs(VALUES - mean).argmin()
    for dtype in (torch.float32, torch.float64):
        found = log_probs(kind, mean, log_scale, dtype).exp()
        between = abs(VALUES[nearest] - mean) > 0.49 * BIN  # 0.0 is the edge of two
        assert found[nearest].item() == pytest.approx(0.5 if between else 1, abs=1e-2)


@discretized
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("log_scale", [-12.0, -3.0, 2.0, 6.0])
def test_values_and_gradients_are_finite_in_the_far_tails(kind, mean, log_scale, dtype):
    likelihood = make(kind, log_scale=log_scale).to(dtype)
    means = torch.full((256,), mean, dtype=dtype, requires_grad=True)
    found = likelihood.log_prob(torch.from_numpy(VALUES).to(dtype), means)
    found.sum().backward()
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert (found <= 1e-6).all()
    assert means.grad.isfinite().all()
    assert likelihood.log_scale.grad.isfinite()
    if abs(mean) >= 30:  # moving the mean towards a value helps still; the outermost ones reach to infinity
        distance, scale = abs(mean) - 1, math.exp(log_scale)
        slope = {"discretized_logistic": math.tanh(distance / (2 * scale)), "discretized_gaussian": distance / scale}[kind]
        assert (means.grad[1:-1] * -np.sign(mean) > 0.99 * slope / scale).all()


@discretized
@pytest.mark.parametrize("log_scale", [-3.0, -6.0, 1.0])
def test_gradients_are_those_of_finite_differences(kind, log_scale):
    likelihood = make(kind).double()
    x = torch.from_numpy(VALUES[[0, 1, 100, 127, 254, 255]])
    mean = torch.tensor([-0.98, -1.05, -0.21, 0.0, 1.02, 0.99], dtype=torch.float64, requires_grad=True)

    def log_prob(mean: Tensor, log_scale: Tensor) -> Tensor:
        return torch.func.functional_call(likelihood, {"log_scale": log_scale}, (x, mean))

    likelihood.forward = likelihood.log_prob
    assert torch.autograd.gradcheck(log_prob, (mean, torch.tensor(log_scale, dtype=torch.float64, requires_grad=True)))


def test_a_density_instead_of_probabilities_would_be_noticed():
    """Planted: at a small scale the density times the bin width is no probability."""
    mean, scale = VALUES[140], np.exp(-6.5)
    assert abs(logistic.pdf(VALUES, mean, scale).sum() * BIN - 1) > 0.1
    assert abs(norm.pdf(VALUES, mean, scale).sum() * BIN - 1) > 0.1


@pytest.mark.parametrize("kind", CONTINUOUS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(mean=st.floats(-3, 3), log_scale=st.floats(-7, 2))
def test_densities_are_scipys(kind, mean, log_scale):
    log_scale = float(np.float32(log_scale))
    likelihood = make(kind, scale="fixed", log_scale=log_scale).double()
    found = likelihood.log_prob(torch.from_numpy(VALUES), torch.tensor(mean, dtype=torch.float64))
    with np.errstate(divide="ignore"):
        expected = CONTINUOUS[kind].logpdf(VALUES, mean, np.exp(log_scale))
    near = (found.numpy() > -700) | (kind == "gaussian")  # scipy's Laplace is the log of a density: 0 beyond
    np.testing.assert_allclose(found.numpy()[near], expected[near], rtol=1e-10, atol=1e-10)


def test_a_bernoulli_is_scipys_and_takes_binary_images_only():
    logits = torch.tensor([[-40.0, -3.0, -0.1, 0.0, 0.7, 5.0, 40.0]] * 2, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).expand(2, 7)
    likelihood = Bernoulli().build()
    found = likelihood.log_prob(x, logits)
    p = 1 / (1 + np.exp(-logits.detach().numpy()))
    np.testing.assert_allclose(found.detach()[:, 1:-1], bernoulli.logpmf([[0], [1]], p)[:, 1:-1], rtol=1e-9)
    assert found[0, -1].item() == found[1, 0].item() == -40  # where scipy's probability has run out of digits
    np.testing.assert_allclose(likelihood.mean(logits).detach(), 2 * p - 1, atol=1e-12)
    found.sum().backward()
    np.testing.assert_allclose(logits.grad, [-p[0], 1 - p[1]], atol=1e-12)
    with pytest.raises(InputError, match=r"needs images of 0 and 255 only, found 90"):
        likelihood.log_prob(to_float(np.array([[0, 255, 90]], np.uint8)), torch.zeros(1, 3))


@pytest.mark.parametrize("kind", [*CONTINUOUS, *DISCRETE, "bernoulli"])
def test_samples_follow_the_probabilities(kind):
    """Against scipy's CDF; for discrete kinds, counts of the 8-bit values against `log_prob`, a tail cut off at the end."""
    likelihood = make(kind, **({} if kind == "bernoulli" else {"log_scale": -2.0}))
    mean = 0.8
    x = likelihood.sample(torch.full((4, 1, 100, 100), mean), rng())
    assert x.dtype == torch.float32
    assert torch.equal(x, likelihood.sample(torch.full((4, 1, 100, 100), mean), rng()))  # the draws are the generator's
    if kind in CONTINUOUS:
        assert kstest(x.flatten(), CONTINUOUS[kind](mean, np.exp(-2.0)).cdf).pvalue > 1e-3
        return
    values = np.array([-1.0, 1.0]) if kind == "bernoulli" else VALUES
    places = np.abs(x.flatten().numpy()[:, None] - values).argmin(1)
    np.testing.assert_allclose(x.flatten(), values[places], atol=1e-6)
    p = likelihood.double().log_prob(torch.from_numpy(values), torch.tensor(mean).double()).exp().detach().numpy()
    enough = p > 1e-3
    counts, expected = np.bincount(places, minlength=len(p)), len(places) * p
    if not enough.all():  # pooled
        counts, expected = ([*v[enough], v[~enough].sum()] for v in (counts, expected))
    assert chisquare(counts, expected).pvalue > 1e-3


@discretized
def test_the_mean_is_that_of_the_values_but_for_a_tail_beyond_the_range(kind):
    likelihood = make(kind, log_scale=-4.0).double()
    for location, same in ((0.1234, True), (-0.7, True), (0.99, False)):
        output = torch.tensor(location, dtype=torch.float64)
        exact = (log_probs(kind, location, -4.0).exp().numpy() * VALUES).sum()
        assert (abs(likelihood.mean(output).item() - exact) < 1e-6) == same


@pytest.mark.parametrize("kind", PER_PIXEL)
def test_a_pixel_with_its_own_scale(kind):
    """The decoder's second half: as `log_scale` near the middle of the range, and never outside it."""
    likelihood = make(kind, scale="per_pixel", log_scale=-2.5).double()
    assert not list(likelihood.parameters())
    assert likelihood.outputs(3) == 6
    x = torch.from_numpy(VALUES).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    location = torch.linspace(-1, 1, 768, dtype=torch.float64).view(1, 3, 16, 16)
    for raw, expected in ((0.0, -2.5), (0.1, -2.4), (1e3, LOG_SCALES[1]), (-1e3, LOG_SCALES[0])):
        output = torch.cat([location, torch.full_like(location, raw)], 1)
        found = likelihood.log_prob(x, output)
        assert found.shape == x.shape
        fixed = make(kind, scale="fixed", log_scale=expected).double()
        assert fixed.outputs(3) == 3
        torch.testing.assert_close(found, fixed.log_prob(x, location), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(likelihood.mean(output), location)
        assert likelihood.sample(output, rng()).shape == x.shape
    mixed = torch.cat([location, torch.linspace(-20, 20, 768, dtype=torch.float64).view_as(location)], 1).requires_grad_()
    likelihood.log_prob(x, mixed).sum().backward()
    assert mixed.grad.isfinite().all()
    assert (mixed.grad[:, 3:] != 0).double().mean() > 0.9  # a pixel at either end can still leave it


def test_bfloat16_outputs_of_a_decoder_are_judged_in_the_images_precision():
    x = to_float(torch.randint(0, 256, (2, 1, 8, 8), generator=rng(), dtype=torch.uint8))
    output = torch.randn(2, 2, 8, 8, generator=rng()).bfloat16()
    for kind in PER_PIXEL:
        likelihood = make(kind, scale="per_pixel")
        assert torch.equal(likelihood.log_prob(x, output), likelihood.log_prob(x, output.float()))
        assert torch.equal(likelihood.sample(output, rng()), likelihood.sample(output.float(), rng()))


def test_pixels_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_float(pixels)
    assert (x.min(), x.max()) == (-1, pytest.approx(1))
    np.testing.assert_allclose(x.flatten(), VALUES, atol=1e-6)
    assert torch.equal(to_uint8(x), pixels)
    assert torch.equal(to_float(pixels.numpy()), x)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("kind", "scale"),
    [*itertools.product([*CONTINUOUS, *DISCRETE], ["fixed", "learned"]), *itertools.product(PER_PIXEL, ["per_pixel"])],
)
def test_saved_beside_the_autoencoder(tmp_path, kind, scale):
    make(kind, log_scale=-1.25, scale=scale).save_pretrained(tmp_path)
    written = (tmp_path / "likelihood.safetensors").read_bytes()
    loaded = load_likelihood(tmp_path)
    for _ in range(10):  # whatever the order of a hash map is
        loaded.save_pretrained(tmp_path)
        assert (tmp_path / "likelihood.safetensors").read_bytes() == written
    assert (loaded.kind, loaded.scale, loaded.log_scale.item()) == (kind, scale, -1.25)
    assert [name for name, _ in loaded.named_parameters()] == (["log_scale"] if scale == "learned" else [])


def test_files_of_other_times_and_kinds(tmp_path):
    path = tmp_path / "likelihood.safetensors"
    Bernoulli().build().save_pretrained(tmp_path)
    assert load_likelihood(tmp_path).kind == "bernoulli"
    save_file({"log_scale": torch.tensor(-1.5)}, path)  # as all were before there were others
    loaded = load_likelihood(tmp_path)
    assert (loaded.scale, loaded.log_scale.item()) == ("learned", -1.5)
    save_file({"log_scale": torch.tensor(-1.5), "shape": torch.tensor(1.0)}, path)
    with pytest.raises(InputError, match="holds log_scale, shape, expected log_scale alone"):
        load_likelihood(tmp_path)
    save_file({"log_scale": torch.tensor(-1.5)}, path, metadata={"likelihood": '{"kind": "cauchy"}'})
    with pytest.raises(InputError, match=r"likelihood\.safetensors: kind: found 'cauchy'; known are 'gaussian', 'laplace', "):
        load_likelihood(tmp_path)
    save_file({"log_scale": torch.tensor(-1.5)}, path, metadata={"likelihood": '{"kind": "laplace", "scale": "per_pixel"}'})
    with pytest.raises(
        InputError, match=r"likelihood\.safetensors: scale: found 'per_pixel'; Input should be 'learned' or 'fixed'"
    ):
        load_likelihood(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=r"likelihood\.safetensors: .*header.*; run train_vae again"):
        load_likelihood(tmp_path)
    with pytest.raises(InputError, match=r"nowhere/likelihood\.safetensors is missing"):
        load_likelihood(tmp_path / "nowhere")


def test_options_that_mean_nothing_are_refused():
    for kind, options, message in (
        ("gaussian", {"scale": "wide"}, "Input should be 'learned', 'fixed' or 'per_pixel'"),
        ("laplace", {"scale": "per_pixel"}, "Input should be 'learned' or 'fixed'"),
        ("bernoulli", {"scale": "learned"}, r"unknown keys \['scale'\]"),
        ("bernoulli", {"log_scale": -1.0}, r"unknown keys \['log_scale'\]"),
    ):
        with pytest.raises(ValidationError, match=message):
            make(kind, **options)
    assert math.isclose(make("laplace").log_scale.item(), -3)


def test_a_density_as_probabilities_of_8_bit_values():
    per_pixel = make("gaussian", scale="per_pixel", log_scale=-1.5)
    assert (as_discrete(per_pixel).kind, as_discrete(per_pixel).log_scale.item()) == ("discretized_gaussian", -1.5)
    assert as_discrete(make("gaussian")) is None and as_discrete(logistic := make("discretized_logistic")) is logistic
