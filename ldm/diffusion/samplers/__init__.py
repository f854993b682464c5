"""The samplers that `sampling.sampler` can name, a line each."""

from ldm.diffusion.samplers.ddim import Ddim as Ddim
from ldm.diffusion.samplers.ddim import Ddpm as Ddpm
from ldm.diffusion.samplers.ddim import Euler as Euler
from ldm.diffusion.samplers.dpmpp_2m import DpmPP2M as DpmPP2M
from ldm.diffusion.samplers.heun import Heun as Heun
from ldm.diffusion.samplers.langevin import Langevin as Langevin
