"""The distributions of training noise levels that `diffusion.noise` can name, a line each."""

from ldm.diffusion.noise.distributions import Cosine as Cosine
from ldm.diffusion.noise.distributions import Linear as Linear
from ldm.diffusion.noise.distributions import LogitNormal as LogitNormal
from ldm.diffusion.noise.distributions import LogNormal as LogNormal
from ldm.diffusion.noise.distributions import LogUniform as LogUniform
from ldm.diffusion.noise.distributions import ScaledLinear as ScaledLinear
from ldm.diffusion.noise.distributions import Uniform as Uniform
