"""The base class of what `evaluate.metrics` can list."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from ldm.base.options import Choice
from ldm.evaluation.features import Array as Array
from ldm.evaluation.features import Images as Images
from ldm.evaluation.value import Value

if TYPE_CHECKING:
    from ldm.evaluation.evaluation import Evaluation as Evaluation
else:
    Evaluation = Any


class Metric(Choice):
    """Measures the trained system. A subclass has its own options."""

    def check_settings(self, samples: int, values: int) -> None:
        """Raise a `ValueError` if `evaluate.samples` images of so many values cannot be measured: when the settings are read."""

    def check_images(self, images: int) -> None:
        """Raise a `ValueError` if so many real images are too few: before anything is trained."""

    def check(self, evaluation: Evaluation) -> None:
        """Called before any sample is drawn: raise an `InputError` if real images alone show that `measure` would fail."""

    @abstractmethod
    def measure(self, evaluation: Evaluation) -> list[Value]:
        """The measured numbers; none where the metric does not apply, as one of labels to images without labels."""
