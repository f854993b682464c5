"""A classifier of images, to see whether samples show what their prompts ask for."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from sklearn.svm import SVC

from ldm.evaluation.features.pca import averaged_down

SIDE = 16  # images are averaged down to at most this many pixels


@dataclass(frozen=True, eq=False)
class Classifier:
    """A support vector machine on pixels, trained on real images only."""

    machine: SVC

    @classmethod
    def fit(cls, images: np.ndarray, labels: Any) -> Self:
        """Train on uint8 images (N, C, H, W) and labels (N,) of any sortable type."""
        pixels = _flat(images)
        # twice scikit-learn's "scale": chosen on digits, where 8, 16 and 32 pixels a side all give 99 %
        gamma = 2 / (pixels.shape[1] * (pixels.var() or 1.0))
        return cls(SVC(C=10.0, gamma=gamma).fit(pixels, np.asarray(labels)))

    def accuracy(self, images: np.ndarray, labels: Any) -> float:
        """Share of images that are classified as `labels` (N,)."""
        labels = np.asarray(labels)
        if labels.shape != (len(images),):
            raise ValueError(f"expected {len(images)} labels, one per image, found {labels.shape}")
        return float((self.machine.predict(_flat(images)) == labels).mean())


def _flat(images: np.ndarray) -> np.ndarray:
    return averaged_down(images, SIDE).reshape(len(images), -1)
