"""How closely the autoencoder alone reconstructs images."""

from typing import Literal

from ldm.evaluation.metrics.metric import Array, Evaluation, Images, Metric
from ldm.evaluation.value import Value


class Psnr(Metric):
    kind: Literal["psnr"] = "psnr"

    def measure(self, evaluation: Evaluation) -> list[Value]:
        value = float(psnr(evaluation.test_images, evaluation.reconstructions).mean())
        reading = "How closely the autoencoder alone reconstructs test images. Higher is better."
        return [Value(name="psnr", value=value, unit="dB", title="PSNR", reading=reading, headline=True)]


def psnr(images: Images, reconstructions: Images) -> Array:
    """PSNR in dB of each pair of 8-bit images (C, H, W) -> (N,); of an identical pair that of one level in one value."""
    import numpy as np

    found = []
    for image, reconstruction in zip(images, reconstructions, strict=True):
        if image.shape != reconstruction.shape or {image.dtype, reconstruction.dtype} != {np.dtype(np.uint8)}:
            sides = " and ".join(f"{side.dtype} {side.shape}" for side in (image, reconstruction))
            raise ValueError(f"expected uint8 images of one shape, found {sides}")
        squared = float(((image.astype(np.float64) - reconstruction) ** 2).sum())
        found.append(10 * np.log10(255**2 * image.size / max(squared, 1.0)))
    return np.array(found)
