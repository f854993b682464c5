"""The registered model as MLflow runs it: prompts in as a DataFrame, PNGs out.

MLflow stores this file with the model and executes it on load (models from code); nothing is unpickled.
"""

import json
from typing import Any

import mlflow.models
import mlflow.pyfunc
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
        plain = {name: getattr(value, "tolist", lambda value=value: value)() for name, value in (params or {}).items()}
        options = {name: value for name, value in plain.items() if value not in (None, [])}
        default_seed, negative = options.pop("seed", 0), options.pop("negative", "")
        sampling = assigned(self._model.recipe.sampling, [f"{key}={json.dumps(value)}" for key, value in options.items()])
        rows = model_input.reset_index(drop=True)
        out = pd.DataFrame({"prompt": rows["prompt"].astype(str)})
        out["seed"] = rows["seed"].fillna(default_seed).astype("int64") if "seed" in rows else default_seed
        out["png"] = pd.Series(index=out.index, dtype=object)
        for seed in out["seed"].unique().tolist():
            same = out[out["seed"] == seed]
            images = self._model.sample(list(same["prompt"]), negative=negative, seed=seed, **sampling)  # uint8 (N, C, H, W)
            out.loc[same.index, "png"] = pd.Series(
                [to_png(from_array(image)) for image in images.numpy()], index=same.index, dtype=object
            )
        return out


mlflow.models.set_model(PromptsToImages())
