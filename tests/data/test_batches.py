"""The data order against a second implementation, and its promises as properties over sizes, ranks and kill points."""

import gc
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare

from ldm.base.errors import InputError
from ldm.base.randomness import seed_for
from ldm.data.batches import ROUNDS, Batches, Order, crops, order, order_by_shard, permute
from ldm.data.reader import ShardReader, open_shards
from ldm.data.shapes import Buckets, Square
from ldm.data.shards import write_shards

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


# shard by shard, for shards that come from afar

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=12).map(tuple)


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, seed=SEEDS, window=st.integers(1, 5), epoch=st.integers(0, 10**6))
def test_shard_by_shard_every_epoch_holds_each_sample_once(counts: tuple[int, ...], seed: int, window: int, epoch: int) -> None:
    size = sum(counts)
    indices = order_by_shard(seed, counts, epoch * size, size, window)
    assert np.array_equal(np.sort(indices), np.arange(size))


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, seed=SEEDS, window=st.integers(1, 5), start=st.floats(0, 3), count=st.integers(0, 60))
def test_shard_by_shard_any_position_is_resumed(
    counts: tuple[int, ...], seed: int, window: int, start: float, count: int
) -> None:
    begin = int(start * sum(counts))
    whole = order_by_shard(seed, counts, 0, begin + count, window)
    assert np.array_equal(order_by_shard(seed, counts, begin, count, window), whole[begin:])
    one_by_one = [order_by_shard(seed, counts, position, 1, window)[0] for position in range(begin, begin + min(count, 9))]
    assert one_by_one == whole[begin : begin + 9].tolist()[: len(one_by_one)]


@settings(max_examples=50, deadline=None)
@given(counts=COUNTS, seed=SEEDS, window=st.integers(1, 4))
def test_shard_by_shard_few_shards_are_read_at_a_time(counts: tuple[int, ...], seed: int, window: int) -> None:
    shard_of = np.repeat(np.arange(len(counts)), counts)
    for epoch in range(2):
        shards = shard_of[order_by_shard(seed, counts, epoch * len(shard_of), len(shard_of), window)]
        first_seen = dict.fromkeys(shards.tolist())  # shards in the order in which they begin
        last = {shard: np.flatnonzero(shards == shard)[-1] for shard in first_seen}
        begins = {shard: np.flatnonzero(shards == shard)[0] for shard in first_seen}
        open_at_once = max(sum(begins[s] <= t <= last[s] for s in first_seen) for t in range(len(shards)))
        assert open_at_once <= window


def test_shard_by_shard_mixes_within_a_window_and_between_epochs() -> None:
    counts = (50,) * 8
    epochs = [order_by_shard(0, counts, epoch * 400, 400) for epoch in range(2)]
    assert (epochs[0] == epochs[1]).sum() < 15
    first_window = epochs[0][:200] // 50
    assert len(set(first_window)) == 4 and (np.diff(first_window) != 0).mean() > 0.6  # shards alternate


# several shapes

GROUPS = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def groups_of(sizes: list[int], seed: int) -> list[np.ndarray]:
    """Samples 0 to sum(sizes) - 1, dealt out to groups."""
    dealt = np.random.default_rng(seed).permutation(sum(sizes))
    return [np.sort(part) for part in np.split(dealt, np.cumsum(sizes)[:-1])]


def steps(
    seed: int, groups: list[np.ndarray], batch: int, epoch_of: Callable[[int, int], list[int]]
) -> Iterator[tuple[int, int, list[int]]]:
    """A second implementation: epoch, group and batch of every step, one after another, by streams that are read to and fro."""

    def stream(group: int) -> Iterator[int]:
        for epoch in itertools.count():
            yield from (int(groups[group][place]) for place in epoch_of(group, epoch))

    streams, taken = [stream(group) for group in range(len(groups))], [0] * len(groups)
    for epoch in itertools.count():
        labels = []
        for group, samples in enumerate(groups):
            while taken[group] * batch < (epoch + 1) * len(samples):
                taken[group] += 1
                labels.append(group)
        key = seed_for(seed, "shapes", epoch)
        for place in range(len(labels)):
            group = labels[permute_one(place, len(labels), key)]
            yield epoch, group, list(itertools.islice(streams[group], batch))


@settings(max_examples=100, deadline=None)
@given(sizes=GROUPS, seed=SEEDS, batch=st.integers(1, 24), count=st.integers(1, 60), resumed=st.lists(st.integers(0, 59)))
def test_several_shapes_equal_a_second_implementation(
    sizes: list[int], seed: int, batch: int, count: int, resumed: list[int]
) -> None:
    """Wherever a training is resumed, in whatever sequence: each position is asked for on its own."""
    groups = groups_of(sizes, seed)
    slow = steps(seed, groups, batch, lambda group, epoch: order(seed, sizes[group], epoch * sizes[group], sizes[group]).tolist())
    expected = [samples for _, _, samples in itertools.islice(slow, count)]
    if len(sizes) == 1:
        assert list(itertools.chain(*expected)) == order(seed, sizes[0], 0, count * batch).tolist()
    for step in (*range(count), *(step for step in resumed if step < count)):
        assert Order(seed, groups).at(step * batch, batch).tolist() == expected[step]


@settings(max_examples=100, deadline=None)
@given(sizes=GROUPS, seed=SEEDS, batch=st.integers(1, 24), epochs=st.integers(1, 5))
def test_several_shapes_how_often_an_image_is_seen(sizes: list[int], seed: int, batch: int, epochs: int) -> None:
    groups = groups_of(sizes, seed)
    shape_of = np.empty(sum(sizes), dtype=int)
    for number, group in enumerate(groups):
        shape_of[group] = number
    taken, streams = Order(seed, groups), [list[int]() for _ in groups]
    for step in range(sum(-(-epochs * size // batch) for size in sizes)):
        samples = taken.at(step * batch, batch)
        assert samples.dtype == np.int64 and samples.shape == (batch,)
        (number,) = set(shape_of[samples].tolist())  # one shape a step
        streams[number] += samples.tolist()
    for group, stream in zip(groups, streams, strict=True):
        size = len(group)
        for start in range(0, len(stream) - size + 1, size):
            assert np.array_equal(np.sort(stream[start : start + size]), group)  # once in each epoch of its stream
        seen = np.bincount(stream, minlength=sum(sizes))[group]
        assert seen.min() >= epochs and seen.max() <= -(-(epochs * size + batch - 1) // size)


def test_several_shapes_are_mixed_within_an_epoch() -> None:
    taken, groups = Order(0, groups_of([3000, 1000], 0)), groups_of([3000, 1000], 0)
    turns = np.array([taken.at(position, 10)[0] in groups[1] for position in range(0, 8000, 10)]).reshape(2, 400)
    assert (turns.sum(axis=1) == 100).all() and (turns[0] != turns[1]).sum() > 50
    halves = turns.reshape(4, 200).sum(axis=1)
    assert (np.abs(halves - 50) < 25).all()  # hypergeometric, with a standard deviation of 4.3


def test_several_shapes_have_whole_batches() -> None:
    with pytest.raises(ValueError, match="position 12 is within a batch of 8"):
        Order(0, groups_of([5, 6], 0)).at(12, 8)
    assert Order(0, groups_of([11], 0)).at(12, 8).tolist() == order(0, 11, 12, 8).tolist()


def test_several_shapes_cost_little_at_any_position() -> None:
    sizes = [6_000_000, 3_000_000, 999_999, 1]
    taken = Order(0, [np.arange(size) for size in sizes])
    position = 7 * 10**7 // 2048 * 2048
    taken.at(position, 2048)
    begin = time.perf_counter()
    for step in range(100):
        taken.at(position + step * 2048, 2048)
    assert (time.perf_counter() - begin) / 100 < 0.05


# crops and flips


def test_crops_and_flips_are_a_function_of_position_and_uniform() -> None:
    seen = crops(3, 0, 20_000, 4, True)
    assert np.array_equal(crops(3, 7_000, 100, 4, True), seen[7_000:7_100])
    for column, values in ((0, 5), (1, 5), (2, 2)):
        assert chisquare(np.bincount(seen[:, column], minlength=values)).pvalue > 1e-4
    assert chisquare(np.bincount(seen @ [10, 2, 1])[np.unique(seen @ [10, 2, 1])]).pvalue > 1e-4  # independent of each other
    assert not crops(3, 0, 1000, 0, False).any()


# batches of images


SIDE, MARGIN, COUNT = 8, 2, 60
SHAPES = {"square": Square(), "buckets": Buckets(step=4, max_aspect=3)}


@pytest.fixture(scope="module", params=SHAPES)
def shards(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Noise, of each shape and `MARGIN` pixels more."""
    folder, random, shapes = tmp_path_factory.mktemp("batches"), np.random.default_rng(0), SHAPES[request.param].shapes(SIDE)
    (folder / "source").mkdir()
    rows = []
    for number in range(COUNT):
        height, width = (side + MARGIN for side in shapes[number % len(shapes)])
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"source/{number:03d}.png")
        rows.append({"file_name": f"{number:03d}.png", "text": "x"})
    pd.DataFrame(rows).to_csv(folder / "source/metadata.csv", index=False)
    index = write_shards(
        folder / "source", folder / "shards", image_size=SIDE, margin=MARGIN, channels=3, resize_filter="box",
        shapes=SHAPES[request.param].model_dump(), val_fraction=0.1, test_fraction=0.1, shard_size=7, max_bad_fraction=0,
    )  # fmt: skip
    assert index["cropped"] == {"mean": 0, "largest": 0} and tuple(open_shards(folder / "shards").shapes) == shapes
    return folder / "shards"


def in_order(reader: ShardReader, seed: int, shuffle: str, batch: int) -> Iterator[int]:
    """The training samples one after another, by the second implementation."""
    groups = list(reader.shapes.values())
    counts = [tuple(len(part) for _, part in reader.shard_positions() if part.start in group) for group in groups]

    def epoch_of(group: int, epoch: int) -> list[int]:
        size = len(groups[group])
        if shuffle == "shard":
            return order_by_shard(seed, counts[group], epoch * size, size).tolist()
        return order(seed, size, epoch * size, size).tolist()

    for _, _, samples in steps(seed, groups, batch, epoch_of):
        yield from samples


def expected(shards: Path, seed: int, shuffle: str, batch: int, count: int) -> Iterator[np.ndarray]:
    """The images at the first positions, from the source files: the reader, the crops and the order are each applied by hand."""
    reader = open_shards(shards)
    for position, number in enumerate(itertools.islice(in_order(reader, seed, shuffle, batch), count)):
        top, left, mirrored = crops(seed, position, 1, MARGIN, True)[0]
        source = np.asarray(Image.open(shards.parent / "source" / reader[number].meta["file_name"]))
        height, width = (side - MARGIN for side in source.shape[:2])
        crop = source[top : top + height, left : left + width]
        yield (crop[:, ::-1] if mirrored else crop).transpose(2, 0, 1)


@settings(max_examples=12, deadline=None)
@given(
    seed=SEEDS,
    shuffle=st.sampled_from(["global", "shard"]),
    ranks=st.integers(1, 3),
    workers=st.integers(0, 2),
    each=st.integers(1, 9),
    kills=st.lists(st.integers(0, 12), max_size=2),
)
def test_batches_of_all_ranks_are_one_global_order_resumed_or_not(
    shards: Path, seed: int, shuffle: str, ranks: int, workers: int, each: int, kills: list[int]
) -> None:
    """With real worker processes. A kill throws all loaders away and goes back to the last checkpoint, every 3 batches."""
    reader, batch = open_shards(shards), ranks * each
    options = {"shuffle": shuffle, "flip": True, "workers": workers, "ranks": ranks}

    def loaders() -> list[Batches]:
        return [Batches(open_shards(shards), seed, rank=rank, **options) for rank in range(ranks)]

    batches, number, pending = math.ceil(2 * len(reader) / batch), 0, sorted(kills)
    consumed: list[np.ndarray] = []
    running = loaders()
    while number < batches:
        if pending and pending[0] <= number:
            pending.pop(0)
            number = number // 3 * 3
            consumed, running = consumed[: number * batch], loaders()
        parts = [one.at(number * batch, batch).numpy() for one in running]
        assert len({part.shape for part in parts}) == 1 and len(parts[0]) == each  # one shape on all ranks
        consumed += itertools.chain(*parts)
        number += 1
    assert len(consumed) == batches * batch
    for image, wanted in zip(consumed, expected(shards, seed, shuffle, batch, len(consumed)), strict=True):
        assert np.array_equal(image, wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_position_may_follow_any_other(shards: Path, workers: int) -> None:
    batches, wanted = Batches(open_shards(shards), 5, flip=True, workers=workers), [*expected(shards, 5, "global", 8, 816)]
    for position in (0, 8, 16, 8, 800, 808, 0):
        assert np.array_equal(batches.at(position, 8).numpy(), np.stack(wanted[position : position + 8]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_named_from_whichever_process(shards: Path, workers: int, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(shards, tmp_path / "shards")
    reader = open_shards(copy)
    _, image, size, *_ = reader.offsets[3]
    shard, key = reader.shard_positions()[0][0]["name"], reader[3].key
    with (copy / shard).open("r+b") as file:
        file.seek(image + 20)
        file.write(bytes(size - 20))
    batches = Batches(open_shards(copy), 0, workers=workers)
    where = next(position for position, number in enumerate(in_order(reader, 0, "global", 4)) if number == 3)
    sound = where // 4 * 4
    for position in range(0, sound, 4):
        batches.at(position, 4)
    with pytest.raises(InputError, match=f"{shard}: sample {key} is damaged .*run the `shard` stage again") as error:
        batches.at(sound, 4)
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


def test_loading_leaves_the_global_random_state_alone(shards: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    Batches(open_shards(shards), 0, workers=1).at(0, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_workers_end_when_nobody_has_their_batches_any_more(shards: Path) -> None:
    """At once: a collector that found them later would leave them no queue to hear of it, and wait 5 s for each."""
    gc.disable()
    try:
        batches, before = Batches(open_shards(shards), 0, workers=2), set(psutil.Process().children())
        batches.at(0, 4)
        assert len(set(psutil.Process().children()) - before) == 2
        del batches
        assert set(psutil.Process().children()) <= before
    finally:
        gc.enable()


def test_workers_end_with_their_owner(shards: Path) -> None:
    """Killed outright, the owner cannot tell its workers; they notice by themselves."""
    code = (
        "import sys, os, multiprocessing, time\n"
        "from ldm.data.batches import Batches\n"
        "from ldm.data.reader import open_shards\n"
        f"batches = Batches(open_shards({str(shards)!r}), 0, workers=2)\n"
        "batches.at(0, 4)\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    workers = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(workers) == 2
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 20  # torch's workers look every five seconds
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, workers
        time.sleep(0.2)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
