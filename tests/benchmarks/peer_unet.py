"""diffusers' `UNet2DConditionModel`, trained as its own text-to-image example does, and sampled.

The recipe is that of `examples/text_to_image/train_text_to_image.py` at its default options: squared error of the predicted
noise; AdamW (0.9, 0.999) with weight decay 0.01; gradients clipped to norm 1; constant learning rate; no average of the
weights; default layout; eager. It is spared what costs time there and may be done before: latents and text embeddings are
given. The learning rate, 1e-4 there for weights trained before, is the caller's, as are the options of the optimizer and of
the network's layout and compilation that a user of diffusers could choose to be faster.
"""

import contextlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GUIDANCE, DDIM_STEPS = 2.0, 25


class Training:
    """The example's loop, a step at a time; `forward` is the network, or the network compiled."""

    def __init__(
        self,
        net: diffusers.UNet2DConditionModel,
        lr: float,
        *,
        fused: bool = False,
        forward: Callable[..., tuple[Tensor]] | None = None,
    ):
        self.net, self.forward = net.train(), net if forward is None else forward
        self.scheduler = diffusers.DDPMScheduler()
        options = {"betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
        self.optimizer = torch.optim.AdamW(net.parameters(), lr, fused=fused or None, **options)

    def gradients(self, x0: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor, autocast: bool = False) -> Tensor:
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=autocast):
            noisy = self.scheduler.add_noise(x0, noise, timesteps)
            predicted = self.forward(noisy, timesteps, encoder_hidden_states=context, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        return loss

    def step(self, x0: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor, autocast: bool = False) -> float:
        """A batch of latents (B, c, h, w) with noise, timesteps (B,) and text embeddings (B, T, D): its loss."""
        loss = self.gradients(x0, noise, timesteps, context, autocast)
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def serve(connection: Connection, folder: Path, batch: tuple[Tensor, ...], lr: float) -> None:
    """Train on one batch at a word, "step", or only compute its loss, "loss"; each answered by the loss."""
    training = Training(diffusers.UNet2DConditionModel.from_pretrained(folder), lr)
    with contextlib.suppress(EOFError):  # the other end is closed
        while word := connection.recv():
            if word == "step":
                connection.send(training.step(*batch))
            else:
                connection.send(training.gradients(*batch).item())
                training.optimizer.zero_grad()


@torch.inference_mode()
def ddim(net: diffusers.UNet2DConditionModel, x: Tensor, context: Tensor, empty: Tensor) -> Tensor:
    """Latents (N, c, h, w) by deterministic DDIM with guidance, from noise x, under `context` (N, T, D) or `empty` (T, D)."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)  # its default clips latents to [-1, 1]
    scheduler.set_timesteps(DDIM_STEPS)
    both = torch.cat([empty.expand_as(context), context])
    for timestep in scheduler.timesteps:
        without, text = net(torch.cat([x, x]), timestep, both, return_dict=False)[0].chunk(2)
        x = scheduler.step(without + GUIDANCE * (text - without), timestep, x).prev_sample
    return x
