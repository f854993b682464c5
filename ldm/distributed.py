"""Several processes that train one model: which one this is, and what they compute together."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(x: Tensor) -> Tensor:
    """The mean of x over all processes: a new tensor, or x itself where there is one process."""
    if ranks() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / ranks()


def any_of_them(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return bool(mean(torch.tensor(float(flag), device=device)) > 0)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that `RANK` and `WORLD_SIZE` speak of, as torchrun sets them; alone where they are not set."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=os.environ.get("LDM_RENDEZVOUS", "env://"),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
