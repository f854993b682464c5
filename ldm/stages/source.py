"""The setting `data.source` -> data/raw/source, a folder of captioned images."""

from pathlib import Path

from ldm.config import load_settings
from ldm.data.digits import write_digits
from ldm.data.huggingface import write_huggingface
from ldm.stages.runtime import stage_main
from ldm.tracking import stage_run


def run(root: Path) -> None:
    settings = load_settings(root)
    source, out = settings.data.source, root / "data/raw/source"
    with stage_run("source", {"source": source}) as tracker:
        count = write_digits(out) if source == "digits" else write_huggingface(source, root, out)
        tracker.log({"images": float(count)}, 0)
    print(f"source: {count} images written to data/raw/source", flush=True)


if __name__ == "__main__":
    stage_main("source", run)
