"""A system trained on squares and one on buckets of the same photographs, both measured on whole and on square test images.

`python tests/benchmarks/shapes.py [IMAGES]` trains both with the default settings, in colour and with four latent channels.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from photographs import write_photographs  # noqa: E402
from test_photographs import BUCKETS, RUN, STAGES  # noqa: E402
from tiny import clone, environment, metrics, set_params  # noqa: E402

from ldm.data.reader import open_shards  # noqa: E402
from ldm.evaluation.bounds import image_bounds  # noqa: E402
from ldm.model import LatentDiffusion  # noqa: E402

LEVELS = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"path": "photographs", "image_size": 32, "channels": 3},
    "text": {"max_tokens": 300},
    "autoencoder": {"latent_channels": 4},
    "evaluate": {"samples": 16, "metrics": metrics(4)},
}


def main() -> None:
    images, bounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1200, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shapes in (("squares", {"kind": "square"}), ("buckets", BUCKETS)):
            root = clone(Path(folder) / name)
            write_photographs(root / "photographs", images)
            set_params(root, SETTINGS | {"data": SETTINGS["data"] | {"shapes": shapes}})
            variables = environment(PYTHONPATH=str(root), OMP_NUM_THREADS="2")
            subprocess.run([sys.executable, "-c", RUN, *STAGES], cwd=root, env=variables, check=True)
        for trained in ("squares", "buckets"):
            model = LatentDiffusion.load(Path(folder) / trained / "models/ldm")
            for seen in ("squares", "buckets"):
                test = open_shards(Path(folder) / seen / "data/shards", "test")
                frame = image_bounds(model, test, LEVELS, 0, lambda done: None).set_index("key")
                bounds[trained, seen] = -frame.nats / (frame.dims * np.log(2))
    for (trained, seen), bits in bounds.items():
        print(f"trained on {trained}, test images as {seen}: {bits.mean():.4f} ± {bits.sem():.4f} bits/dim of {len(bits)}")
    for seen in ("squares", "buckets"):
        gain = bounds["squares", seen] - bounds["buckets", seen]
        print(f"on {seen}, buckets are better by {gain.mean():.4f} ± {gain.sem():.4f} bits/dim, image by image")


if __name__ == "__main__":
    main()
