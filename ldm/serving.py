"""The registered model as MLflow runs it: prompts in as a DataFrame, PNGs out.

MLflow stores this file with the model and executes it on load (models from code); nothing is unpickled.
"""

import io
import os
from typing import Any

import mlflow.models
import mlflow.pyfunc
import pandas as pd
from PIL import Image


class PromptsToImages(mlflow.pyfunc.PythonModel):
    """Columns in: `prompt` and optionally `seed`. Columns out: `prompt`, `seed`, `png` (bytes).

    Rows with one seed are drawn together, so a row alone with its seed is a function of (prompt, seed) only.
    """

    def load_context(self, context: Any) -> None:
        from ldm.model import LatentDiffusion

        self._model = LatentDiffusion.load(context.artifacts["model"], device=os.environ.get("LDM_DEVICE") or "cpu")

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        options = dict(params or {})
        default_seed = options.pop("seed", None) or 0
        rows = model_input.reset_index(drop=True)
        out = pd.DataFrame({"prompt": rows["prompt"].astype(str)})
        out["seed"] = rows["seed"].fillna(default_seed).astype("int64") if "seed" in rows else default_seed
        out["png"] = pd.Series(index=out.index, dtype=object)
        for seed in out["seed"].unique().tolist():
            same = out[out["seed"] == seed]
            images = self._model.sample(list(same["prompt"]), seed=seed, **options)  # uint8 (N, C, H, W)
            out.loc[same.index, "png"] = pd.Series([png(image) for image in images], index=same.index, dtype=object)
        return out


def png(image: Any) -> bytes:
    """A uint8 image tensor (C, H, W) as PNG."""
    pixels = image.permute(1, 2, 0).cpu().numpy()  # (H, W, C)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, format="PNG")
    return file.getvalue()


mlflow.models.set_model(PromptsToImages())
