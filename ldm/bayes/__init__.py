"""Evidence: likelihoods, bounds on log p(x), diagnostics of the latents."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(
    __name__,
    {
        "Bound": "bound",
        "Elbo": "elbo",
        "diagnose": "diagnostics",
        "elbo": "elbo",
        "importance_bound": "elbo",
        "whole_bound": "bound",
    },
)
