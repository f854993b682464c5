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
