"""Stochastic gradient Langevin dynamics: optimizers whose iterates are samples of a posterior (`README.md`).

With U(θ) = -log prior(θ) - Σ log p(datum | θ), estimated by `num_data` times the gradient of a minibatch's *mean* loss, and a
step size ε (`lr`), the update is θ ← θ - (ε/2) ∇U(θ) + N(0, ε) (Welling & Teh 2011, equation 4). Its samples are those of
exp(-U) up to errors that vanish with ε: where the curvature of U is a and the variance of its estimated gradient V, their
variance is (1 + εV/4) / (a (1 - εa/4)), and should be 1/a.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ldm.base.errors import InputError
from ldm.base.randomness import fill_normal

Schedule = Callable[[int], float]  # how many steps were taken, to the step size of the next
PRIORS = ("gaussian", "laplace")
EXACT = (torch.float32, torch.float64)  # types that do not round a step's noise away
# Options of other optimizers that would change what is sampled, and what there is instead.
REFUSED = {
    "momentum": "SGHMC has momentum, with the noise that belongs to it (friction)",
    "nesterov": "SGHMC has momentum, with the noise that belongs to it (friction)",
    "dampening": "SGHMC has momentum, with the noise that belongs to it (friction)",
    "betas": "PSGLD has a preconditioner, SGHMC momentum",
    "weight_decay": "state the prior: prior_precision (1 / variance)",
}


@dataclass(frozen=True)
class Polynomial:
    """ε = a (b + t)^-γ after t steps (Welling & Teh 2011); for 1/2 < γ <= 1 averages weighted by ε converge."""

    a: float
    b: float
    gamma: float = 0.55

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0 and self.gamma > 0):
            raise InputError(f"{self}: give a, b and gamma above 0, or a first and a last step size to Polynomial.between")

    @classmethod
    def between(cls, first: float, last: float, steps: int, gamma: float = 0.55) -> "Polynomial":
        """From step size `first` at step 0 to `last` at step `steps`."""
        if not 0 < last < first or steps < 1 or gamma <= 0:
            raise InputError(
                f"a step size from {first} to {last} in {steps} steps: give 0 < last < first, 1 step or more, gamma > 0"
            )
        b = steps / ((first / last) ** (1 / gamma) - 1)
        return cls(first * b**gamma, b, gamma)

    def __call__(self, step: int) -> float:
        return self.a * (self.b + step) ** -self.gamma


@dataclass(frozen=True)
class Cyclical:
    """Falls from `lr` along half a cosine in each of `cycles` cycles (Zhang et al. 2020, equation 1), which visit several modes.

    Samples are those of each cycle's last part (`samples`), the first `exploration` of it being there to move.
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
    """What the samplers share: their options, what they refuse, their noise, and the gradient of U."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Schedule,
        num_data: int,
        prior_precision: float,
        prior: str,
        temperature: float,
        seed: int | None,
        **own: Any,
    ) -> None:
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        common = {"num_data": num_data, "prior_precision": prior_precision, "prior": prior, "temperature": temperature}
        self._noise: dict[int, Tensor] = {}  # of each group, overwritten at every step
        super().__init__(params, {"lr": lr, **common, "seed": seed, **own})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._refuse(group.keys() - self.defaults.keys() - {"params", "param_names"})
        if not callable(group["lr"]) and not 0 <= group["lr"] < math.inf:
            raise InputError(f"lr {group['lr']}: a step size is 0 or more, or a function of the step")
        if not 1 <= group["num_data"] < math.inf:
            raise InputError(f"num_data {group['num_data']}: the number of data that the mean loss is a mean of, 1 or more")
        if group["prior"] not in PRIORS:
            raise InputError(f"prior {group['prior']!r}: expected one of {', '.join(PRIORS)}")
        for name in ("prior_precision", "temperature"):
            if not (math.isfinite(group[name]) and group[name] >= 0):
                raise InputError(f"{name} {group[name]}: expected 0 or more")
        for p in group["params"]:
            if p.dtype not in EXACT:
                raise InputError(
                    f"a parameter of {tuple(p.shape)} is {p.dtype}, which rounds the noise away: "
                    "sample float32 parameters (autocast may compute in less)"
                )

    def _refuse(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            raise InputError(f"{type(self).__name__} has no {name}: {REFUSED.get(name, 'leave it out')}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, from the gradients of the mean loss in `.grad`. A `closure` computes them and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for number, group in enumerate(self.param_groups):
            lr, count = self.step_size(number), self._count(group)
            noise = self._draw(number, int(count), math.sqrt(lr * group["temperature"] * group.get("friction", 1.0)))
            self._update(group, lr, noise)
            count += 1
        return loss

    def _check_gradients(self) -> None:
        """Before anything moves."""
        if self._optimizer_step_pre_hooks or _global_optimizer_pre_hooks:
            raise InputError("a hook would run before each step of the sampler, where gradients get clipped; remove it")
        for p in (p for group in self.param_groups for p in group["params"]):
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise InputError(f"a parameter of {tuple(p.shape)} has a hook that may change its gradient; remove it")
            if p.dtype not in EXACT:
                raise InputError(f"a parameter of {tuple(p.shape)} became {p.dtype}, which rounds the noise away")
            if p.grad is None:
                raise InputError(f"a parameter of {tuple(p.shape)} has no gradient: leave out what the loss does not depend on")

    def step_size(self, number: int = 0) -> float:
        """ε of the next step, of a parameter group."""
        group = self.param_groups[number]
        return float(group["lr"](int(self._count(group))) if callable(group["lr"]) else group["lr"])

    def _count(self, group: dict[str, Any]) -> Tensor:
        """Steps taken, int64 (); in the state of the group's first parameter, so that it is saved with it."""
        count: Tensor = self.state[group["params"][0]].setdefault("step", torch.zeros((), dtype=torch.int64))
        return count

    def _update(self, group: dict[str, Any], lr: float, noise: list[Tensor]) -> None:
        """Move a group's parameters; `noise` is shaped like them and may be overwritten."""
        raise NotImplementedError

    def _draw(self, number: int, step: int, std: float) -> list[Tensor]:
        """N(0, std²) of the shapes of a group's parameters, float32 drawn for (seed, group, step)."""
        group = self.param_groups[number]
        params = group["params"]
        if number not in self._noise:
            self._noise[number] = torch.empty(sum(p.numel() for p in params), dtype=torch.float32, device=params[0].device)
        flat = fill_normal(self._noise[number], group["seed"], "langevin", number, step, std=std)
        return shaped(flat, params)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._noise = {}


def shaped(flat: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Consecutive parts of a vector, of the shapes and types of `params`."""
    parts = flat.split([p.numel() for p in params])
    return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, params, strict=True)]


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
    """θ ← θ - (ε/2) ∇U(θ) + N(0, ε T) (Welling & Teh 2011, equation 4).

    `lr` is ε, a number or a function of the step. `.grad` holds the gradient of the *mean* loss over a minibatch, `num_data` says
    over how many data it would be a mean if it were of all. The prior is N(0, 1 / prior_precision), or Laplace with that
    variance; 0, the default, is a flat one. Samples are those of exp(-U / temperature). `seed` decides all noise (None: it is
    drawn from torch's own generator).
    Raises `InputError` for what would sample something else: see `REFUSED`, half-precision parameters, hooks on gradients.
    """

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
        **unknown: Any,
    ) -> None:
        self._refuse(unknown)
        super().__init__(params, lr, num_data, prior_precision, prior, temperature, seed)

    def _update(self, group: dict[str, Any], lr: float, noise: list[Tensor]) -> None:
        _add_gradient(noise, group, -lr / 2)
        torch._foreach_add_(group["params"], noise)


class PSGLD(Sampler):
    """θ ← θ - (ε/2) G ∇U(θ) + N(0, ε T G), G = 1 / (eps + √V) (Li et al. 2016, algorithm 1); other options as in `SGLD`.

    V is a running mean (weight 1 - alpha, its start at 0 corrected for) of the squared gradients of the mean loss. While G
    changes with θ, exactness needs a term Γ = ∂G/∂θ, which is left out, as is usual: it vanishes as alpha goes to 1 (section 4).
    After `adaptation_steps` G stands, Γ is 0, and only what comes then is exact: let that be the end of the burn-in.
    """

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
        alpha: float = 0.99,
        eps: float = 1e-5,
        adaptation_steps: int | None = None,
        **unknown: Any,
    ) -> None:
        self._refuse(unknown)
        own = {"alpha": alpha, "eps": eps, "adaptation_steps": adaptation_steps}
        super().__init__(params, lr, num_data, prior_precision, prior, temperature, seed, **own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        alpha, eps, steps = (self.param_groups[-1][name] for name in ("alpha", "eps", "adaptation_steps"))
        if not (0 <= alpha < 1 and eps > 0 and (steps is None or steps >= 1)):
            raise InputError(
                f"alpha {alpha}, eps {eps}, adaptation_steps {steps}: expected 0 or more and below 1, more than 0, and 1 or more"
            )

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
    """v ← (1 - α) v - (ε/2) ∇U(θ) + N(0, α ε T), θ ← θ + v (Chen et al. 2014, equation 15, with η = ε/2); options as in `SGLD`.

    `friction` is α in (0, 1]; 1 is SGLD. The smaller, the farther the momentum carries, and the more the gradients' own noise
    counts: the variance is (1 + εV/(4α)) / (a (1 - εa/(4(2 - α)))).
    """

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
        friction: float = 0.1,
        **unknown: Any,
    ) -> None:
        self._refuse(unknown)
        super().__init__(params, lr, num_data, prior_precision, prior, temperature, seed, friction=friction)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        friction = self.param_groups[-1]["friction"]
        if not 0 < friction <= 1:
            raise InputError(f"friction {friction}: expected more than 0, and 1 (which is SGLD) at most")

    def _update(self, group: dict[str, Any], lr: float, noise: list[Tensor]) -> None:
        params = group["params"]
        velocity = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        torch._foreach_mul_(velocity, 1 - group["friction"])
        _add_gradient(noise, group, -lr / 2)
        torch._foreach_add_(velocity, noise)
        torch._foreach_add_(params, velocity)


SAMPLERS = {"sgld": SGLD, "psgld": PSGLD, "sghmc": SGHMC}


def check_deterministic(module: nn.Module) -> None:
    """Raise an `InputError` where the loss of a module is not a function of its weights and data: dropout, batch statistics."""
    for name, part in module.named_modules():
        rate = getattr(part, "p" if isinstance(part, nn.modules.dropout._DropoutNd) else "dropout", 0)  # of nn.LSTM and others
        random = isinstance(rate, int | float) and rate > 0
        if part.training and (random or isinstance(part, nn.modules.batchnorm._BatchNorm)):
            raise InputError(
                f"{name} ({type(part).__name__}) is in training mode, so the loss is random: call eval() on the model"
            )
