"""Samplers against exact solutions of the probability-flow ODE and diffusers' schedulers."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from scipy import stats
from scipy.integrate import solve_ivp
from torch import Tensor

from ldm.base.options import kinds
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import NoiseLevels, ScaledLinear
from ldm.diffusion.samplers.ddim import ddim
from ldm.diffusion.samplers.dpmpp_2m import dpmpp_2m
from ldm.diffusion.samplers.heun import heun
from ldm.diffusion.samplers.langevin import langevin
from ldm.diffusion.samplers.sampler import Sampler

ORDERS = {"euler": 1, "heun": 2, "dpmpp_2m": 2}
SIGMA_MIN, SIGMA_MAX = 0.05, 20.0
every_kind = pytest.mark.parametrize("name", kinds(Sampler))


def make(kind: str, **options: float) -> Callable[..., Tensor]:
    return kinds(Sampler)[kind](**options).build(math.inf)


def karras(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    return NoiseLevels(ScaledLinear(), torch.tensor([sigma_min, sigma_max], dtype=torch.float64)).grid("karras", steps)


GRIDS: dict[str, Callable[[int], Tensor]] = {
    "exponential": lambda steps: torch.from_numpy(np.geomspace(SIGMA_MAX, SIGMA_MIN, steps + 1)),
    "karras": lambda steps: karras(steps + 1, SIGMA_MIN, SIGMA_MAX)[:-1],
}


def gaussian(mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser of data N(mean, std²)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = sigma.view(-1, 1, 1, 1) ** 2
        return (std**2 * x + variance * mean) / (std**2 + variance)

    return denoise


WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), np.array([0.4, 0.2])


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of the mixture of WEIGHTS, MEANS, STDS, in every dimension by itself."""
    weights, means, stds = (torch.from_numpy(a) for a in (WEIGHTS, MEANS, STDS))
    noisy, variance = x[..., None], sigma.view(-1, 1, 1, 1, 1) ** 2
    total = stds**2 + variance
    logits = weights.log() - 0.5 * ((noisy - means) ** 2 / total + total.log())
    return (logits.softmax(-1) * (stds**2 * noisy + variance * means) / total).sum(-1)


def start(count: int = 5) -> Tensor:
    noise = torch.randn(count, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return SIGMA_MAX * noise


def order(error: Callable[[int], float]) -> float:
    """Slope of log error over log step count, on the two finest of doubling grids."""
    steps = (80, 160, 320)
    errors = np.log([error(n) for n in steps])
    return float(-np.polyfit(np.log(steps), errors, 1)[0])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ORDERS)
def test_convergence_to_the_closed_form_of_a_gaussian(name, grid):
    mean, std, x = 0.7, 0.5, start()
    exact = mean + (x - mean) * ((std**2 + SIGMA_MIN**2) / (std**2 + SIGMA_MAX**2)) ** 0.5

    def error(steps: int) -> float:
        return float((make(name)(gaussian(mean, std), x, GRIDS[grid](steps)) - exact).abs().max())

    assert error(320) < {1: 0.1, 2: 2e-3}[ORDERS[name]]
    assert order(error) == pytest.approx(ORDERS[name], abs=0.12)


@pytest.mark.parametrize("name", ORDERS)
def test_convergence_to_an_ode_solver_on_a_mixture(name):
    x = start()

    def slope(sigma: float, flat: np.ndarray) -> np.ndarray:
        now = torch.from_numpy(flat).view_as(x)
        return ((now - mixture(now, torch.full((len(x),), sigma, dtype=torch.float64))) / sigma).numpy().ravel()

    solved = solve_ivp(slope, (SIGMA_MAX, SIGMA_MIN), x.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-12)
    exact = torch.from_numpy(solved.y[:, -1]).view_as(x)

    def error(steps: int) -> float:
        return float((make(name)(mixture, x, GRIDS["exponential"](steps)) - exact).abs().mean())

    assert order(error) == pytest.approx(ORDERS[name], abs=0.2)


def noises(shape: tuple[int, ...], seed: int = 2) -> Callable[[int], Tensor]:
    return lambda i: torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + i), dtype=torch.float64)


def mixture_cdf(x: np.ndarray) -> np.ndarray:
    return (WEIGHTS * stats.norm.cdf(x[:, None], MEANS, STDS)).sum(1)


@pytest.mark.parametrize(
    ("sample", "steps"),
    [
        (make("ddpm"), 300),
        (make("ddim", eta=0.5), 300),
        (make("euler"), 200),
        (make("heun"), 60),
        (make("heun", churn=20.0), 60),
        (partial(heun, churn=20.0, churn_max=10.0), 60),
        (make("dpmpp_2m"), 60),
        (make("langevin", step=0.2), 150),
        (make("langevin", step=0.2, corrections=4), 60),
    ],
)
def test_samples_of_a_mixture_are_distributed_as_it_is(sample, steps):
    count = 4000
    shape = (count, 1, 1, 1)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = sample(mixture, 80 * noise, karras(steps, 0.002, 80.0), noises(shape))
    samples = drawn.flatten().numpy()
    assert stats.kstest(samples, mixture_cdf).pvalue > 0.01
    left = samples < -0.2  # 3 and 6 standard deviations from the components
    assert left.mean() == pytest.approx(WEIGHTS[0], abs=4 * np.sqrt(np.prod(WEIGHTS) / count))
    for part, mean, std in ((samples[left], MEANS[0], STDS[0]), (samples[~left], MEANS[1], STDS[1])):
        assert part.mean() == pytest.approx(mean, abs=4 * std / np.sqrt(len(part)))
        assert part.std() == pytest.approx(std, rel=4 / np.sqrt(2 * len(part)) + 0.01)


@pytest.mark.parametrize("step", [0.3, 1.0])
def test_langevin_steps_settle_where_their_discretisation_says(step):
    """Constant step eps, precision a: variance 1 / (a (1 - eps a / 4)), the oracle of stochastic gradient Langevin dynamics."""
    std, sigma, count = 0.5, 2.0, 40_000
    shape = (count, 1, 1, 1)
    sigmas = torch.tensor([sigma * (1 + 1e-9), sigma], dtype=torch.float64)
    start = sigma * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = langevin(gaussian(0.0, std), start, sigmas, noises(shape), step=step, corrections=int(30 / step**2))
    variance, eps = std**2 + sigma**2, (step * sigma) ** 2
    expected = variance / (1 - eps / (4 * variance))
    assert float(found.var()) == pytest.approx(expected, rel=3 * np.sqrt(2 / count))
    assert abs(variance / expected - 1) > {0.3: 1, 1.0: 10}[step] * np.sqrt(2 / count)  # the oracle tells them apart


def test_churn_is_algorithm_2_of_karras_et_al():
    """Written again in numpy, from the paper."""
    shape, churn, high = (4, 1, 1, 1), 6.0, 8.0
    sigmas = karras(10, 0.05, 20.0)
    noise, t = noises(shape), karras(10, 0.05, 20.0).numpy()

    def denoise(x: np.ndarray, level: float) -> np.ndarray:
        return mixture(torch.from_numpy(x), torch.full((4,), level, dtype=torch.float64)).numpy()

    x = start(4)[..., :1, :1].numpy()
    begun = torch.from_numpy(x.copy())
    for i in range(10):
        gamma = min(churn / 10, np.sqrt(2) - 1) if t[i] <= high else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * noise(i).numpy()
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            x = x_hat + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * (x - denoise(x, t[i + 1])) / t[i + 1])
    found = heun(mixture, begun, sigmas, noise, churn=churn, churn_max=high)
    np.testing.assert_allclose(found, x, rtol=1e-10)


def test_heun_churns_levels_only_that_training_reaches():
    x, sigmas, noise = start(), karras(10, 0.05, 20.0), noises((5, 1, 2, 3))
    found = kinds(Sampler)["heun"](churn=6.0).build(15.0)(mixture, x, sigmas, noise)
    assert torch.equal(found, heun(mixture, x, sigmas, noise, churn=6.0, churn_max=15 / math.sqrt(2)))
    assert not torch.equal(found, make("heun", churn=6.0)(mixture, x, sigmas, noise))


def test_stochastic_samplers_draw_by_themselves_where_no_noise_is_given():
    x, sigmas = start(), karras(5, 0.05, SIGMA_MAX)
    for name in ("ddpm", "langevin"):
        torch.manual_seed(3)
        first, second = (make(name)(mixture, x, sigmas) for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        assert torch.equal(first, make(name)(mixture, x, sigmas))


@every_kind
def test_the_last_step_to_zero_is_the_denoisers_estimate(name):
    """And nothing divides by the final 0."""
    x, sigmas = start(), torch.tensor([3.0, 0.0], dtype=torch.float64)
    expected = gaussian(0.7, 0.5)(x, torch.full((len(x),), 3.0, dtype=torch.float64))
    torch.testing.assert_close(make(name)(gaussian(0.7, 0.5), x, sigmas), expected)


@every_kind
def test_evaluations_and_dtype(name):
    seen: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return gaussian(0.0, 1.0)(x, sigma)

    out = make(name)(denoise, start().float(), karras(8, 0.01, 20.0))
    assert out.dtype == torch.float32
    assert all(sigma.shape == (5,) and sigma.dtype == torch.float32 for sigma in seen)
    assert len(seen) == (15 if name in ("heun", "langevin") else 8)


def network(x: Tensor, timesteps: Tensor) -> Tensor:
    """Any smooth function of both will do for comparing samplers."""
    return torch.sin(2 * x + timesteps.view(-1, 1, 1, 1) / 300) + 0.3 * x


def scheduler_steps(scheduler, noise: Tensor) -> tuple[list[Tensor], Tensor]:
    """States x0 + sigma n of a diffusers scheduler, the start included, and the sigmas they lie at."""
    alpha_bar = scheduler.alphas_cumprod.double()
    levels = [((1 - alpha_bar[t]) / alpha_bar[t]).sqrt() for t in scheduler.timesteps]
    sigmas = torch.stack([*levels, torch.zeros((), dtype=torch.float64)])
    state, states = noise, []
    for t, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        states.append(state * (1 + sigma**2).sqrt())
        state = scheduler.step(network(state, t.expand(len(state)).double()), t, state).prev_sample
    return [*states, state], sigmas


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_diffusers_ddim(spacing, eta):
    theirs = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, timestep_spacing=spacing)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64)  # our last level is 0
    theirs.set_timesteps(25)
    begun = start() / SIGMA_MAX
    noise = noises(begun.shape)
    step = theirs.step
    counter = iter(range(25))
    theirs.step = lambda out, t, x: step(out, t, x, eta=eta, variance_noise=noise(next(counter)) if eta else None)
    states, sigmas = scheduler_steps(theirs, begun)
    denoiser = Denoiser(network, "eps", ScaledLinear().build())
    for i, state in enumerate(states[:-1]):
        one = ddim(denoiser, state, sigmas[i : i + 2], lambda _, i=i: noise(i), eta=eta)
        torch.testing.assert_close(one, states[i + 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ddim(denoiser, states[0], sigmas, noise, eta=eta), states[-1], rtol=1e-4, atol=1e-4)
    if spacing == "trailing":  # the grid is theirs too
        grid = ScaledLinear().build().grid("uniform", 25)
        torch.testing.assert_close(grid, sigmas, rtol=1e-5, atol=0)
    if not eta:
        assert torch.equal(make("euler")(denoiser, states[0], sigmas), ddim(denoiser, states[0], sigmas))


def test_ddpm_is_diffusers_ddpm():
    theirs = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, variance_type="fixed_small")
    theirs.alphas_cumprod, theirs.one = theirs.alphas_cumprod.double(), theirs.one.double()
    theirs.set_timesteps(50)
    begun = start() / SIGMA_MAX
    step = theirs.step
    theirs.step = lambda out, t, x: step(out, t, x, generator=torch.Generator().manual_seed(int(t)))
    states, sigmas = scheduler_steps(theirs, begun)
    levels = ScaledLinear().build()

    def noise(i: int) -> Tensor:
        return torch.randn(begun.shape, generator=torch.Generator().manual_seed(int(theirs.timesteps[i])), dtype=torch.float64)

    found = make("ddpm")(Denoiser(network, "eps", levels), states[0], sigmas, noise)
    torch.testing.assert_close(found, states[-1], rtol=1e-4, atol=1e-4)


def test_dpmpp_2m_is_diffusers_dpm_solver():
    theirs = DPMSolverMultistepScheduler(1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="trailing")
    theirs.set_timesteps(25)
    states, sigmas = scheduler_steps(theirs, start() / SIGMA_MAX)
    denoiser = Denoiser(network, "eps", ScaledLinear().build())
    for i in range(1, len(states)):
        torch.testing.assert_close(dpmpp_2m(denoiser, states[0], sigmas[: i + 1]), states[i], rtol=1e-4, atol=1e-4)
