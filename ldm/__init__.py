"""Latent diffusion models: raw captioned images in, a registered model out."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(__name__, {"model": "LatentDiffusion", "registry": "registry"})
