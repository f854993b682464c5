"""The Fréchet distance of samples to real images, in a feature space."""

from typing import TYPE_CHECKING, Annotated, Literal

from ldm.base.errors import InputError
from ldm.base.options import OneOf
from ldm.evaluation.features.feature_space import FeatureSpace, checked
from ldm.evaluation.features.pca import Pca
from ldm.evaluation.metrics.metric import Metric
from ldm.evaluation.value import Value

if TYPE_CHECKING:
    import numpy as np

    from ldm.evaluation.evaluation import Evaluation


class Frechet(Metric):
    """Between equally many samples and test images; the floor is the distance between training and test images.

    For finite N the distance between two samples of one distribution is above 0, hence the floor.
    """

    kind: Literal["frechet"] = "frechet"
    name: str = "fd"  # another one for a second feature space
    features: Annotated[FeatureSpace, OneOf()] = Pca()

    def measure(self, evaluation: "Evaluation") -> list[Value]:
        found = evaluation.features(self.features)
        if found.test.shape[1] >= len(found.test):
            raise InputError(
                f"evaluate.metrics: {self.name} needs more images than dimensions, found {found.size} in {found.name}; "
                "raise evaluate.samples (and test images), or take kind kernel"
            )
        floor = frechet_distance(found.train, found.test)
        return [
            Value(
                name=self.name, value=frechet_distance(found.samples, found.test), unit="", title=f"FD-{found.name}",
                reading="Fréchet distance of samples to test images in this feature space. Lower is better; two sets of real "
                "images set the floor. Compare only at equal N and d; it is not an FID.",
                note=f"{found.size}; two sets of real images: {floor:.3g}", headline=True,
            ),
            Value(
                name=f"{self.name}_floor", value=floor, unit="", title=f"FD-{found.name}, floor",
                reading="Fréchet distance of training images to test images: what a perfect model would have.", note=found.size,
            ),
        ]  # fmt: skip


def frechet_distance(a: "np.ndarray", b: "np.ndarray") -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½) of features (N, d): the squared distance of the fitted Gaussians.

    Dowson & Landau 1982; Heusel et al. 2017. In float64, from symmetric eigenvalues, which unlike a general matrix
    square root stay real when a covariance is nearly singular. Needs more samples than dimensions on both sides.
    """
    import numpy as np

    a, b = checked(a, b)
    for features in (a, b):
        if len(features) <= features.shape[1]:
            raise ValueError(
                f"a Fréchet distance needs more samples than dimensions, found N = {len(features)} and "
                f"d = {features.shape[1]}: give more images or fewer dimensions"
            )
    cov_a, cov_b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    return max(0.0, float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))
