"""SGLD's step against SGD and drawing its noise, and its samples against those of `posteriors`, on ten million parameters.

Figures are ratios, above 1 where ours is faster, but for a step's cost over that of its parts. `make bench` prints them; the
tests themselves hold the sides to equal work: equal updates without noise, and moments that are known.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import arviz
import posteriors
import pytest
import torch
from benchmarks.timing import interleaved, times_faster
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ldm.base.device import reuse_freed_memory
from ldm.base.randomness import fill_normal, generator
from ldm.langevin import PSGLD, SGHMC, SGLD

WIDTH, LAYERS, BATCH = 1000, 10, 32
NUM_DATA, LR = 50_000, 1e-8
ROUNDS = 15


@pytest.fixture(autouse=True)
def same_memory() -> Iterator[None]:
    """What our stages set, for both sides."""
    reuse_freed_memory()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def model() -> nn.Sequential:
    """10,020,010 parameters in 22 tensors."""
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, WIDTH), torch.randint(10, (BATCH,))


def with_gradients() -> list[nn.Parameter]:
    net, (x, y) = model(), batch()
    cross_entropy(net(x), y).backward()
    return list(net.parameters())


def size(params: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in params)


def milliseconds(seconds: dict[str, list[float]]) -> None:
    for name, times in seconds.items():
        print(f"  {name}: {median(times) * 1e3:.1f} ms", flush=True)


def test_step_is_sgd_and_normals() -> None:
    """A step of SGLD moves by a step of SGD (of ε num_data / 2) and by what `fill_normal` draws."""
    sampled, descended = with_gradients(), with_gradients()
    start = torch.cat([p.detach().flatten() for p in sampled])
    SGLD(sampled, LR, num_data=NUM_DATA, seed=1).step()
    torch.optim.SGD(descended, LR / 2 * NUM_DATA, foreach=True).step()
    noise = fill_normal(torch.empty(size(sampled)), 1, "langevin", 0, 0, std=math.sqrt(LR))
    ends = [torch.cat([p.detach().flatten() for p in params]) for params in (sampled, descended)]
    torch.testing.assert_close(ends[0] - start, ends[1] - start + noise, rtol=0, atol=1e-6)
    assert (ends[1] - start).abs().max() > 1e-5


def test_step() -> None:
    """Of every sampler, over SGD's and drawing as many normals, one after the other.

    Torch's idle threads look for work for a while, and take it from the cores that draw. So every drawing here follows an
    operation on all of torch's threads, as it does after gradients.
    """
    params, flat, rng = with_gradients(), torch.empty(size(with_gradients())), torch.Generator()
    descend, given = torch.optim.SGD(params, LR / 2 * NUM_DATA, foreach=True).step, {"num_data": NUM_DATA, "seed": 0}
    decay = torch.optim.SGD(params, LR / 2 * NUM_DATA, foreach=True, weight_decay=1 / NUM_DATA).step  # the Gaussian prior's work
    sums = {
        "SGD and one normal_": lambda: (descend(), flat.normal_(generator=rng)),
        "SGD and fill_normal": lambda: (descend(), fill_normal(flat, 0)),
        "SGD with weight decay and fill_normal": lambda: (decay(), fill_normal(flat, 0)),
    }
    samplers = {
        "SGLD": SGLD(params, LR, **given).step,
        "SGLD, Gaussian prior": SGLD(params, LR, prior_precision=1.0, **given).step,
        "SGLD, Laplace prior": SGLD(params, LR, prior_precision=1.0, prior="laplace", **given).step,
        "PSGLD": PSGLD(params, LR, **given).step,
        "SGHMC": SGHMC(params, LR, **given).step,
    }
    seconds = interleaved(sums | {"SGD": descend} | samplers, ROUNDS)
    print(f"\nstep of {flat.numel():,} parameters, {torch.get_num_threads()} threads")
    milliseconds(seconds)
    for parts in sums:
        costs = ", ".join(f"{name} {times_faster(seconds[parts], seconds[name]):.2f}" for name in samplers)
        print(f"  over {parts}: {costs}", flush=True)


def test_normals() -> None:
    flat, rng = torch.empty(size(list(model().parameters()))), generator(0)
    draws = {}
    for threads in {1, 2, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        draws[threads] = fill_normal(flat, 0).clone()
    assert all(torch.equal(draws[1].view(torch.int32), other.view(torch.int32)) for other in draws.values())
    fourth = draws[1].double().pow(4).mean()
    assert fourth == pytest.approx(3, abs=5 * math.sqrt(96 / flat.numel()))  # variance of the fourth power: 105 - 9
    torch.set_num_threads(threads)
    seconds = interleaved({"ours": lambda: fill_normal(flat, 0), "normal_": lambda: flat.normal_(generator=rng)}, ROUNDS)
    print(f"\n{flat.numel():,} normals, {threads} threads: ratio {times_faster(seconds['ours'], seconds['normal_']):.2f}")
    milliseconds(seconds)


@dataclass
class Posteriors:
    """SGLD as `posteriors` documents it: a mean log-likelihood with the temperature 1 / num_data, and the step ε num_data / 2."""

    loss: Callable[[dict[str, Tensor], tuple[Tensor, ...]], Tensor]  # mean negative log-likelihood of a minibatch
    params: dict[str, Tensor]
    lr: float  # ε
    num_data: int
    prior_precision: float = 0.0
    noisy: bool = True
    inplace: bool = True

    def __post_init__(self) -> None:
        def log_posterior(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            value = -self.loss(params, batch)
            if self.prior_precision:
                squares = sum(params[name].square().sum() for name in self.params)
                value = value - self.prior_precision / (2 * self.num_data) * squares
            return value, torch.tensor([])

        temperature = 1 / self.num_data if self.noisy else 0.0
        self.transform = posteriors.sgmcmc.sgld.build(log_posterior, lr=self.lr * self.num_data / 2, temperature=temperature)
        self.state = self.transform.init({name: value.detach().clone() for name, value in self.params.items()})

    def step(self, *batch: Tensor) -> None:
        self.state, _ = self.transform.update(self.state, batch, inplace=self.inplace)


@pytest.mark.parametrize("inplace", [True, False])
def test_posteriors_on_a_gaussian(inplace: bool) -> None:
    """The peer is used as it is meant: of precision a its variance is 1 / (a (1 - εa/4)), which two in ε would make another."""
    a, lr, count = 2.0, 0.4, 40_000
    start = torch.randn(count, generator=generator("start")) / math.sqrt(a)
    theirs = Posteriors(lambda params, _: a / 2 * params["x"].square().sum() / 10, {"x": start}, lr, 10, inplace=inplace)
    torch.manual_seed(0)
    for _ in range(40):
        theirs.step()
    expected = 1 / (a * (1 - lr * a / 4))
    assert theirs.state.params["x"].var().item() == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / count))


def samples(noisy: bool) -> dict[str, tuple[Callable[[], None], Callable[[], Tensor]]]:
    """By name, a step with its gradients, and the parameters in one vector."""
    x, y = batch()
    net = model()
    optimizer = SGLD(net.parameters(), LR, num_data=NUM_DATA, temperature=float(noisy), seed=0)

    def ours() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(net(x), y).backward()
        optimizer.step()

    found = {"ours": (ours, lambda: nn.utils.parameters_to_vector(net.parameters()).detach())}
    call, names = posteriors.model_to_function(model()), dict(model().named_parameters())

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return cross_entropy(call({name: params[name] for name in names}, batch[0]), batch[1])

    for name, inplace in {"posteriors": False, "posteriors, in place": True}.items():
        peer = Posteriors(loss, names, LR, NUM_DATA, noisy=noisy, inplace=inplace)
        found[name] = (lambda p=peer: p.step(x, y), lambda p=peer: torch.cat([p.state.params[n].flatten() for n in names]))
    return found


def test_sample() -> None:
    """With gradients, on the same model and minibatch."""
    start = nn.utils.parameters_to_vector(model().parameters()).detach()
    moved = {}
    for name, (step, vector) in samples(noisy=False).items():
        step()
        moved[name] = vector() - start
    for other in moved.values():
        assert (other - moved["ours"]).norm() < 1e-3 * moved["ours"].norm()

    seconds = interleaved({name: step for name, (step, _) in samples(noisy=True).items()}, ROUNDS)
    print(f"\nsample of {len(start):,} parameters, gradients of {BATCH} data included, {torch.get_num_threads()} threads")
    milliseconds(seconds)
    for name in list(seconds)[1:]:
        print(f"  ratio to {name}: {times_faster(seconds['ours'], seconds[name]):.2f}")


@dataclass(frozen=True)
class Regression:
    """y = X w + N(0, 1), w ~ N(0, I): its posterior is known, and so is where a chain may start."""

    x: Tensor  # (N, D)
    y: Tensor  # (N,)
    mean: Tensor  # (D,)
    factor: Tensor  # Cholesky's, of the covariance

    lr = 5e-4  # 1 - εa/2 is 0.95, and the gradients' noise adds 10 % to the variance
    minibatch = 50
    steps = 2000

    @classmethod
    def random(cls, count: int = 200, dims: int = 10) -> "Regression":
        rng = generator("regression")
        x = torch.randn(count, dims, generator=rng)
        y = x @ torch.randn(dims, generator=rng) + torch.randn(count, generator=rng)
        covariance = torch.linalg.inv(x.T @ x + torch.eye(dims))
        return cls(x, y, covariance @ x.T @ y, torch.linalg.cholesky(covariance))

    def start(self, chains: int) -> Tensor:
        return self.mean + torch.randn(chains, len(self.mean), generator=generator("start")) @ self.factor.T

    def minibatches(self, chains: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(chains, minibatch, D) and (chains, minibatch), one for each step."""
        rng = generator("minibatches")
        for _ in range(self.steps):
            indices = torch.randint(len(self.x), (chains, self.minibatch), generator=rng)
            yield self.x[indices], self.y[indices]

    @staticmethod
    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Of all chains (chains, D) together: each has its own gradient in its row."""
        return 0.5 * (torch.einsum("cnd,cd->cn", x, w) - y).square().mean(1).sum()

    def ours(self, chains: int) -> Tensor:
        """(chains, steps, D)."""
        w = self.start(chains).requires_grad_()
        optimizer = SGLD([w], self.lr, num_data=len(self.x), prior_precision=1.0, seed=0)
        draws = torch.empty(chains, self.steps, len(self.mean))
        for step, (x, y) in enumerate(self.minibatches(chains)):
            optimizer.zero_grad(set_to_none=True)
            self.loss(w, x, y).backward()
            optimizer.step()
            draws[:, step] = w.detach()
        return draws

    def theirs(self, chains: int, inplace: bool) -> Tensor:
        peer = Posteriors(
            lambda params, batch: self.loss(params["w"], *batch), {"w": self.start(chains)}, self.lr, len(self.x), 1.0,
            inplace=inplace,
        )  # fmt: skip
        torch.manual_seed(0)
        draws = torch.empty(chains, self.steps, len(self.mean))
        for step, (x, y) in enumerate(self.minibatches(chains)):
            peer.step(x, y)
            draws[:, step] = peer.state.params["w"]
        return draws


def effective_samples(draws: Tensor) -> float:
    """Of the coordinate that has fewest, of draws (chains, steps, D)."""
    return min(float(arviz.ess(draws[..., i].double().numpy())) for i in range(draws.shape[-1]))


@pytest.mark.parametrize("chains", [1, 16])
def test_effective_samples(chains: int) -> None:
    """A second, of linear regression with minibatches; several chains are rows of one tensor, on both sides."""
    problem = Regression.random()
    ways = {
        "ours": lambda: problem.ours(chains),
        "posteriors": lambda: problem.theirs(chains, inplace=False),
        "posteriors, in place": lambda: problem.theirs(chains, inplace=True),
    }
    found = {name: way() for name, way in ways.items()}
    exact = (problem.factor @ problem.factor.T).diagonal()
    for name, draws in found.items():
        flat, effective = draws.flatten(0, 1), effective_samples(draws)
        assert ((flat.mean(0) - problem.mean) / (flat.var(0) / effective).sqrt()).abs().max() < 4, name
        assert (flat.var(0) / exact).mean() == pytest.approx(1.13, abs=4 * math.sqrt(2 / 10 / effective)), name

    seconds = interleaved(ways, 3)
    print(f"\nlinear regression, {chains} chains of {problem.steps} steps, {torch.get_num_threads()} threads")
    rates = {}
    for name, times in seconds.items():
        rates[name] = effective_samples(found[name]) / median(times)
        micro = median(times) / problem.steps * 1e6
        print(f"  {name}: {micro:.0f} µs a step, {rates[name]:.0f} effective samples a second")
    for name in list(rates)[1:]:
        speed = times_faster(seconds["ours"], seconds[name])
        print(f"  ratio to {name}: {rates['ours'] / rates[name]:.2f} (of steps {speed:.2f})", flush=True)
