"""Sampling weights by stochastic gradient Langevin dynamics: samplers, chains, step sizes, convergence, predictive averages."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(__name__, {"sgld": "SGLD PSGLD SGHMC", "chains": "Chains", "step_size": "find_step_size"})
