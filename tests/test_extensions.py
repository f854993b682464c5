"""A new sampler, metric, data source or likelihood is one new file and one line, and then works wherever the others do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from tiny import TINY, clone, environment, set_params

ADDED = {
    "ldm/diffusion/samplers/midpoint.py": '''"""Runge-Kutta's methods of second order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field

from ldm.base.lazy import Tensor
from ldm.diffusion.samplers.sampler import DenoiseFn, NoiseFn, Sampler, level


def midpoint(denoiser: DenoiseFn, x: Tensor, sigmas: Tensor, noise: NoiseFn | None = None, *, alpha: float = 0.5) -> Tensor:
    """The second evaluation is at a share `alpha` of each step: 1/2 is the midpoint, 1 Heun's method."""
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        slope, step = (x - denoiser(x, level(x, sigma))) / sigma, sigma_next - sigma
        if (inner := sigma + alpha * step) > 0:
            ahead = x + alpha * step * slope
            inside = (ahead - denoiser(ahead, level(x, inner))) / inner
            slope = slope + (inside - slope) / (2 * alpha)
        x = x + step * slope
    return x


class Midpoint(Sampler):
    kind: Literal["midpoint"] = "midpoint"
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    backwards: bool = False

    def build(self, sigma_max: float) -> Callable[..., Any]:
        return partial(midpoint, alpha=self.alpha)
''',
    "ldm/evaluation/metrics/sharpness.py": '''"""How sharp samples are."""

from typing import TYPE_CHECKING, Literal

from ldm.evaluation.metrics.metric import Metric
from ldm.evaluation.value import Value

if TYPE_CHECKING:
    from ldm.evaluation.evaluation import Evaluation


class Sharpness(Metric):
    """Mean absolute difference of horizontal neighbours."""

    kind: Literal["sharpness"] = "sharpness"

    def measure(self, evaluation: "Evaluation") -> list[Value]:
        import numpy as np

        sides = evaluation.samples, evaluation.test_images
        found, real = (float(np.mean([np.abs(np.diff(image.astype(float))).mean() for image in images])) for images in sides)
        return [
            Value(
                name="sharpness",
                value=found,
                unit="grey levels",
                title="sharpness of samples",
                reading="Mean difference of neighbouring pixels. Closer to the real images' is better.",
                note=f"real images: {real:.3g}",
                headline=True,
            )
        ]
''',
    "ldm/data/sources/rings.py": '''"""Drawings of rings."""

from pathlib import Path
from typing import Literal

from ldm.base.files import replacing
from ldm.base.options import Positive
from ldm.data.sources.source import Source


class Rings(Source):
    kind: Literal["rings"] = "rings"
    count: Positive = 100

    def write(self, root: Path, out: Path) -> int:
        import numpy as np
        import pandas as pd
        from PIL import Image, ImageDraw

        random, rows = np.random.default_rng(0), []
        with replacing(out) as folder:
            for number in range(self.count):
                label = ("small", "large")[number % 2]
                radius = {"small": 3, "large": 6}[label] + random.uniform(-1, 1)
                x, y = random.uniform(7, 9, 2)
                image = Image.new("L", (16, 16))
                ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), outline=255, width=2)
                image.save(folder / f"{number:04d}.png")
                rows.append({"file_name": f"{number:04d}.png", "text": f"a {label} ring", "label": label})
            pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
        return self.count
''',
    "ldm/bayes/likelihoods/discretized_laplace.py": '''"""The Laplace likelihood of 8-bit values."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from ldm.base.lazy import Tensor, torch
from ldm.bayes.likelihoods.family import Family


class DiscretizedLaplace(Family):
    """A Laplace distribution integrated over the bin of each 8-bit value; the outermost bins reach to infinity."""

    kind: Literal["discretized_laplace"] = "discretized_laplace"
    discrete: ClassVar[bool] = True

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        from ldm.base.pixels import BIN, centred_levels

        width = BIN * torch.exp(-log_scale)  # of a bin, in units of the scale
        distance = torch.sub(centred_levels(x), location, alpha=1 / BIN)
        near, far = (distance.abs() - 0.5) * width, (distance.abs() + 0.5) * width
        around = torch.log1p(-0.5 * (near.clamp(max=0).exp() + (-far).exp()))  # the bin of the location
        inner = torch.where(near > 0, -near - math.log(2) + torch.log(-torch.expm1(-width)), around)
        edge = (distance * x.sign() - 0.5) * width  # of an outermost bin
        tail = torch.where(edge > 0, -edge - math.log(2), torch.log1p(-0.5 * edge.clamp(max=0).exp()))
        return torch.where(x.abs() > 1 - BIN / 2, tail, inner)

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        first, second = torch.empty((2, *shape), device=rng.device).exponential_(generator=rng)
        return first - second
''',
}
CLASSES = ("Midpoint", "Sharpness", "Rings", "DiscretizedLaplace")
SETTINGS = {  # what is not set on the command line
    "data": {"source": {"kind": "rings", "count": 120}, "image_size": 16, "resize_filter": "box"},
    "train_vae": TINY["train_vae"] | {"likelihood": {"kind": "discretized_laplace", "log_scale": -2.0}},
    "evaluate": TINY["evaluate"] | {"metrics": [{"kind": "psnr"}, {"kind": "sharpness"}]},
}
ASSIGNED = {"sampling.sampler.kind": "midpoint", "sampling.sampler.alpha": "0.75", "sampling.steps": "3"}


def python(folder: Path, *arguments: str) -> str:
    """What Python prints in this folder, whose `ldm` it imports if there is one."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def git(root: Path, *arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the repository with four new choices, and tiny settings that name them all but the sampler."""
    root = clone(tmp_path_factory.mktemp("extended") / "project")
    for (path, text), name in zip(ADDED.items(), CLASSES, strict=True):
        file = root / path
        file.write_text(text)
        with (file.parent / "__init__.py").open("a") as package:
            print(f"from {path.removesuffix('.py').replace('/', '.')} import {name} as {name}", file=package)
    return root


@pytest.fixture(scope="module")
def printed(extended) -> str:
    """What a run of the pipeline prints, under settings from params.yaml and from the command line."""
    set_params(extended, TINY)
    set_params(extended, SETTINGS)
    assignments = [text for key, value in ASSIGNED.items() for text in ("--set", f"{key}={value}")]
    return python(extended, "-m", "ldm.cli", "run", *assignments)


def test_each_is_one_new_file_and_one_line(extended):
    assert {line.split()[1] for line in git(extended, "status", "--porcelain", "ldm") if line.startswith("??")} == set(ADDED)
    packages = {str(Path(path).parent / "__init__.py") for path in ADDED}
    changed = [line.split("\t") for line in git(extended, "diff", "--numstat", "--", ".", ":!params.yaml", ":!dvc.lock")]
    assert changed == [["1", "0", package] for package in sorted(packages)]


def test_a_run_takes_them_from_settings_and_command_line(extended, printed):
    assert "params.yaml: sampling.steps: 2, now 3" in printed
    written = yaml.safe_load((extended / "params.yaml").read_text())
    assert written["sampling"]["sampler"] == {"kind": "midpoint", "alpha": 0.75}
    captions = pd.read_csv(extended / "data/raw/source/metadata.csv").text
    assert captions.tolist() == ["a small ring", "a large ring"] * 60
    with safe_open(extended / "models/ldm/autoencoder/likelihood.safetensors", "pt") as file:
        assert json.loads(file.metadata()["likelihood"])["kind"] == "discretized_laplace"
    recipe = json.loads((extended / "models/ldm/model.json").read_text())
    assert recipe["sampling"]["sampler"] == {"kind": "midpoint", "alpha": 0.75, "backwards": False}


def test_the_metric_is_in_summary_and_report(extended, printed):
    value = json.loads((extended / "reports/metrics.json").read_text())["sharpness"]
    assert 0 < value < 255
    assert re.search(r"^sharpness of samples +[\d.]+ grey levels +\(real images: [\d.]+\)$", printed, re.M)
    page = (extended / "reports/report.html").read_text()
    assert "sharpness of samples" in page and "Closer to the real images" in page


DRAW = """
import sys
import torch
from typer.testing import CliRunner
from ldm.base.options import kinds
from ldm.base.pixels import to_float
from ldm.bayes.likelihoods.family import Family
from ldm.cli import app

def draw(out, *assignments):
    arguments = [text for assignment in assignments for text in ("--set", assignment)]
    command = ["sample", "--model", "models/ldm", "--prompt", "a large ring", "-n", "4", "--out", out, *arguments]
    CliRunner().invoke(app, command, catch_exceptions=False)

draw("own")
draw("same", "sampler.alpha=0.75", "steps=3")
draw("heun", "sampler.kind=heun")
draw("end", "sampler.kind=midpoint", "sampler.alpha=1")
print("midpoint" in CliRunner().invoke(app, ["sample", "--help"]).output)

values = to_float(torch.arange(256, dtype=torch.uint8)).double()
for location in (-1.4, -1.0, 0.1, 1.0):
    for log_scale in (-6.0, -2.0, 1.0):
        place = torch.tensor(location, dtype=torch.float64)
        likelihood = kinds(Family)["discretized_laplace"](log_scale=log_scale).build().double()
        print(float(likelihood.log_prob(values, place.expand(256)).exp().sum()))
"""


def pictures(folder: Path) -> np.ndarray:
    files = sorted(folder.iterdir())
    return np.stack([np.asarray(Image.open(file)) for file in files])


def test_the_command_line_draws_with_the_sampler(extended, printed):
    help_names_it, *sums = python(extended, "-c", DRAW).split()[-13:]
    assert help_names_it == "True"
    assert [float(total) for total in sums] == pytest.approx([1] * 12, abs=1e-9)  # the likelihood's
    own, same, heun, end = (pictures(extended / name) for name in ("own", "same", "heun", "end"))
    assert own.shape == (4, 16, 16)
    assert np.array_equal(own, same)
    assert np.abs(heun.astype(int) - end).max() <= 1  # another implementation of the same steps
    assert np.abs(own.astype(int) - end).max() > 1


SERVE = """
import mlflow, pandas, sys
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/ldm/1")
rows = pandas.DataFrame({"prompt": ["a large ring"] * 2, "seed": [0, 1]})
changes = {"own": {}, "heun": {"sampler.kind": "heun"}, "end": {"sampler.alpha": 1.0, "sampler.kind": "midpoint"}}
for name, params in changes.items():
    for seed, png in enumerate(model.predict(rows, params=params).png):
        open(f"{name}{seed}.png", "wb").write(png)
print(sorted(param.name for param in model.metadata.signature.params))
print(mlflow.search_runs(search_all_experiments=True)["metrics.sharpness"].dropna().tolist())
import ldm
print(ldm.__file__)
"""


def test_the_served_model_takes_the_sampler_and_its_option(extended, printed, tmp_path):
    """In a folder without the code: the registered model brings its own."""
    names, tracked, file = python(tmp_path, "-c", SERVE, f"sqlite:///{extended}/mlflow.db").splitlines()[-3:]
    assert "sampler.alpha" in names and "sampler.backwards" in names
    metrics = json.loads((extended / "reports/metrics.json").read_text())
    assert set(json.loads(tracked)) == {metrics["sharpness"]}
    assert not Path(file).is_relative_to(extended / "ldm")
    own, heun, end = (
        np.stack([np.asarray(Image.open(tmp_path / f"{name}{i}.png")) for i in (0, 1)]) for name in ("own", "heun", "end")
    )
    assert np.array_equal(own[0], pictures(extended / "own")[0])  # the same seed and number as on the command line
    assert np.abs(heun.astype(int) - end).max() <= 1
    assert np.abs(own.astype(int) - end).max() > 1
