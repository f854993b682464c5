"""Write the folder of captioned images `data.path` as WebDataset shards with an index."""

from pathlib import Path

import pandas as pd

from ldm.base.paths import QUARANTINE, SHARDS
from ldm.base.progress import Progress
from ldm.config import load_settings
from ldm.data.parallel import default_workers
from ldm.data.shards import write_shards
from ldm.registry.tracking import stage_run
from ldm.stages.runtime import stage_main
from ldm.stages.stage import Stage

PRINTED = 20  # quarantined images that are printed; quarantine.csv has all


def run(root: Path) -> None:
    settings = load_settings(root)
    data = settings.data.model_dump(exclude={"source", "path"})
    bars: dict[str, Progress] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = Progress(f"shard: {what}", total)
        bars[what](done)

    with stage_run(STAGE.name, STAGE.params(settings)) as tracker:
        folder, out, workers = root / settings.data.path, root / SHARDS, default_workers()
        index = write_shards(folder, out, **data, report=root / QUARANTINE, workers=workers, progress=progress)
        counts = {split: stop - start for split, (start, stop) in index["splits"].items()}
        tracker.log({f"{split}_images": float(n) for split, n in counts.items()} | {"quarantined": index["quarantined"]}, 0)
    splits, bad = ", ".join(f"{n} {split}" for split, n in counts.items()), index["quarantined"]
    print(f"shard: {index['found']} images found, {splits}, {bad} quarantined, {len(index['shards'])} shards")
    for image in pd.read_csv(out / "quarantine.csv", dtype=str, keep_default_na=False, nrows=PRINTED).itertuples():
        print(f"shard: quarantined {image.file_name!r}: {image.reason}")
    if bad > PRINTED:
        print(f"shard: and {bad - PRINTED} more")
    if index["ignored"]:
        print(f"shard: ignored what is no image: {', '.join(f'{n} {suffix}' for suffix, n in index['ignored'].items())}")
    if index["duplicates"]:
        found = ", ".join(f"{n} {kind}" for kind, n in index["duplicates"].items())
        print(f"shard: {found} duplicates, listed in {SHARDS}/duplicates.csv")


STAGE = Stage("shard", run, settings=("data",), inputs=("${data.path}",), outs=(SHARDS,))

if __name__ == "__main__":
    stage_main(STAGE)
