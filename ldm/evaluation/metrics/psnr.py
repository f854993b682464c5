"""How closely the autoencoder alone reconstructs images."""

from typing import Literal

from ldm.evaluation.metrics.metric import Array, Evaluation, Metric
from ldm.evaluation.value import Value


class Psnr(Metric):
    kind: Literal["psnr"] = "psnr"

    def measure(self, evaluation: Evaluation) -> list[Value]:
        value = float(psnr(evaluation.test_images, evaluation.reconstructions).mean())
        reading = "How closely the autoencoder alone reconstructs test images. Higher is better."
        return [Value(name="psnr", value=value, unit="dB", title="PSNR", reading=reading, headline=True)]


def psnr(images: Array, reconstructions: Array) -> Array:
    """PSNR in dB of each pair of 8-bit images (N, C, H, W) -> (N,); of an identical pair that of one level in one value."""
    import numpy as np

    if images.shape != reconstructions.shape or {images.dtype, reconstructions.dtype} != {np.dtype(np.uint8)}:
        found = " and ".join(f"{side.dtype} {side.shape}" for side in (images, reconstructions))
        raise ValueError(f"expected uint8 images of one shape, found {found}")
    difference = (images.astype(np.float64) - reconstructions).reshape(len(images), -1)
    squared = (difference**2).sum(axis=1).clip(min=1)
    return np.asarray(10 * np.log10(255**2 * difference.shape[1] / squared))
