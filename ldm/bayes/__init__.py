"""Evidence: likelihoods, bounds on log p(x), diagnostics of the latents."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(__name__, {"bound": "Bound whole_bound", "elbo": "elbo importance_bound"})
