"""The system as a latent-variable model: likelihoods, the evidence lower bound, the bound of the whole system."""

from ldm._lazy import exports

__getattr__, __all__ = exports(__name__, {"Bound": "bound", "elbo": "elbo", "whole_bound": "bound"})
