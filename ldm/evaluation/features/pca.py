"""Principal components of the pixels of real images."""

from typing import TYPE_CHECKING, Literal

from ldm.base.options import Positive
from ldm.evaluation.features.feature_space import Extractor, FeatureSpace

if TYPE_CHECKING:
    import numpy as np

LARGEST_SIDE = 32  # larger images are averaged down first: a full SVD of raw photographs would not fit in memory


class Pca(FeatureSpace):
    """The leading principal components of training images (pixels in [0, 1], not whitened)."""

    kind: Literal["pca"] = "pca"
    dim: Positive = 32  # fewer for few or very small images

    def build(self, train_images: "np.ndarray", most: int) -> tuple[str, Extractor]:
        dim = min(self.dim, most, train_images[0].size)
        return f"pca{dim}", fit_pca(train_images, dim)


def fit_pca(images: "np.ndarray", dim: int) -> Extractor:
    """Project on `dim` principal components of uint8 images (N, C, H, W): a full SVD in float64.

    The largest loading of each component is positive. `dim` must be below N and at most the number of pixels.
    """
    import numpy as np

    pixels = averaged_down(images, LARGEST_SIDE).reshape(len(images), -1)
    if not 1 <= dim <= min(len(pixels) - 1, pixels.shape[1]):
        raise ValueError(f"cannot take {dim} components of {len(pixels)} images of {pixels.shape[1]} pixels")
    mean = pixels.mean(axis=0)
    components = np.linalg.svd(pixels - mean, full_matrices=False)[2][:dim]
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(dim), largest])[:, None]  # (d, pixels)

    def extract(new: np.ndarray) -> np.ndarray:
        if new.shape[1:] != images.shape[1:]:
            raise ValueError(f"features were fitted on images {images.shape[1:]}, found {new.shape[1:]}")
        return (averaged_down(new, LARGEST_SIDE).reshape(len(new), -1) - mean) @ components.T

    return extract


def averaged_down(images: "np.ndarray", side: int) -> "np.ndarray":
    """Pixels in [0, 1] of uint8 images (N, C, H, W), each axis longer than `side` averaged down to `side` blocks, float64."""
    import numpy as np

    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"expected uint8 images (N, C, H, W), found {images.dtype} {images.shape}")
    pixels = images / 255.0
    for axis in (2, 3):
        length = pixels.shape[axis]
        if length > side:
            edges = np.arange(side + 1) * length // side
            shape = [-1 if i == axis else 1 for i in range(4)]
            pixels = np.add.reduceat(pixels, edges[:-1], axis=axis) / np.diff(edges).reshape(shape)
    return pixels
