"""Do samples show what their prompts ask for?"""

from typing import TYPE_CHECKING, Literal

from ldm.evaluation.metrics.metric import Metric
from ldm.evaluation.value import Value, described

if TYPE_CHECKING:
    from ldm.evaluation.evaluation import Evaluation


ABOUT = {  # unit, title, how to read it
    "prompt_accuracy": (
        "share", "prompt accuracy",
        "Samples in which a classifier trained on real images finds what the prompt asks for. Higher is better.",
    ),
    "unseen_prompt_accuracy": (
        "share", "unseen prompt accuracy", "The same for prompts that no caption says in these words. Higher is better.",
    ),
    "classifier_accuracy": (
        "share", "classifier accuracy", "Test images whose label the classifier finds: what prompt accuracy can be trusted to.",
    ),
}  # fmt: skip


class PromptAccuracy(Metric):
    """Share of samples that a classifier, trained on real training images only, gives the label of their prompt.

    Needs captions with labels.
    """

    kind: Literal["prompt_accuracy"] = "prompt_accuracy"

    def measure(self, evaluation: "Evaluation") -> list[Value]:
        if (classifier := evaluation.classifier) is None:
            return []
        real = classifier.accuracy(evaluation.test_images, evaluation.test_labels)
        accuracy = classifier.accuracy(evaluation.samples, evaluation.prompts.label)
        numbers = {"prompt_accuracy": accuracy, "classifier_accuracy": real}
        if (unseen := evaluation.unseen_prompts) is not None:
            numbers["unseen_prompt_accuracy"] = classifier.accuracy(evaluation.unseen_samples, unseen.label)
        return described(numbers, ABOUT, {"prompt_accuracy": f"real test images: {real:.1%}", "unseen_prompt_accuracy": ""})
