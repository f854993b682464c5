"""Does a challenger become champion? A paired one-sided t-test on test images.

Throughout, "nats" are a model's lower bound on log p(image | caption), per image: higher is better. Both models are
measured on the same images with the same noise, so that the differences vary far less than the values.
"""

import math
from dataclasses import dataclass

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
    """Promote if the lower Student-t confidence limit of the mean paired improvement is above zero.

    `challenger` and `champion` hold nats by image key, in any order; keys that differ are a ValueError. Without a
    champion a challenger whose bound is finite is promoted.
    """
    if not 0 < level < 0.5:
        raise ValueError(f"level must be between 0 and 0.5, found {level}")
    _check_nats("challenger", challenger)
    if champion is not None:
        _check_nats("champion", champion)
        _check_keys(challenger, champion)

    for name, nats in (("challenger", challenger), ("champion", champion)):
        if nats is not None and not np.isfinite(nats).all():
            key = nats.index[~np.isfinite(nats)][0]
            return Decision(False, level, f"the {name}'s bound is not finite on image {key!r}", len(challenger))
    if champion is None and len(challenger):
        return Decision(True, level, "no champion yet", len(challenger))
    n = len(challenger)
    if champion is None or n < 2:
        return Decision(False, level, f"{n} image(s) cannot show an improvement: at least 2 are needed", n)

    gains = challenger.to_numpy(np.float64) - champion.loc[challenger.index].to_numpy(np.float64)
    mean, se = float(gains.mean()), float(gains.std(ddof=1)) / math.sqrt(n)
    lower = mean - float(stdtrit(n - 1, 1 - level)) * se  # Student-t quantile
    promote = lower > 0
    limit = f"the lower limit of the improvement, {lower:.3g} nats per image at level {level:g}, is"
    return Decision(promote, level, f"{limit} {'above' if promote else 'not above'} zero", n, mean, se, lower)


def _check_nats(name: str, nats: Series) -> None:
    repeated = nats.index[nats.index.duplicated()]
    if len(repeated):
        raise ValueError(f"the {name} has image {repeated[0]!r} more than once")
    mean = nats[np.isfinite(nats)].mean()
    if mean > 0:
        raise ValueError(
            f"the {name}'s nats are {mean:.4g} on average: a lower bound on log p of 8-bit images cannot be "
            "positive, so these look like code lengths"
        )


def _check_keys(challenger: Series, champion: Series) -> None:
    for has, lacks, a, b in (("challenger", "champion", challenger, champion), ("champion", "challenger", champion, challenger)):
        if len(extra := a.index.difference(b.index)):
            found = f"image {extra[0]!r} has a value of the {has} but none of the {lacks} ({len(extra)} such)"
            raise ValueError(f"{found}: evaluate both on the same images")
