"""Every place of a project in which pixels or captions can lie, and what `ldm data purge` does there: one list."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Literal

from ldm.base.paths import HOME, LATENT_STORE, LATENTS, QUARANTINE, SHARD_CACHE, SHARDS, SOURCE, TRACKING, WORK
from ldm.versioning.branches import WORKTREES
from ldm.versioning.cache import REMOVED

LEFTOVER = "leftover"
COLLECTION = "COLLECTION"  # stands for the folder data.path


@dataclass(frozen=True)
class Place:
    """Files and folders of a project by a pattern of their path; where patterns are nested, the longest counts."""

    pattern: str
    fate: Literal["deleted", "refused", "stays", "empty"]  # refused: while the image is there; empty: no pixels, no captions
    holds: str

    def parts(self, collection: PurePosixPath) -> tuple[str, ...]:
        return PurePosixPath(self.pattern.replace(COLLECTION, escape(str(collection)))).parts

    def matches(self, path: PurePosixPath, collection: PurePosixPath) -> bool:
        parts = self.parts(collection)
        return len(parts) <= len(path.parts) and all(map(fnmatchcase, path.parts, parts))

    def found(self, root: Path, collection: PurePosixPath) -> list[Path]:
        """What the pattern names here, sorted. A leftover of ours is a folder: a file or a link of such a name is the user's."""
        found = sorted(root.glob("/".join(self.parts(collection))))
        return [path for path in found if self.holds != LEFTOVER or (path.is_dir() and not path.is_symlink())]

    def files(self, root: Path, collection: PurePosixPath) -> list[Path]:
        """All files here, sorted."""
        found = self.found(root, collection)
        below = (sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path] for path in found)
        return [path for paths in below for path in paths if path.is_symlink() or path.is_file()]


PLACES = (
    # what is current: purge refuses as long as the image is in there
    Place(COLLECTION, "refused", "collection"),
    Place(SOURCE, "refused", "source"),
    Place(SHARDS, "refused", "shards"),
    Place(LATENTS, "refused", "latents"),
    Place(WORKTREES, "refused", "worktrees"),  # of scheduled runs
    # what is not
    Place(f"{COLLECTION}/.ingest.partial", "deleted", LEFTOVER),  # of an ingest that was killed
    Place("data/*.partial", "deleted", LEFTOVER),  # of a stage that was killed
    Place("data/*.replaced", "deleted", LEFTOVER),
    Place(f"{SOURCE}.partial", "deleted", LEFTOVER),
    Place(f"{SOURCE}.replaced", "deleted", LEFTOVER),
    Place(f"{WORK}/*/*/bad_batch_*", "deleted", "batch"),  # of a training that diverged
    Place(SHARD_CACHE, "deleted", "download"),  # those that hold the image
    Place(LATENT_STORE, "deleted", "store"),  # all that no checkout has in data/latents
    Place(".dvc/cache/files", "deleted", "objects"),  # of the image, and what was made of it; the remote's too
    Place(f".dvc/cache/{REMOVED}", "deleted", "removed"),  # by an `ldm gc` that was killed
    # what stays
    Place("models", "stays", "trained weights"),
    Place(WORK, "stays", "trained weights"),
    Place("reports", "stays", "reports and sample pictures, here and in DVC's cache"),
    Place("mlruns", "stays", "MLflow's runs and versions, with reports and pictures"),
    Place("mlartifacts", "stays", "MLflow's runs and versions, with reports and pictures"),
    Place("mlflow.db*", "stays", "MLflow's runs and versions, with reports and pictures"),
    Place(TRACKING, "stays", "MLflow's runs and versions, with reports and pictures"),
    Place(HOME, "stays", "what libraries keep where no home can be written"),
    Place(".ldm/prefect.db*", "stays", "file names in logs of runs"),
    Place(".ldm/schedule*", "stays", "file names in logs of runs"),
    Place(".ldm/run.json", "stays", "file names in logs of runs"),
    Place("*.png", "stays", "pictures that commands wrote, such as contact_sheet.png"),
    Place(".git", "stays", "old caption tables in DVC's cache, and what git's history has"),
    Place(QUARANTINE, "stays", "file names in lists of DVC, git and the quarantine"),
    # neither pixels nor captions
    Place(".ldm/slots", "empty", "locks"),
    Place(f"{COLLECTION}.dvc", "empty", "the collection's hash"),
    Place(".dvc", "empty", "DVC's configuration and listings"),
    Place(".ldm/*.lock", "empty", "locks"),
    Place(".ldm/*.yaml", "empty", "fingerprints of the code"),
)
UNTOUCHED = "; ".join(dict.fromkeys(place.holds for place in PLACES if place.fate == "stays"))


def place_of(path: PurePosixPath, collection: PurePosixPath) -> Place | None:
    """The place of a file, both paths relative to the project; None if the list lacks it."""
    found = [place for place in PLACES if place.matches(path, collection)]
    return max(found, key=lambda place: len(place.parts(collection)), default=None)
