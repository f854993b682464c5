"""The distributions of training noise levels that `diffusion.noise` can name, a line each."""

from ldm.diffusion.noise.continuous import LogitNormal as LogitNormal
from ldm.diffusion.noise.continuous import LogNormal as LogNormal
from ldm.diffusion.noise.continuous import LogUniform as LogUniform
from ldm.diffusion.noise.continuous import Uniform as Uniform
from ldm.diffusion.noise.tables import Cosine as Cosine
from ldm.diffusion.noise.tables import Linear as Linear
from ldm.diffusion.noise.tables import ScaledLinear as ScaledLinear
