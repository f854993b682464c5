"""Principal components of the pixels of real images."""

from typing import TYPE_CHECKING, Literal

from ldm.base.options import Positive
from ldm.evaluation.features.feature_space import Extractor, FeatureSpace

if TYPE_CHECKING:
    import numpy as np

LARGEST_SIDE = 32  # larger images are averaged down first: a full SVD of raw photographs would not fit in memory


class Pca(FeatureSpace):
    """The leading principal components of training images: pixels in [0, 1], not whitened; a full SVD in float64.

    The largest loading of each component is positive.
    """

    kind: Literal["pca"] = "pca"
    dim: Positive = 32  # fewer for few or very small images

    def build(self, train_images: "np.ndarray", most: int) -> tuple[str, Extractor]:
        import numpy as np

        pixels = flat(train_images, LARGEST_SIDE)
        dim = min(self.dim, most, pixels.shape[1])
        if not 1 <= dim < len(pixels):
            raise ValueError(f"cannot take {dim} components of {len(pixels)} images")
        mean = pixels.mean(axis=0)
        components = np.linalg.svd(pixels - mean, full_matrices=False)[2][:dim]
        largest = np.abs(components).argmax(axis=1)
        components = components * np.sign(components[np.arange(dim), largest])[:, None]  # (d, pixels)

        def extract(images: np.ndarray) -> np.ndarray:
            return (flat(images, LARGEST_SIDE) - mean) @ components.T

        return f"pca{dim}", extract


def flat(images: "np.ndarray", side: int) -> "np.ndarray":
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
