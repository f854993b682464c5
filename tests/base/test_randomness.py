"""Normal numbers: the same for any number of threads and in a forked process, and normal."""

import multiprocessing
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from ldm.base.randomness import CHUNK, fill_normal, fill_rows, generator

SIZE = 5 * CHUNK + 3


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(*position: str | int, count: int = SIZE, std: float = 1.0, threads: int | None = None) -> np.ndarray:
    if threads is not None:
        torch.set_num_threads(threads)
    return fill_normal(torch.empty(count), *position, std=std).numpy()


@pytest.mark.parametrize("count", [0, 1, 7, CHUNK, CHUNK + 1, SIZE])
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads(count):
    alone = drawn(1, "noise", count=count, threads=1)
    for number in (2, 3):
        assert drawn(1, "noise", count=count, threads=number).tobytes() == alone.tobytes()


@pytest.mark.usefixtures("threads")
def test_in_a_forked_process():
    """Whose parent's threads are gone."""
    before = drawn(1, "noise", threads=2)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send_bytes(drawn(1, "noise").tobytes()))
    child.start()
    try:
        assert here.poll(60), "a forked process draws no numbers"
        assert here.recv_bytes() == before.tobytes()
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("std", [1.0, 0.01])
def test_they_are_normal(std):
    found = drawn(3, "noise", 8, std=std)
    assert kstest(found, "norm", args=(0, std)).pvalue > 0.01
    assert abs(found.mean()) < 3 * std / SIZE**0.5
    assert found.var(dtype=np.float64) == pytest.approx(std**2, rel=3 * (2 / SIZE) ** 0.5)


def test_positions_and_chunks_are_independent():
    found = np.stack([drawn(1, "noise", 0), drawn(1, "noise", 1), drawn(2, "noise", 0), np.roll(drawn(1, "noise", 0), CHUNK)])
    assert np.abs(np.corrcoef(found) - np.eye(4)).max() < 4 / SIZE**0.5


def test_a_standard_deviation_of_0():
    assert not drawn(1, std=0.0).any()


def test_rows_are_those_of_their_numbers_however_they_are_shared():
    whole = fill_rows(torch.empty(40, 3, 5), range(100, 140), 7, "noise")
    for i in (0, 13, 39):
        assert torch.equal(whole[i], torch.randn(3, 5, generator=generator(7, "noise", 100 + i)))
    parts = [fill_rows(torch.empty(len(part), 3, 5), part, 7, "noise") for part in (range(100, 117), [117], range(118, 140))]
    assert torch.equal(torch.cat(parts), whole)
    chosen = [139, 100, 120]
    assert torch.equal(fill_rows(torch.empty(3, 3, 5), chosen, 7, "noise"), whole[[number - 100 for number in chosen]])
    assert not torch.equal(fill_rows(torch.empty(40, 3, 5), range(100, 140), 7, "other"), whole)
    values = fill_rows(torch.empty(2000, 50), range(2000), 7, "noise")
    assert kstest(values.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(float(torch.corrcoef(values[:, :2].T)[0, 1])) < 0.1 and abs(float((values[:-1] * values[1:]).mean())) < 0.02
