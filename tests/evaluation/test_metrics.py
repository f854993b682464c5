"""Metrics as `evaluate.metrics` lists them, on a model whose samples and reconstructions are known."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import BaseModel, ValidationError

from ldm.base.errors import InputError
from ldm.base.options import OneOf, kinds
from ldm.evaluation.evaluation import Evaluation, balanced, labelled
from ldm.evaluation.features import Pca
from ldm.evaluation.metrics.frechet import Frechet, frechet_distance
from ldm.evaluation.metrics.kernel import Kernel, kernel_distance
from ldm.evaluation.metrics.latents import Latents
from ldm.evaluation.metrics.metric import Metric
from ldm.evaluation.metrics.prompt_accuracy import PromptAccuracy
from ldm.evaluation.metrics.psnr import Psnr, psnr
from ldm.evaluation.metrics.variance_ratio import VarianceRatio, variance_ratio
from ldm.nets.autoencoder import DiagonalGaussian, VQModel

WORDS = {"low": 0, "high": 200}


class Settings(BaseModel):
    metrics: tuple[Annotated[Metric, OneOf()], ...]


class Reader:
    """Grey images, dark ones called low and bright ones high."""

    def __init__(self, count: int, seed: int, labels: bool = True) -> None:
        rng = np.random.default_rng(seed)
        names = [list(WORDS)[i % 2] for i in range(count)]
        self.pixels = np.stack([rng.integers(0, 56, (1, 8, 8)) + WORDS[name] for name in names]).astype(np.uint8)
        texts = [f"a {name} image" if i % 3 else f"{name} one" for i, name in enumerate(names)]
        self.captions = pd.DataFrame({"key": [f"{seed}-{i}" for i in range(count)], "text": texts})
        prompts = {"text": ["something low", "a low image"], "label": ["low", "low"]}
        self.prompts = pd.DataFrame(prompts if labels else {"text": [], "label": []})
        if labels:
            self.captions["label"] = names

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shapes(self) -> dict[tuple[int, int], np.ndarray]:
        return {(8, 8): np.arange(len(self))}

    def shape_of(self, position: int) -> tuple[int, int]:
        return 8, 8

    def subset(self, positions: Any) -> "Reader":
        found = copy.copy(self)
        found.pixels, found.captions = self.pixels[positions], self.captions.iloc[positions].reset_index(drop=True)
        return found

    def images(self, positions: Any) -> np.ndarray:
        return self.pixels[np.asarray(positions)]


class Model:
    """Draws what a prompt says, but `wrong` of the first prompts, and reconstructs images one grey level too bright."""

    autoencoder: Any = None
    wrong = 0

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return 1, size[0] // 2, size[1] // 2

    def sample(self, prompts: list[str], *, size: tuple[int, int], seed: int, first: int) -> torch.Tensor:
        assert (size, first) == ((8, 8), 0)
        rng = np.random.default_rng(seed)
        levels = [200 if ("high" in prompt) != (number < self.wrong) else 0 for number, prompt in enumerate(prompts)]
        return torch.from_numpy(np.stack([rng.integers(0, 40, (1, 8, 8)) + level for level in levels]).astype(np.uint8))

    def encode(self, images: torch.Tensor) -> DiagonalGaussian:
        mean = images[:, :, ::2, ::2].float() / 100
        return DiagonalGaussian(mean, torch.full_like(mean, -3))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return ((latents * 100).round().repeat_interleave(2, 2).repeat_interleave(2, 3) + 1).to(torch.uint8)


def evaluation(labels: bool = True, **changes: Any) -> Evaluation:
    model = Model()
    for name, value in changes.items():
        setattr(model, name, value)
    readers: list[Any] = [Reader(90, 1, labels), Reader(60, 2, labels)]
    return Evaluation(model, *readers, seed=0, sample_count=40, unseen_count=10)


def of_train(prompts: slice = slice(None)) -> Any:
    found = Reader(90, 1)
    found.prompts = found.prompts[prompts]
    return found


def test_a_list_of_kinds_is_a_list_of_metrics() -> None:
    found = Settings.model_validate({"metrics": [{"kind": "psnr"}, {"kind": "frechet", "features": {"kind": "pca", "dim": 3}}]})
    assert found.metrics == (Psnr(), Frechet(features=Pca(dim=3)))
    assert set(kinds(Metric)) >= {"psnr", "frechet", "kernel", "prompt_accuracy", "variance_ratio", "latents"}
    for wrong in ({"kind": "fid"}, {"kind": "psnr", "dim": 3}, {"kind": "kernel", "features": {"kind": "pca", "dim": 0}}):
        with pytest.raises(ValidationError):
            Settings.model_validate({"metrics": [wrong]})


def test_the_command_line_reads_metrics_without_the_libraries_that_measure() -> None:
    code = "import ldm.evaluation.metrics, sys; print([n for n in ('torch', 'numpy', 'pandas', 'sklearn') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"


def test_psnr_is_that_of_the_reconstructions() -> None:
    given = evaluation()
    (value,) = Psnr().measure(given)
    images = np.stack(given.test_images)
    blocks = images[:, :, ::2, ::2].repeat(2, 2).repeat(2, 3).astype(int) + 1
    assert value.value == pytest.approx(psnr(images, blocks.astype(np.uint8)).mean())
    assert value.unit == "dB" and value.headline


def test_distances_compare_as_many_samples_as_test_images_in_a_space_fitted_to_training_images() -> None:
    given = evaluation()
    distance, floor = Frechet(features=Pca(dim=5), name="other").measure(given)
    (kernel,) = Kernel(features=Pca(dim=5)).measure(given)
    _, extract = Pca(dim=5).build(given.train_images, 39)
    samples, test, train = (extract(images[:40]) for images in (given.samples, given.test_images, given.train_images))
    assert (distance.name, floor.name, distance.title) == ("other", "other_floor", "FD-pca5")
    assert distance.value == frechet_distance(samples, test) and floor.value == frechet_distance(train, test)
    assert (kernel.value, kernel.error) == kernel_distance(samples, test)
    assert distance.note == f"N = 40, d = 5; two sets of real images: {floor.value:.3g}"
    assert given.features(Pca(dim=5)) is given.features(Pca(dim=5))  # computed once
    assert Frechet(features=Pca(dim=500)).measure(given)[0].title == "FD-pca39"  # fewer dimensions than samples


def test_too_few_images_for_a_frechet_distance_are_found_before_samples_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    given = evaluation(sample=None)  # it cannot draw
    for metric in (Frechet(), Kernel(), Psnr(), PromptAccuracy(), VarianceRatio(), Latents()):
        metric.check(given)
    monkeypatch.setattr(Pca, "build", lambda *_: ("large", lambda images: np.zeros((len(images), 2048))))
    given = evaluation(sample=None)
    Kernel().check(given)
    with pytest.raises(
        InputError, match=r"evaluate.metrics: fd needs more images than dimensions, found N = 40, d = 2048 in large; raise"
    ):
        Frechet().check(given)


def test_features_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> Any:
        return "broken", lambda images: np.where(np.arange(len(images))[:, None] == 4, np.nan, np.zeros((len(images), 3)))

    monkeypatch.setattr(Pca, "build", build)
    with pytest.raises(InputError, match=r"evaluate.metrics: the features broken of image 4 are not finite"):
        Kernel().measure(evaluation())


def test_prompt_accuracy_counts_samples_that_show_what_their_prompts_say() -> None:
    values = {value.name: value for value in PromptAccuracy().measure(evaluation(wrong=4))}
    assert values["prompt_accuracy"].value == pytest.approx(36 / 40)
    assert values["unseen_prompt_accuracy"].value == pytest.approx(6 / 10)
    assert values["classifier_accuracy"].value == 1 and values["prompt_accuracy"].note == "real test images: 100.0%"


def test_unseen_prompts_are_those_that_no_caption_contains() -> None:
    given = evaluation()
    assert given.unseen_prompts is not None and set(given.unseen_prompts.text) == {"something low"}
    without = Evaluation(given.model, of_train(slice(1, None)), given.test, seed=0, sample_count=40, unseen_count=10)
    assert without.unseen_prompts is None
    assert [value.name for value in PromptAccuracy().measure(without)] == ["prompt_accuracy", "classifier_accuracy"]


def test_variance_ratio_is_that_of_samples_over_training_images() -> None:
    given = evaluation()
    (value,) = VarianceRatio().measure(given)
    expected = variance_ratio(given.train_images, given.train_labels, given.samples, given.prompts.label)
    assert value.value == expected == pytest.approx((40**2 - 1) / (56**2 - 1), rel=0.1)  # of uniform integers
    few = Evaluation(given.model, of_train(), given.test, seed=0, sample_count=2, unseen_count=1)
    assert VarianceRatio().measure(few) == []  # one sample of each label


def test_latents_are_described_channel_by_channel() -> None:
    given = evaluation()
    values = {value.name: value for value in Latents().measure(given)}
    assert given.latents is not None
    assert {name: value.value for name, value in values.items()} == given.latents.metrics()
    assert values["kl_nats_channel_0"].title == "channel 0: KL" and values["kl_nats_channel_0"].unit == "nats"


def test_metrics_that_do_not_apply_measure_nothing() -> None:
    unlabelled = evaluation(labels=False)
    assert PromptAccuracy().measure(unlabelled) == VarianceRatio().measure(unlabelled) == []
    assert len(Frechet().measure(unlabelled)) == 2 and "label" not in unlabelled.prompts
    channels = {"in_channels": 1, "out_channels": 1}
    vq = VQModel(
        **channels, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=1, num_vq_embeddings=4
    )
    assert Latents().measure(evaluation(autoencoder=vq)) == []


def test_every_image_of_an_evaluation_repeats() -> None:
    first, second = evaluation(), evaluation()
    assert np.array_equal(first.samples, second.samples) and np.array_equal(first.test_images, second.test_images)
    assert sorted(np.stack(first.test_images).sum((1, 2, 3))) == sorted(first.test.images(range(60)).sum((1, 2, 3)))
    assert not np.array_equal(first.test_images, first.test.images(range(60)))  # in random order
    names = ["high" if image.mean() > 100 else "low" for image in first.test_images]
    assert list(first.test_labels) == names


def test_captions_that_stand_for_several_labels_are_no_prompts() -> None:
    captions = pd.DataFrame({"text": ["a", "b", "b", "c", "a"], "label": ["x", "x", "y", "y", "x"]})
    clear = labelled(captions)
    assert clear is not None and clear.to_numpy().tolist() == [["a", "x"], ["c", "y"]]
    assert labelled(captions[:2]) is None and labelled(captions[["text"]]) is None


def test_prompts_are_balanced_over_labels() -> None:
    prompts = pd.DataFrame({"text": ["a", "b", "c", "c"], "label": ["x", "x", "y", "y"]})
    assert balanced(prompts, 5).text.tolist() == ["a", "c", "b", "c", "a"]
    assert balanced(prompts[["text"]], 4).text.tolist() == ["a", "b", "c", "a"]
