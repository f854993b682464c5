"""The likelihoods that `train_vae.likelihood` can name, a line each."""

from ldm.bayes.likelihoods.continuous import Gaussian as Gaussian
from ldm.bayes.likelihoods.continuous import Laplace as Laplace
from ldm.bayes.likelihoods.discrete import Bernoulli as Bernoulli
from ldm.bayes.likelihoods.discrete import DiscretizedGaussian as DiscretizedGaussian
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic as DiscretizedLogistic
