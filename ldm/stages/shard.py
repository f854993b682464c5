"""Folder of captioned images -> WebDataset shards with an index."""

from pathlib import Path

import pandas as pd

from ldm.base.errors import InputError
from ldm.base.paths import QUARANTINE, SHARDS
from ldm.base.progress import Progress
from ldm.config import load_settings
from ldm.data.parallel import default_workers
from ldm.data.shards import TooManyUnreadable, write_shards
from ldm.registry.tracking import stage_run
from ldm.stages.runtime import stage_main
from ldm.stages.stage import Stage

SHOWN = 20  # quarantined images that are printed; quarantine.csv has all


def run(root: Path) -> None:
    settings = load_settings(root)
    data = settings.data.model_dump(exclude={"source"})
    out = root / SHARDS
    with stage_run(STAGE.name, STAGE.params(settings)) as tracker:
        bars: dict[str, Progress] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = Progress(f"shard: {what}", total)
            bars[what](done)

        try:
            index = write_shards(root / data.pop("path"), out, **data, workers=default_workers(), progress=progress)
        except TooManyUnreadable as error:
            path = root / QUARANTINE
            path.parent.mkdir(exist_ok=True)
            error.quarantined.to_csv(path, index=False, errors="backslashreplace")
            raise InputError(f"{error}; all are in {path.relative_to(root)}") from None
        counts = {split: stop - start for split, (start, stop) in index["splits"].items()}
        tracker.log({f"{split}_images": float(n) for split, n in counts.items()} | {"quarantined": index["quarantined"]}, 0)
    split = ", ".join(f"{n} {name}" for name, n in counts.items())
    print(f"shard: {index['found']} images found, {split}, {index['quarantined']} quarantined, {len(index['shards'])} shards")
    show(pd.read_csv(out / "quarantine.csv", dtype=str, keep_default_na=False))
    if index["ignored"]:
        ignored = ", ".join(f"{n} {suffix}" for suffix, n in index["ignored"].items())
        print(f"shard: ignored what is no image: {ignored}")
    if index["duplicates"]:
        found = ", ".join(f"{n} {kind}" for kind, n in index["duplicates"].items())
        print(f"shard: {found} duplicates, listed in {SHARDS}/duplicates.csv")


def show(quarantined: pd.DataFrame) -> None:
    for bad in quarantined[:SHOWN].itertuples():
        print(f"shard: quarantined {bad.file_name!r}: {bad.reason}")
    if len(quarantined) > SHOWN:
        print(f"shard: and {len(quarantined) - SHOWN} more")


STAGE = Stage("shard", run, settings=("data",), inputs=("${data.path}",), outs=(SHARDS,))

if __name__ == "__main__":
    stage_main(STAGE)
