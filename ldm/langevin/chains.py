"""Several chains of a sampler side by side: control variates for their gradients, the draws they keep, their convergence."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.tensors import save_tensors
from ldm.langevin.sgld import SGLD

RHAT, ESS = 1.01, 400.0  # thresholds of Vehtari et al. 2021
Loss = Callable[..., Tensor]  # from the weights of a chain (name -> tensor) and the tensors of its minibatch to the mean loss


@dataclass(frozen=True)
class Draws:
    """Samples of weights."""

    values: dict[str, Tensor]  # by name, (chains, draws, …)
    weights: Tensor  # (draws,), how much each counts in an average: its step size (Welling & Teh 2011, equation 11)

    @property
    def chains(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def count(self) -> int:  # of all chains together
        return self.chains * len(self.weights)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The weights of each draw, name -> tensor, chain after chain."""
        for each in zip(*(value.flatten(0, 1) for value in self.values.values()), strict=True):
            yield dict(zip(self.values, each, strict=True))

    def save(self, path: Path, about: dict[str, Any] | None = None) -> None:
        """Write safetensors with `about` as JSON in the header. Equal draws give equal bytes."""
        draws = {f"draws.{name}": value.contiguous() for name, value in self.values.items()}
        save_tensors({**draws, "weights": self.weights}, path, metadata={"about": json.dumps(about or {}, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> tuple["Draws", dict[str, Any]]:
        """Read the draws and `about` that `save` wrote; `InputError` if the file holds something else."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                values = {name.removeprefix("draws."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            weights = values.pop("weights")
            if not values or any(value.shape[1:2] != weights.shape for value in values.values()):
                raise ValueError("the numbers of draws and weights differ")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: holds no posterior samples ({error}); run the stage sample_posterior") from None
        return cls(values, weights), about


def control_variates(loss: Loss, centre: dict[str, Tensor], batches: Iterable[tuple[Tensor, ...]]) -> Loss:
    """The same mean loss with far less gradient noise near the weights `centre`, best an optimum (Baker et al. 2019, eq. 4)."""
    gradient, centre = torch.func.grad(loss), {name: value.detach() for name, value in centre.items()}
    count, total = 0, {name: torch.zeros_like(value) for name, value in centre.items()}
    for batch in batches:
        for name, value in gradient(centre, *batch).items():
            total[name] += len(batch[0]) * value
        count += len(batch[0])
    if not count:
        raise InputError("control variates need the gradient of all data, and there are none")

    def corrected(weights: dict[str, Tensor], *batch: Tensor) -> Tensor:
        here = gradient(centre, *batch)
        linear = [((total[name] / count - here[name]) * (weights[name] - centre[name])).sum() for name in centre]
        return loss(weights, *batch) + torch.stack(linear).sum()

    return corrected


class Chains:
    """Chains of a `sampler`, such as functools.partial(SGLD, lr=…, num_data=…), each with its own minibatches and noise.

    Their weights are stacked, (chains, …) by name as in `start`; `vectorized` computes their losses at once (torch.func.vmap).
    After the first `burn_in` steps, every `thin`-th step is kept as a draw if `keep(step)` is true.
    """

    def __init__(
        self, loss: Loss, start: dict[str, Tensor], sampler: Callable[[list[Tensor]], SGLD], *, burn_in: int = 0, thin: int = 1,
        keep: Callable[[int], bool] = lambda step: True, vectorized: bool = True,
    ) -> None:  # fmt: skip
        if burn_in < 0 or thin < 1:
            raise InputError(f"burn_in {burn_in}, thin {thin}: give 0 or more, and 1 or more")
        if len({len(value) for value in start.values()}) != 1:
            raise InputError("start: give the weights of equally many chains (the first dimension) under every name")
        self.parameters = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
        self.optimizer = sampler(list(self.parameters.values()))
        self.loss, self.burn_in, self.thin, self.keep, self.vectorized = loss, burn_in, thin, keep, vectorized
        self.done = 0  # steps
        self.kept: dict[str, list[Tensor]] = {name: [] for name in start}  # draws, (chains, …) each
        self.lrs: list[float] = []  # step size of each draw

    def step(self, *batch: Tensor) -> Tensor:
        """One step of every chain on its minibatch, tensors (chains, …); returns the mean losses before it, (chains,)."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.vectorized:
            losses = torch.func.vmap(self.loss)(self.parameters, *batch)
        else:
            names, each = list(self.parameters), zip(*(*self.parameters.values(), *batch), strict=True)
            losses = torch.stack([self.loss(dict(zip(names, one, strict=False)), *one[len(names) :]) for one in each])
        losses.sum().backward()  # the loss of a chain depends on its own weights only
        lr = self.optimizer.step_size()
        self.optimizer.step()
        if self.done >= self.burn_in and (self.done - self.burn_in + 1) % self.thin == 0 and self.keep(self.done):
            self.lrs.append(lr)
            for name, value in self.parameters.items():
                self.kept[name].append(value.detach().to("cpu", copy=True))
        self.done += 1
        return losses.detach()

    def draws(self) -> Draws:
        """The draws kept so far."""
        if not self.lrs:
            raise InputError(f"no draws after {self.done} steps of which {self.burn_in} are burn-in; take more")
        values = {name: torch.stack(kept, 1) for name, kept in self.kept.items()}
        if not all(value.isfinite().all() for value in values.values()):
            raise InputError(f"the chains diverged: weights are not finite after {self.done} steps; take a smaller step size")
        return Draws(values, torch.tensor(self.lrs, dtype=torch.float64))

    def state_dict(self) -> dict[str, Tensor]:
        """Of every parameter its value, its draws and its state in the sampler; `load_state_dict` also needs `done`."""
        state = {"lrs": torch.tensor(self.lrs, dtype=torch.float64)}
        for name, p in self.parameters.items():
            kept = {"draws": torch.stack(self.kept[name], 1)} if self.lrs else {}
            state |= {f"{name}/{entry}": v for entry, v in {"value": p.detach(), **kept, **self.optimizer.state[p]}.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor], done: int) -> None:
        self.lrs, self.done = state["lrs"].tolist(), done
        for name, p in self.parameters.items():
            entries = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            p.detach().copy_(entries.pop("value"))
            self.kept[name] = list(entries.pop("draws").unbind(1)) if self.lrs else []
            self.optimizer.state[p] = {entry: value.to(p.device) for entry, value in entries.items()}


def convergence(values: np.ndarray) -> DataFrame:
    """R-hat, `rhat`, and bulk effective sample size, `ess`, of `values` (chains, draws, quantities) (Vehtari et al. 2021)."""
    import arviz  # here: it takes a second

    data = arviz.convert_to_dataset({"value": values})
    return DataFrame({name: np.ravel(getattr(arviz, name)(data)["value"]) for name in ("rhat", "ess")})


def warnings(found: DataFrame) -> list[str]:
    """Why the draws must not be taken for independent samples of one distribution, a sentence each."""
    rhat, ess = found.rhat.max(), found.ess.min()
    mixed = f"R-hat is {rhat:.3g} where it should be {RHAT} at most: the chains have not mixed; leave more steps between draws"
    many = f"the effective sample size is {ess:.0f} where {ESS:.0f} are asked for; take more draws, farther apart"
    return [warning for warning, passed in ((mixed, rhat <= RHAT), (many, ess >= ESS)) if not passed]
