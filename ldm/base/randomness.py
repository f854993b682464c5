"""Randomness as a function of position: every draw comes from a name, never from a generator that has to be saved."""

import functools
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def seed_for(*parts: str | int) -> int:
    """A 63-bit seed for a position such as `(seed, "noise", images_seen)`, of which torch's generator on a CPU takes 32 bits."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator for a position (see `seed_for`)."""
    return torch.Generator(device).manual_seed(seed_for(*parts))


def fill_rows(out: Tensor, numbers: Iterable[int], *position: str | int) -> Tensor:
    """Fill each row of `out` with N(0, 1) for (position, its number), whatever other rows there are; returns `out`.

    A GPU draws other values than a CPU.
    """
    rng = torch.Generator(out.device)
    for row, number in zip(out, numbers, strict=True):
        row.normal_(generator=rng.manual_seed(seed_for(*position, number)))
    return out


CHUNK = 1 << 16  # draws from one generator: few enough to stay in a core's cache, enough to hide how long one takes to seed


def fill_normal(out: Tensor, *position: str | int, std: float = 1.0) -> Tensor:
    """Fill `out`, contiguous floats, with N(0, std²) for a position (`seed_for`), for any number of threads alike; returns it."""
    if out.device.type != "cpu":
        return out.normal_(0, std, generator=generator(*position, device=out.device))
    chunks = out.view(-1).split(CHUNK)
    numbers = iter(range(len(chunks)))  # whoever is free takes the next: a core may have other work

    def draw(_: int = 0) -> None:
        for number in numbers:
            chunks[number].normal_(0, std, generator=generator(*position, number))

    threads = min(torch.get_num_threads(), len(chunks))
    if threads == 1:
        draw()
    else:
        list(_pool(threads).map(draw, range(threads)))
    return out


_pool = functools.cache(ThreadPoolExecutor)  # by the number of threads
os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
