"""What metrics and pictures need of a trained system: samples, reconstructions and real images, each computed once."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from ldm.base.errors import InputError
from ldm.base.progress import Progress
from ldm.base.randomness import seed_for
from ldm.bayes.diagnostics import Diagnostics, diagnose
from ldm.bayes.elbo import Elbo
from ldm.data.batches import order
from ldm.data.caption_columns import all_captions
from ldm.data.reader import ShardReader
from ldm.evaluation.autoencoder import evaluate_elbo
from ldm.evaluation.features import FeatureSpace
from ldm.evaluation.parts import by_kind
from ldm.nets.autoencoder import VQModel

MOST, BYTES = 4096, 1 << 30  # images of a split that are looked at, and their pixels: at most, unless samples are as many
DIAGNOSED = 1 << 26  # latent values that are looked at, at most


class Evaluation:
    """A trained `ldm.model.LatentDiffusion` beside real images in random order, uint8 (C, H, W), and their labels, if any."""

    def __init__(self, model: Any, train: ShardReader, test: ShardReader, seed: int, sample_count: int, unseen_count: int):
        self.model, self.test, self.seed = model, test, seed
        some = [_some(reader, seed, sample_count) for reader in (train, test)]
        (self.train_images, self.train_labels, _), (self.test_images, self.test_labels, self._sizes) = map(self._real, some)
        # Samples are drawn for captions, and for labelled prompts that no caption contains, if the data have any.
        captions = some[0].captions
        self.labelled = labelled(captions)
        self.prompts = balanced(captions if self.labelled is None else self.labelled, sample_count)
        self.unseen_prompts = None
        if self.labelled is not None and not train.prompts.empty:
            known = {text for reader in (train, test) for row in reader.captions.to_dict("records") for text in all_captions(row)}
            unseen = train.prompts[~train.prompts.text.isin(known)]
            self.unseen_prompts = None if unseen.empty else balanced(unseen, unseen_count)
        self._features: dict[FeatureSpace, Features] = {}

    def _real(self, reader: ShardReader) -> tuple[list[np.ndarray], np.ndarray | None, list[tuple[int, int]]]:
        """Images of a split in random order, their labels, and height and width."""
        rows = order(seed_for(self.seed, "real"), len(reader), 0, len(reader))
        images, sizes = dict[int, np.ndarray](), [reader.shape_of(row) for row in rows.tolist()]
        for places in by_kind(sizes).values():
            images |= dict(zip(places, reader.images(rows[places]), strict=True))
        labels = reader.captions.label.to_numpy()[rows] if "label" in reader.captions else None
        return [images[place] for place in range(len(rows))], labels, sizes

    @cached_property
    def elbo(self) -> Elbo:
        """The autoencoder's own bound on every test image."""
        with Progress("evaluate: the autoencoder's bound"):
            return evaluate_elbo(self.model.autoencoder, self.model.likelihood, self.test, self.seed)

    @cached_property
    def reconstructions(self) -> list[np.ndarray]:
        """The test images, encoded and decoded."""
        images = self.test_images
        with Progress("evaluate: reconstructions"):
            return self._by_size(
                [image.shape for image in images],
                lambda places, _: self.model.decode(self.model.encode(stacked([images[i] for i in places])).mean),
            )

    @cached_property
    def latents(self) -> Diagnostics | None:
        """Diagnostics of the posteriors of test images of the commonest shape; None for VQ, and where there is one image."""
        shape, positions = max(self.test.shapes.items(), key=lambda found: len(found[1]))
        most = max(2, min(MOST, DIAGNOSED // math.prod(self.model.latent_shape(shape))))
        if isinstance(self.model.autoencoder, VQModel) or len(positions) < 2:
            return None
        with Progress("evaluate: latents"):
            found = self.model.encode(torch.from_numpy(self.test.images(positions[:most])))
            return diagnose(found.mean.cpu(), found.logvar.cpu())

    @cached_property
    def samples(self) -> list[np.ndarray]:
        with Progress("evaluate: samples"):
            return self._sampled(self.prompts, "evaluate")

    @cached_property
    def unseen_samples(self) -> list[np.ndarray]:
        assert self.unseen_prompts is not None
        with Progress("evaluate: samples of unseen prompts"):
            return self._sampled(self.unseen_prompts, "evaluate unseen")

    def _sampled(self, prompts: pd.DataFrame, purpose: str) -> list[np.ndarray]:
        """An image for each prompt. Their sizes are those of test images, in random order."""
        seed, texts = seed_for(self.seed, purpose), prompts.text.tolist()

        def sampled(places: list[int], first: int) -> torch.Tensor:
            size = sizes[places[0]]
            return self.model.sample([texts[i] for i in places], size=size, seed=seed, first=first)

        sizes = [self._sizes[i % len(self._sizes)] for i in range(len(texts))]
        return self._by_size(sizes, sampled)

    def _by_size(self, sizes: Sequence[Any], function: Callable[[list[int], int], torch.Tensor]) -> list[np.ndarray]:
        """Images made by a function of the places of one size, and of how many were made before, in the order of places."""
        made: dict[int, np.ndarray] = {}
        for places in by_kind(sizes).values():
            made |= dict(zip(places, function(places, len(made)).numpy(), strict=True))
        return [made[place] for place in range(len(sizes))]

    def features(self, space: FeatureSpace) -> "Features":
        return self._features.get(space) or self._features.setdefault(space, Features(self, space))


def _some(reader: ShardReader, seed: int, least: int) -> ShardReader:
    """Images of a split, at random: all of them, or as many as `MOST` and `BYTES` allow and `least` asks for."""
    count = min(len(reader), max(least, min(MOST, BYTES // reader.images([0]).size)))
    return reader.subset(np.sort(order(seed_for(seed, "real"), len(reader), 0, count)))


def stacked(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Images of one shape as a tensor (N, C, H, W)."""
    return torch.from_numpy(np.stack(images))


class Features:
    """Features of equally many samples, test images and training images, each (N, d). No sample is drawn before it is needed."""

    def __init__(self, evaluation: Evaluation, space: FeatureSpace):
        self._evaluation = evaluation
        self.count = min(len(evaluation.prompts), len(evaluation.test_images), len(evaluation.train_images))
        self.name, self._extract = space.build(evaluation.train_images, self.count - 1)
        self.test, self.train = self._of(evaluation.test_images), self._of(evaluation.train_images)
        self.size = f"N = {self.count}, d = {self.test.shape[1]}"

    @cached_property
    def samples(self) -> np.ndarray:
        return self._of(self._evaluation.samples)

    def _of(self, images: Sequence[np.ndarray]) -> np.ndarray:
        features = self._extract(images[: self.count])
        if len(bad := np.argwhere(~np.isfinite(features))):
            raise InputError(f"evaluate.metrics: the features {self.name} of image {bad[0, 0]} are not finite")
        return features


def labelled(captions: pd.DataFrame) -> pd.DataFrame | None:
    """Distinct captions that stand for one label, with it; None unless they tell at least two labels apart."""
    if "label" not in captions:
        return None
    clear = captions[["text", "label"]].drop_duplicates().drop_duplicates("text", keep=False).reset_index(drop=True)
    return clear if clear.label.nunique() > 1 else None


def balanced(prompts: pd.DataFrame, count: int) -> pd.DataFrame:
    """`count` prompts: equally many of each label, cycling through the label's prompts."""
    prompts = prompts.drop_duplicates("text")
    groups = [group for _, group in prompts.groupby("label", sort=False)] if "label" in prompts else [prompts]
    picked = [groups[i % len(groups)].iloc[i // len(groups) % len(groups[i % len(groups)])] for i in range(count)]
    return pd.DataFrame(picked).reset_index(drop=True)
