"""Samplers against the exact stationary distributions of their updates, and against mistakes planted in copies of them."""

import copy
import inspect
import math
from dataclasses import replace
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import kstest, laplace
from targets import NUM_DATA, Target, run
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ldm.base.errors import InputError
from ldm.base.randomness import fill_normal
from ldm.langevin import sgld
from ldm.langevin.sgld import PSGLD, SAMPLERS, SGHMC, SGLD, Cyclical, Polynomial, normal_like

TARGETS = [
    Target(lr=0.4, precision=1.0),
    Target(lr=0.2, precision=1.0, noise=10.0),
    Target(lr=1.0, precision=1.5, noise=1.0, prior=0.4),
    Target(lr=0.004, precision=100.0, prior=30.0, centre=-2.0),
    Target(lr=0.03, precision=5.0, noise=80.0, prior=1.0, centre=1.0),
    # Where training leaves a weight: far from 0, as seen from the posterior's width, here 0.001.
    Target(lr=2e-7, precision=1e6, noise=6e6, prior=1e3, centre=3.0),
]
FRICTION = 0.3


def assert_moments(weights: Tensor, mean: float, variance: float) -> None:
    """Within 3 standard errors, those of independent Gaussians."""
    assert float(weights.mean()) == pytest.approx(mean, abs=3 * math.sqrt(variance / len(weights)))
    assert float(weights.var()) == pytest.approx(variance, abs=3 * variance * math.sqrt(2 / len(weights)))


def assert_exact(module: ModuleType, name: str, target: Target, **options) -> None:
    """That a module's sampler has the mean of a target and the variance that the formula gives."""
    make = getattr(module, name)
    if name == "SGHMC":
        target = replace(target, friction=FRICTION)
        make = partial(make, friction=FRICTION)
    if name == "PSGLD":  # whose preconditioner is then 1 / root, and does not change; the step size that matters is lr / root
        root = 1e-5 + abs(target.gradient(target.start)) / NUM_DATA
        weights = run(replace(target, lr=target.lr * root), partial(make, adaptation_steps=1), steps=target.steps, **options)
    else:
        weights = run(target, make, **options)
    assert_moments(weights, target.centre, target.formula)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["SGLD", "PSGLD", "SGHMC"])
def test_stationary_distribution(name, target):
    assert_exact(sgld, name, target)


@pytest.mark.parametrize("friction", [1.0, FRICTION, 0.01])
def test_formula_solves_the_lyapunov_equation(friction):
    for target in TARGETS:
        target = replace(target, friction=friction, temperature=0.7)
        assert target.formula == pytest.approx(target.lyapunov, rel=1e-9)


@pytest.mark.parametrize("name", ["SGLD", "PSGLD", "SGHMC"])
@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_temperature(name, temperature):
    assert_exact(sgld, name, replace(TARGETS[0], temperature=temperature))
    assert_exact(sgld, name, replace(TARGETS[1], temperature=temperature))


def test_temperature_0_is_gradient_descent():
    target = Target(lr=0.4, precision=1.0, centre=2.0, temperature=0.0)
    weights = run(target, SGLD, chains=3, steps=4)
    np.testing.assert_allclose(weights, 2 + (1 - 0.4 / 2) ** 4, rtol=1e-6)


def test_float64_parameters():
    assert_exact(sgld, "SGLD", TARGETS[2], dtype=torch.float64)


def test_laplace_prior():
    """At a small step size, alone: of variance 1 / precision, by a Kolmogorov-Smirnov test of 20 000 chains."""
    precision = 8.0  # scale 1/4
    weights = run(
        Target(lr=4e-4, precision=precision, prior=precision), partial(SGLD, prior="laplace"), chains=20_000, steps=3000
    )
    assert kstest(weights.numpy(), laplace(scale=(2 * precision) ** -0.5).cdf).pvalue > 0.01
    error = math.sqrt(5 / len(weights)) / precision  # of a Laplace distribution's variance, whose kurtosis is 6
    assert float(weights.var()) == pytest.approx(1 / precision, abs=3 * error)


def test_decreasing_step_size():
    """It ends at the posterior's variance, and is on the way what the recursion in float64 says, far from it."""
    target, steps = Target(lr=0.0, precision=1.0, noise=20.0), 2000
    schedule = Polynomial.between(0.3, 5e-4, steps, gamma=1.0)
    make = lambda params, lr, **options: SGLD(params, schedule, **options)  # noqa: E731
    exact = [0.0]
    for step in range(steps):
        noise = target.noise if step else 0.0
        exact.append((1 - schedule(step) / 2) ** 2 * exact[-1] + schedule(step) + schedule(step) ** 2 * noise / 4)
    early, late = (run(target, make, chains=20_000, steps=n) for n in (20, steps))
    error = math.sqrt(2 / 20_000)
    assert float(early.var()) == pytest.approx(exact[20], rel=3 * error) and exact[20] > 1.2
    assert float(late.var()) == pytest.approx(exact[steps], rel=3 * error)
    assert float(late.var()) == pytest.approx(1 / target.precision, rel=3 * error)


MISTAKES = {
    "noise of standard deviation ε": ("SGLD", "math.sqrt(lr * group", "lr * math.sqrt(group"),
    "noise of variance ε/2": ("SGLD", "math.sqrt(lr * group", "math.sqrt(lr / 2 * group"),
    "N/n missing": ("SGLD", 'alpha=scale * group["num_data"])', "alpha=scale)"),
    "preconditioned noise unscaled": ("PSGLD", "mul_(noise, torch._foreach_sqrt(roots))", "mul_(noise, roots)"),
    "noise preconditioned like the drift": ("PSGLD", "torch._foreach_mul_(noise, torch._foreach_sqrt(roots))", "pass"),
    "prior left out": ("SGLD", 'group["params"], group["prior_precision"]', 'group["params"], 0.0'),
    "Gaussian prior as Laplace": ("SGLD", "precision and group", "False and group"),
    "prior as weight decay of the mean loss": (
        "SGLD", "params, alpha=scale * precision)", 'params, alpha=scale * precision * group["num_data"])',
    ),
    "prior as decoupled weight decay beside the explicit one": (
        "SGLD", "_add_gradient(noise, group, -lr / 2)\n        if",
        'torch._foreach_mul_(group["params"], 1 - lr * group["prior_precision"])\n'
        "        _add_gradient(noise, group, -lr / 2)\n        if",
    ),
    "momentum left on": (
        "SGLD", 'torch._foreach_add_(group["params"], noise)',
        'velocity = [self.state[p].setdefault("velocity", torch.zeros_like(p)) for p in group["params"]]\n'
        "        torch._foreach_mul_(velocity, 0.9)\n"
        "        torch._foreach_add_(velocity, noise)\n"
        '        torch._foreach_add_(group["params"], velocity)',
    ),
    "gradient clipping left on": (
        "SGLD", "_add_gradient(noise, group, -lr / 2)\n        if",
        'torch.nn.utils.clip_grad_norm_(group["params"], 1.0)\n'
        "        _add_gradient(noise, group, -lr / 2)\n        if",
    ),
    "bfloat16": (
        "SGLD", 'torch._foreach_add_(group["params"], noise)',
        'torch._foreach_add_(group["params"], noise)\n'
        '        torch._foreach_copy_(group["params"], [p.bfloat16() for p in group["params"]])',
    ),
    "momentum without its own noise": ("SGHMC", 'group.get("friction", 1.0)', "1.0"),
}  # fmt: skip


def changed(old: str, new: str) -> ModuleType:
    """A copy of the samplers' module with other code in one place."""
    source = inspect.getsource(sgld)
    assert source.count(old) == 1, f"expected once in the module: {old}"
    module = ModuleType("changed")
    module.__dict__["__name__"] = "ldm.langevin.sgld"  # where its dataclasses look for their module
    exec(source.replace(old, new), module.__dict__)
    return module


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake):
    name, old, new = MISTAKES[mistake]
    module = changed(old, new)
    with pytest.raises(AssertionError):
        for target in TARGETS:
            assert_exact(module, name, target)


@pytest.mark.parametrize("name", ["SGLD", "PSGLD", "SGHMC"])
def test_the_copy_without_a_mistake_passes(name):
    module = changed("class SGLD(", "class SGLD(")
    assert getattr(module, name) is not getattr(sgld, name)
    assert_exact(module, name, TARGETS[2])


# Options and their refusal


def parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(3, 2, dtype=dtype))


@pytest.mark.parametrize("make", SAMPLERS.values())
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.9}, "SGHMC has momentum"),
        ({"nesterov": True}, "SGHMC has momentum"),
        ({"weight_decay": 1e-2}, "prior_precision"),
        ({"betas": (0.9, 0.999)}, "preconditioner"),
        ({"foreach": True}, "has no foreach: leave it out"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"lr": math.nan}, "lr nan"),
        ({"lr": math.inf}, "lr inf"),
        ({"num_data": 0}, "num_data 0"),
        ({"num_data": math.nan}, "num_data nan"),
        ({"prior": "cauchy"}, "gaussian, laplace"),
        ({"prior_precision": -1.0}, "prior_precision -1.0"),
        ({"temperature": math.inf}, "temperature inf"),
    ],
)
def test_options_that_would_sample_something_else(make, options, message):
    """Of a group, or of all."""
    with pytest.raises(InputError, match=message):
        make([{"params": [parameter()], **options}], 0.1, num_data=10)
    with pytest.raises(InputError, match=message):
        make([parameter()], **{"lr": 0.1, "num_data": 10, **options})


def test_the_number_of_data_is_required():
    for make in SAMPLERS.values():
        with pytest.raises(TypeError, match="num_data"):
            make([parameter()], 0.1)


@pytest.mark.parametrize("friction", [0.0, 1.5, math.nan])
def test_friction(friction):
    with pytest.raises(InputError, match="friction"):
        SGHMC([parameter()], 0.1, num_data=10, friction=friction)
    with pytest.raises(InputError, match="friction"):
        SGHMC([{"params": [parameter()], "friction": friction}], 0.1, num_data=10)


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"alpha": -0.1}, {"eps": 0.0}, {"adaptation_steps": 0}])
def test_options_of_the_preconditioner(options):
    with pytest.raises(InputError, match=next(iter(options))):
        PSGLD([parameter()], 0.1, num_data=10, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    with pytest.raises(InputError, match="rounds the noise away"):
        SGLD([parameter(dtype)], 0.1, num_data=10)


def test_hooks_on_gradients():
    hooks = [
        lambda p, optimizer: p.register_hook(lambda gradient: gradient.clamp(-1, 1)),
        lambda p, optimizer: p.register_post_accumulate_grad_hook(lambda p: None),
        lambda p, optimizer: optimizer.register_step_pre_hook(lambda *_: None),
        lambda p, optimizer: register_optimizer_step_pre_hook(lambda *_: None),
    ]
    for hook in hooks:
        p = parameter()
        optimizer = SGLD([p], 0.1, num_data=10)
        handle = hook(p, optimizer)
        p.square().mean().backward()
        with pytest.raises(InputError, match="hook"):
            optimizer.step()
        handle.remove()
        optimizer.step()


def test_a_parameter_without_a_gradient():
    used, unused = parameter(), parameter()
    optimizer = SGLD([used, unused], 0.1, num_data=10)
    used.sum().backward()
    with pytest.raises(InputError, match="has no gradient"):
        optimizer.step()


# Runs


def walk(optimizer: SGLD, params: list[Tensor], steps: int) -> bytes:
    """Steps on a quadratic loss; the parameters' bytes after them."""
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p - 1).square().mean() for p in params).backward()
        optimizer.step()
    return b"".join(p.detach().numpy().tobytes() for p in params)


def parameters() -> list[Tensor]:
    return [parameter(), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(4, dtype=torch.float64))]


@pytest.mark.parametrize("make", SAMPLERS.values())
def test_seed(make):
    def run(seed: int | None) -> bytes:
        params = parameters()
        return walk(make(params, 1e-3, num_data=10, seed=seed), params, 5)

    assert run(1) == run(1) != run(2)
    torch.manual_seed(3)
    drawn = run(None)
    assert drawn != run(None)
    torch.manual_seed(3)
    assert drawn == run(None)


@pytest.mark.parametrize(
    "lr", [1e-3, Polynomial.between(1e-2, 1e-4, 9), Cyclical(1e-2, 12, 3)], ids=["constant", "falls", "cycles"]
)
@pytest.mark.parametrize("make", [SGLD, partial(PSGLD, adaptation_steps=4), PSGLD, SGHMC])
def test_resumed_run(make, lr, tmp_path):
    whole, first = parameters(), parameters()
    uninterrupted = walk(make(whole, lr, num_data=10, seed=4), whole, 9)
    optimizer = make(first, lr, num_data=10, seed=4)
    walk(optimizer, first, 6)
    torch.save({"optimizer": optimizer.state_dict(), "params": first}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=False)
    resumed = make(saved["params"], lr, num_data=10, seed=99)
    resumed.load_state_dict(saved["optimizer"])
    assert walk(resumed, saved["params"], 3) == uninterrupted
    copied, params = copy.deepcopy((optimizer, first))
    assert walk(copied, params, 3) == uninterrupted


def test_noise_does_not_depend_on_the_default_dtype():
    def noise() -> Tensor:
        return normal_like([p], 0)[0]

    p = parameter()
    before = noise()
    torch.set_default_dtype(torch.float64)
    try:
        assert noise().dtype == torch.float32 and torch.equal(noise(), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_closure():
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p - 1).square().mean()
        loss.backward()
        return loss

    p, other = parameter(), parameter()
    with torch.no_grad():
        p.zero_(), other.zero_()
    optimizer = SGLD([p], 1e-3, num_data=10, seed=0)
    assert optimizer.step(closure).item() == 1.0
    assert walk(SGLD([other], 1e-3, num_data=10, seed=0), [other], 1) == p.detach().numpy().tobytes()


def test_groups_have_their_own_options_and_noise():
    params = [nn.Parameter(torch.zeros(20_000)) for _ in range(3)]
    optimizer = SGLD(
        [{"params": params[:1]}, {"params": params[1:], "lr": 0.04, "prior_precision": 5.0}], 0.01, num_data=7, seed=0
    )  # fmt: skip
    for p in params:
        p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    for p, lr in zip(params, (0.01, 0.04, 0.04), strict=True):
        assert_moments(p.detach().double(), -lr / 2 * 7 * 3, lr)
    assert torch.corrcoef(torch.stack(params).detach()).fill_diagonal_(0).abs().max() < 4 / math.sqrt(20_000)
    assert (optimizer.step_size(0), optimizer.step_size(1)) == (0.01, 0.04)


def test_friction_1_is_sgld():
    one, other = parameters(), parameters()
    made = SGHMC(one, 1e-3, num_data=10, prior_precision=2.0, seed=1, friction=1.0)
    assert walk(made, one, 5) == walk(SGLD(other, 1e-3, num_data=10, prior_precision=2.0, seed=1), other, 5)


@pytest.mark.parametrize("adaptation_steps", [None, 3])
def test_preconditioner_that_adapts(adaptation_steps):
    """Against algorithm 1 of Li et al. (2016) in numpy, with the running mean's start corrected for."""
    p = nn.Parameter(torch.linspace(-1, 2, 50))
    optimizer = PSGLD(
        [p], 1e-3, num_data=40, prior_precision=2.0, seed=3, alpha=0.9, eps=1e-3, adaptation_steps=adaptation_steps
    )  # fmt: skip
    weights, squares = p.detach().double().numpy().copy(), np.zeros(50)
    for step in range(6):
        p.grad = (p.detach() - 0.5) ** 3
        optimizer.step()
        gradient = (weights - 0.5) ** 3
        updates = min(step + 1, adaptation_steps or step + 1)
        if step < updates:
            squares = 0.9 * squares + 0.1 * gradient**2
        scale = 1 / (1e-3 + np.sqrt(squares / (1 - 0.9**updates)))
        noise = fill_normal(torch.empty(50), 3, "langevin", 0, step).double().numpy()
        weights += -0.5 * 1e-3 * scale * (40 * gradient + 2 * weights) + np.sqrt(1e-3 * scale) * noise
        np.testing.assert_allclose(p.detach().numpy(), weights, rtol=1e-4, atol=1e-5)


# Schedules


def test_polynomial_schedule_of_welling_and_teh():
    schedule = Polynomial.between(0.01, 1e-4, 10**6, gamma=0.55)
    assert schedule.a == pytest.approx(0.1996, abs=1e-4) and schedule.b == pytest.approx(231, abs=0.5)
    assert schedule(0) == pytest.approx(0.01) and schedule(10**6) == pytest.approx(1e-4)
    assert schedule(5000) == pytest.approx(schedule.a * (schedule.b + 5000) ** -0.55)


@pytest.mark.parametrize(
    ("first", "last", "steps", "gamma"), [(1e-4, 0.01, 10, 0.5), (1, 0, 10, 0.5), (1, 0.1, 0, 0.5), (1, 0.1, 5, 0)]
)
def test_polynomial_schedule_that_does_not_fall(first, last, steps, gamma):
    with pytest.raises(InputError, match="a step size from"):
        Polynomial.between(first, last, steps, gamma)


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [(Polynomial, (-1, 1)), (Polynomial, (1, 0)), (Polynomial, (1, 1, 0)), (Cyclical, (-1, 10, 2)), (Cyclical, (1, 2, 5)),
     (Cyclical, (1, 10, 0)), (Cyclical, (1, 10, 2, 1.0))],
)  # fmt: skip
def test_schedules_that_cannot_be(schedule, arguments):
    with pytest.raises(InputError, match=rf"{schedule.__name__}\(.*give "):
        schedule(*arguments)


@pytest.mark.parametrize(("steps", "cycles"), [(100, 4), (103, 4), (10, 1)])
def test_cyclical_schedule(steps, cycles):
    """Zhang et al. (2020), equation 1, which counts steps from 1, and the part of each cycle that is sampled in algorithm 1."""
    schedule, length = Cyclical(0.3, steps, cycles, exploration=0.7), math.ceil(steps / cycles)
    for k in range(1, steps + 1):
        part = ((k - 1) % length) / length
        assert schedule(k - 1) == pytest.approx(0.3 / 2 * (math.cos(math.pi * part) + 1))
        assert schedule.samples(k - 1) == (part >= 0.7)


def test_schedules_are_followed():
    p = parameter()
    schedule = Polynomial.between(0.1, 0.01, 10)
    optimizer = SGLD([p], schedule, num_data=1, temperature=0.0)
    before = p.detach().clone()
    for step in range(4):
        assert optimizer.step_size() == schedule(step)
        p.grad = torch.ones_like(p)
        optimizer.step()
        before -= schedule(step) / 2
    torch.testing.assert_close(p.detach(), before)
