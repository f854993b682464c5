"""Batches of images in an order that is a function of (seed, epoch, position): training can resume at any position."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
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


Stream = Callable[[int, int], np.ndarray]  # start and count -> indices of a group's samples at these positions of its stream


class Order:
    """The training order of samples of several shapes, each batch of one shape: a function of seed, position and batch size.

    `groups` are the samples of each shape, as arrays of their indices. The epochs of a group, one after another, are its
    stream (`order`, or one of `streams`), and its batch j has the stream's positions jB … (j + 1)B - 1: a last short batch is
    completed from the group's own next epoch. Of a group of n samples, epoch e has the batches ⌈e n / B⌉ … ⌈(e + 1) n / B⌉ - 1,
    and whose turn each step of the epoch is, a permutation keyed by (seed, epoch) says.

    So in its stream a sample comes once in n; in the first E epochs E times at least and ⌈(E n + B - 1) / n⌉ times at most.
    """

    def __init__(self, seed: int, groups: Iterable[np.ndarray], streams: Iterable[Stream] | None = None):
        self.seed, self.groups = seed, [np.asarray(group, dtype=np.int64) for group in groups]
        self.sizes = tuple(len(group) for group in self.groups)
        self.streams = [partial(order, seed, size) for size in self.sizes] if streams is None else list(streams)

    def at(self, position: int, batch_size: int) -> np.ndarray:
        """Indices of the samples of the batch at a global position, int64 (batch_size,), all of one group."""
        group, start = 0, position
        if len(self.groups) > 1:
            step, within = divmod(position, batch_size)
            if within:
                raise ValueError(f"position {position} is within a batch of {batch_size}: with several shapes, batches are whole")
            group, number = self._batch(step, batch_size)
            start = number * batch_size
        return self.groups[group][self.streams[group](start, batch_size)]

    def _batch(self, step: int, batch_size: int) -> tuple[int, int]:
        """The group whose turn a step is, and the number of its batch."""
        epoch = step * batch_size // sum(self.sizes)  # or an earlier one: each group's batches are rounded up
        while sum(_batches(self.sizes, epoch, batch_size)) > step:
            epoch -= 1
        before = _batches(self.sizes, epoch, batch_size)
        groups, numbers = _turns(self.seed, self.sizes, epoch, batch_size)
        group, number = int(groups[step - sum(before)]), int(numbers[step - sum(before)])
        return group, before[group] + number


def _batches(sizes: tuple[int, ...], epochs: int, batch_size: int) -> list[int]:
    """How many batches of each group the first `epochs` epochs have."""
    return [-(-epochs * size // batch_size) for size in sizes]


@lru_cache(maxsize=2)
def _turns(seed: int, sizes: tuple[int, ...], epoch: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each step of an epoch: its group, and how many of the epoch's earlier steps are of that group."""
    ends, starts = (_batches(sizes, epochs, batch_size) for epochs in (epoch + 1, epoch))
    counts = [end - start for end, start in zip(ends, starts, strict=True)]
    groups = np.repeat(np.arange(len(sizes)), counts)
    groups = groups[permute(np.arange(len(groups)), len(groups), seed_for(seed, "shapes", epoch))]
    numbers = np.empty_like(groups)
    numbers[np.argsort(groups, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return groups, numbers


def draws(seed: int, start: int, count: int, *purpose: str | int) -> np.ndarray:
    """Even draws for images at global positions, uint64 (count,): for any batches, ranks and workers alike."""
    return _mix(np.arange(start, start + count).astype(np.uint64), seed_for(seed, *purpose))


def fractions(drawn: np.ndarray) -> np.ndarray:
    """Even draws as float64 in [0, 1), (N,)."""
    return (drawn >> np.uint64(11)) * 2.0**-53


def crops(seed: int, start: int, count: int, margin: int, flip: bool) -> np.ndarray:
    """The crops of images at global positions, int64 (count, 3): first row, first column (0 … `margin`), mirrored or not."""
    row, column, side = (draws(seed, start, count, "view", part) for part in range(3))
    places = (row % np.uint64(margin + 1), column % np.uint64(margin + 1), side & np.uint64(flip))
    return np.stack(places, axis=1).astype(np.int64)


class Batches(Dataset[torch.Tensor | InputError]):
    """Training batches of a split, each of one shape, decoded ahead by worker processes, whose number changes nothing.

    `shuffle` is `global` or `shard` (see `order_by_shard`); `flip` mirrors half of the images; a rank gets its part of a batch.
    """

    def __init__(
        self, reader: ShardReader, seed: int, *, shuffle: str = "global", flip: bool = False, workers: int = 0,
        rank: int = 0, ranks: int = 1,
    ):  # fmt: skip
        self.reader, self.seed, self.flip, self.workers, self.rank, self.ranks = reader, seed, flip, workers, rank, ranks
        streams = None
        if shuffle == "shard":
            shards = [(tuple(shard["shape"]), len(positions)) for shard, positions in reader.shard_positions()]
            counts = (tuple(count for shape, count in shards if shape == wanted) for wanted in reader.shapes)
            streams = [partial(order_by_shard, seed, of_shape) for of_shape in counts]
        self.order = Order(seed, reader.shapes.values(), streams)
        self._stream: Iterator[torch.Tensor | InputError] = iter(())
        self._next: tuple[int, int] | None = None  # position and size of the batch that the stream gives next

    def at(self, position: int, batch_size: int) -> torch.Tensor:
        """This rank's part of the images at a position, uint8 (batch_size / ranks, C, H, W); a damaged one is an `InputError`."""
        if self._next != (position, batch_size):
            self._stream = iter(())  # ends the workers, which else would be copied
            spans = ((start, batch_size) for start in itertools.count(position, batch_size))
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
        """This rank's part of a batch (position, size), or the error: torch would wrap a worker's in its traceback."""
        (position, batch_size), margin = span, self.reader.preprocessing.margin
        share = batch_size // self.ranks
        first = self.rank * share
        indices = self.order.at(position, batch_size)[first : first + share]
        chosen = crops(self.seed, position + first, share, margin, self.flip) if margin or self.flip else None
        try:
            return torch.from_numpy(self.reader.images(indices, chosen))
        except InputError as error:
            return error
