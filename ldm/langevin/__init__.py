"""Sampling weights by stochastic gradient Langevin dynamics: samplers, chains, step sizes, convergence, predictive averages."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(
    __name__,
    {
        "Chains": "chains",
        "Cyclical": "sgld",
        "Draws": "chains",
        "PSGLD": "sgld",
        "Polynomial": "sgld",
        "SGHMC": "sgld",
        "SGLD": "sgld",
        "StepSize": "step_size",
        "find_step_size": "step_size",
    },
)
