"""The curve of a training that died and went on is, in MLflow, that of one which nobody disturbed: every point, once."""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import with_soak
from torch import Tensor, nn

from ldm.registry.tracking import Records, experiment_id, stage_run
from ldm.training.checkpoint import CheckpointStore
from ldm.training.fit import fit
from ldm.training.optimizers import AdamW, Optimizer

CHECKPOINT = 96  # images


@dataclass(frozen=True)
class Plan:
    images: int = 400
    batch_size: int = 8
    lr: float = 0.05
    warmup_images: int = 24
    optimizer: Optimizer = AdamW(weight_decay=0.1)  # noqa: RUF009 (frozen)
    ema_halflife_images: int = 40
    checkpoint_images: int = CHECKPOINT


class Regression:
    """Least squares; its process dies at a position."""

    def __init__(self, dies_at: int | None, how: str) -> None:
        torch.manual_seed(0)
        self.module, self.dies_at, self.how = nn.Linear(3, 1), dies_at, how

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters())}]

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        if images_seen == self.dies_at:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError
        x = torch.randn(batch_size, 3, generator=rng)[part]
        return (self.module(x) - x.sum(1, keepdim=True)).square().mean(), {"pixels": x.mean()}

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]:
        return {}

    def compile(self) -> None: ...


def train(folder: Path, key: str, dies_at: int | None = None, how: str = "") -> None:
    with stage_run("train_unet", {}, key=key) as run:
        store, objective = CheckpointStore(folder / key), Regression(dies_at, how)
        fit(objective, Plan(), seed=1, tracker=run, store=store, progress=lambda done, row: None)  # type: ignore[arg-type]


def points(client: Any, key: str) -> list[tuple[str, int, float]]:
    """Of the one run of a training; of what the clock decides, positions only."""
    (run,) = client.search_runs([experiment_id(client)], f"tags.`ldm.key` = '{key}'")
    assert run.info.status == "FINISHED"
    found = [point for name in run.data.metrics for point in client.get_metric_history(run.info.run_id, name)]
    return sorted((point.key, point.step, 0.0 if point.key.startswith("system/") else point.value) for point in found)


@pytest.mark.parametrize(  # a fork that is killed cannot deliver by itself: it shares a connection to SQLite
    ("how", "by"),
    [
        ("killed", "record"),
        ("killed", "record, at once"),
        ("failed", "record"),
        ("failed", "record, at once"),
        ("failed", "itself"),
    ],
)
@pytest.mark.parametrize("seed", with_soak(1, 6))
def test_the_curve_of_a_resumed_training(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, how: str, by: str
) -> None:
    """A failed one has delivered rows beyond its checkpoint, which come again."""
    if by != "itself":
        monkeypatch.setenv("LDM_RECORDS", str(tmp_path / "records"))
    records = Records(tmp_path / "records")
    train(tmp_path, "undisturbed")
    moments = np.random.default_rng(seed).integers(2, 24, 2) * 8 + [0, 200]
    for moment in map(int, moments):
        if how == "killed":
            child = os.fork()
            if not child:
                with contextlib.suppress(BaseException):
                    train(tmp_path, "disturbed", moment, how)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        else:
            with pytest.raises(RuntimeError):
                train(tmp_path, "disturbed", moment, how)
        if by == "record":
            records.deliver()
    train(tmp_path, "disturbed")
    records.deliver()
    expected = points(client, "undisturbed")
    assert len(expected) == 50 * 6 and points(client, "disturbed") == expected
