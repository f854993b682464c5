"""Batches of images in an order that is a function of (seed, epoch, position): training can resume at any position."""

import copy
import itertools
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.base.errors import InputError
from ldm.base.randomness import seed_for
from ldm.data.reader import ShardReader

ROUNDS = 8
BLOCK = 4096  # positions that are permuted together
WINDOW = 4  # shards whose samples are mixed, in a shuffle that reads shard by shard
AHEAD = 4  # batches that each worker decodes ahead


def order(seed: int, size: int, start: int, count: int) -> np.ndarray:
    """Indices of the samples at global positions, int64 (count,). Each epoch is another permutation of all `size` samples."""
    epochs, within = np.divmod(np.arange(start, start + count), size)
    blocks, places = np.divmod(within, BLOCK)
    indices = np.empty(count, dtype=np.int64)
    for epoch, block in sorted(set(zip(epochs.tolist(), blocks.tolist(), strict=True))):
        here = (epochs == epoch) & (blocks == block)
        indices[here] = _block(seed, size, epoch, block)[places[here]]
    return indices


@lru_cache(maxsize=4)
def _block(seed: int, size: int, epoch: int, block: int) -> np.ndarray:
    """One block of an epoch's permutation; it costs little more than the few positions of a batch."""
    positions = np.arange(block * BLOCK, min((block + 1) * BLOCK, size))
    return permute(positions, size, seed_for(seed, "order", epoch))


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of `range(size)` at `positions`: a Feistel network below the next power of four, with cycle walking.

    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains": permute a result again while it is `size` or more.)
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    keys = [seed_for(key, number) for number in range(ROUNDS)]
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right, round_key) & mask)
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


def order_by_shard(seed: int, counts: tuple[int, ...], start: int, count: int, window: int = WINDOW) -> np.ndarray:
    """Like `order`, over shards of `counts` samples, so that only `window` shards are read at a time.

    Each epoch permutes the shards, cuts them into windows, and permutes the samples of each window.
    """
    size = sum(counts)
    positions = np.arange(start, start + count)
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // size).tolist():
        sizes, firsts, ends = _shards(seed, counts, epoch)
        here = np.flatnonzero(positions // size == epoch)
        within = positions[here] % size
        windows = np.searchsorted(ends, within, side="right") // window
        for number in np.unique(windows).tolist():
            first, last = number * window, min((number + 1) * window, len(sizes)) - 1
            begin, end = int(ends[first] - sizes[first]), int(ends[last])
            inside = windows == number
            mixed = begin + permute(within[inside] - begin, end - begin, seed_for(seed, "window", epoch, number))
            places = np.searchsorted(ends, mixed, side="right")
            indices[here[inside]] = firsts[places] + mixed - (ends[places] - sizes[places])
    return indices


@lru_cache(maxsize=2)
def _shards(seed: int, counts: tuple[int, ...], epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the shards in an epoch's order: sizes, indices of their first samples, positions at which they end."""
    sizes = np.array(counts, dtype=np.int64)
    shards = permute(np.arange(len(sizes)), len(sizes), seed_for(seed, "shards", epoch))
    return sizes[shards], (np.cumsum(sizes) - sizes)[shards], np.cumsum(sizes[shards])


def crops(seed: int, start: int, count: int, margin: int, flip: bool) -> np.ndarray:
    """The crops of images at global positions, int64 (count, 3): first row, first column (0 … `margin`), mirrored or not."""
    positions = np.arange(start, start + count).astype(np.uint64)
    draws = [_mix(positions, seed_for(seed, "view", part)) for part in range(3)]
    return np.stack([*(draw % np.uint64(margin + 1) for draw in draws[:2]), draws[2] & np.uint64(flip)], axis=1).astype(np.int64)


class Batches(Dataset[torch.Tensor | InputError]):
    """Training batches of a split, decoded ahead by worker processes, whose number changes nothing.

    `shuffle` is `global` or `shard` (see `order_by_shard`); `flip` mirrors half of the images; a rank gets its part of a batch.
    """

    def __init__(
        self, reader: ShardReader, seed: int, *, shuffle: str = "global", flip: bool = False, workers: int = 0,
        rank: int = 0, ranks: int = 1,
    ):  # fmt: skip
        self.reader, self.seed, self.flip, self.workers, self.rank, self.ranks = reader, seed, flip, workers, rank, ranks
        self._order = partial(order, seed, len(reader))
        if shuffle == "shard":
            self._order = partial(order_by_shard, seed, tuple(len(positions) for _, positions in reader.shard_positions()))
        self._stream: Iterator[torch.Tensor | InputError] = iter(())
        self._next: tuple[int, int] | None = None  # position and size of the batch that the stream gives next

    def at(self, position: int, batch_size: int) -> torch.Tensor:
        """This rank's part of the images at a position, uint8 (batch_size / ranks, C, H, W); a damaged one is an `InputError`."""
        if self._next != (position, batch_size):
            self._stream = iter(())  # ends the workers, which else would be copied
            share = batch_size // self.ranks
            spans = ((start, share) for start in itertools.count(position + self.rank * share, batch_size))
            generator = torch.Generator()  # else the loader would draw a seed for its workers from the global state
            options: dict[str, Any] = {"num_workers": self.workers, "prefetch_factor": AHEAD if self.workers else None}
            # of a copy without a stream: in a cycle of references, the collector ends the loader's queues before its workers,
            # which then do not hear that they should end, and 5 s are waited for each
            self._stream = iter(DataLoader(copy.copy(self), None, sampler=spans, generator=generator, **options))
        batch = next(self._stream)
        self._next = None if isinstance(batch, InputError) else (position + batch_size, batch_size)
        if isinstance(batch, InputError):
            raise batch
        return batch

    def __getitem__(self, span: tuple[int, int]) -> torch.Tensor | InputError:
        """The images of a span (first global position, count), or the error: torch would wrap a worker's in its traceback."""
        margin = self.reader.preprocessing.margin
        chosen = crops(self.seed, *span, margin, self.flip) if margin or self.flip else None
        try:
            return torch.from_numpy(self.reader.images(self._order(*span), chosen))
        except InputError as error:
            return error
