"""The registered model as MLflow runs it. MLflow stores this file with it and executes it on load; nothing is unpickled."""

import json
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd

from ldm.base.options import assigned
from ldm.data.images import from_array, to_png


class PromptsToImages(mlflow.pyfunc.PythonModel):
    """Columns in: `prompt` and optionally `seed`. Columns out: `prompt`, `seed`, `png` (bytes).

    Rows with one seed are drawn together, so a row alone with its seed is a function of (prompt, seed) only.
    """

    def load_context(self, context: Any) -> None:
        from ldm.base.device import default_device
        from ldm.model import LatentDiffusion

        self._model = LatentDiffusion.load(context.artifacts["model"], default_device())

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        options = {name: np.asarray(value).tolist() for name, value in (params or {}).items()}
        default_seed, negative = options.pop("seed", 0), options.pop("negative", "")
        changes = [f"{key}={json.dumps(value)}" for key, value in options.items() if value not in (None, [])]
        sampling = assigned(self._model.recipe.sampling, changes)
        rows = model_input.reset_index(drop=True)
        seeds = rows["seed"].fillna(default_seed).astype("int64") if "seed" in rows else default_seed
        out = pd.DataFrame({"prompt": rows["prompt"].astype(str), "seed": seeds})
        pngs: dict[int, bytes] = {}
        for seed in out["seed"].unique().tolist():
            same = out[out["seed"] == seed]
            images = self._model.sample(list(same["prompt"]), negative=negative, seed=seed, **sampling)
            pngs |= {row: to_png(from_array(image)) for row, image in zip(same.index, images.numpy(), strict=True)}
        out["png"] = pd.Series(pngs, dtype=object)
        return out


mlflow.models.set_model(PromptsToImages())
