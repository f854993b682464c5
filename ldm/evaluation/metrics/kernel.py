"""The kernel distance of samples to real images, in a feature space."""

from typing import Annotated, Any, Literal

from ldm.base.options import OneOf
from ldm.evaluation.features import FeatureSpace, Pca
from ldm.evaluation.metrics.metric import Array, Evaluation, Metric
from ldm.evaluation.value import Value

LEAST = 3  # images on both sides, of which the error leaves one out


class Kernel(Metric):
    """Between equally many samples and test images. Unbiased, so two samples of one distribution are at 0 on average."""

    kind: Literal["kernel"] = "kernel"
    name: str = "kd"  # another one for a second feature space
    features: Annotated[FeatureSpace, OneOf()] = Pca()

    def check_settings(self, samples: int, values: int) -> None:
        if samples < LEAST:
            raise ValueError(f"{self.kind} needs {LEAST} samples, and evaluate.samples is {samples}")
        self.features.check(samples, values)

    def check_images(self, images: int) -> None:
        if images < LEAST:
            raise ValueError(f"{self.kind} needs {LEAST} images of the train and of the test split")

    def measure(self, evaluation: Evaluation) -> list[Value]:
        found = evaluation.features(self.features)
        value, error = kernel_distance(found.samples, found.test)
        reading = "Kernel distance (MMD², cubic kernel) of samples to test images. Lower is better; 0 is as good as real images."
        return [Value(name=self.name, value=value, error=error, title=f"KD-{found.name}", reading=reading, note=found.size)]


def kernel_distance(a: Array, b: Array) -> tuple[float, float]:
    """Unbiased MMD² of independent features (N, d), kernel (x·y/d + 1)³ (Bińkowski et al. 2018), and its jackknife error."""
    import numpy as np

    if min(m := len(a), n := len(b)) < LEAST:
        raise ValueError(f"a kernel distance needs at least {LEAST} samples on both sides, found {m} and {n}")
    in_a, in_b, cross = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    np.fill_diagonal(in_a, 0)
    np.fill_diagonal(in_b, 0)

    def mmd(sum_a: Any, sum_b: Any, sum_cross: Any, m: int, n: int) -> Any:
        """From the kernel summed over pairs within m, within n and across; floats, or arrays of leave-one-out sums."""
        return sum_a / (m * (m - 1)) + sum_b / (n * (n - 1)) - 2 * sum_cross / (m * n)

    sum_a, sum_b, sum_cross = in_a.sum(), in_b.sum(), cross.sum()
    without_a = mmd(sum_a - 2 * in_a.sum(axis=1), sum_b, sum_cross - cross.sum(axis=1), m - 1, n)
    without_b = mmd(sum_a, sum_b - 2 * in_b.sum(axis=1), sum_cross - cross.sum(axis=0), m, n - 1)
    variance = (m - 1) * without_a.var() + (n - 1) * without_b.var()
    return float(mmd(sum_a, sum_b, sum_cross, m, n)), float(np.sqrt(variance))
