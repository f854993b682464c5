"""Fingerprints of the code of every stage -> .ldm/code.yaml, where dvc.yaml reads them as parameters."""

from pathlib import Path

import yaml

from ldm.base.files import write_text
from ldm.base.paths import CODE
from ldm.stages.fingerprint import fingerprint
from ldm.stages.stage import NAMES, stage_main


def run(root: Path) -> None:
    file = root / CODE
    file.parent.mkdir(exist_ok=True)
    write_text(file, yaml.safe_dump({name: fingerprint(name) for name in NAMES if name != "code"}, sort_keys=False))


if __name__ == "__main__":
    stage_main("code", run)
