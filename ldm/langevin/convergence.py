"""Whether chains have converged, by ArviZ."""

import numpy as np
from pandas import DataFrame

RHAT, ESS = 1.01, 400.0  # thresholds of Vehtari et al. 2021


def convergence(values: np.ndarray) -> DataFrame:
    """Rank-normalised split R-hat, `rhat`, and bulk effective sample size, `ess`, of `values` (chains, draws, quantities).

    (Vehtari et al. 2021.) NaN for fewer than 4 draws a chain. Give functions of a model's outputs rather than its weights.
    """
    import arviz  # here: it takes a second

    data = arviz.convert_to_dataset({"value": values})
    return DataFrame({name: np.ravel(getattr(arviz, name)(data)["value"]) for name in ("rhat", "ess")})


def warnings(found: DataFrame) -> list[str]:
    """Why the draws must not be taken for independent samples of one distribution, a sentence each."""
    rhat, ess = found.rhat.max(), found.ess.min()
    mixed = f"R-hat is {rhat:.3g} where it should be {RHAT} at most: the chains have not mixed; leave more steps between draws"
    many = f"the effective sample size is {ess:.0f} where {ESS:.0f} are asked for; take more draws, farther apart"
    return [warning for warning, passed in ((mixed, rhat <= RHAT), (many, ess >= ESS)) if not passed]
