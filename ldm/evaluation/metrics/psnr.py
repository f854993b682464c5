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
    """Peak signal-to-noise ratio in dB of each pair of 8-bit images (N, C, H, W) -> (N,).

    An identical pair would be infinite; it gets the value of a pair that differs by one level in one value,
    the largest that a differing pair can have, so that means stay finite.
    """
    import numpy as np

    if images.shape != reconstructions.shape or {images.dtype, reconstructions.dtype} != {np.dtype(np.uint8)}:
        found = " and ".join(f"{side.dtype} {side.shape}" for side in (images, reconstructions))
        raise ValueError(f"expected uint8 images of one shape, found {found}")
    difference = (images.astype(np.float64) - reconstructions).reshape(len(images), -1)
    squared = (difference**2).sum(axis=1).clip(min=1)
    return np.asarray(10 * np.log10(255**2 * difference.shape[1] / squared))
