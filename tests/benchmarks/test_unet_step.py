"""A training step of the U-Net against diffusers' own network of the same shape, weights and optimizer, in one run.

The figure is a ratio of medians of interleaved pairs: above 1, ours is faster. `make bench` prints it.
"""

import statistics
import time

import diffusers
import pytest
import torch

from ldm.nets.unet import UNet

BATCH, PAIRS = 64, 15
SHAPE = {"block_out_channels": (64, 64), "layers_per_block": 1, "cross_attention_dim": 384, "norm_num_groups": 8}


def ours() -> torch.nn.Module:
    return UNet(4, 4, attention=("none", "cross"), num_heads=4, **SHAPE)


def theirs(folder) -> torch.nn.Module:
    return diffusers.UNet2DConditionModel.from_pretrained(folder)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("default", "channels_last"))
def test_training_step(layout, tmp_path):
    torch.manual_seed(0)
    own = ours()
    own.save_pretrained(tmp_path)
    peer = theirs(tmp_path)
    inputs = torch.randn(BATCH, 4, 8, 8), torch.rand(BATCH) * 1000, torch.randn(BATCH, 11, 384)

    def stepper(net):
        net = net.to(memory_format=layout).train()
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)

        def step():
            out = net(*inputs)
            loss = (out if isinstance(out, torch.Tensor) else out.sample).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    steps = stepper(own), stepper(peer)
    losses = [step() for step in steps]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # the same work
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(PAIRS):
        for seconds, step in zip(times, steps, strict=True):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    medians = [statistics.median(seconds) for seconds in times]
    print(f"\nU-Net step, batch {BATCH}, {layout}: ours {medians[0] * 1e3:.0f} ms, diffusers {medians[1] * 1e3:.0f} ms, ", end="")
    print(f"ratio {medians[1] / medians[0]:.2f}, {torch.get_num_threads()} threads, torch {torch.__version__}")
