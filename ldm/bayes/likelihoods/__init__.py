"""The likelihoods that `train_vae.likelihood` can name, a line each."""

from ldm.bayes.likelihoods.bernoulli import Bernoulli as Bernoulli
from ldm.bayes.likelihoods.gaussian import DiscretizedGaussian as DiscretizedGaussian
from ldm.bayes.likelihoods.gaussian import Gaussian as Gaussian
from ldm.bayes.likelihoods.laplace import Laplace as Laplace
from ldm.bayes.likelihoods.logistic import DiscretizedLogistic as DiscretizedLogistic
