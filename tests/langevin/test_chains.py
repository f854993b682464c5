"""Chains side by side: the same as one after the other and as one alone; what they keep, and files of it."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from ldm.base.errors import InputError
from ldm.langevin.chains import Chains, Draws, control_variates
from ldm.langevin.sgld import SAMPLERS, SGHMC, SGLD, Cyclical, Polynomial

NET = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


def net_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (functional_call(NET, weights, x) - y).square().mean()


def linear_loss(weights: dict[str, Tensor]) -> Tensor:
    return weights["a"].sum() + 2 * weights["b"].sum()


def start(chains: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(chains, *p.shape, generator=generator) for n, p in NET.named_parameters()}


def run(chains: Chains, steps: int = 6, count: int = 3) -> Chains:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        chains.step(torch.randn(count, 5, 2, generator=generator), torch.randn(count, 5, 1, generator=generator))
    return chains


@pytest.mark.parametrize("make", SAMPLERS.values())
def test_vectorized_or_not(make):
    sampler = partial(make, lr=1e-3, num_data=20, prior_precision=1.0, seed=3)
    one, other = (run(Chains(net_loss, start(3), sampler, vectorized=v)).draws() for v in (True, False))
    assert one.count == other.count == 18
    for name, value in one.values.items():
        torch.testing.assert_close(value, other.values[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vectorized", [True, False])
def test_each_chain_is_an_ordinary_run(vectorized):
    """At temperature 0, where chains differ by their starts and minibatches only, against plain autograd and SGD."""
    schedule = Polynomial.between(1e-2, 1e-3, 6)
    sampler = partial(SGLD, lr=schedule, num_data=20, temperature=0.0)
    found = run(Chains(net_loss, start(3), sampler, vectorized=vectorized)).parameters
    for chain in range(3):
        weights = {name: value[chain].clone().requires_grad_() for name, value in start(3).items()}
        generator = torch.Generator().manual_seed(2)
        for step in range(6):
            x, y = torch.randn(3, 5, 2, generator=generator), torch.randn(3, 5, 1, generator=generator)
            gradients = torch.autograd.grad(net_loss(weights, x[chain], y[chain]), list(weights.values()))
            with torch.no_grad():
                for weight, gradient in zip(weights.values(), gradients, strict=True):
                    weight -= schedule(step) / 2 * 20 * gradient
        for name, weight in weights.items():
            torch.testing.assert_close(found[name][chain], weight, rtol=1e-4, atol=1e-6)


def test_chains_have_their_own_noise():
    equal = {"a": torch.zeros(4, 5000), "b": torch.zeros(4)}
    chains = Chains(linear_loss, equal, partial(SGLD, lr=1e-2, num_data=1, seed=0))
    chains.step()
    assert np.abs(np.corrcoef(chains.draws().values["a"][:, 0]) - np.eye(4)).max() < 4 / 5000**0.5
    assert not equal["a"].any()


def kept(sampler, **options) -> tuple[list[int], Tensor]:
    """How many steps were taken when each draw was kept: without noise, `a` counts them."""
    chains = Chains(linear_loss, {"a": torch.zeros(2), "b": torch.zeros(2, 3)}, sampler, **options)
    for _ in range(20):
        chains.step()
    draws = chains.draws()
    assert {name: tuple(v.shape) for name, v in draws.values.items()} == {
        "a": (2, len(draws.weights)), "b": (2, len(draws.weights), 3),
    }  # fmt: skip
    return [round(float(-a)) for a in draws.values["a"][0]], draws.weights


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, list(range(1, 21))),
        ({"burn_in": 15}, [16, 17, 18, 19, 20]),
        ({"thin": 6}, [6, 12, 18]),
        ({"burn_in": 5, "thin": 4}, [9, 13, 17]),
        ({"keep": Cyclical(1.0, 20, 2, exploration=0.7).samples}, [8, 9, 10, 18, 19, 20]),
        ({"keep": Cyclical(1.0, 20, 2, exploration=0.7).samples, "burn_in": 10, "thin": 2}, [18, 20]),
    ],
)
def test_which_steps_are_kept(options, expected):
    found, weights = kept(partial(SGLD, lr=2.0, num_data=1, temperature=0.0), **options)
    assert found == expected and weights.tolist() == [2.0] * len(expected)


def test_draws_weigh_as_much_as_their_step_size():
    schedule = Cyclical(1.0, 20, 2)
    _, weights = kept(partial(SGLD, lr=schedule, num_data=1), burn_in=5, thin=4)
    np.testing.assert_allclose(weights, [schedule(8), schedule(12), schedule(16)])


def test_losses_are_those_before_the_step():
    chains = Chains(linear_loss, {"a": torch.tensor([1.0, 5.0]), "b": torch.zeros(2)}, partial(SGLD, lr=1.0, num_data=1))
    assert chains.step().tolist() == [1.0, 5.0]


def test_no_draws_yet():
    chains = Chains(linear_loss, {"a": torch.zeros(2), "b": torch.zeros(2)}, partial(SGLD, lr=1.0, num_data=1), burn_in=3)
    chains.step()
    with pytest.raises(InputError, match="no draws after 1 steps of which 3 are burn-in"):
        chains.draws()


def test_bad_options():
    sampler, weights = partial(SGLD, lr=1.0, num_data=1), {"a": torch.zeros(2), "b": torch.zeros(2)}
    for options in ({"burn_in": -1}, {"thin": 0}):
        with pytest.raises(InputError, match="burn_in"):
            Chains(linear_loss, weights, sampler, **options)
    for bad in ({"a": torch.zeros(2), "b": torch.zeros(3)}, {}):
        with pytest.raises(InputError, match="start"):
            Chains(linear_loss, bad, sampler)


# Files


def some_draws() -> Draws:
    return run(Chains(net_loss, start(3), partial(SGHMC, lr=1e-3, num_data=20, seed=3), thin=2)).draws()


def test_a_file_of_draws(tmp_path):
    draws, path = some_draws(), tmp_path / "draws.safetensors"
    draws.save(path, {"sampler": "sghmc", "part": ["decoder.1"]})
    loaded, about = Draws.load(path)
    assert about == {"sampler": "sghmc", "part": ["decoder.1"]}
    assert loaded.values.keys() == draws.values.keys() and torch.equal(loaded.weights, draws.weights)
    assert all(torch.equal(loaded.values[name], value) for name, value in draws.values.items())
    some_draws().save(tmp_path / "again.safetensors", {"part": ["decoder.1"], "sampler": "sghmc"})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_iterating_draws():
    draws = some_draws()
    each = list(draws)
    assert len(each) == draws.count == 9
    for number, one in enumerate(each):
        assert all(torch.equal(one[name], value[number // 3, number % 3]) for name, value in draws.values.items())
    x = torch.ones(1, 2)
    assert functional_call(NET, each[0], x).shape == (1, 1)


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text(json.dumps({"draws": []}))
    elif how == "other tensors":
        save_file({"w": torch.zeros(3)}, path)
    elif how == "no weights":
        save_file({"draws.w": torch.zeros(1, 3)}, path, metadata={"about": "{}"})
    elif how == "about":
        save_file({"draws.w": torch.zeros(1, 3), "weights": torch.ones(3)}, path, metadata={"about": "{"})
    elif how == "no draws":
        save_file({"weights": torch.ones(3)}, path, metadata={"about": "{}"})


@pytest.mark.parametrize("how", ["cut", "empty", "text", "other tensors", "no weights", "about", "no draws"])
def test_a_damaged_file(how, tmp_path):
    path = tmp_path / "draws.safetensors"
    some_draws().save(path)
    damage(path, how)
    with pytest.raises(InputError, match=r"draws\.safetensors: holds no posterior samples"):
        Draws.load(path)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"draws\.safetensors: holds no .* \(No such file.*\); run the stage sample_posterior"):
        Draws.load(tmp_path / "draws.safetensors")


@pytest.mark.parametrize("done", [1, 4, 5])
@pytest.mark.parametrize("make", SAMPLERS.values())
def test_saved_chains_go_on_as_if_nothing_had_been(make, done, tmp_path):
    """Through a file, before their first draw and after: the same weights and draws to the bit."""
    generator = torch.Generator().manual_seed(2)
    batches = [(torch.randn(3, 5, 2, generator=generator), torch.randn(3, 5, 1, generator=generator)) for _ in range(8)]

    def new() -> Chains:
        return Chains(
            net_loss, start(3), partial(make, lr=Polynomial.between(1e-2, 1e-3, 8), num_data=20, seed=3), burn_in=2, thin=2
        )

    whole, half, other = new(), new(), new()
    for number, batch in enumerate(batches):
        whole.step(*batch)
        if number < done:
            half.step(*batch)
    save_file(half.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"), done)
    for batch in batches[done:]:
        other.step(*batch)
    assert other.done == whole.done == 8
    assert all(torch.equal(other.parameters[name], value) for name, value in whole.parameters.items())
    assert torch.equal(other.draws().weights, whole.draws().weights) and other.draws().count == 9
    assert all(torch.equal(other.draws().values[name], value) for name, value in whole.draws().values.items())


# control variates

DATA = [torch.randn(24, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (2, 1)]
PARTS = [slice(0, 8), slice(8, 16), slice(16, 22), slice(22, 24)]  # of unequal sizes


def point(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in NET.named_parameters()}


def gradient(loss, weights: dict[str, Tensor], *batch: Tensor) -> dict[str, Tensor]:
    """By autograd."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves, *batch), list(leaves.values())), strict=True))


def corrected():
    return control_variates(net_loss, point(0), ([tensor[part] for tensor in DATA] for part in PARTS))


def test_control_variates_add_the_full_gradient_less_the_minibatchs():
    """Baker et al. 2019, equation 4, term by term."""
    loss, centre, here = corrected(), point(0), point(1)
    batch = [tensor[3:9] for tensor in DATA]
    found, terms = gradient(loss, here, *batch), [
        gradient(net_loss, here, *batch), gradient(net_loss, centre, *batch), gradient(net_loss, centre, *DATA),
    ]  # fmt: skip
    for name, value in found.items():
        torch.testing.assert_close(value, terms[0][name] - terms[1][name] + terms[2][name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss(centre, *batch), net_loss(centre, *batch))  # the loss itself is as it was there


def test_control_variates_change_no_mean_and_take_all_noise_at_their_centre():
    loss, whole = corrected(), gradient(net_loss, point(1), *DATA)
    sizes = [part.stop - part.start for part in PARTS]
    each = [gradient(loss, point(1), *(tensor[part] for tensor in DATA)) for part in PARTS]
    for name, value in whole.items():
        mean = sum(size / 24 * one[name] for size, one in zip(sizes, each, strict=True))
        torch.testing.assert_close(mean, value, rtol=1e-10, atol=1e-12)
    at_centre, expected = gradient(loss, point(0), *(tensor[:3] for tensor in DATA)), gradient(net_loss, point(0), *DATA)
    for name, value in expected.items():
        torch.testing.assert_close(at_centre[name], value, rtol=1e-10, atol=1e-12)
        assert (gradient(net_loss, point(0), *(tensor[:3] for tensor in DATA))[name] - value).abs().max() > 1e-2


def test_chains_under_control_variates_vectorized_or_not():
    def draws(vectorized: bool) -> Draws:
        begin = {name: torch.stack([value + 0.1 * i for i in range(3)]) for name, value in point(0).items()}
        chains = Chains(corrected(), begin, partial(SGHMC, lr=1e-3, num_data=24, seed=3), vectorized=vectorized)
        generator = torch.Generator().manual_seed(2)
        for _ in range(5):
            index = torch.randint(24, (3, 4), generator=generator)
            chains.step(*(tensor[index] for tensor in DATA))
        return chains.draws()

    one, other = draws(True), draws(False)
    for name, value in one.values.items():
        torch.testing.assert_close(value, other.values[name], rtol=1e-9, atol=1e-9)


def test_control_variates_of_no_data_are_refused():
    with pytest.raises(InputError, match="there are none"):
        control_variates(net_loss, point(0), [])
