"""The five parameterisations against their table, written again in numpy."""

import numpy as np
import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import Cosine, Linear

KINDS = ("eps", "x0", "v", "edm", "flow")
SIGMA_DATA = 0.7


def table(kind: str, sigma: np.ndarray) -> tuple[np.ndarray, ...]:
    """c_skip, c_out, c_in, c_noise of noise levels `sigma` (B,) under the linear schedule, and the network's true target
    as coefficients of (x0, n)."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    timestep = np.interp(np.log(sigma), 0.5 * (np.log1p(-alpha_bar) - np.log(alpha_bar)), np.arange(1000.0))
    one, vp, edm = np.ones_like(sigma), 1 / np.sqrt(1 + sigma**2), 1 / np.sqrt(sigma**2 + SIGMA_DATA**2)
    rows = {
        "eps": (one, -sigma, vp, timestep, (0 * one, one)),
        "x0": (0 * one, one, vp, timestep, (one, 0 * one)),
        "v": (1 / (1 + sigma**2), -sigma * vp, vp, timestep, (-sigma * vp, vp)),
        "edm": (
            SIGMA_DATA**2 * edm**2,
            sigma * SIGMA_DATA * edm,
            edm,
            250 * np.log(sigma),
            (sigma * edm / SIGMA_DATA, -SIGMA_DATA * edm),
        ),
        "flow": (1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma), 1000 * sigma / (1 + sigma), (-one, one)),
    }
    return rows[kind]


class Recorder:
    """A network that keeps its inputs and answers with what it was given."""

    def __init__(self, answer: torch.Tensor):
        self.answer = answer

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        self.x, self.timesteps, self.cond = x, timesteps, cond
        return self.answer


@pytest.fixture
def draws() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    sigma = np.exp(random.uniform(np.log(0.02), np.log(80), 12))
    return random.normal(size=(12, 2, 3, 5)), random.normal(size=(12, 2, 3, 5)), sigma


def make(kind: str, net: Recorder) -> Denoiser:
    return Denoiser(net, kind, Linear(sigma_max=1e3).build(), SIGMA_DATA)


def wide(coefficient: np.ndarray) -> np.ndarray:
    return coefficient[:, None, None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_tables_row(kind, draws):
    x0, noise, sigma = draws
    x, answer = x0 + wide(sigma) * noise, np.random.default_rng(1).normal(size=x0.shape)
    skip, out, inp, c_noise, _ = table(kind, sigma)
    net = Recorder(torch.from_numpy(answer))
    found = make(kind, net)(torch.from_numpy(x), torch.from_numpy(sigma))
    np.testing.assert_allclose(found, wide(skip) * x + wide(out) * answer, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(net.x, wide(inp) * x, rtol=1e-10)
    np.testing.assert_allclose(net.timesteps, c_noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_target_denoises_perfectly_and_costs_nothing(kind, draws):
    x0, noise, sigma = draws
    of_x0, of_noise = table(kind, sigma)[-1]
    net = Recorder(torch.from_numpy(wide(of_x0) * x0 + wide(of_noise) * noise))
    denoiser = make(kind, net)
    x, sigma = torch.from_numpy(x0 + wide(sigma) * noise), torch.from_numpy(sigma)
    np.testing.assert_allclose(denoiser(x, sigma), x0, atol=1e-10)
    assert denoiser.loss(torch.from_numpy(x0), torch.from_numpy(noise), sigma).max() < 1e-20


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_mean_square_of_the_networks_error(kind, draws):
    x0, noise, sigma = draws
    of_x0, of_noise = table(kind, sigma)[-1]
    error = np.random.default_rng(2).normal(size=x0.shape)
    net = Recorder(torch.from_numpy(wide(of_x0) * x0 + wide(of_noise) * noise + error))
    loss = make(kind, net).loss(*(torch.from_numpy(a) for a in (x0, noise, sigma)))
    np.testing.assert_allclose(loss, np.square(error).mean((1, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_loss_is_accurate_at_every_level(kind):
    """The target's differences must not cancel: the worst is (x0 - x) / sigma at the smallest level."""
    x0, noise = torch.randn(2, 64, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.logspace(-2, 1.9, 64, dtype=torch.float64)
    answer = torch.zeros_like(x0)
    exact = make(kind, Recorder(answer)).loss(x0, noise, sigma)
    found = make(kind, Recorder(answer.float())).loss(x0.float(), noise.float(), sigma.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_conditions_reach_the_network(draws):
    x0, noise, sigma = (torch.from_numpy(a) for a in draws)
    net, context = Recorder(x0), torch.ones(12, 4, 2)
    make("v", net)(x0, sigma, context=context, context_mask=None)
    assert net.cond["context"] is context
    assert net.cond["context_mask"] is None
    net.cond = {}
    make("v", net).loss(x0, noise, sigma, context=context)
    assert net.cond["context"] is context


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_a_batch_do_not_mix(kind, draws):
    x0, noise, sigma = (torch.from_numpy(a) for a in draws)
    together = make(kind, lambda x, t: x.tanh() + t.view(-1, 1, 1, 1) / 1000)
    whole = together.loss(x0, noise, sigma)
    alone = torch.cat([together.loss(x0[i : i + 1], noise[i : i + 1], sigma[i : i + 1]) for i in range(len(x0))])
    torch.testing.assert_close(whole, alone)


def test_a_networks_parameters_are_the_denoisers():
    net = torch.nn.Conv2d(2, 2, 1)
    assert [p is q for p, q in zip(Denoiser(net, "v", Cosine().build()).parameters(), net.parameters(), strict=True)]
