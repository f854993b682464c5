"""The feature spaces that distances between sets of images are measured in."""

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from ldm.base.options import Choice, Positive

if TYPE_CHECKING:
    from numpy import ndarray as Array
else:
    Array = Any  # for annotations: the command line reads metrics without the libraries that measure

LARGEST_SIDE = 32  # larger images are averaged down first: a full SVD of raw photographs would not fit in memory


class FeatureSpace(Choice):
    """Maps uint8 images (N, C, H, W) to features, float64 (N, d). A subclass has its own options."""

    def check(self, samples: int, values: int) -> None:
        """Raise a `ValueError` if `evaluate.samples` images of so many values do not have such features."""

    @abstractmethod
    def build(self, train_images: Array, most: int) -> tuple[str, Callable[[Array], Array]]:
        """Its name, such as "pca32", and the mapping; it may be fitted to these images, and have `most` dimensions at most."""


class Pca(FeatureSpace):
    """The leading principal components of pixels in [0, 1], not whitened; the largest loading of each is positive."""

    kind: Literal["pca"] = "pca"
    dim: Positive = 32  # fewer for few images

    def check(self, samples: int, values: int) -> None:
        if self.dim >= samples:
            raise ValueError(f"features.dim {self.dim} needs more samples than that, and evaluate.samples is {samples}")
        if self.dim > values:
            raise ValueError(f"features.dim {self.dim} is more than the {values} values of an image, as features see it")

    def build(self, train_images: Array, most: int) -> tuple[str, Callable[[Array], Array]]:
        import numpy as np

        pixels = flat(train_images, LARGEST_SIDE)
        dim = min(self.dim, most, pixels.shape[1])
        if not 1 <= dim < len(pixels):
            raise ValueError(f"cannot take {dim} components of {len(pixels)} images")
        mean = pixels.mean(axis=0)
        components = np.linalg.svd(pixels - mean, full_matrices=False)[2][:dim]
        largest = np.abs(components).argmax(axis=1)
        components = components * np.sign(components[np.arange(dim), largest])[:, None]  # (d, pixels)
        return f"pca{dim}", lambda images: (flat(images, LARGEST_SIDE) - mean) @ components.T


def flat(images: Array, side: int) -> Array:
    """Pixels in [0, 1], float64 (N, D), of uint8 images (N, C, H, W), whose longer axes are averaged down to `side` blocks."""
    import numpy as np

    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"expected uint8 images (N, C, H, W), found {images.dtype} {images.shape}")
    pixels = images / 255.0
    for axis in (2, 3):
        if (length := pixels.shape[axis]) > side:
            edges = np.arange(side + 1) * length // side
            pixels = np.add.reduceat(pixels, edges[:-1], axis=axis) / np.diff(edges).reshape((-1, 1) if axis == 2 else -1)
    return pixels.reshape(len(images), -1)
