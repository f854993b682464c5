"""Which posterior samples new images are scored under: those that the settings ask for."""

import shutil
from pathlib import Path

from tiny import REPOSITORY, set_params

from ldm.drift import samplers


def test_what_earlier_settings_left_behind_is_not_used(tmp_path: Path) -> None:
    """DVC leaves the outs of a stage that has gone from the list; they are of the model of that time."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    for sampler in ("sghmc", "sgld"):
        (tmp_path / "models/posterior" / sampler).mkdir(parents=True)
        for name in ("samples.safetensors", "scores.csv"):
            (tmp_path / "models/posterior" / sampler / name).touch()
    for asked in ([], ["sgld"], ["sgld", "sghmc"]):
        set_params(tmp_path, {"sample_posterior": asked})
        assert samplers(tmp_path) == asked
    (tmp_path / "models/posterior/sgld/scores.csv").unlink()
    assert samplers(tmp_path) == ["sghmc"]
