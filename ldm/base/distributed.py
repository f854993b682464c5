"""Several processes that train one model: which one this is, and what they compute together."""

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


def agree(number: int, device: torch.device) -> bool:
    """Whether all processes have the same number."""
    ends = torch.tensor([number, -number], device=device)  # int64: a float would round what counts images
    if ranks() > 1:
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    return int(ends[0]) == -int(ends[1])


def shard(module: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Share parameters, gradients and so the optimizer's state out over all processes (FSDP2; Zhao et al. 2023).

    In place, before an optimizer sees the parameters. Each of the `parts` is put together only while it runs, the rest for
    as long as the module's own forward and backward pass takes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other layout
    mesh = init_device_mesh(next(module.parameters()).device.type, (ranks(),))
    for part in (*parts, module):
        fully_shard(part, mesh=mesh)


def is_shared(tensor: Tensor) -> bool:
    """Whether each process has a part of it. (A DTensor, whose module takes half a second to import.)"""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def own(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's parts of tensors that were shared out, the others as they are; they share memory with them."""
    return [tensor.to_local() if is_shared(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


@torch.no_grad()
def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state in which no tensor is shared out. All processes have to call this, and the first one gets those tensors."""
    found = {}
    for name, tensor in state.items():
        if is_shared(tensor):
            tensor = tensor.full_tensor()  # type: ignore[attr-defined]
            if rank():
                continue
            tensor = tensor.cpu()  # there may be no room for all of them where the parts are
        found[name] = tensor
    return found


@torch.no_grad()
def load(state: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Copy the whole tensors `found` into those of `state`, of which each process may have a part."""
    for name, tensor in state.items():
        value = found[name]
        if is_shared(tensor):
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            value = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
        own([tensor])[0].copy_(value)


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
