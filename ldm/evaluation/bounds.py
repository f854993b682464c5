"""The whole system's bound, image by image over a split."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

from ldm.data.reader import ShardReader


def image_bounds(
    model: Any,
    samples: ShardReader,
    *,
    levels: int,
    seed: int,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    """`model.bound` (see `ldm.model.LatentDiffusion`) of every image under its own caption.

    Columns `key`, `reconstruction`, `entropy`, `prior`, `nats` (their sum, a lower bound on log p(x | caption), nats
    per image) and `dims`. An image's draws depend on its key and `seed`, so two models meet the same noise.
    """
    captions = samples.captions
    frames = []
    progress(0)
    for start in range(0, len(samples), batch_size):
        rows = captions.iloc[start : start + batch_size]
        pixels = torch.from_numpy(samples.images(range(start, start + len(rows))))
        keys = rows.key.tolist()
        bound = model.bound(pixels, rows.text.tolist(), levels=levels, seed=seed, keys=keys)
        terms = {name: getattr(bound, name).double().numpy() for name in ("reconstruction", "entropy", "prior", "nats")}
        frames.append(pd.DataFrame({"key": keys, **terms, "dims": bound.dims}))
        progress(start + len(rows))
    return pd.concat(frames, ignore_index=True)
