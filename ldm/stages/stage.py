"""A stage of the pipeline as its module declares it. `dvc.yaml` says the same to DVC; a test holds it to this."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ldm.base.options import value_at
from ldm.config import Settings

NAMES = (  # every stage, each after those it depends on
    "code", "source", "shard", "pretrained", "train_vae", "cache_latents", "train_unet", "evaluate", "sample_posterior",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """`python -m ldm.stages.NAME` reads `inputs` and `settings`, and writes `outs`: paths in the project, keys of params.yaml."""

    name: str
    run: Callable[..., None]  # of the project's folder, and of an item where the stage is `for_each`
    settings: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()  # "${data.path}" is the path that this setting names
    outs: tuple[str, ...] = ()  # "${item}" is the item
    for_each: str | None = None  # a list in params.yaml: the stage runs once for each item

    def params(self, settings: Settings) -> dict[str, Any]:
        """The values of the settings that it reads, by their dotted keys."""
        values = settings.model_dump()
        return {key: value_at(values, key) for key in self.settings}
