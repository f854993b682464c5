"""Samplers against exact solutions of the probability-flow ODE and diffusers' schedulers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from scipy.integrate import solve_ivp
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import karras_sigmas, noise_levels
from ldm.diffusion.samplers import SAMPLERS, dpmpp_2m, euler

ORDERS = {"euler": 1, "heun": 2, "dpmpp_2m": 2}
SIGMA_MIN, SIGMA_MAX = 0.05, 20.0
GRIDS: dict[str, Callable[[int], Tensor]] = {
    "exponential": lambda steps: torch.from_numpy(np.geomspace(SIGMA_MAX, SIGMA_MIN, steps + 1)),
    "karras": lambda steps: karras_sigmas(steps + 1, SIGMA_MIN, SIGMA_MAX)[:-1],
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
        return float((SAMPLERS[name](gaussian(mean, std), x, GRIDS[grid](steps)) - exact).abs().max())

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
        return float((SAMPLERS[name](mixture, x, GRIDS["exponential"](steps)) - exact).abs().mean())

    assert order(error) == pytest.approx(ORDERS[name], abs=0.2)


@pytest.mark.parametrize("name", ORDERS)
def test_samples_of_a_mixture_have_its_weights_and_moments(name):
    count = 4000
    noise = torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    steps = {"euler": 200, "heun": 60, "dpmpp_2m": 60}[name]
    samples = SAMPLERS[name](mixture, 80 * noise, karras_sigmas(steps, 0.002, 80.0)).flatten().numpy()
    left = samples < -0.2  # 3 and 6 standard deviations from the components
    assert left.mean() == pytest.approx(WEIGHTS[0], abs=4 * np.sqrt(np.prod(WEIGHTS) / count))
    for part, mean, std in ((samples[left], MEANS[0], STDS[0]), (samples[~left], MEANS[1], STDS[1])):
        assert part.mean() == pytest.approx(mean, abs=4 * std / np.sqrt(len(part)))
        assert part.std() == pytest.approx(std, rel=4 / np.sqrt(2 * len(part)) + 0.01)


@pytest.mark.parametrize("name", ORDERS)
def test_the_last_step_to_zero_is_the_denoisers_estimate(name):
    """And nothing divides by the final 0."""
    x, sigmas = start(), torch.tensor([3.0, 0.0], dtype=torch.float64)
    expected = gaussian(0.7, 0.5)(x, torch.full((len(x),), 3.0, dtype=torch.float64))
    torch.testing.assert_close(SAMPLERS[name](gaussian(0.7, 0.5), x, sigmas), expected)


@pytest.mark.parametrize("name", ORDERS)
def test_evaluations_and_dtype(name):
    seen: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return gaussian(0.0, 1.0)(x, sigma)

    out = SAMPLERS[name](denoise, start().float(), karras_sigmas(8, 0.01, 20.0))
    assert out.dtype == torch.float32
    assert all(sigma.shape == (5,) and sigma.dtype == torch.float32 for sigma in seen)
    assert len(seen) == (15 if name == "heun" else 8)


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
def test_euler_is_diffusers_ddim(spacing):
    theirs = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, timestep_spacing=spacing)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    theirs.set_timesteps(25)
    states, sigmas = scheduler_steps(theirs, start() / SIGMA_MAX)
    denoiser = Denoiser(network, "eps", noise_levels("scaled_linear", 80.0))
    for i, state in enumerate(states[:-1]):
        torch.testing.assert_close(euler(denoiser, state, sigmas[i : i + 2]), states[i + 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(euler(denoiser, states[0], sigmas), states[-1], rtol=1e-4, atol=1e-4)


def test_dpmpp_2m_is_diffusers_dpm_solver():
    theirs = DPMSolverMultistepScheduler(1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="trailing")
    theirs.set_timesteps(25)
    states, sigmas = scheduler_steps(theirs, start() / SIGMA_MAX)
    denoiser = Denoiser(network, "eps", noise_levels("scaled_linear", 80.0))
    for i in range(1, len(states)):
        torch.testing.assert_close(dpmpp_2m(denoiser, states[0], sigmas[: i + 1]), states[i], rtol=1e-4, atol=1e-4)
