"""Write the folder of captioned images `data.path` as WebDataset shards with an index."""

import functools
from collections import Counter
from pathlib import Path

import pandas as pd

from ldm.base.paths import QUARANTINE, SHARDS
from ldm.base.progress import Progress
from ldm.config import load_settings
from ldm.data.captions import ORIGINS
from ldm.data.parallel import default_workers
from ldm.data.shapes import as_text
from ldm.data.shards import write_shards
from ldm.registry.tracking import stage_run
from ldm.stages.checks import check_lengths
from ldm.stages.stage import stage_main, stage_params

CROPPED = 0.5  # share of an image, of which people should know
PRINTED = 20  # quarantined images that are printed; quarantine.csv has all


def run(root: Path) -> None:
    settings = load_settings(root)
    data, workers = settings.data.model_dump(exclude={"source", "path"}), default_workers()
    bars: dict[str, Progress] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = Progress(f"shard: {what}", total)
        bars[what](done)

    with stage_run("shard", stage_params(root, "shard", settings)) as tracker:
        folder, out, report = root / settings.data.path, root / SHARDS, root / QUARANTINE
        check = functools.partial(check_lengths, root, settings)
        index = write_shards(folder, out, **data, report=report, workers=workers, progress=progress, check_captions=check)
        counts = {split: stop - start for split, (start, stop) in index["splits"].items()}
        facts = {"quarantined": index["quarantined"], "converted": sum(index["converted"].values())}
        facts |= {f"{name}_captions": index["captions"][name] for name in ("several", "empty", "distinct")}
        tracker.log({f"{split}_images": float(n) for split, n in counts.items()} | facts, 0)
    bad, listed = index["quarantined"], ", ".join(f"{n} {split}" for split, n in counts.items())
    print(f"shard: {index['found']} images found, {listed}, {bad} quarantined, {len(index['shards'])} shards")
    for image in pd.read_csv(out / "quarantine.csv", dtype=str, keep_default_na=False, nrows=PRINTED).itertuples():
        print(f"shard: quarantined {image.file_name!r}: {image.reason}")
    if bad > PRINTED:
        print(f"shard: and {bad - PRINTED} more")
    images, cropped = Counter[str](), index["cropped"]
    for shard in index["shards"]:
        images[as_text(shard["shape"])] += shard["count"]
    listed = ", ".join(f"{n} of {shape}" for shape, n in images.items())
    print(f"shard: {listed}; cropped {cropped['mean']:.1%} of an image on average, {cropped['largest']:.1%} at most")
    if cropped["largest"] > CROPPED:
        advice = "data.shapes: buckets, a larger data.shapes.max_aspect, or data.fit: contain keeps more"
        print(f"shard: warning: of some images more than half is cropped, the centre is kept; {advice}")
    captions, origins = index["captions"], ", ".join(f"{n} from {ORIGINS[of]}" for of, n in index["captions"]["origins"].items())
    several = f"; {captions['several']} images have several" if captions["several"] else ""
    print(f"shard: captions: {origins}; {captions['distinct']} distinct, {captions['empty']} empty{several}")
    if listed := ", ".join(f"{n} of {profile}" for profile, n in index["converted"].items()):
        print(f"shard: colours converted to sRGB: {listed}")
    if listed := ", ".join(f"{n} {what}" for what, n in index["ignored"].items()):
        print(f"shard: passed over: {listed}")
    if listed := ", ".join(f"{n} {kind}" for kind, n in index["duplicates"].items()):
        print(f"shard: {listed} duplicates, listed in {SHARDS}/duplicates.csv")


if __name__ == "__main__":
    stage_main("shard", run)
