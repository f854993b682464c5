"""A learned weight for each noise level."""

import torch
from torch import Tensor, nn

FREQUENCIES = 64


class Uncertainty(nn.Module):
    """loss / exp(u) + u, so that u(sigma) comes to ln of the level's mean loss (Karras et al. 2024, EDM2; Kendall & Gal 2018).

    u is linear in Fourier features of ln(sigma) / 4.
    """

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        # evenly spread quantiles of |N(0, 1)|, where EDM2 draws; the first one is 0, whose cosine is a bias
        spread = torch.special.ndtri(0.5 + torch.arange(FREQUENCIES, dtype=torch.float64) / (2 * FREQUENCIES))
        self.register_buffer("frequencies", (2 * torch.pi * spread).float(), persistent=False)
        self.weight = nn.Parameter(torch.zeros(2 * FREQUENCIES))  # u = 0

    def u(self, sigma: Tensor) -> Tensor:
        """Like sigma (B,); float32 under autocast, too."""
        angles = sigma.log()[:, None] / 4 * self.frequencies
        return (torch.cat([angles.cos(), angles.sin()], dim=1) * self.weight).sum(1)

    def forward(self, loss: Tensor, sigma: Tensor) -> Tensor:
        u = self.u(sigma)
        return loss * torch.exp(-u) + u
