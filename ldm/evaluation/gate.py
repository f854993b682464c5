"""Does a challenger become champion? A paired one-sided t-test of bounds on log p(image | caption), in nats (`README.md`)."""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from pandas import Series
from scipy.special import stdtrit


@dataclass(frozen=True)
class Decision:
    """The outcome of the gate. Improvements are challenger − champion in nats per image; NaN if nothing was compared."""

    promote: bool
    level: float  # chance of promoting a challenger that is no better
    reason: str
    n: int = 0  # images compared
    mean: float = math.nan  # mean improvement
    se: float = math.nan  # its standard error
    lower: float = math.nan  # one-sided lower confidence limit of the mean improvement


def decide(challenger: Series, champion: Series | None, level: float = 0.005) -> Decision:
    """Promote if the lower limit of the mean improvement is above 0. Both hold nats by image key; `ValueError` if keys differ."""
    if not 0 < level < 0.5:
        raise ValueError(f"level must be between 0 and 0.5, found {level}")
    models = {name: nats for name, nats in (("challenger", challenger), ("champion", champion)) if nats is not None}
    for name, nats in models.items():
        if len(repeated := nats.index[nats.index.duplicated()]):
            raise ValueError(f"the {name} has image {repeated[0]!r} more than once")
        if (mean := nats[np.isfinite(nats)].mean()) > 0:
            raise ValueError(f"the {name}'s nats are {mean:.4g} on average, but log p of 8-bit images is negative: code lengths?")
    for (has, here), (lacks, there) in permutations(models.items(), 2):
        if len(extra := here.index.difference(there.index)):
            found = f"image {extra[0]!r} has a value of the {has} but none of the {lacks} ({len(extra)} such)"
            raise ValueError(f"{found}: evaluate both on the same images")
    n = len(challenger)
    for name, nats in models.items():
        if len(bad := nats.index[~np.isfinite(nats)]):
            return Decision(False, level, f"the {name}'s bound is not finite on image {bad[0]!r}", n)
    if champion is None and n:
        return Decision(True, level, "no champion yet", n)
    if champion is None or n < 2:
        return Decision(False, level, f"{n} image(s) cannot show an improvement: at least 2 are needed", n)
    gains = challenger.to_numpy(np.float64) - champion.loc[challenger.index].to_numpy(np.float64)
    mean, se = float(gains.mean()), float(gains.std(ddof=1)) / math.sqrt(n)
    lower = mean - float(stdtrit(n - 1, 1 - level)) * se  # Student-t quantile
    limit = f"the lower limit of the improvement, {lower:.3g} nats per image at level {level:g}, is"
    return Decision(lower > 0, level, f"{limit} {'above' if lower > 0 else 'not above'} zero", n, mean, se, lower)
