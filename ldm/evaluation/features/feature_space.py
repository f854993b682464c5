"""The base class of feature spaces, which distances between sets of images are measured in."""

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from ldm.base.options import Choice

if TYPE_CHECKING:
    import numpy as np

Extractor = Callable[["np.ndarray"], "np.ndarray"]  # uint8 images (N, C, H, W) to features, float64 (N, d)


class FeatureSpace(Choice):
    """Maps images to vectors. A subclass has its own options."""

    @abstractmethod
    def build(self, train_images: "np.ndarray", most: int) -> tuple[str, Extractor]:
        """The name of the space, such as "pca32", and the mapping.

        `train_images`, uint8 (N, C, H, W), are real training images, for spaces that are fitted. There are only `most` + 1
        images on each side of a distance: a space that can choose its dimension takes at most `most`.
        """


def checked(a: "np.ndarray", b: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Two sets of features (N, d) in float64; `ValueError` if they do not fit together or are not finite."""
    import numpy as np

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected features (N, d) with one d, found {a.shape} and {b.shape}")
    for side, features in (("first", a), ("second", b)):
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise ValueError(f"row {row} of the {side} features is not finite")
    return a, b
