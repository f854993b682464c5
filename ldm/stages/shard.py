"""Folder of captioned images -> WebDataset shards with an index."""

from pathlib import Path

from ldm.config import load_settings
from ldm.data.shards import write_shards
from ldm.stages.runtime import stage_main
from ldm.tracking import stage_run


def run(root: Path) -> None:
    settings = load_settings(root)
    data = settings.data.model_dump()
    with stage_run("shard", data) as tracker:
        index = write_shards(root / data.pop("path"), root / "data/shards", **data)
        counts = {split: stop - start for split, (start, stop) in index["splits"].items()}
        tracker.log({f"{split}_images": float(n) for split, n in counts.items()} | {"quarantined": len(index["quarantined"])}, 0)
    split = ", ".join(f"{n} {name}" for name, n in counts.items())
    print(
        f"shard: {index['found']} images found, {split}, {len(index['quarantined'])} quarantined, {len(index['shards'])} shards"
    )
    for bad in index["quarantined"]:
        print(f"shard: quarantined {bad['file_name']!r}: {bad['reason']}")


if __name__ == "__main__":
    stage_main("shard", run)
