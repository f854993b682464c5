"""What the ranks of a training compute together. All of it also works in one process without a process group."""

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
    """The mean of x over all ranks: a new tensor, or x itself with one rank."""
    if ranks() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / ranks()


def all_ranks_equal(number: int, device: torch.device) -> bool:
    """Whether all ranks pass the same number."""
    ends = torch.tensor([number, -number], device=device)  # int64: float32 would round counts of images
    if ranks() > 1:
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    return int(ends[0]) == -int(ends[1])


def shard(module: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Shard parameters over all ranks, in place, before an optimizer sees them (FSDP2). Each part is gathered while it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other layout
    mesh = init_device_mesh(next(module.parameters()).device.type, (ranks(),))
    for part in (*parts, module):
        fully_shard(part, mesh=mesh)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor; importing its module takes half a second


@torch.no_grad()
def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shard of each sharded tensor, and the other tensors themselves; memory is shared with them."""
    return [tensor.to_local() if _is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


@torch.no_grad()
def full_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with sharded tensors gathered, on the CPU. All ranks have to call this; only rank 0 gets the gathered ones."""
    found = {}
    for name, tensor in state.items():
        if not _is_sharded(tensor):
            found[name] = tensor
        elif (whole := tensor.full_tensor()) is not None and not rank():  # type: ignore[attr-defined]
            found[name] = whole.cpu()  # a GPU may have no room for all full tensors
    return found


@torch.no_grad()
def load(state: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Copy the full tensors `found` into the tensors of `state`, sharded or not."""
    for name, tensor in state.items():
        value = found[name]
        if _is_sharded(tensor):
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            value = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
        local_shards([tensor])[0].copy_(value)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun's variables (`RANK`, `WORLD_SIZE`, …) describe; without them, stay a single process."""
    with contextlib.ExitStack() as joined:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            joined.callback(dist.destroy_process_group)
        yield
