"""The diffusion model of the latents: denoiser, noise levels, samplers, guidance."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(__name__, {"denoiser": "Denoiser", "samplers": "samplers"})
