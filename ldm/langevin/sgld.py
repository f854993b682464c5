"""Stochastic gradient Langevin dynamics: optimizers whose iterates are samples of a posterior (`README.md`)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ldm.base.errors import InputError
from ldm.base.randomness import fill_normal

Schedule = Callable[[int], float]  # from the number of steps taken to the size of the next step
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {  # option: whether a value is valid, and which values are
    "lr": (lambda lr: callable(lr) or 0 <= lr < math.inf, "a step size of 0 or more, or a function of the step"),
    "num_data": (lambda count: 1 <= count < math.inf, "the size of the data set that minibatches come from, 1 or more"),
    "prior": (lambda prior: prior in ("gaussian", "laplace"), "one of gaussian, laplace"),
    "prior_precision": (lambda precision: 0 <= precision < math.inf, "0 or more"),
    "temperature": (lambda temperature: 0 <= temperature < math.inf, "0 or more"),
    "friction": (lambda friction: 0 < friction <= 1, "more than 0 and at most 1, which is SGLD"),
    "alpha": (lambda alpha: 0 <= alpha < 1, "0 or more, and less than 1"),
    "eps": (lambda eps: eps > 0, "more than 0"),
    "adaptation_steps": (lambda steps: steps is None or steps >= 1, "1 or more, or None"),
}
OPTIONS = {"params", "param_names", "lr", "num_data", "prior_precision", "prior", "temperature", "seed"}  # of every sampler


@dataclass(frozen=True)
class Polynomial:
    """ε = a (b + t)^-γ after t steps (Welling & Teh 2011); averages weighted by ε converge for 1/2 < γ <= 1."""

    a: float
    b: float
    gamma: float = 0.55

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0 and self.gamma > 0):
            raise InputError(f"{self}: give a, b and gamma above 0, or a first and a last step size to Polynomial.between")

    @classmethod
    def between(cls, first: float, last: float, steps: int, gamma: float = 0.55) -> "Polynomial":
        """From step size `first` at step 0 to `last` at step `steps`; `InputError` if it would not fall."""
        if not (0 < last < first and steps >= 1 and gamma > 0):
            raise InputError(f"a step size from {first} to {last} in {steps} steps: give 0 < last < first, steps >= 1, gamma > 0")
        b = steps / ((first / last) ** (1 / gamma) - 1)
        return cls(first * b**gamma, b, gamma)

    def __call__(self, step: int) -> float:
        return self.a * (self.b + step) ** -self.gamma


@dataclass(frozen=True)
class Cyclical:
    """Falls from `lr` along half a cosine in each of `cycles` cycles, to visit several modes (Zhang et al. 2020, equation 1)."""

    lr: float
    steps: int  # of all cycles together
    cycles: int
    exploration: float = 0.8  # first part of each cycle, which only moves the chain: keep the draws for which `samples` is true

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 1 <= self.cycles <= self.steps and 0 <= self.exploration < 1):
            raise InputError(f"{self}: give lr above 0, as many steps as cycles or more, and exploration from 0 to below 1")

    def __call__(self, step: int) -> float:
        return 0.5 * self.lr * (1 + math.cos(math.pi * self._progress(step)))

    def samples(self, step: int) -> bool:
        """Whether the weights after `step` + 1 steps are a sample."""
        return self._progress(step) >= self.exploration

    def _progress(self, step: int) -> float:
        length = math.ceil(self.steps / self.cycles)
        return step % length / length


class SGLD(torch.optim.Optimizer):
    """θ ← θ - (ε/2) ∇U(θ) + N(0, ε T) (Welling & Teh 2011, equation 4), U(θ) = -log prior(θ) - Σ log p(datum | θ).

    `lr` is ε, a number or a function of the step; `temperature` is T. ∇U is estimated by `num_data`, the size of the whole data
    set, times `.grad`, the gradient of the *mean* loss over a minibatch in nats. The prior has the variance 1 / prior_precision,
    0 is flat. `seed` decides all noise; None draws one from torch's global generator. Parameter groups may have their own values.
    `InputError` for what changes the sampled distribution: other optimizers' options, half-precision parameters, gradient hooks.
    """

    extra: ClassVar[dict[str, Any]] = {}  # further options of a sampler, with their defaults

    def __init__(
        self, params: Iterable[Any], lr: float | Schedule, *, num_data: int, prior_precision: float = 0.0,
        prior: str = "gaussian", temperature: float = 1.0, seed: int | None = None, **extra: Any,
    ) -> None:  # fmt: skip
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        common = {"lr": lr, "num_data": num_data, "prior_precision": prior_precision, "prior": prior}
        super().__init__(params, {**common, "temperature": temperature, "seed": seed, **self.extra, **extra})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group, instead = self.param_groups[-1], "SGHMC has momentum, PSGLD a preconditioner; prior_precision is the weight decay"
        for name in sorted(group.keys() - OPTIONS - self.extra.keys()):
            raise InputError(f"{type(self).__name__} has no {name}: leave it out ({instead})")
        for name, (valid, expected) in VALID.items():
            if name in group and not valid(group[name]):
                raise InputError(f"{name} {group[name]}: expected {expected}")
        for dtype in {p.dtype for p in group["params"]} - {torch.float32, torch.float64}:
            raise InputError(f"parameters of {dtype}, which rounds the noise away: sample float32 parameters")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients of the mean loss in `.grad`; a `closure` computes them and returns the loss."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        params = [p for group in self.param_groups for p in group["params"]]
        hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in params)
        if hooked or self._optimizer_step_pre_hooks or _global_optimizer_pre_hooks:
            raise InputError("a hook that may change gradients runs before each step of the sampler; remove it")
        for shape in (tuple(p.shape) for p in params if p.grad is None):
            raise InputError(f"a parameter of {shape} has no gradient: leave out what the loss does not depend on")
        for number, group in enumerate(self.param_groups):
            lr, state = self.step_size(number), self.state[group["params"][0]]
            std = math.sqrt(lr * group["temperature"] * group.get("friction", 1.0))
            self._update(group, lr, normal_like(group["params"], group["seed"], "langevin", number, int(state["step"]), std=std))
            state["step"] += 1
        return loss

    def step_size(self, number: int = 0) -> float:
        """ε of the next step of parameter group `number`, whose steps taken are in the state of its first parameter."""
        group = self.param_groups[number]
        count = self.state[group["params"][0]].setdefault("step", torch.zeros((), dtype=torch.int64))
        return float(group["lr"](int(count)) if callable(group["lr"]) else group["lr"])

    def _update(self, group: dict[str, Any], lr: float, noise: list[Tensor]) -> None:
        """Move a group's parameters; `noise` is shaped like them and may be overwritten."""
        _add_gradient(noise, group, -lr / 2)
        if "friction" in group:
            velocity = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in group["params"]]
            torch._foreach_mul_(velocity, 1 - group["friction"])
            torch._foreach_add_(velocity, noise)
            noise = velocity
        torch._foreach_add_(group["params"], noise)


class PSGLD(SGLD):
    """θ ← θ - (ε/2) G ∇U(θ) + N(0, ε T G), G = 1 / (eps + √V) (Li et al. 2016, algorithm 1).

    V is a running mean of squared gradients of the mean loss (weight 1 - alpha, corrected for its start at 0). The term
    Γ = ∂G/∂θ is left out (section 4). After `adaptation_steps` G stays as it is and samples are exact: end the burn-in there.
    """

    extra: ClassVar[dict[str, Any]] = {"alpha": 0.99, "eps": 1e-5, "adaptation_steps": None}

    def _update(self, group: dict[str, Any], lr: float, noise: list[Tensor]) -> None:
        params, alpha = group["params"], group["alpha"]
        step, last = int(self.state[params[0]]["step"]), group["adaptation_steps"] or math.inf
        squares = [self.state[p].setdefault("square_avg", torch.zeros_like(p)) for p in params]
        if step < last:
            gradients = [p.grad for p in params]
            torch._foreach_mul_(squares, alpha)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - alpha)
        roots = torch._foreach_sqrt(squares)  # then 1 / G
        torch._foreach_div_(roots, math.sqrt(1 - alpha ** min(step + 1, last)))
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(noise, torch._foreach_sqrt(roots))  # G (√(1/G) n - (ε/2) ∇U)
        _add_gradient(noise, group, -lr / 2)
        torch._foreach_div_(noise, roots)
        torch._foreach_add_(params, noise)


class SGHMC(SGLD):
    """v ← (1 - α) v - (ε/2) ∇U(θ) + N(0, α ε T), θ ← θ + v (Chen et al. 2014, equation 15, with η = ε/2)."""

    extra: ClassVar[dict[str, Any]] = {"friction": 0.1}  # α; a smaller one carries farther and amplifies gradient noise


SAMPLERS = {"sgld": SGLD, "psgld": PSGLD, "sghmc": SGHMC}


def normal_like(params: list[Tensor], *position: str | int, std: float = 1.0) -> list[Tensor]:
    """Draws of N(0, std²) shaped like `params`, in float32 and then of their dtypes, for a position (see `fill_normal`)."""
    sizes = [p.numel() for p in params]
    flat = fill_normal(torch.empty(sum(sizes), dtype=torch.float32, device=params[0].device), *position, std=std)
    return [part.view(p.shape).to(p.dtype) for part, p in zip(flat.split(sizes), params, strict=True)]


def _add_gradient(to: list[Tensor], group: dict[str, Any], scale: float) -> None:
    """Add `scale` times the estimated gradient of U = num_data · (mean loss) - log prior."""
    params, precision = group["params"], group["prior_precision"]
    torch._foreach_add_(to, [p.grad for p in params], alpha=scale * group["num_data"])
    if precision and group["prior"] == "gaussian":
        torch._foreach_add_(to, params, alpha=scale * precision)
    elif precision:  # exp(-|θ| / b), whose variance is 2 b²
        torch._foreach_add_(to, torch._foreach_sign(params), alpha=scale * math.sqrt(2 * precision))
