"""What metrics and pictures need of a trained system: samples, reconstructions and real images, each computed once."""

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
from ldm.data.reader import ShardReader
from ldm.evaluation.autoencoder import evaluate_elbo
from ldm.evaluation.features import FeatureSpace
from ldm.nets.autoencoder import DiagonalGaussian, VQModel

MOST, BATCH = 4096, 256  # images of a split that are used at most, and that are encoded and decoded at a time


class Evaluation:
    """A trained `ldm.model.LatentDiffusion` beside real images in random order, uint8 (N, C, H, W), and their labels, if any."""

    def __init__(self, model: Any, train: ShardReader, test: ShardReader, seed: int, sample_count: int, unseen_count: int):
        self.model, self.train, self.test, self.seed = model, train, test, seed
        (self.train_images, self.train_labels), (self.test_images, self.test_labels) = map(self._real, (train, test))
        # Samples are drawn for captions, and for labelled prompts that no caption contains, if the data have any.
        self.labelled = labelled(train.captions)
        self.prompts = balanced(train.captions if self.labelled is None else self.labelled, sample_count)
        unseen = train.prompts[~train.prompts.text.isin([*train.captions.text, *test.captions.text])]
        self.unseen_prompts = None if self.labelled is None or unseen.empty else balanced(unseen, unseen_count)
        self._features: dict[FeatureSpace, Features] = {}

    def _real(self, reader: ShardReader) -> tuple[np.ndarray, np.ndarray | None]:
        rows = order(seed_for(self.seed, "real"), len(reader), 0, min(len(reader), MOST))
        return reader.images(rows), reader.captions.label.to_numpy()[rows] if "label" in reader.captions else None

    @cached_property
    def elbo(self) -> Elbo:
        """The autoencoder's own bound on every test image."""
        with Progress("evaluate: the autoencoder's bound"):
            return evaluate_elbo(self.model.autoencoder, self.model.likelihood, self.test, self.seed)

    def _encoded(self, images: np.ndarray) -> list[DiagonalGaussian]:
        return [self.model.encode(part) for part in torch.from_numpy(images).split(BATCH)]

    @cached_property
    def reconstructions(self) -> np.ndarray:
        """The test images, encoded and decoded."""
        with Progress("evaluate: reconstructions"):
            return torch.cat([self.model.decode(q.mean) for q in self._encoded(self.test_images)]).numpy()

    @cached_property
    def latents(self) -> Diagnostics | None:
        """Diagnostics of the test images' posteriors; None for VQ."""
        if isinstance(self.model.autoencoder, VQModel):
            return None
        with Progress("evaluate: latents"):
            encoded = self._encoded(self.test.images(range(len(self.test_images))))
            return diagnose(torch.cat([q.mean.cpu() for q in encoded]), torch.cat([q.logvar.cpu() for q in encoded]))

    @cached_property
    def samples(self) -> np.ndarray:
        with Progress("evaluate: samples"):
            return self.model.sample(self.prompts.text.tolist(), seed=seed_for(self.seed, "evaluate")).numpy()

    @cached_property
    def unseen_samples(self) -> np.ndarray:
        assert self.unseen_prompts is not None
        with Progress("evaluate: samples of unseen prompts"):
            return self.model.sample(self.unseen_prompts.text.tolist(), seed=seed_for(self.seed, "evaluate unseen")).numpy()

    def features(self, space: FeatureSpace) -> "Features":
        return self._features.get(space) or self._features.setdefault(space, Features(self, space))


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

    def _of(self, images: np.ndarray) -> np.ndarray:
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
