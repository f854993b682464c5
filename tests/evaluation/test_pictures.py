"""Pictures of an evaluation: what is drawn, and when."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ldm.bayes.elbo import Elbo
from ldm.evaluation import pictures


def test_rate_and_distortion_in_training_are_shown_where_they_are_code_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Elbo(torch.tensor([-10.0, -30.0]), torch.tensor([1.0, 2.0]), dims=256)

    def shown(curve: pd.DataFrame, discrete: bool = True) -> Any:
        """Nats an image by series, where there is a picture."""
        frames: list[pd.DataFrame] = []
        monkeypatch.setattr(pictures, "rate_distortion", lambda frame, path, **_: frames.append(frame.set_index("series")))
        pictures.draw_rate_distortion(own, curve, tmp_path / "x.png", discrete=discrete)
        return 256 * math.log(2) * frames[0] if frames else None

    curve = pd.DataFrame({"images": np.arange(8), "kl_nats": np.arange(8.0), "distortion_nats": np.arange(8.0)[::-1] ** 2})
    found = shown(curve)
    assert found.loc["test images"].tolist() == pytest.approx([1.5, 20])
    quarters = found.drop("test images")
    assert quarters.rate_bits_per_dim.tolist() == pytest.approx([0.5, 2.5, 4.5, 6.5])
    assert quarters.distortion_bits_per_dim.tolist() == pytest.approx([(49 + 36) / 2, (25 + 16) / 2, (9 + 4) / 2, 0.5])
    assert shown(curve.drop(columns="kl_nats")).rate_bits_per_dim.tolist() == pytest.approx([1.5] * 5)  # of a VQ model
    assert len(shown(curve[:2])) == 3
    assert shown(curve, discrete=False) is None
    assert shown(pd.DataFrame(columns=["images", "loss"])) is None  # of an autoencoder used as it is


def test_every_sample_stands_above_its_prompt_in_the_row_of_its_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        pictures, "image_grid", lambda images, columns, path, **more: drawn.update(more, images=images, n=columns)
    )
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    texts, labels = ["a one", "a two", "1", "2", "a one", "two", "1", "2", "three", "one"], ["1", "2"] * 4 + ["3", "1"]
    prompts = pd.DataFrame({"text": texts, "label": labels})
    pictures.prompt_grid(tmp_path / "x.png", prompts[prompts.label != "3"].reset_index(drop=True), images)
    assert drawn["n"] == 4 and np.stack(drawn["images"]).ravel().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert drawn["captions"] == ["a one", "1", "a one", "1", "a two", "2", "two", "2"]
    pictures.prompt_grid(tmp_path / "x.png", prompts, images)
    assert drawn["n"] == 1 and drawn["captions"] == ["a one", "a two", "three"]
    pictures.prompt_grid(tmp_path / "x.png", pd.DataFrame({"text": ["b", "a", "b", "a"]}), images[:4])  # without labels
    assert drawn["n"] == 2 and drawn["captions"] == ["b", "b", "a", "a"]
