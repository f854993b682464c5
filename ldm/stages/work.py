"""Unfinished trainings in `.ldm/work/STAGE/KEY`, outside of DVC's outs, which DVC may delete.

The key is the hash of everything that the result depends on: settings, inputs, layout, code, library versions. So a run that
died resumes from its own checkpoint, and no other run does. An edit of the code changes the key; the run then names the
checkpoint under the earlier code, and `ldm checkpoints adopt` moves it to the new key, on the record.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from ldm.base.errors import InputError
from ldm.base.files import canonical_json, content_hash, write_text
from ldm.base.options import value_at
from ldm.base.paths import WORK
from ldm.config import Settings
from ldm.registry.lineage import ADOPTED, described
from ldm.stages.fingerprint import counted, fingerprint
from ldm.stages.stage import NAMES, Busy

PATIENCE = 2.0  # seconds to wait for a folder that another process holds, which may only be looking at it


@dataclass(frozen=True)
class Work:
    """One unfinished training and everything that its result depends on, as JSON values."""

    folder: Path
    stage: str
    params: dict[str, Any]  # settings that it reads
    inputs: dict[str, str]  # hashes
    layout: dict[str, Any]  # device, processes, how batches are cut
    code: str  # fingerprint; "": written by an earlier version of this package
    modules: dict[str, str]  # hash of each module's text, to tell what changed; not in the key
    versions: dict[str, str]  # of libraries
    total: int = 0  # images (or steps) of the whole training
    threads: Sequence[int] = ()  # thread counts that it was computed with, in order
    adopted: Sequence[dict[str, Any]] = ()  # earlier states of the code that took part, oldest first
    nonce: str = ""  # random, kept until the training is done

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def run_key(self) -> str:
        """Key of its MLflow run: the same training on another machine, or after this one is done, is another run."""
        return f"{self.key}-{self.nonce}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def reached(self) -> int:
        """Images (or steps) of the newest checkpoint; 0 if there is none."""
        return max((int(path.name) for path in self.checkpoint.glob("*") if path.name.isdigit()), default=0)

    @property
    def progress(self) -> str:
        return f"{self.reached:,} of {self.total:,}" if self.total else f"{self.reached:,}"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def written(self) -> datetime:
        places = (self.checkpoint, self.folder)
        return datetime.fromtimestamp(next((place.stat().st_mtime for place in places if place.exists()), 0))

    def today(self) -> "Work":
        """The same work with the code and libraries of this process."""
        return identify(self.folder.parents[3], self.stage, self.params, self.inputs, self.layout)

    def changes(self) -> list[str]:
        """What has changed in code and libraries since the checkpoint; empty if a run resumes from it."""
        if not self.code:
            return ["unknown, it was written by an earlier version"]
        if self.stage not in NAMES:
            return [f"there is no stage {self.stage} any more"]
        now = self.today()
        if now.key == self.key:
            return []
        modules = sorted({name for name, _ in self.modules.items() ^ now.modules.items()})
        libraries = [(name, self.versions.get(name), new) for name, new in now.versions.items()]
        changed = modules + [f"{name} {old} to {new}" for name, old, new in libraries if old != new]
        return changed or ["what is imported from where"]

    def state(self, settings: Settings) -> str:
        """In a few words: whether a run with these settings would resume from it."""
        if is_running(self):
            return "running"
        if changes := self.changes():
            return f"changed: {', '.join(changes)}"
        now, params = json.loads(json.dumps(settings.model_dump())), self.params.items()
        others = [words for key, value in params for words in _differing(key, value, value_at(now, key, value))]
        return f"other settings: {', '.join(others)}" if others else "ready"

    def save(self) -> None:
        write_text(self.folder / "work.json", canonical_json({**vars(self), "folder": str(self.folder)}))

    def finish(self) -> None:
        """Delete the folder of a training that is done."""
        shutil.rmtree(self.folder)

    def tags(self) -> dict[str, str]:
        """Tags of the MLflow run: its code, and the earlier states of the code that took part."""
        tags = {"ldm.code": self.code, "ldm.threads": ", ".join(map(str, self.threads))}
        return tags | ({"ldm.adopted": described(self.stage, self.adopted)} if self.adopted else {})

    def note_adopted(self, out: Path) -> None:
        """Record in an out if its weights come from more than one state of the code."""
        (out / ADOPTED).unlink(missing_ok=True)
        if self.adopted:
            write_text(out / ADOPTED, canonical_json({"stage": self.stage, "adopted": self.adopted}))


def identify(root: Path, stage: str, params: dict[str, Any], inputs: dict[str, str], layout: dict[str, Any]) -> Work:
    """The work of a run with the code and libraries of this process."""
    params, inputs, layout = json.loads(json.dumps([params, inputs, layout], default=str))
    versions = {name: version(name) for name in ("torch", "numpy")}
    depends: dict[str, Any] = {"stage": stage, "params": params, "inputs": inputs, "layout": layout, "versions": versions}
    depends["code"] = fingerprint(stage)
    key = content_hash(canonical_json(depends).encode())[:32]
    return Work(root / WORK / stage / key, modules=counted(stage), **depends)


def works(root: Path, stage: str = "*") -> list[Work]:
    """Every unfinished training, of one stage or of all, the newest last."""
    return sorted(map(_read, (root / WORK).glob(f"{stage}/*/")), key=lambda work: work.written)


@contextlib.contextmanager
def opened(root: Path, run: Work, total: int, threads: int) -> Iterator[Work]:
    """The work of a run, its folder locked. If it starts from nothing beside a checkpoint under other code, that is printed."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(run.folder):
        found = _read(run.folder)
        before = found if run.reached else run  # an interrupted `adopt` may have left a record without a checkpoint
        earlier = [count for count in before.threads if count != threads]
        nonce = found.nonce or uuid.uuid4().hex
        work = replace(run, total=total, threads=[*earlier, threads], adopted=before.adopted, nonce=nonce)
        if earlier:
            counts = ", ".join(map(str, earlier))
            print(f"{run.stage}: was computed with {counts} threads, goes on with {threads}: rounding may differ", flush=True)
        work.save()
        for other in works(root, run.stage) if not work.reached else ():
            same = (other.params, other.inputs, other.layout) == (run.params, run.inputs, run.layout)
            if same and other.reached and other.key != work.key:
                where = f"{other.folder.relative_to(root)}, after {other.progress}, written {other.written:%Y-%m-%d %H:%M}"
                print(
                    f"{run.stage}: there is a checkpoint of these settings and inputs under other code: {where}\n"
                    f"{run.stage}: changed since: {', '.join(other.changes())}\n"
                    f"{run.stage}: this run starts from nothing; to go on from that checkpoint, stop it (ctrl-C), type "
                    f"`ldm checkpoints adopt {other.key[:8]}`, and run again",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
        yield work


def adopt(root: Path, key: str) -> Work:
    """Move the checkpoint of `key` (or a beginning of it) to the key that a run with today's code has."""
    source = find(root, key)
    if not source.reached:
        raise InputError(f"{source.folder}: has no checkpoint")
    if not source.code or source.stage not in NAMES:
        raise InputError(f"{source.folder}: changed: {source.changes()[0]}; `ldm checkpoints drop {source.key[:8]}`")
    today = source.today()
    if today.key == source.key:
        raise InputError(f"{source.folder}: is of today's code; a run goes on from it by itself")
    with _locked(source.folder), _locked(today.folder):
        step = {"code": source.code, "reached": source.reached, "changed": source.changes()}
        target = replace(today, total=source.total, threads=source.threads, adopted=[*source.adopted, step])
        if target.reached >= source.reached:
            hint = f"a run goes on from that one, or `ldm checkpoints drop {target.key[:8]}` first"
            raise InputError(f"{target.folder}: has a checkpoint of today's code already, after {target.progress}; {hint}")
        shutil.rmtree(target.checkpoint, ignore_errors=True)  # an earlier point of the same training
        target.save()
        os.rename(source.checkpoint, target.checkpoint)
        source.finish()
    return target


def drop(work: Work) -> None:
    """Delete an unfinished training."""
    with _locked(work.folder):
        work.finish()


def find(root: Path, key: str) -> Work:
    """The unfinished training whose key begins with `key`."""
    found = [work for work in works(root) if work.key.startswith(key)]
    if len(found) != 1:
        keys = ", ".join(work.key[:8] for work in found or works(root)) or "none"
        raise InputError(f"checkpoint {key!r}: {'several begin so' if found else 'there is none'}; here are: {keys}")
    return found[0]


def is_running(work: Work) -> bool:
    """Whether a process is training it now."""
    with contextlib.suppress(FileNotFoundError), (work.folder / "lock").open("r+") as lock:  # creates nothing
        return not _holds(lock)
    return False


def _differing(key: str, was: Any, now: Any) -> list[str]:
    """In words, leaf by leaf, where two values of a setting differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        return [words for name in was | now for words in _differing(f"{key}.{name}", was.get(name), now.get(name))]
    return [] if was == now else [f"{key} {was}, now {now}"]


def _read(folder: Path) -> Work:
    try:
        found = json.loads((folder / "work.json").read_text(encoding="utf-8"))
        return Work(**found.pop("identity", {}) | found | {"folder": folder})  # an earlier version wrote some fields in there
    except (OSError, ValueError, TypeError, AttributeError):  # missing, damaged, or of a still earlier version
        return Work(folder, folder.parent.name, {}, {}, {}, "", {}, {})


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is missing; `InputError` if another process still holds it after `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while True:
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            if _holds(lock):
                yield
                return
        if time.monotonic() >= deadline:
            raise Busy(f"{folder}: another process trains this very run; wait for it or stop it")
        time.sleep(0.05)


def _holds(lock: IO[str]) -> bool:
    """Lock an open file. False if another process has locked it, or has deleted it since it was opened."""
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    return False
