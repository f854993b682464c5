"""The Fréchet distance of samples to real images, in a feature space."""

from typing import Annotated, Literal

from ldm.base.errors import InputError
from ldm.base.options import OneOf
from ldm.evaluation.features import FeatureSpace, Pca
from ldm.evaluation.metrics.metric import Array, Evaluation, Metric
from ldm.evaluation.value import Value

READING = (
    "Fréchet distance of samples to test images in this feature space. Lower is better; two sets of real images set the floor. "
    "Compare only at equal N and d; it is not an FID."
)
FLOOR = "Fréchet distance of training images to test images: what a perfect model would have."


class Frechet(Metric):
    """Between equally many samples and test images. For finite N a perfect model is above 0, at the floor."""

    kind: Literal["frechet"] = "frechet"
    name: str = "fd"  # another one for a second feature space
    features: Annotated[FeatureSpace, OneOf()] = Pca()

    def check_settings(self, samples: int, values: int) -> None:
        self.features.check(samples, values)

    def check(self, evaluation: Evaluation) -> None:
        found = evaluation.features(self.features)
        if found.test.shape[1] >= len(found.test):
            few = f"{self.name} needs more images than dimensions, found {found.size} in {found.name}"
            raise InputError(f"evaluate.metrics: {few}; raise evaluate.samples (and test images), or take kind kernel")

    def measure(self, evaluation: Evaluation) -> list[Value]:
        found = evaluation.features(self.features)
        distance, floor = frechet_distance(found.samples, found.test), frechet_distance(found.train, found.test)
        title, note = f"FD-{found.name}", f"{found.size}; two sets of real images: {floor:.3g}"
        return [
            Value(name=self.name, value=distance, title=title, reading=READING, note=note, headline=True),
            Value(name=f"{self.name}_floor", value=floor, title=f"{title}, floor", reading=FLOOR, note=found.size),
        ]


def frechet_distance(a: Array, b: Array) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½) of features (N, d), N > d (Dowson & Landau 1982; Heusel et al. 2017)."""
    import numpy as np

    if (n := min(len(a), len(b))) <= a.shape[1]:
        raise ValueError(f"a Fréchet distance needs more samples than dimensions, found N = {n} and d = {a.shape[1]}")
    # symmetric eigenvalues stay real when a covariance is nearly singular, unlike a general matrix square root
    cov_a, cov_b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    return max(0.0, float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))
