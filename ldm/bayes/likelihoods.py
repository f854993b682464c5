"""Likelihoods p(x | z) of images given the decoder's output."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.errors import InputError

FILE = "likelihood.safetensors"
BIN = 2 / 255  # distance between neighbouring 8-bit values in [-1, 1]


def to_float(pixels: Any) -> Tensor:
    """8-bit images, uint8 (N, C, H, W) of numpy or torch, to float32 in [-1, 1]."""
    return torch.as_tensor(pixels).float() * BIN - 1


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] to the nearest 8-bit values."""
    return ((x + 1) / BIN).round().clamp(0, 255).to(torch.uint8)


class DiscretizedLogistic(nn.Module):
    """A logistic distribution integrated over each of the 256 values of an 8-bit pixel, one learned scale.

    Salimans et al. 2017 (PixelCNN++), equation 2 with a single component: the outermost bins reach to infinity,
    so that the probabilities of the 256 values sum to 1.
    """

    def __init__(self, log_scale: float = -3.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(log_scale))

    @classmethod
    def from_pretrained(cls, folder: Path) -> "DiscretizedLogistic":
        likelihood = cls()
        if not (folder / FILE).is_file():
            raise InputError(f"{folder / FILE} is missing: expected an autoencoder that train_vae wrote, likelihood and all")
        likelihood.load_state_dict(load_file(folder / FILE))
        return likelihood

    def save_pretrained(self, folder: Path) -> None:
        """Write the scale beside the autoencoder's weights."""
        save_file(self.state_dict(), folder / FILE)

    def log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        """Log-probability in nats of pixels x, which are 8-bit values mapped to [-1, 1]; like x."""
        inverse = torch.exp(-self.log_scale)
        upper = (x + BIN / 2 - mean) * inverse
        lower = upper - BIN * inverse
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), exact in every tail
        width = torch.log(-torch.expm1(-BIN * inverse))
        below = F.logsigmoid(upper) + torch.where(x > -1 + BIN / 2, width, 0.0)
        above = torch.where(x > -1 + BIN / 2, F.logsigmoid(-lower), 0.0)
        return torch.where(x < 1 - BIN / 2, below + above, F.logsigmoid(-lower))
