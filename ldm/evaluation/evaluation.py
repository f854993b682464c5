"""What metrics and pictures need of a trained system: samples, reconstructions and real images, each computed once."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from ldm.base.progress import Progress
from ldm.base.randomness import seed_for
from ldm.bayes.diagnostics import Diagnostics, diagnose
from ldm.bayes.elbo import Elbo
from ldm.data.batches import order
from ldm.data.reader import ShardReader
from ldm.evaluation.autoencoder import evaluate_elbo
from ldm.evaluation.classifier import Classifier
from ldm.evaluation.features.feature_space import FeatureSpace
from ldm.nets.autoencoder import VQModel

MOST = 4096  # images of a split that are used at most
BATCH = 256  # images encoded and decoded at a time


@dataclass(frozen=True)
class Features:
    """Features of equally many samples, test images and training images, each float64 (N, d)."""

    name: str  # of the feature space
    samples: np.ndarray
    test: np.ndarray
    train: np.ndarray

    @property
    def size(self) -> str:
        return f"N = {len(self.test)}, d = {self.test.shape[1]}"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A trained system beside real images, uint8 (N, C, H, W); whatever is drawn depends on `seed` alone.

    Real images come in random order, so that the first few stand for all.
    """

    model: Any  # ldm.model.LatentDiffusion
    train: ShardReader
    test: ShardReader
    seed: int
    sample_count: int
    unseen_count: int
    _features: dict[FeatureSpace, Features] = field(default_factory=dict)

    def _chosen(self, reader: ShardReader) -> np.ndarray:
        return order(seed_for(self.seed, "real"), len(reader), 0, min(len(reader), MOST))

    @cached_property
    def train_images(self) -> np.ndarray:
        return self.train.images(self._chosen(self.train))

    @cached_property
    def test_images(self) -> np.ndarray:
        return self.test.images(self._chosen(self.test))

    @property
    def train_labels(self) -> np.ndarray:
        return self.train.captions.label.iloc[self._chosen(self.train)].to_numpy()

    @property
    def test_labels(self) -> np.ndarray:
        return self.test.captions.label.iloc[self._chosen(self.test)].to_numpy()

    @cached_property
    def elbo(self) -> Elbo:
        """The autoencoder's own bound on every test image."""
        with Progress("evaluate: the autoencoder's bound"):
            return evaluate_elbo(self.model.autoencoder, self.model.likelihood, self.test, self.seed)

    @cached_property
    def reconstructions(self) -> np.ndarray:
        """The test images, encoded and decoded."""
        with Progress("evaluate: reconstructions"):
            parts = torch.from_numpy(self.test_images).split(BATCH)
            return torch.cat([self.model.decode(self.model.encode(part).mean) for part in parts]).numpy()

    @cached_property
    def latents(self) -> Diagnostics | None:
        """Diagnostics of the test images' posteriors; None for VQ."""
        if isinstance(self.model.autoencoder, VQModel):
            return None
        with Progress("evaluate: latents"):
            count = min(len(self.test), MOST)
            parts = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
            encoded = [self.model.encode(torch.from_numpy(self.test.images(part))) for part in parts]
            return diagnose(torch.cat([p.mean.cpu() for p in encoded]), torch.cat([p.logvar.cpu() for p in encoded]))

    @cached_property
    def labelled(self) -> pd.DataFrame | None:
        return labelled(self.train.captions)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """The captions that samples are drawn for: `text`, and `label` if captions have labels."""
        return balanced(self.train.captions if self.labelled is None else self.labelled, self.sample_count)

    @cached_property
    def samples(self) -> np.ndarray:
        with Progress("evaluate: samples"):
            return self.model.sample(self.prompts.text.tolist(), seed=seed_for(self.seed, "evaluate")).numpy()

    @cached_property
    def unseen_prompts(self) -> pd.DataFrame | None:
        """Labelled prompts that no caption contains, if the data have any."""
        seen = self.train.prompts.text.isin([*self.train.captions.text, *self.test.captions.text])
        return None if self.labelled is None or seen.all() else balanced(self.train.prompts[~seen], self.unseen_count)

    @cached_property
    def unseen_samples(self) -> np.ndarray:
        assert self.unseen_prompts is not None
        with Progress("evaluate: samples of unseen prompts"):
            return self.model.sample(self.unseen_prompts.text.tolist(), seed=seed_for(self.seed, "evaluate unseen")).numpy()

    @cached_property
    def classifier(self) -> Classifier | None:
        """Trained on real training images; None without labels."""
        return None if self.labelled is None else Classifier.fit(self.train_images, self.train_labels)

    def features(self, space: FeatureSpace) -> Features:
        if space not in self._features:
            sides = self.samples, self.test_images, self.train_images
            count = min(map(len, sides))
            name, extract = space.build(self.train_images, count - 1)
            self._features[space] = Features(name, *(extract(images[:count]) for images in sides))
        return self._features[space]


def labelled(captions: pd.DataFrame) -> pd.DataFrame | None:
    """Distinct captions that stand for one label, with it; None unless they tell at least two labels apart."""
    if "label" not in captions:
        return None
    distinct = captions[["text", "label"]].drop_duplicates()
    clear = distinct[~distinct.text.duplicated(keep=False)].reset_index(drop=True)
    return clear if clear.label.nunique() > 1 else None


def balanced(prompts: pd.DataFrame, count: int) -> pd.DataFrame:
    """`count` prompts: equally many of each label, cycling through the label's prompts."""
    prompts = prompts.drop_duplicates("text")
    groups = [group for _, group in prompts.groupby("label", sort=False)] if "label" in prompts else [prompts]
    picked = [groups[i % len(groups)].iloc[i // len(groups) % len(groups[i % len(groups)])] for i in range(count)]
    return pd.DataFrame(picked).reset_index(drop=True)
