"""Do samples show what their prompts ask for?"""

from typing import TYPE_CHECKING, Literal

from ldm.evaluation.metrics.metric import Metric
from ldm.evaluation.value import Value

if TYPE_CHECKING:
    from ldm.evaluation.evaluation import Evaluation


class PromptAccuracy(Metric):
    """Share of samples that a classifier, trained on real training images only, gives the label of their prompt.

    Measured for captions of the data, for prompts that no caption contains, and for test images, which the classifier may
    get wrong itself. Needs captions with labels.
    """

    kind: Literal["prompt_accuracy"] = "prompt_accuracy"

    def measure(self, evaluation: "Evaluation") -> list[Value]:
        classifier = evaluation.classifier
        if classifier is None:
            return []
        real = classifier.accuracy(evaluation.test_images, evaluation.test_labels)
        about = "Share of samples in which a classifier trained on real images finds what the prompt asks for"
        note = f"real test images: {real:.1%}"
        prompts, unseen = evaluation.prompts, evaluation.unseen_prompts
        values = [
            Value(
                name="prompt_accuracy", value=classifier.accuracy(evaluation.samples, prompts.label), unit="share",
                title="prompt accuracy", reading=f"{about}. Higher is better.", note=note, headline=True,
            )
        ]  # fmt: skip
        if unseen is not None:
            values.append(
                Value(
                    name="unseen_prompt_accuracy", value=classifier.accuracy(evaluation.unseen_samples, unseen.label),
                    unit="share", title="unseen prompt accuracy",
                    reading=f"{about}, for prompts that no caption says in these words. Higher is better.", headline=True,
                )
            )  # fmt: skip
        reading = "Share of test images whose label the classifier finds: what prompt accuracy can be trusted to."
        return [
            *values,
            Value(name="classifier_accuracy", value=real, unit="share", title="classifier accuracy", reading=reading),
        ]
