"""Evidence: likelihoods, bounds on log p(x), diagnostics of the latents."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(
    __name__,
    {
        "Bound": "bound", "whole_bound": "bound", "Elbo": "elbo", "elbo": "elbo", "importance_bound": "elbo",
        "diagnose": "diagnostics",
    },
)  # fmt: skip
