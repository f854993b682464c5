"""Sampling weights by stochastic gradient Langevin dynamics: samplers, chains, step sizes, convergence, predictive averages."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(
    __name__,
    {
        "SGLD": "sgld", "PSGLD": "sgld", "SGHMC": "sgld", "Polynomial": "sgld", "Cyclical": "sgld",
        "Chains": "chains", "Draws": "chains", "StepSize": "step_size", "find_step_size": "step_size",
    },
)  # fmt: skip
