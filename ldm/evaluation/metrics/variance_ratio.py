"""Are samples of one label as varied as real images of it?"""

from typing import TYPE_CHECKING, Any, Literal

from ldm.evaluation.metrics.metric import Metric
from ldm.evaluation.value import Value

if TYPE_CHECKING:
    import numpy as np

    from ldm.evaluation.evaluation import Evaluation


class VarianceRatio(Metric):
    """Needs captions with labels, and two images of a label on both sides."""

    kind: Literal["variance_ratio"] = "variance_ratio"

    def measure(self, evaluation: "Evaluation") -> list[Value]:
        if evaluation.classifier is None:
            return []
        real, prompted = evaluation.train_labels, evaluation.prompts.label.to_numpy()
        if not varied_labels(real, prompted):
            return []
        value = variance_ratio(evaluation.train_images, real, evaluation.samples, prompted)
        reading = (
            "Pixel variance among samples of one label over that among real images of it. "
            "1 is as varied as real images, 0 is all the same."
        )
        return [Value(name="variance_ratio", value=value, unit="", title="variance ratio", reading=reading, headline=True)]


def varied_labels(*sides: Any) -> list[Any]:
    """The labels that occur at least twice in each of several arrays of labels (N,), sorted."""
    import numpy as np

    counts = [dict(zip(*np.unique(np.asarray(side), return_counts=True), strict=True)) for side in sides]
    return [label for label in counts[0] if all(count.get(label, 0) > 1 for count in counts)]


def variance_ratio(real: "np.ndarray", real_labels: Any, generated: "np.ndarray", generated_labels: Any) -> float:
    """Variance within labels of generated images over that of real ones, uint8 (N, C, H, W), with labels (N,).

    For each label the unbiased variance over its images, averaged over pixels; then the mean over labels,
    generated / real. Uses the labels that have at least two images on both sides.
    """
    import numpy as np

    labels = varied_labels(real_labels, generated_labels)
    if not labels:
        raise ValueError("no label has two images or more on both sides, real and generated")
    spread = [
        np.mean([images[np.asarray(of) == label].var(axis=0, ddof=1, dtype=np.float64).mean() for label in labels])
        for images, of in ((generated, generated_labels), (real, real_labels))
    ]
    if spread[1] == 0:
        raise ValueError(f"the real images of each of {len(labels)} labels are all the same: nothing to compare with")
    return float(spread[0] / spread[1])
