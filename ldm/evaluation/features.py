"""The feature spaces that distances between sets of images are measured in."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ldm.base.options import Choice, Positive

if TYPE_CHECKING:
    from numpy import ndarray as Array
else:
    Array = Any  # for annotations: the command line reads metrics without the libraries that measure

LARGEST_SIDE = 32  # larger images are averaged down first: a full SVD of raw photographs would not fit in memory
Images = Sequence[Array]  # each uint8 (C, H, W); an array (N, C, H, W) is one, too


class FeatureSpace(Choice):
    """Maps images to features, float64 (N, d). A subclass has its own options."""

    def check(self, samples: int, values: int) -> None:
        """Raise a `ValueError` if `evaluate.samples` images of so many values do not have such features."""

    @abstractmethod
    def build(self, train_images: Images, most: int) -> tuple[str, Callable[[Images], Array]]:
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

    def build(self, train_images: Images, most: int) -> tuple[str, Callable[[Images], Array]]:
        import numpy as np

        size = common_size(train_images, LARGEST_SIDE)
        pixels = flat(train_images, size)
        dim = min(self.dim, most, pixels.shape[1])
        if not 1 <= dim < len(pixels):
            raise ValueError(f"cannot take {dim} components of {len(pixels)} images")
        mean = pixels.mean(axis=0)
        components = np.linalg.svd(pixels - mean, full_matrices=False)[2][:dim]
        largest = np.abs(components).argmax(axis=1)
        components = components * np.sign(components[np.arange(dim), largest])[:, None]  # (d, pixels)
        return f"pca{dim}", lambda images: (flat(images, size) - mean) @ components.T


def common_size(images: Images, most: int | None = None) -> tuple[int, int]:
    """Height and width that all images have at least, or `most` if that is less."""
    sides = (min(image.shape[axis] for image in images) for axis in (-2, -1))
    height, width = (min(side, most or side) for side in sides)
    return height, width


def flat(images: Images, size: tuple[int, int]) -> Array:
    """Pixels in [0, 1], float64 (N, D), of images that are `averaged` to this height and width."""
    return averaged(images, size) / 255.0


def averaged(images: Images, size: tuple[int, int]) -> Array:
    """Pixels of 0 to 255, float64 (N, D), of images of this height and width, averaged in blocks.

    So images of several shapes can be compared; where one has fewer pixels than blocks, some blocks hold the same.
    """
    import numpy as np

    if wrong := [image for image in images if image.dtype != np.uint8 or image.ndim != 3]:
        raise ValueError(f"expected uint8 images (C, H, W), found {wrong[0].dtype} {wrong[0].shape}")
    rows = []
    for image in images:
        pixels = image.astype(np.float64)
        for axis, blocks in enumerate(size, start=1):
            if (length := pixels.shape[axis]) != blocks:
                edges = np.arange(blocks + 1) * length // blocks
                widths = np.diff(edges).clip(min=1).reshape((-1, 1) if axis == 1 else -1)
                pixels = np.add.reduceat(pixels, edges[:-1], axis=axis) / widths
        rows.append(pixels.ravel())
    return np.stack(rows)
