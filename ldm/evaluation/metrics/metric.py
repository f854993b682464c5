"""The base class of what `evaluate.metrics` can list."""

from abc import abstractmethod
from typing import TYPE_CHECKING

from ldm.base.options import Choice
from ldm.evaluation.value import Value

if TYPE_CHECKING:
    from ldm.evaluation.evaluation import Evaluation


class Metric(Choice):
    """Measures the trained system. A subclass has its own options."""

    @abstractmethod
    def measure(self, evaluation: "Evaluation") -> list[Value]:
        """The measured numbers; none where the metric does not apply, as one of labels to images without labels."""
