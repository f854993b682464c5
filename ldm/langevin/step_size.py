"""How large a step of Langevin dynamics may be, from the curvature of the potential and the noise of its gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.langevin.sgld import normal_like

TOLERANCE = 0.05  # relative error of a posterior variance
ITERATIONS = 20  # of the power method at most
CONVERGED = 1e-4  # relative change of the eigenvalue
CURVATURE_MINIBATCHES = 4  # curvatures vary less between minibatches than gradients do, and cost more


@dataclass(frozen=True)
class StepSize:
    """What limits the step size ε at some weights (U as in `ldm.langevin.sgld`), along the direction of largest curvature."""

    curvature: float  # a
    gradient_noise: float  # V, variance of the gradient of U over minibatches
    mean_gradient_noise: float  # the same, averaged over the parameters
    friction: float = 1.0  # α of SGHMC; 1 is SGLD
    temperature: float = 1.0  # T
    direction: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)  # unit vector, shaped like the parameters

    def contraction(self, lr: float) -> float:
        """What a step leaves of a deviation, 1 - εa/2; with momentum, the largest eigenvalue's modulus. Below -1 it diverges."""
        kept = 1 - self.friction
        half = (1 + kept - lr * self.curvature / 2) / 2
        root = half**2 - kept
        return math.sqrt(kept) if root < 0 else half + math.copysign(math.sqrt(root), half)

    def noise_ratio(self, lr: float) -> float:
        """Variance of the injected noise of a step over that of its gradient noise, 4αT/(εV); it should be far above 1."""
        noise = max(self.gradient_noise, self.mean_gradient_noise)
        return 4 * self.friction * self.temperature / (lr * noise) if noise else math.inf

    def inflation(self, lr: float) -> float:
        """Stationary variance over T/a, (1 + εV/(4αT)) / (1 - εa/(4(2 - α))); infinite if the chain diverges."""
        shrink = 1 - lr * self.curvature / (4 * (2 - self.friction))
        return math.inf if shrink <= 0 else (1 + 1 / self.noise_ratio(lr)) / shrink

    def recommended(self, tolerance: float = TOLERANCE) -> float:
        """The largest ε whose `inflation` is at most 1 + tolerance: 1 + εb = (1 + tolerance) (1 - εc)."""
        b, c = 1 / self.noise_ratio(1.0), self.curvature / (4 * (2 - self.friction))
        if b + c == 0:
            raise InputError("the loss has neither curvature nor gradient noise here: it does not depend on these weights")
        return tolerance / (b + (1 + tolerance) * c)

    def warnings(self, lr: float, tolerance: float = TOLERANCE) -> list[str]:
        """Why samples drawn with step size `lr` would not follow the posterior, a sentence each."""
        found, inflation, left = [], self.inflation(lr), f"a step leaves {self.contraction(lr):.3g} of a deviation"
        if not math.isfinite(inflation):
            found.append(f"step size {lr:.3g} diverges: {left}")
        elif inflation > 1 + 2 * tolerance:
            why = f"injected noise is {self.noise_ratio(lr):.3g} times the gradients', {left}"
            instead = f"take {self.recommended(tolerance):.3g}, or larger batches"
            found.append(f"step size {lr:.3g} gives variances about {inflation:.2f} times what they should be ({why}): {instead}")
        if (t := self.temperature) != 1:
            found.append(f"temperature {t:g}: samples are of the posterior to the power of {1 / t:g}")
        return found

    def metrics(self, lr: float) -> dict[str, Any]:
        """What step size `lr` does, by name."""
        values = {name: getattr(self, name)(lr) for name in ("contraction", "noise_ratio", "inflation")}
        return {"lr": lr, "lr_recommended": self.recommended(), **values, "step_size_warnings": self.warnings(lr)}


def find_step_size(
    loss: Callable[[int], Tensor], params: list[Tensor], *, num_data: int, prior_precision: float = 0.0, minibatches: int = 16,
    friction: float = 1.0, temperature: float = 1.0, seed: int = 0, nearby: StepSize | None = None,
) -> StepSize:  # fmt: skip
    """Measure curvature and gradient noise at the present weights. `loss(i)` is the mean loss of minibatch i.

    The curvature is the largest eigenvalue, by modulus, of the Hessian over the first minibatches (power method), the noise the
    variance of gradients along its eigenvector. With `nearby`, measured at other weights, only the noise is measured anew.
    """
    if minibatches < 2:
        raise InputError(f"minibatches {minibatches}: a variance takes 2 or more")
    if not temperature > 0:
        raise InputError(f"temperature {temperature:g}: without noise there is nothing to sample; give more than 0")

    def gradient(i: int, graph: bool = False) -> list[Tensor]:
        return [g * num_data for g in torch.autograd.grad(loss(i), params, create_graph=graph, materialize_grads=True)]

    few, vector = min(CURVATURE_MINIBATCHES, minibatches), normal_like(params, seed, "step size")
    curvature, unit = (nearby.curvature, list(nearby.direction)) if nearby else (0.0, [])
    for _ in range(0 if nearby else ITERATIONS):
        norm = _dot(vector, vector).sqrt()
        unit = [v / norm for v in vector]
        vector = [prior_precision * u for u in unit]  # then plus the Hessian times `unit`
        for i in range(few):
            slope = _dot(gradient(i, graph=True), unit)
            if slope.requires_grad:  # else the loss is linear
                torch._foreach_add_(vector, torch.autograd.grad(slope, params, materialize_grads=True), alpha=1 / few)
        before, curvature = curvature, float(_dot(vector, unit))
        if abs(curvature - before) <= CONVERGED * abs(curvature):
            break
    gradients = [gradient(i) for i in range(minibatches)]
    along = torch.stack([_dot(g, unit) for g in gradients]).var()
    each = torch.stack([torch.stack(parts).double().var(0).sum() for parts in zip(*gradients, strict=True)]).sum()
    mean = float(each) / sum(p.numel() for p in params)
    return StepSize(abs(curvature), float(along), mean, friction, temperature, tuple(unit))


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()
