"""The registered model as MLflow runs it. MLflow stores this file with it and executes it on load; nothing is unpickled."""

import json
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd

from ldm.base.options import assigned
from ldm.data.images import from_array, to_png
from ldm.data.shapes import from_text
from ldm.diffusion.options import changed_sampling


class PromptsToImages(mlflow.pyfunc.PythonModel):
    """Columns `prompt`, maybe `seed`, to `prompt`, `seed`, `png` (bytes); a row alone is a function of (prompt, seed) only."""

    def load_context(self, context: Any) -> None:
        from ldm.base.device import default_device
        from ldm.model import LatentDiffusion

        self._model = LatentDiffusion.load(context.artifacts["model"], default_device())

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        options = {name: np.asarray(value).tolist() for name, value in (params or {}).items()}
        default_seed, negative, size = options.pop("seed", 0), options.pop("negative", ""), options.pop("size", "")
        defaults = self._model.recipe.sampling  # None: not given; an empty list: none, as no guidance_interval
        given = {key: value for key, value in options.items() if value is not None and (value != [] or key in defaults)}
        changed = assigned(defaults, [f"{key}={json.dumps(None if value == [] else value)}" for key, value in given.items()])
        sampling, shape = changed_sampling(changed, {}).model_dump(), from_text(size) if size else None
        rows = model_input.reset_index(drop=True)
        seeds = rows["seed"].fillna(default_seed).astype("int64") if "seed" in rows else default_seed
        out = pd.DataFrame({"prompt": rows["prompt"].astype(str), "seed": seeds})
        pngs: dict[int, bytes] = {}
        for seed in out["seed"].unique().tolist():
            same = out[out["seed"] == seed]
            images = self._model.sample(list(same["prompt"]), negative=negative, seed=seed, size=shape, **sampling)
            pngs |= {row: to_png(from_array(image)) for row, image in zip(same.index, images.numpy(), strict=True)}
        out["png"] = pd.Series(pngs, dtype=object)
        return out


mlflow.models.set_model(PromptsToImages())
