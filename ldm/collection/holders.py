"""What still holds an image that is to be purged: the checkout, the branch of the collection, worktrees.

A scheduled run makes its worktree anew if it is missing, so one that holds an image goes as a whole while no run is at work.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.base.files import file_hash, locked
from ldm.base.paths import LATENTS, SHARDS
from ldm.collection.objects import DIGEST, Objects, images_of
from ldm.collection.traces import Traces
from ldm.data.folders import walk
from ldm.versioning.branches import WORKTREES, contents_at, find_checkouts
from ldm.versioning.cache import named, named_now
from ldm.versioning.git import COLLECTION, commit_of, git
from ldm.versioning.worktree import SLOTS


@dataclass
class Holders:
    advice: str  # on what the checkout holds
    refused: dict[str, str] = field(default_factory=dict)  # digest -> where the image still is, and what to do
    stale: list[Path] = field(default_factory=list)  # worktrees that go; the lock of their slot is held
    current: set[str] = field(default_factory=set)  # md5 of all objects that anything else names

    def refuse(self, held: Mapping[str, str], advice: str) -> None:
        self.refused |= {digest: f"still in {where}; {advice}" for digest, where in held.items() if digest not in self.refused}


def find_holders(
    root: Path, repo: Any, objects: Objects, traces: Traces, collection: str, stack: contextlib.ExitStack
) -> Holders:  # fmt: skip
    """Who holds the images; `collection` is the path of their folder. `stack` gets the locks of slots whose worktrees go."""
    again = f"delete it from {collection} (with `dvc add`, if DVC versions that), run the pipeline (`ldm run`), then purge"
    holders = Holders(again)
    named_here = _outs(root, repo, objects)
    holders.current |= named_here.keys()
    holders.refuse(_held(root, collection, objects, traces, named_here), again)
    if tip := commit_of(root, COLLECTION):
        pointers = contents_at(root, [tip], f"{collection}.dvc")
        listed = _expanded(objects, named(pointers), "the collection of scheduled runs")
        holders.current |= listed.keys()
        holders.refuse(_digests(traces, listed), "commit its deletion, and run a deployment, which takes it out")
    for checkout in find_checkouts(root)[1:]:
        named_there = _expanded(objects, named_now([checkout]), f"what {checkout} names")
        held = _held(checkout, collection, objects, traces, named_there)
        slot = checkout.relative_to(root / WORKTREES).parts[0] if checkout.is_relative_to(root / WORKTREES) else ""
        if held and slot:
            (root / SLOTS).mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(root / SLOTS / f"{slot}.lock", wait=False))
                holders.stale.append(checkout)
                continue
            except BlockingIOError:
                holders.refuse(held, f"a run of {slot} is at work; purge when it has ended")
        holders.current |= named_there.keys()
        holders.refuse(held, f"take it out there, or `git worktree remove --force {checkout}`")
    return holders


def remove_worktree(root: Path, checkout: Path) -> None:
    """Remove the worktree of a slot that is locked; what it shares with the checkout stays."""
    with locked(root / SLOTS / "lock"):  # as those who make worktrees do
        git(root, "worktree", "remove", "--force", "--force", git(checkout, "rev-parse", "--show-toplevel"))


def _outs(root: Path, repo: Any, objects: Objects) -> dict[str, str]:
    """What dvc.lock and the .dvc files of the checkout name: the path of each file, and of each folder, by its md5."""
    found: dict[str, str] = {}
    for out in repo.index.outs:
        md5, path = out.hash_info.value if out.hash_info else "", out.fs_path.removeprefix(f"{root}/")
        files = objects.listing(md5) if md5.endswith(".dir") else {"": md5}
        found |= {file: f"{path}/{name}".rstrip("/") for name, file in files.items()}
    return found


def _expanded(objects: Objects, folders: Iterable[str], where: str) -> dict[str, str]:
    """These objects, and those that are files in them."""
    return {file: where for md5 in folders for file in (md5, *(objects.listing(md5) if md5.endswith(".dir") else {}).values())}


def _digests(traces: Traces, named: Mapping[str, str]) -> dict[str, str]:
    """The digests of images that objects hold, with the place where these are named."""
    found: dict[str, str] = {}
    for kind in (traces.images, traces.shards, traces.latents):
        for md5, digests in kind.items():
            if md5 in named:
                found = dict.fromkeys(digests, named[md5]) | found
    return found


def _held(checkout: Path, collection: str, objects: Objects, traces: Traces, named: Mapping[str, str]) -> dict[str, str]:
    """The digests of images that a checkout names, or has on its disk, with the place."""
    found, wanted = _digests(traces, named), traces.wanted
    for path in sorted((checkout / SHARDS).glob("*.tar")):
        found = dict.fromkeys(images_of(path) & wanted, str(path)) | found
    manifest = checkout / LATENTS / "manifest.json"
    with contextlib.suppress(OSError, ValueError, KeyError):  # there is none, or it is damaged
        for file in json.loads(manifest.read_text(encoding="utf-8"))["files"]:
            found = dict.fromkeys(traces.shard_hashes.get(file["shard_sha256"], ()), str(manifest)) | found
    sizes = {objects.size(md5) for md5 in traces.images}
    for path in (checkout / collection / name for name, _ in walk(checkout / collection)):
        if path.is_file() and path.stat().st_size in sizes and (digest := file_hash(path)[:DIGEST]) in wanted:
            found.setdefault(digest, str(path))
    return found
