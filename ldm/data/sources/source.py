"""The base class of what `data.source` can name."""

from abc import abstractmethod
from pathlib import Path

from ldm.base.options import Choice


class Source(Choice):
    """Where the images of `data/raw/source` come from. A subclass has its own options and writes a folder that `shard` reads."""

    @abstractmethod
    def write(self, root: Path, out: Path) -> int:
        """Write captioned images to `out`, all or nothing; return how many. Paths in options are relative to `root`."""
