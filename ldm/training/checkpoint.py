"""Checkpoints of an unfinished training run: safetensors and JSON, replaced atomically."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.base import distributed
from ldm.base.tensors import save_tensors


@dataclass(frozen=True)
class CheckpointStore:
    """The one checkpoint kept in `folder`; whoever holds the folder's key holds the run's identity."""

    folder: Path

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint: a kill at any moment leaves the old one or the new one, never a part."""
        complete = self.folder / f"{state['images_seen']:012d}"
        partial = complete.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            save_tensors({key: value.detach().contiguous() for key, value in tensors.items()}, partial / "state.safetensors")
            (partial / "state.json").write_text(json.dumps(state))
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        except Exception:  # a full disk
            shutil.rmtree(partial)
            raise
        shutil.rmtree(complete, ignore_errors=True)
        os.replace(partial, complete)
        for old in sorted(self.folder.glob("*[0-9]"))[:-1]:
            shutil.rmtree(old)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest complete checkpoint, or None."""
        if not (found := sorted(self.folder.glob("*[0-9]"))):
            return None
        return load_file(found[-1] / "state.safetensors"), json.loads((found[-1] / "state.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's per-parameter state as flat named tensors."""
    return {f"{index}.{name}": x for index, state in optimizer.state_dict()["state"].items() for name, x in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, each moment in its parameter's memory layout, as fused kernels require."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        if name != "step":
            moment = torch.empty_like(trained[int(index)], requires_grad=False)
            distributed.load({name: moment}, {name: value})
            value = moment
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
