"""Are samples of one label as varied as real images of it?"""

from typing import Any, Literal

from ldm.evaluation.features import averaged, common_size
from ldm.evaluation.metrics.metric import Array, Evaluation, Images, Metric
from ldm.evaluation.value import Value

READING = (
    "Pixel variance among samples of one label over that among real images of it. "
    "1 is as varied as real images, 0 is all the same."
)


class VarianceRatio(Metric):
    """Needs captions with labels, and two images of a label on both sides."""

    kind: Literal["variance_ratio"] = "variance_ratio"

    def measure(self, evaluation: Evaluation) -> list[Value]:
        if evaluation.labelled is None:
            return []
        real, generated = (evaluation.train_images, evaluation.train_labels), (evaluation.samples, evaluation.prompts.label)
        try:
            value = variance_ratio(*real, *generated)
        except ValueError:  # real images of one label are all the same
            return []
        if value is None:
            return []
        return [Value(name="variance_ratio", value=value, title="variance ratio", reading=READING, headline=True)]


def variance_ratio(real: Images, real_labels: Any, generated: Images, generated_labels: Any) -> float | None:
    """Unbiased variance within a label, mean over labels with two images on both sides, generated / real; None without any."""
    import numpy as np

    of_real, of_generated = np.asarray(real_labels), np.asarray(generated_labels)
    labels = [label for label in np.unique(of_real) if min(sum(of == label) for of in (of_real, of_generated)) > 1]

    def spread(pixels: Array, of: Array) -> Any:
        return np.mean([pixels[of == label].var(axis=0, ddof=1).mean() for label in labels])

    if not labels:
        return None
    size = common_size([*real, *generated])
    if (variance := spread(averaged(real, size), of_real)) == 0:
        raise ValueError(f"the real images of each of {len(labels)} labels are all the same: nothing to compare with")
    return float(spread(averaged(generated, size), of_generated) / variance)
