"""What `evaluate.metrics` can list: each metric is a class in a file of its own, imported here."""

from ldm.evaluation.metrics.frechet import Frechet as Frechet
from ldm.evaluation.metrics.kernel import Kernel as Kernel
from ldm.evaluation.metrics.latents import Latents as Latents
from ldm.evaluation.metrics.prompt_accuracy import PromptAccuracy as PromptAccuracy
from ldm.evaluation.metrics.psnr import Psnr as Psnr
from ldm.evaluation.metrics.variance_ratio import VarianceRatio as VarianceRatio
