"""Write what `data.source` names to data/raw/source, a folder of captioned images."""

from pathlib import Path

from ldm.base.paths import SOURCE
from ldm.base.progress import Progress
from ldm.config import load_settings
from ldm.data.sources.source import Source
from ldm.registry.tracking import stage_run
from ldm.stages.stage import stage_main, stage_params


def run(root: Path) -> None:
    settings = load_settings(root)
    source: Source = settings.data.source
    with stage_run("source", stage_params(root, "source", settings)) as tracker:
        with Progress(f"source: {source.kind}"):
            count = source.write(root, root / SOURCE)
        tracker.log({"images": float(count)}, 0)
    print(f"source: {count} images written to {SOURCE}", flush=True)


if __name__ == "__main__":
    stage_main("source", run)
