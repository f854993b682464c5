"""The order of samples: a function of (seed, epoch, position), so that any position can be resumed at once."""

import numpy as np

from ldm.randomness import seed_for

ROUNDS = 8


def order(seed: int, size: int, start: int, count: int) -> np.ndarray:
    """Sample indices at global positions `start … start + count - 1` over `size` samples, int64 (count,).

    Each epoch is a permutation of its own: every sample exactly once, nothing materialised.
    """
    positions = np.arange(start, start + count)
    epochs = positions // size
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permute(positions[here] % size, size, seed_for(seed, "order", int(epoch)))
    return indices


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of `range(size)` evaluated at `positions`: a Feistel network with cycle walking.

    Black & Rogaway 2002, "Ciphers with arbitrary finite domains": permute the next power of four and walk on
    from values that fall outside.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(ROUNDS):
            left, right = right, left ^ (_mix(right, seed_for(key, round_number)) & mask)
        values[outside] = (left << half) | right
        outside = values >= size
    return values.astype(np.int64)


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014) on `values + key`."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
