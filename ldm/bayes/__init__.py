"""The system as a latent-variable model: likelihoods, bounds on the evidence, diagnostics of the latents, posterior samples."""

from ldm._lazy import exports

__getattr__, __all__ = exports(
    __name__,
    {
        "Bound": "bound",
        "Chains": "chains",
        "Cyclical": "sgld",
        "Draws": "chains",
        "Elbo": "elbo",
        "PSGLD": "sgld",
        "Polynomial": "sgld",
        "SGHMC": "sgld",
        "SGLD": "sgld",
        "StepSize": "step_size",
        "check_deterministic": "sgld",
        "diagnose": "diagnostics",
        "elbo": "elbo",
        "find_step_size": "step_size",
        "importance_bound": "elbo",
        "load_likelihood": "likelihoods",
        "make_likelihood": "likelihoods",
        "whole_bound": "bound",
    },
)
