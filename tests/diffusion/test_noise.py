"""Noise levels against diffusers' schedulers and the distributions they are named after."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from pydantic import ValidationError
from scipy import stats

from ldm.base.options import kinds
from ldm.diffusion.noise import LogNormal, Noise, NoiseLevels, ScaledLinear, Uniform

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}  # the last is not read


every_kind = pytest.mark.parametrize("noise", kinds(Noise))


def make(noise: str, **options: Any) -> NoiseLevels:
    return kinds(Noise)[noise](**options).build()


def draws(noise: str, count: int, **options: Any) -> np.ndarray:
    """Independent sigmas, each the first of a batch of its own."""
    levels, random = make(noise, **options), torch.Generator().manual_seed(0)
    return np.array([float(levels.draw(4, random)[0]) for _ in range(count)], dtype=np.float64)


@pytest.mark.parametrize("noise", SCHEDULES)
def test_table_is_diffusers_schedule(noise):
    start, end = ENDS[noise]
    theirs = DDPMScheduler(1000, beta_start=start, beta_end=end, beta_schedule=SCHEDULES[noise])
    table = make(noise, sigma_max=1e9).table
    alpha_bar = 1 / (1 + table**2)
    np.testing.assert_allclose(alpha_bar, theirs.alphas_cumprod, rtol=2e-5)
    betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
    np.testing.assert_allclose(betas, theirs.betas, rtol=1e-6)


@pytest.mark.parametrize("noise", SCHEDULES)
def test_table_stops_at_sigma_max_without_moving_the_rest(noise):
    whole, cut = make(noise, sigma_max=1e9).table, make(noise, sigma_max=10.0).table
    assert cut[-1] <= 10.0 < whole[len(cut)]
    assert torch.equal(cut, whole[: len(cut)])
    assert (whole.diff() > 0).all()


@pytest.mark.parametrize("noise", SCHEDULES)
def test_zero_terminal_snr_is_diffusers(noise):
    start, end = ENDS[noise]
    theirs = DDIMScheduler(1000, start, end, SCHEDULES[noise], rescale_betas_zero_snr=True)
    alpha_bar = theirs.alphas_cumprod.double()
    table = make(noise, zero_terminal_snr=True).table
    assert table[-1] <= 80.0
    np.testing.assert_allclose(1 / (1 + table**2), alpha_bar[: len(table)], rtol=2e-3, atol=2e-7)  # theirs is float32
    beyond = alpha_bar[len(table) :].numpy()
    assert len(beyond)  # the levels between sigma_max and infinity
    assert (beyond < 1 / (1 + 80.0**2) + 1e-6).all()
    finer = make(noise, sigma_max=1e9, zero_terminal_snr=True).table
    assert len(finer) == 999  # all but the last, where nothing is left of the image
    assert finer[0] == pytest.approx(float(make(noise).table[0]), rel=1e-12)  # and the first stays


@pytest.mark.parametrize("noise", ["linear", "cosine"])
def test_shift_multiplies_the_table(noise):
    plain, shifted = make(noise, sigma_max=1e9), make(noise, sigma_max=1e9, shift=3.0)
    torch.testing.assert_close(shifted.table[:-1], 3 * plain.table[: len(shifted.table) - 1])
    torch.testing.assert_close(shifted.timesteps(3 * plain.table[:900]), plain.timesteps(plain.table[:900]))


def test_shift_is_that_of_flow_matching():
    """Esser et al. 2024, equation 23, as diffusers' flow schedulers apply it: t' = s t / (1 + (s - 1) t)."""
    t = np.linspace(0.01, 0.9, 50)
    shifted = 3 * t / (1 + 2 * t)
    levels = Uniform(sigma_max=1e6, shift=3.0).build()
    found = levels.quantile(torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(found / (1 + found), shifted, atol=2.5e-3)  # sigma_min leaves out a little of [0, 1]


@pytest.mark.parametrize("noise", SCHEDULES)
def test_a_shift_leaves_levels_below_sigma_max(noise):
    for rescaled in (False, True):  # at the smallest sigma_max and the largest shift
        assert len(make(noise, sigma_max=1.0, shift=16.0, zero_terminal_snr=rescaled).table) > 1
    with pytest.raises(ValidationError, match=r"shift\n.*less than or equal to 16"):
        make(noise, shift=1e5)
    with pytest.raises(ValidationError, match=r"sigma_max\n.*greater than or equal to 1"):
        make(noise, sigma_max=0.5)


def test_a_log_uniform_distribution_has_no_shift():
    with pytest.raises(ValidationError, match=r"unknown keys \['shift'\]"):
        make("loguniform", shift=2.0)


@pytest.mark.parametrize("noise", ["lognormal", "uniform"])
def test_continuous_levels_reach_both_ends(noise):
    levels = make(noise)
    assert (levels.sigma_min, levels.sigma_max) == pytest.approx((0.002, 80.0), rel=1e-12)


@pytest.mark.parametrize("noise", [*SCHEDULES, "lognormal", "uniform"])
def test_timesteps_are_exact_at_the_tables_entries_and_interpolate_in_log_sigma(noise):
    levels = make(noise)
    table = levels.table
    count = np.arange(len(table), dtype=np.float64)
    np.testing.assert_allclose(levels.timesteps(table), count, atol=1e-9)
    np.testing.assert_allclose(levels.timesteps(table.float()), count, atol=2e-3)
    between = torch.from_numpy(np.exp(np.random.default_rng(0).uniform(np.log(table[0]), np.log(table[-1]), 500)))
    np.testing.assert_allclose(levels.timesteps(between), np.interp(np.log(between), np.log(table), count), rtol=1e-9, atol=1e-9)
    beyond = torch.tensor([0.0, 1e-9, 1e9], dtype=torch.float64)
    assert levels.timesteps(beyond).tolist() == [0, 0, len(table) - 1]


def test_timesteps_are_those_of_diffusers_euler_scheduler():
    """Its sigma-to-timestep map is an independent reading of the same interpolation."""
    theirs = EulerDiscreteScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alpha_bar = theirs.alphas_cumprod.double().numpy()
    log_sigmas = 0.5 * np.log((1 - alpha_bar) / alpha_bar)
    sigmas = np.array([0.03, 0.5, 3.3, 14.0])
    ours = ScaledLinear().build().timesteps(torch.from_numpy(sigmas))
    np.testing.assert_allclose(ours, theirs._sigma_to_t(sigmas, log_sigmas), atol=1e-3)  # its table is float32


@pytest.mark.parametrize("noise", SCHEDULES)
def test_timesteps_are_drawn_uniformly(noise):
    levels = make(noise)
    sigmas = draws(noise, 3000)
    entries = levels.table.float().double().numpy()
    index = np.searchsorted(entries, sigmas)
    np.testing.assert_array_equal(entries[index], sigmas)  # table entries, nothing between
    assert stats.kstest((index + 0.5) / len(entries), "uniform").pvalue > 0.001


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_continuous_levels_have_their_distributions(shift):
    """Of ln sigma or of the flow's time, each within [0.002, 80]."""

    unshifted = draws("uniform", 3000, shift=shift) / shift
    low, high = (s / (1 + s) for s in (0.002 / shift, 80 / shift))
    assert stats.kstest(unshifted / (1 + unshifted), stats.uniform(low, high - low).cdf).pvalue > 0.001
    for noise, mean, std in (("lognormal", -1.2, 1.2), ("logitnormal", 0.0, 1.0)):
        ends = [(math.log(s / shift) - mean) / std for s in (0.002, 80)]
        expected = stats.truncnorm(*ends, loc=mean + math.log(shift), scale=std)
        assert stats.kstest(np.log(draws(noise, 3000, shift=shift)), expected.cdf).pvalue > 0.001
    log = np.log(draws("loguniform", 3000))
    assert stats.kstest(log, stats.uniform(math.log(0.002), math.log(40_000)).cdf).pvalue > 0.001


def test_logit_normal_is_normal_in_the_logit_of_flow_time():
    sigma = draws("logitnormal", 3000)
    t = sigma / (1 + sigma)
    assert stats.kstest(np.log(t / (1 - t)), stats.norm(0, 1).cdf).pvalue > 0.001


@every_kind
def test_quantiles_are_those_of_the_draws(noise):
    levels = make(noise)
    drawn = levels.draw(8192, torch.Generator().manual_seed(1)).double()
    for share in (0.1, 0.25, 0.5, 0.9):
        below = float((drawn < levels.quantile(torch.tensor([share], dtype=torch.float64))).double().mean())
        assert below == pytest.approx(share, abs=2e-3)


@every_kind
def test_draws_repeat_with_their_generator_and_stay_in_range(noise):
    levels = make(noise, sigma_max=5.0)
    first, again, other = (levels.draw(512, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.float32
    assert first.shape == (512,)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    edges = torch.tensor([levels.sigma_min, levels.sigma_max])  # float32, as the draws are
    assert first.min() >= edges[0]
    assert first.max() <= edges[1] * (1 + 1e-6)


def test_grids_in_closed_form():
    """Evenly apart in ln sigma; in the flow's time, its shift undone; in timesteps as diffusers spaces "trailing" ones."""
    levels = Uniform(shift=2.0).build()
    np.testing.assert_allclose(levels.grid("exponential", 5), [*np.geomspace(80, 0.002, 5), 0], rtol=1e-10)
    t = 40 / 41 * np.array([1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(levels.grid("uniform", 4), [*(2 * t / (1 - t)), 0], rtol=1e-12)
    np.testing.assert_allclose(levels.grid("karras", 7), [*np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 7) ** 7, 0], rtol=1e-12)
    theirs = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="trailing")
    theirs.set_timesteps(20)
    table = ScaledLinear().build()
    np.testing.assert_allclose(table.grid("uniform", 20)[:-1], table.table[theirs.timesteps], rtol=1e-12)
    between = table.grid("uniform", 30)  # 1000 / 30 is no whole number
    assert (between.diff() < 0).all()
    np.testing.assert_allclose(table.timesteps(between[:-1]), 1000 - 1 - np.arange(30) * 1000 / 30, atol=1e-6)
    finest = table.grid("uniform", 1500)  # more steps than timesteps: the last ones go below the first timestep
    assert (finest.diff() < 0).all() and finest[-1] == 0


def test_a_batch_is_stratified():
    """Each of `count` equal parts of flow time holds exactly one draw."""
    levels = Uniform().build()
    sigma = levels.draw(64, torch.Generator().manual_seed(3)).double()
    low, high = 0.002 / 1.002, 80 / 81
    position = (sigma / (1 + sigma) - low) / (high - low)
    gaps = position.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 64), rtol=1e-2, atol=0)


@pytest.mark.parametrize("steps", [2, 20, 50])
def test_karras_grid_is_diffusers(steps):
    theirs = EulerDiscreteScheduler(1000, use_karras_sigmas=True)
    grid = theirs._convert_to_karras(torch.tensor([80.0, 0.002]), num_inference_steps=steps)
    ours = LogNormal().build().grid("karras", steps)
    assert ours.dtype == torch.float64
    assert ours[-1] == 0
    np.testing.assert_allclose(ours[:-1], grid, rtol=1e-6)


def test_karras_grid_in_closed_form():
    levels = NoiseLevels(LogNormal(), torch.tensor([0.01, 40.0], dtype=torch.float64))
    middle = (40.0 ** (1 / 7) / 2 + 0.01 ** (1 / 7) / 2) ** 7
    np.testing.assert_allclose(levels.grid("karras", 3), [40.0, middle, 0.01, 0.0], rtol=1e-12)
    assert levels.grid("karras", 1).tolist() == pytest.approx([40.0, 0.0])
