"""Sampling weights by stochastic gradient Langevin dynamics: samplers, chains, step sizes, convergence, predictive averages."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(__name__, {
    "sgld": "SGLD PSGLD SGHMC Polynomial Cyclical", "chains": "Chains Draws", "step_size": "StepSize find_step_size",
})  # fmt: skip
