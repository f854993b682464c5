"""The networks that `backbone` can name for the diffusion model, a line each."""

from ldm.nets.backbones.unet import UNetBackbone as UNetBackbone
