"""Feature space for distances between sets of images: principal components of the pixels of real images."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # (N, C, H, W)
Features = NDArray[np.float64]  # (N, d)

LARGEST_SIDE = 32  # larger images are averaged down first: a full SVD of raw photographs would not fit in memory


def averaged_down(images: Images, side: int) -> NDArray[np.float64]:
    """Pixels in [0, 1] of uint8 images (N, C, H, W), each axis longer than `side` averaged down to `side` blocks."""
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


@dataclass(frozen=True, eq=False)
class PixelPCA:
    """Projection on the leading principal components of real training images (pixels in [0, 1], not whitened)."""

    shape: tuple[int, ...]  # (C, H, W) of the images it was fitted on
    mean: NDArray[np.float64]  # (D,)
    components: NDArray[np.float64]  # (d, D), orthonormal rows, largest loading of each positive

    @classmethod
    def fit(cls, images: Images, dim: int) -> Self:
        """Full SVD in float64; `dim` must be below the number of images and at most the number of pixels."""
        pixels = averaged_down(images, LARGEST_SIDE).reshape(len(images), -1)
        if not 1 <= dim <= min(len(pixels) - 1, pixels.shape[1]):
            raise ValueError(f"cannot take {dim} components of {len(pixels)} images of {pixels.shape[1]} pixels")
        mean = pixels.mean(axis=0)
        components = np.linalg.svd(pixels - mean, full_matrices=False)[2][:dim]
        largest = np.abs(components).argmax(axis=1)
        signs = np.sign(components[np.arange(dim), largest])
        return cls(images.shape[1:], mean, components * signs[:, None])

    @property
    def name(self) -> str:
        return f"pca{len(self.components)}"

    def __call__(self, images: Images) -> Features:
        """Features (N, d) of uint8 images of the shape that was fitted."""
        if images.shape[1:] != self.shape:
            raise ValueError(f"features were fitted on images {self.shape}, found {images.shape[1:]}")
        pixels = averaged_down(images, LARGEST_SIDE).reshape(len(images), -1)
        return (pixels - self.mean) @ self.components.T
