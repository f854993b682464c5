"""The data order against a second implementation, and its promises as properties over sizes, ranks and kill points."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ldm.data.batches import ROUNDS, order, permute
from ldm.randomness import seed_for

SIZES = st.one_of(st.integers(1, 40), st.integers(1, 3000), st.sampled_from([63, 64, 65, 255, 256, 257, 1023, 1024, 1025]))
SEEDS = st.integers(0, 2**31)


def permute_one(position: int, size: int, key: int) -> int:
    """The same cipher in Python's unbounded integers, one position at a time."""

    def mix(z: int) -> int:  # SplitMix64
        z %= 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    half = max(1, math.ceil(math.ceil(math.log2(max(size, 2))) / 2))
    while True:
        left, right = divmod(position, 2**half)
        for number in range(ROUNDS):
            left, right = right, left ^ (mix(right + seed_for(key, number)) % 2**half)
        position = left * 2**half + right
        if position < size:
            return position


@settings(max_examples=60, deadline=None)
@given(size=SIZES, key=st.integers(0, 2**63 - 1), data=st.data())
def test_equals_a_second_implementation(size: int, key: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), max_size=8))
    found = permute(np.array(positions, dtype=np.int64), size, key)
    assert found.tolist() == [permute_one(position, size, key) for position in positions]


@settings(max_examples=100, deadline=None)
@given(size=SIZES, seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_epoch_holds_each_sample_once(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(order(seed, size, epoch * size, size)), np.arange(size))


@settings(max_examples=100, deadline=None)
@given(size=SIZES, seed=SEEDS, start=st.floats(0, 5), count=st.integers(0, 100))
def test_any_position_is_resumed_without_what_came_before(size: int, seed: int, start: float, count: int) -> None:
    start = int(start * size)  # epochs to positions
    from_the_start = order(seed, size, 0, start + count)
    assert np.array_equal(order(seed, size, start, count), from_the_start[start:])


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 100),
    seed=SEEDS,
    ranks=st.integers(1, 5),
    workers=st.integers(1, 4),
    each=st.integers(1, 16),
    kills=st.lists(st.integers(0, 40), max_size=3),
)
def test_ranks_workers_and_kills_leave_one_global_order(
    size: int, seed: int, ranks: int, workers: int, each: int, kills: list[int]
) -> None:
    """Each batch is cut into ranks and their workers' pieces; a kill goes back to the last checkpoint, every 4 batches."""
    batch = ranks * each
    batches = math.ceil(3 * size / batch)
    consumed = np.full(batches * batch, -1)
    number, pending = 0, sorted(kills)
    while number < batches:
        if pending and pending[0] <= number:
            pending.pop(0)
            consumed[number // 4 * 4 * batch :] = -1  # work since the checkpoint is lost
            number = number // 4 * 4
        for rank in range(ranks):
            for worker in range(workers):
                mine = range(number * batch + rank * each + worker, number * batch + (rank + 1) * each, workers)
                for position in mine:
                    consumed[position] = order(seed, size, position, 1)[0]
        number += 1
    assert np.array_equal(consumed, order(seed, size, 0, batches * batch))
    for epoch in range(3):
        assert np.array_equal(np.sort(consumed[epoch * size : (epoch + 1) * size]), np.arange(size))


def test_epochs_and_seeds_differ() -> None:
    size = 1000
    epochs = [order(0, size, epoch * size, size) for epoch in range(3)] + [order(1, size, 0, size)]
    for i, a in enumerate(epochs):
        for b in epochs[:i]:
            assert (a == b).sum() < 10  # chance agreements: Poisson with mean 1


@pytest.mark.parametrize("size", [2, 3, 7, 16, 37])
def test_every_sample_is_as_likely_at_every_position(size: int) -> None:
    epochs = 1500
    table = order(0, size, 0, epochs * size).reshape(epochs, size)
    for position in (0, size // 2, size - 1):
        assert chisquare(np.bincount(table[:, position], minlength=size)).pvalue > 1e-4
    steps = (np.diff(table, axis=1) % size).ravel()  # neighbours are not tied to each other
    assert chisquare(np.bincount(steps, minlength=size)[1:]).pvalue > 1e-4 if size > 2 else True


def test_a_trillion_samples_need_no_memory() -> None:
    size = 10**12 + 7
    start = 5 * size - 5_000
    indices = order(3, size, start, 10_000)  # the end of one epoch and the beginning of the next
    assert indices.min() >= 0 and indices.max() < size
    assert len(set(indices[:5_000].tolist())) == len(set(indices[5_000:].tolist())) == 5_000
    assert indices[:5_000].tolist()[::1000] == [
        permute_one(p % size, size, seed_for(3, "order", 4)) for p in range(start, start + 5_000, 1000)
    ]
