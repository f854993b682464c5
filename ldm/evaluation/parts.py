"""Images of a split in parts of one shape that fit into memory."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ldm.base.memory import Parts
from ldm.data.reader import ShardReader

T = TypeVar("T")
Part = Callable[[np.ndarray, Tensor], T]  # of positions in the split, and their images, uint8 (N, C, H, W)


def in_parts(reader: ShardReader, device: torch.device, function: Part[T]) -> Iterator[tuple[np.ndarray, T]]:
    """`function` of all images of a split, part by part, with the positions of each part. It computes on `device`."""
    divide = Parts(device)
    for shape, positions in reader.shapes.items():

        def result(part: slice, positions: np.ndarray = positions) -> tuple[np.ndarray, T]:
            return positions[part], function(positions[part], torch.from_numpy(reader.images(positions[part])))

        yield from divide(result, len(positions), kind=shape)


def of_each(reader: ShardReader, device: torch.device, function: Part[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Tensors (N, …), on the CPU, of all images of a split in their order; `function` gives them for a part."""
    positions, results = zip(*in_parts(reader, device, function), strict=True)
    order = torch.from_numpy(np.argsort(np.concatenate(positions)))
    return tuple(torch.cat([part.cpu() for part in parts])[order] for parts in zip(*results, strict=True))


def by_kind(kinds: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The places of each kind, such as the shape of an image, in the order in which kinds first occur."""
    places: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    return places
