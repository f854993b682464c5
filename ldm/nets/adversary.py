"""The discriminator and the perceptual distance of the latent diffusion paper's autoencoder (Rombach et al. 2022, appendix G)."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.base.errors import InputError
from ldm.base.files import file_hash


class PatchDiscriminator(nn.Module):
    """Logits (B, 1, h, w), one for each patch, of images (B, C, H, W) being real (Isola et al. 2017, "PatchGAN")."""

    def __init__(self, inputs: int, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(inputs, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            convolution = nn.Conv2d(widths[layer - 1], widths[layer], 4, 1 if layer == layers else 2, 1, bias=False)
            blocks += [convolution, nn.GroupNorm(1, widths[layer]), nn.LeakyReLU(0.2)]  # batch norms would mix images
        self.net = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Perceptual(nn.Module):
    """Distance between images in the feature maps of a frozen VGG (Zhang et al. 2018, "LPIPS", equation 1), (B,).

    By default a small VGG with random orthogonal filters, whose features compare the distributions of patches nearly as well as
    trained ones (Amir & Weiss 2021, "Understanding and simplifying perceptual distances").
    """

    VGG16: ClassVar = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    mean: Tensor
    std: Tensor

    def __init__(self, widths: Sequence[Sequence[int]] = ((32, 32), (64, 64), (128, 128))) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        rng, before = torch.Generator().manual_seed(0), 3
        for level, convolutions in enumerate(widths):
            layers += [nn.MaxPool2d(2)] if level else []
            for width in convolutions:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                nn.init.orthogonal_(layers[-2].weight, gain=2**0.5, generator=rng)  # type: ignore[arg-type]
                nn.init.zeros_(layers[-2].bias)  # type: ignore[arg-type]
                before = width
            self.register_buffer(f"lin{level}", torch.ones(before))
        self.features = nn.Sequential(*layers)
        # torchvision's normalisation, for images in [-1, 1]
        self.register_buffer("mean", torch.tensor((-0.030, -0.088, -0.188)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor((0.458, 0.448, 0.450)).view(1, 3, 1, 1))
        self.requires_grad_(False)

    @classmethod
    def from_file(cls, path: Path, sha256: str) -> "Perceptual":
        """VGG-16 with the weights of a file, safetensors or torch's own format (read without unpickling objects): torchvision's
        keys, `features.N.weight`, and, if there are any, LPIPS's channel weights, `linK.model.1.weight`.
        """
        if not path.is_file():
            raise InputError(f"{path}: no such file; train_vae.objective.perceptual is `random`, or a file of VGG-16 weights")
        if (found := file_hash(path)) != sha256:
            raise InputError(f"{path}: sha256 is {found}, perceptual_sha256 says {sha256}; fetch it again, or set that")
        net = cls(cls.VGG16)
        kept = {key: value for key, value in net.state_dict().items() if not key.startswith("features.")}
        try:
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
            kept |= {key.partition(".")[0]: value.flatten() for key, value in state.items() if key.startswith("lin")}
            net.load_state_dict(kept | {key: value for key, value in state.items() if key.startswith("features.")})
        except Exception as error:  # of many kinds, all of which mean that the file does not hold these weights
            unread = isinstance(error, UnpicklingError)  # whose text is torch's advice to programmers
            found = "cannot be read as weights" if unread else textwrap.shorten(str(error), 450)
            raise InputError(f"{path}: not the weights of torchvision's VGG-16 without batch normalisation: {found}") from error
        return net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean over positions of the weighted squared difference of features, summed over levels; gradients reach y alone."""
        with torch.no_grad():
            real = self._maps(x)
        total = torch.zeros(len(x), device=x.device)
        for level, (a, b) in enumerate(zip(real, self._maps(y), strict=True)):
            total = total + ((a - b).square() * getattr(self, f"lin{level}").view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total

    def _maps(self, x: Tensor) -> list[Tensor]:
        """The last activations of each level, normalised to length 1 at every position."""
        h, maps = (x.expand(-1, 3, -1, -1) - self.mean) / self.std, []  # a grey image is an RGB one of equal channels
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(F.normalize(h.float(), dim=1, eps=1e-10))
            h = layer(h)
        return [*maps, F.normalize(h.float(), dim=1, eps=1e-10)]
