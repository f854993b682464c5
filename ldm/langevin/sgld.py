"""Stochastic gradient Langevin dynamics: optimizers whose iterates are samples of a posterior (`README.md`).

U(θ) = -log prior(θ) - Σ log p(datum | θ) is estimated from a minibatch, by `num_data` times its *mean* loss. With step size ε
(`lr`) the update is θ ← θ - (ε/2) ∇U(θ) + N(0, ε) (Welling & Teh 2011, equation 4). Its samples follow exp(-U) up to an error
that vanishes with ε: where U has curvature a and the estimated gradient variance V, the variance of θ is
(1 + εV/4) / (a (1 - εa/4)) instead of 1/a.
"""

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
PRIORS = ("gaussian", "laplace")
EXACT = (torch.float32, torch.float64)  # dtypes that do not round the noise of a step away
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {  # option: whether a value is valid, and which values are
    "lr": (lambda lr: callable(lr) or 0 <= lr < math.inf, "a step size of 0 or more, or a function of the step"),
    "num_data": (lambda count: 1 <= count < math.inf, "the size of the data set that minibatches come from, 1 or more"),
    "prior": (lambda prior: prior in PRIORS, f"one of {', '.join(PRIORS)}"),
    "prior_precision": (lambda precision: 0 <= precision < math.inf, "0 or more"),
    "temperature": (lambda temperature: 0 <= temperature < math.inf, "0 or more"),
    "friction": (lambda friction: 0 < friction <= 1, "more than 0 and at most 1, which is SGLD"),
    "alpha": (lambda alpha: 0 <= alpha < 1, "0 or more, and less than 1"),
    "eps": (lambda eps: eps > 0, "more than 0"),
    "adaptation_steps": (lambda steps: steps is None or steps >= 1, "1 or more, or None"),
}
REFUSED = {  # options of other optimizers that would change the sampled distribution, and what to use instead
    **dict.fromkeys(("momentum", "nesterov", "dampening"), "SGHMC has momentum, with the noise that belongs to it (friction)"),
    "betas": "PSGLD has a preconditioner, SGHMC momentum",
    "weight_decay": "state the prior: prior_precision (1 / variance)",
}


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
        """From step size `first` at step 0 to `last` at step `steps`."""
        if not (0 < last < first and steps >= 1 and gamma > 0):
            raise InputError(f"a step size from {first} to {last} in {steps} steps: give 0 < last < first, steps >= 1, gamma > 0")
        b = steps / ((first / last) ** (1 / gamma) - 1)
        return cls(first * b**gamma, b, gamma)

    def __call__(self, step: int) -> float:
        return self.a * (self.b + step) ** -self.gamma


@dataclass(frozen=True)
class Cyclical:
    """Falls from `lr` along half a cosine in each of `cycles` cycles, to visit several modes (Zhang et al. 2020, equation 1).

    The first `exploration` (a fraction) of each cycle only moves the chain; keep the draws for which `samples` is true.
    """

    lr: float
    steps: int  # of all cycles together
    cycles: int
    exploration: float = 0.8

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


class Sampler(torch.optim.Optimizer):
    """Options, checks and noise that all samplers share.

    `lr` is ε, a number or a function of the step. `.grad` holds the gradient of the *mean* loss over a minibatch, in nats;
    `num_data` is the size of the whole data set. The prior is N(0, 1 / prior_precision), or Laplace with that variance; the
    default, 0, is a flat prior. Samples follow exp(-U / temperature). `seed` decides all noise; None draws a seed from torch's
    global generator. Parameter groups may have their own values.

    Raises `InputError` for what would change the sampled distribution: `REFUSED`, half-precision parameters, gradient hooks.
    """

    extra: ClassVar[dict[str, Any]] = {}  # further options of a sampler, with their defaults

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Schedule,
        *,
        num_data: int,
        prior_precision: float = 0.0,
        prior: str = "gaussian",
        temperature: float = 1.0,
        seed: int | None = None,
        **extra: Any,
    ) -> None:
        self._refuse(extra.keys() - self.extra.keys())
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        common = {"num_data": num_data, "prior_precision": prior_precision, "prior": prior, "temperature": temperature}
        self._noise: dict[int, Tensor] = {}  # a buffer for each group, overwritten at every step
        super().__init__(params, {"lr": lr, **common, "seed": seed, **self.extra, **extra})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._refuse(group.keys() - self.defaults.keys() - {"params", "param_names"})
        for name, (valid, expected) in VALID.items():
            if name in group and not valid(group[name]):
                raise InputError(f"{name} {group[name]}: expected {expected}")
        for p in group["params"]:
            _check(p, gradient=False)

    def _refuse(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            raise InputError(f"{type(self).__name__} has no {name}: {REFUSED.get(name, 'leave it out')}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients of the mean loss in `.grad`; a `closure` computes them and returns the loss."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        if self._optimizer_step_pre_hooks or _global_optimizer_pre_hooks:
            raise InputError("a hook that may clip gradients runs before each step of the sampler; remove it")
        for p in (p for group in self.param_groups for p in group["params"]):
            _check(p)
        for number, group in enumerate(self.param_groups):
            lr, count = self.step_size(number), self._count(group)
            noise = self._draw(number, int(count), math.sqrt(lr * group["temperature"] * group.get("friction", 1.0)))
            self._update(group, lr, noise)
            count += 1
        return loss

    def step_size(self, number: int = 0) -> float:
        """ε of the next step of parameter group `number`."""
        group = self.param_groups[number]
        return float(group["lr"](int(self._count(group))) if callable(group["lr"]) else group["lr"])

    def _count(self, group: dict[str, Any]) -> Tensor:
        """Steps taken, int64 (), kept in the state of the group's first parameter so that it is saved with it."""
        return self.state[group["params"][0]].setdefault("step", torch.zeros((), dtype=torch.int64))

    def _update(self, group: dict[str, Any], lr: float, noise: list[Tensor]) -> None:
        """Move a group's parameters; `noise` is shaped like them and may be overwritten."""
        raise NotImplementedError

    def _draw(self, number: int, step: int, std: float) -> list[Tensor]:
        """N(0, std²) shaped like the parameters of a group, drawn in float32 for (seed, group, step)."""
        group = self.param_groups[number]
        params = group["params"]
        if number not in self._noise:
            self._noise[number] = torch.empty(sum(p.numel() for p in params), dtype=torch.float32, device=params[0].device)
        return shaped(fill_normal(self._noise[number], group["seed"], "langevin", number, step, std=std), params)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._noise = {}


def shaped(flat: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Consecutive parts of a vector, with the shapes and dtypes of `params`."""
    parts = flat.split([p.numel() for p in params])
    return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, params, strict=True)]


def _check(p: Tensor, gradient: bool = True) -> None:
    if p.dtype not in EXACT:
        raise InputError(f"a parameter of {tuple(p.shape)} is {p.dtype}, which rounds the noise away: sample float32 parameters")
    if gradient and (p._backward_hooks or p._post_accumulate_grad_hooks):
        raise InputError(f"a parameter of {tuple(p.shape)} has a hook that may change its gradient; remove it")
    if gradient and p.grad is None:
        raise InputError(f"a parameter of {tuple(p.shape)} has no gradient: leave out what the loss does not depend on")


def _add_gradient(to: list[Tensor], group: dict[str, Any], scale: float) -> None:
    """Add `scale` times the estimated gradient of U = num_data · (mean loss) - log prior."""
    params = group["params"]
    torch._foreach_add_(to, [p.grad for p in params], alpha=scale * group["num_data"])
    precision = group["prior_precision"]
    if precision and group["prior"] == "gaussian":
        torch._foreach_add_(to, params, alpha=scale * precision)
    elif precision:  # exp(-|θ| / b), whose variance is 2 b²
        torch._foreach_add_(to, torch._foreach_sign(params), alpha=scale * math.sqrt(2 * precision))


class SGLD(Sampler):
    """θ ← θ - (ε/2) ∇U(θ) + N(0, ε T) (Welling & Teh 2011, equation 4)."""

    def _update(self, group: dict[str, Any], lr: float, noise: list[Tensor]) -> None:
        _add_gradient(noise, group, -lr / 2)
        torch._foreach_add_(group["params"], noise)


class PSGLD(Sampler):
    """θ ← θ - (ε/2) G ∇U(θ) + N(0, ε T G), G = 1 / (eps + √V) (Li et al. 2016, algorithm 1).

    V is a running mean of the squared gradients of the mean loss (weight 1 - alpha, corrected for its start at 0). While G
    changes with θ, an exact sampler needs a term Γ = ∂G/∂θ. It is left out, as usual: it vanishes as alpha goes to 1 (section 4).
    After `adaptation_steps` G stays as it is and samples are exact: end the burn-in there.
    """

    extra: ClassVar[dict[str, Any]] = {"alpha": 0.99, "eps": 1e-5, "adaptation_steps": None}

    def _update(self, group: dict[str, Any], lr: float, noise: list[Tensor]) -> None:
        params, alpha = group["params"], group["alpha"]
        step, last = int(self.state[params[0]]["step"]), group["adaptation_steps"]
        squares = [self.state[p].setdefault("square_avg", torch.zeros_like(p)) for p in params]
        if last is None or step < last:
            gradients = [p.grad for p in params]
            torch._foreach_mul_(squares, alpha)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - alpha)
        updates = step + 1 if last is None else min(step + 1, last)
        roots = torch._foreach_sqrt(squares)  # then 1 / G
        torch._foreach_div_(roots, math.sqrt(1 - alpha**updates))
        torch._foreach_add_(roots, group["eps"])
        # G (√(1/G) n - (ε/2) ∇U)
        torch._foreach_mul_(noise, torch._foreach_sqrt(roots))
        _add_gradient(noise, group, -lr / 2)
        torch._foreach_div_(noise, roots)
        torch._foreach_add_(params, noise)


class SGHMC(Sampler):
    """v ← (1 - α) v - (ε/2) ∇U(θ) + N(0, α ε T), θ ← θ + v (Chen et al. 2014, equation 15, with η = ε/2).

    `friction` is α in (0, 1]; 1 is SGLD. A smaller α carries the momentum farther and amplifies the gradients' own noise: the
    variance is (1 + εV/(4α)) / (a (1 - εa/(4(2 - α)))).
    """

    extra: ClassVar[dict[str, Any]] = {"friction": 0.1}

    def _update(self, group: dict[str, Any], lr: float, noise: list[Tensor]) -> None:
        params = group["params"]
        velocity = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        torch._foreach_mul_(velocity, 1 - group["friction"])
        _add_gradient(noise, group, -lr / 2)
        torch._foreach_add_(velocity, noise)
        torch._foreach_add_(params, velocity)


SAMPLERS = {"sgld": SGLD, "psgld": PSGLD, "sghmc": SGHMC}
