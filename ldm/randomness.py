"""Randomness as a function of position: every draw comes from a name, never from a generator that has to be saved."""

import hashlib

import torch


def seed_for(*parts: str | int) -> int:
    """A 63-bit seed for a position such as `(seed, "noise", images_seen)`; equal parts give equal seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator for a position (see `seed_for`)."""
    return torch.Generator(device).manual_seed(seed_for(*parts))
