"""Classifier-free guidance around a denoiser whose answer is known."""

import pytest
import torch
from torch import Tensor

from ldm.diffusion.guidance import Guidance, autoguidance, classifier_free
from ldm.diffusion.samplers.ddim import ddim


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


def guided(denoiser: Linear, scale: float, inputs: dict[str, Tensor], **options):
    texts = (inputs[name] for name in ("context", "context_mask", "null", "null_mask"))
    return classifier_free(denoiser, Guidance(scale, **options), *texts)


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
    found = ddim(guided(Linear(), 2.0, inputs), inputs["x"], sigmas)  # one step to 0 is the denoiser's estimate
    shrunk = inputs["x"] / 5 - inputs["x"] / (1 + inputs["sigma"].view(-1, 1, 1, 1))
    torch.testing.assert_close(found, empty + 2 * (text - empty) + shrunk)


@pytest.mark.parametrize(("level", "inside"), [(0.5, False), (0.51, True), (2.0, True), (2.01, False)])
def test_outside_of_the_interval_the_prompt_alone_counts(level, inside, inputs):
    inputs["sigma"] = torch.full((3,), level, dtype=torch.float64)
    text, empty = apart(inputs)
    denoiser = Linear()
    found = guided(denoiser, 3.0, inputs, interval=(0.5, 2.0))(inputs["x"], inputs["sigma"])
    torch.testing.assert_close(found, empty + 3 * (text - empty) if inside else text)
    assert denoiser.batches == [6 if inside else 3]


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_is_diffusers_formula(rescale, inputs):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    text, empty = apart(inputs)
    expected = rescale_noise_cfg(empty + 5 * (text - empty), text, guidance_rescale=rescale)
    found = guided(Linear(), 5.0, inputs, rescale=rescale)(inputs["x"], inputs["sigma"])
    torch.testing.assert_close(found, expected)
    if rescale == 1:
        torch.testing.assert_close(found.flatten(1).std(1), text.flatten(1).std(1))


def test_negative_prompts_may_differ_image_by_image(inputs):
    negative = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[1], [3], [2]])
    texts = inputs["context"], inputs["context_mask"], negative, mask
    found = classifier_free(Linear(), Guidance(2.0), *texts)(inputs["x"], inputs["sigma"])
    text, _ = apart(inputs)
    unwanted, _ = apart(inputs | {"context": negative, "context_mask": mask})
    torch.testing.assert_close(found, unwanted + 2 * (text - unwanted))


def test_autoguidance_extrapolates_from_the_weaker_model(inputs):
    def strong(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.view(-1, 1, 1, 1))

    def weak(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma[0]))
        return strong(x, sigma) + 0.1 * x

    calls: list[float] = []
    x, sigma = inputs["x"], torch.full((3,), 1.5, dtype=torch.float64)
    found = autoguidance(strong, weak, Guidance(2.5))(x, sigma)
    torch.testing.assert_close(found, strong(x, sigma) - 1.5 * 0.1 * x)
    for none in (Guidance(1.0), Guidance(2.5, interval=(0.0, 1.0))):
        torch.testing.assert_close(autoguidance(strong, weak, none)(x, sigma), strong(x, sigma))
    assert len(calls) == 1
