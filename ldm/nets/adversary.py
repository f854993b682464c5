"""The discriminator and the perceptual distance of the latent diffusion paper's autoencoder (Rombach et al. 2022, appendix G)."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.base.errors import InputError
from ldm.base.hashing import file_hash

NEGATIVE_SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Logits (B, 1, h, w), one for each patch, of images (B, C, H, W) being real (Isola et al. 2017, "PatchGAN").

    With group instead of batch normalisation, so that an image's logits depend on no other image, and a batch may be
    parted between processes without changing them.
    """

    def __init__(self, inputs: int, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(inputs, channels, 4, 2, 1), nn.LeakyReLU(NEGATIVE_SLOPE)]
        width = channels
        for layer in range(1, layers + 1):
            before, width = width, channels * min(2**layer, 8)
            convolution = nn.Conv2d(before, width, 4, 1 if layer == layers else 2, 1, bias=False)
            blocks += [convolution, nn.GroupNorm(1, width), nn.LeakyReLU(NEGATIVE_SLOPE)]
        self.net = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Perceptual(nn.Module):
    """Distance between images in the feature maps of a frozen VGG (Zhang et al. 2018, "LPIPS", equation 1), (B,).

    Its weights are a file of yours, checked by its sha256, with torchvision's keys of VGG-16 (`features.N.weight`) and, where
    they are in it too, LPIPS's learned channel weights (`linK.model.1.weight`). Without a file a small VGG with random
    orthogonal filters takes its place: such features compare the distributions of patches, and do so nearly as well
    as trained ones (Amir & Weiss 2021, "Understanding and simplifying perceptual distances").
    """

    VGG16: ClassVar = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    RANDOM: ClassVar = ((32, 32), (64, 64), (128, 128))
    # torchvision's normalisation, for images in [-1, 1]
    MEAN: ClassVar = (-0.030, -0.088, -0.188)
    STD: ClassVar = (0.458, 0.448, 0.450)

    mean: Tensor
    std: Tensor

    def __init__(self, widths: Sequence[Sequence[int]] = RANDOM, seed: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self._taps: list[int] = []  # the last activation before each halving
        before = 3
        for level, convolutions in enumerate(widths):
            if level:
                layers.append(nn.MaxPool2d(2))
            for width in convolutions:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self._taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        rng = torch.Generator().manual_seed(seed)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight, gain=2**0.5, generator=rng)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for level, convolutions in enumerate(widths):
            self.register_buffer(f"lin{level}", torch.full((convolutions[-1],), 1.0))
        self.register_buffer("mean", torch.tensor(self.MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(self.STD).view(1, 3, 1, 1))
        self.requires_grad_(False)

    @classmethod
    def from_file(cls, path: Path, sha256: str) -> "Perceptual":
        """VGG-16 with the weights of a safetensors file, or of torch's own format read without unpickling objects."""
        if not path.is_file():
            raise InputError(f"{path}: no such file; train_vae.ldm.perceptual is `random`, or a file of VGG-16 weights")
        if (found := file_hash(path)) != sha256:
            raise InputError(f"{path}: sha256 is {found}, perceptual_sha256 says {sha256}; fetch it again, or set that")
        try:
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        except (SafetensorError, UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
            raise InputError(f"{path}: cannot be read as weights ({str(error).splitlines()[0]})") from error
        net = cls(cls.VGG16)
        own = net.state_dict()
        used = {key: value for key, value in state.items() if key.startswith("features.")}
        for level in range(len(cls.VGG16)):
            if (learned := state.get(f"lin{level}.model.1.weight")) is not None:
                used[f"lin{level}"] = learned.flatten()
        for key, value in own.items():
            if key.startswith("features.") and (key not in used or used[key].shape != value.shape):
                raise InputError(f"{path}: {key} of shape {tuple(value.shape)} is not in it; it must hold torchvision's VGG-16")
        if extra := sorted(used.keys() - own.keys()):
            raise InputError(f"{path}: {extra[0]} is not of torchvision's VGG-16 (without batch normalisation)")
        net.load_state_dict(own | used)
        return net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean over positions of the weighted squared difference of features, summed over levels; gradients reach y alone."""
        with torch.no_grad():
            real = self._maps(x)
        total = torch.zeros(len(x), device=x.device)
        for level, (a, b) in enumerate(zip(real, self._maps(y), strict=True)):
            weight = getattr(self, f"lin{level}").view(1, -1, 1, 1)
            total = total + ((a - b).square() * weight).sum(1).mean((1, 2))
        return total

    def _maps(self, x: Tensor) -> list[Tensor]:
        """Each level's features, of unit length at every position."""
        h = (x.expand(-1, 3, -1, -1) - self.mean) / self.std  # a grey image is an RGB one of equal channels
        maps = []
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in self._taps:
                maps.append(F.normalize(h.float(), dim=1, eps=1e-10))
        return maps
