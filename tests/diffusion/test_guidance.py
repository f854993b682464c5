"""Classifier-free guidance around a denoiser whose answer is known."""

import pytest
import torch
from torch import Tensor

from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.samplers import euler


class Linear:
    """D = x / (1 + sigma) + the mean of the tokens that the mask admits; keeps the sizes it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, *, context: Tensor, context_mask: Tensor) -> Tensor:
        self.batches.append(len(x))
        weights = context_mask[..., None].to(context)
        pooled = (context * weights).sum((1, 2)) / weights.sum((1, 2))
        return x / (1 + sigma.view(-1, 1, 1, 1)) + pooled.view(-1, 1, 1, 1)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    return {
        "x": normal(3, 2, 4, 4),
        "sigma": normal(3).exp(),
        "context": normal(3, 4, 5),
        "context_mask": mask,
        "null": normal(4, 5),
        "null_mask": torch.tensor([True, True, False, False]),
    }


def apart(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """D under the prompts and under the empty caption, one image at a time."""
    text, empty = [], []
    for i in range(3):
        x, sigma = inputs["x"][i : i + 1], inputs["sigma"][i : i + 1]
        text.append(Linear()(x, sigma, context=inputs["context"][i : i + 1], context_mask=inputs["context_mask"][i : i + 1]))
        empty.append(Linear()(x, sigma, context=inputs["null"][None], context_mask=inputs["null_mask"][None]))
    return torch.cat(text), torch.cat(empty)


def guided(denoiser: Linear, scale: float, inputs: dict[str, Tensor]):
    return classifier_free(denoiser, scale, *(inputs[name] for name in ("context", "context_mask", "null", "null_mask")))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_scale_extrapolates_from_the_empty_caption(scale, inputs):
    text, empty = apart(inputs)
    found = guided(Linear(), scale, inputs)(inputs["x"], inputs["sigma"])
    torch.testing.assert_close(found, empty + scale * (text - empty))
    assert scale in (1.0,) or not torch.allclose(found, text)


def test_one_evaluation_of_a_doubled_batch_and_none_for_scale_one(inputs):
    denoiser = Linear()
    guided(denoiser, 3.0, inputs)(inputs["x"], inputs["sigma"])
    guided(denoiser, 1.0, inputs)(inputs["x"], inputs["sigma"])
    assert denoiser.batches == [6, 3]


def test_a_guided_denoiser_is_a_denoiser_to_samplers(inputs):
    text, empty = apart(inputs)
    sigmas = torch.tensor([4.0, 0.0], dtype=torch.float64)
    found = euler(guided(Linear(), 2.0, inputs), inputs["x"], sigmas)  # one step to 0 is the denoiser's estimate
    shrunk = inputs["x"] / 5 - inputs["x"] / (1 + inputs["sigma"].view(-1, 1, 1, 1))
    torch.testing.assert_close(found, empty + 2 * (text - empty) + shrunk)
