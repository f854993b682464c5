"""A year of nights on a schedule: the disk stays bounded, the champion loads every morning, deleted images are gone everywhere.

Runs, stages and servers are real, at tiny sizes; the clock is `year.Calendar`. Prefect's server has a clock of its own: what it
wrote is aged in its database. `YEAR_SVG=flows/year.svg` draws the picture of flows/README.md.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import socket
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from dvc.repo import Repo
from forks import Forks
from inboxes import drop, listed
from matplotlib.figure import Figure
from PIL import Image
from tiny import clone, environment, set_params
from year import Calendar

import ldm
from flows import server
from ldm.base import clock
from ldm.data.conventions import BATCH_TABLE
from ldm.registry.versions import find
from ldm.versioning.git import git
from ldm.versioning.worktree import prepare

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
MINE, KEEP, GRACE, FIRST = "data/raw/mine", 5, 7, datetime(2026, 1, 5, 3, tzinfo=UTC)  # a Monday
SETTINGS: dict[str, Any] = {
    "data": {"path": MINE, "image_size": 8, "resize_filter": "box", "val_fraction": 0.2, "test_fraction": 0.2, "shard_size": 16,
             "max_bad_fraction": 0.1},
    "text": {"max_tokens": 6},
    "autoencoder": {"block_out_channels": [8, 8], "norm_num_groups": 4},
    "train_vae": {"images": 64, "batch_size": 32, "warmup_images": 0, "checkpoint_images": 32},
    "backbone": {"block_out_channels": [8, 16], "num_heads": 2, "norm_num_groups": 4},
    "train_unet": {"images": 64, "batch_size": 32, "warmup_images": 0, "checkpoint_images": 32},
    "sampling": {"steps": 2},
    "evaluate": {"samples": 8, "unseen_samples": 8, "bound_levels": 2, "importance_samples": 2,
                 "metrics": [{"kind": "psnr"}, {"kind": "latents"}]},
}  # fmt: skip
STORES = {  # what is measured; a file with several names counts for the first
    "DVC's cache": [".dvc/cache"], "MLflow": ["mlruns", "mlflow.db"], "Prefect": [".ldm/prefect.db"], "git": [".git"],
    "latents, checkpoints, worktrees": [".ldm"], "checkout": ["."], "DVC's index": ["../dvc"],
}  # fmt: skip
EDITS = ("delete", "replace", "rename", "copy", "delete a batch", "mistake")
WEEK = 7 * 24 * 3600
AGED = {"flow_run": "end_time", "events": "occurred", "event_resources": "occurred"}  # by which Prefect's server removes rows


def picture(seed: int) -> bytes:
    """An image of 8x8 grey pixels, as many of them alike as different."""
    random, blob = np.random.default_rng(seed), io.BytesIO()
    pixels = np.repeat(random.integers(0, 256, (4, 8), dtype=np.uint8), 2, axis=0)
    Image.fromarray(pixels).save(blob, "PNG")
    return blob.getvalue()


def plan() -> dict[int, list[str]]:
    """What happens on which night: 0 is the first one, a Monday."""
    rng, found = random.Random(2026), {0: ["images"] * 10}
    weeks = rng.sample(range(1, 50), 16)
    for night in sorted(7 * week + day for week in weeks for day in rng.sample(range(5), rng.choice([1, 1, 2]))):
        found.setdefault(night, []).append("images")
    busy = sorted(set(found) - {0})
    for night, what in zip(rng.sample(busy[3:-3], 3), ("full disk", "reboot in training", "damaged images"), strict=True):
        found[night].append(what)
    for month, what in enumerate(
        ("delete", "replace", "delete", "rename", "delete a batch", "mistake", "delete", "copy"), start=1
    ):
        night = 30 * month + rng.randrange(10)
        found.setdefault(night, []).append(what)
        if what == "mistake":
            found.setdefault(night + 3, []).append("take back")
        if month == 3:
            found.setdefault(night + 7 + (-night - 1) % 7, []).append("reboot in collect")  # the first Sunday after a week
    for night in (200, 290):  # between the two, what its worktree holds was deleted
        found.setdefault(night, []).append("on demand")
    return found


class Year:
    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.root, self.inbox = folder, clone(folder / "project"), folder / "inbox"
        self.calendar = Calendar(folder / "calendar.json")
        self.rng, self.seed, self.happened = random.Random(7), 0, Counter[str]()
        self.images: set[bytes] = set()  # that the collection has to have at the end
        self.deleted: dict[bytes, datetime] = {}  # when
        self.disk: list[dict[str, int]] = []  # after each collection of garbage
        self.mistake = ("", Path())
        self.inbox.mkdir()
        set_params(self.root, SETTINGS)
        git(self.root, "config", "gc.cruftPacks", "false")  # their ages are in a format of git's own
        git(self.root, "config", "user.name", "somebody")
        git(self.root, "config", "user.email", "somebody@localhost")
        self.calendar.begin(FIRST - timedelta(hours=12))
        patch.setattr(clock, "now", self.calendar.now)
        patch.setattr(clock, "at", self.calendar.at)
        variables = environment(
            YEAR=str(folder / "calendar.json"), PYTHONPATH=str(Path(__file__).parents[1]), PREFECT_HOME=str(folder / "prefect"),
            MLFLOW_TRACKING_URI=f"sqlite:///{self.root}/mlflow.db", DVC_NO_ANALYTICS="1", GIT_CONFIG_GLOBAL="/dev/null",
            PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS="2", PREFECT_SERVER_ANALYTICS_ENABLED="false",
            DVC_SITE_CACHE_DIR=str(folder / "dvc"), LDM_ROOT=str(self.root),
        )  # fmt: skip
        for name in os.environ.keys() - variables.keys():
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.chdir(self.root)
        self.commit("settings")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.server = self.start_server()
        patch.setenv("PREFECT_API_URL", self.server.url)
        self.forks = Forks(folder / "forks")  # Prefect reads its settings on import

    def start_server(self) -> server.Server:
        started = server.start(self.port)
        started.wait()
        return started

    def commit(self, message: str) -> None:
        for command in (["add", "--all"], ["commit", "--quiet", "--message", message]):
            self.git(*command)

    def git(self, *arguments: str) -> None:
        """As somebody types it at this time of the year."""
        dates = dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), clock.now().isoformat())
        subprocess.run(["git", *arguments], cwd=self.root, check=True, env={**os.environ, **dates})

    def stop(self) -> None:
        self.forks.stop()
        assert self.server.process.stdin
        self.server.process.stdin.close()
        self.server.process.wait(60)

    # what people do

    def arrive(self, count: int) -> None:
        for _ in range(count):
            self.seed += 1
            self.images.add(picture(self.seed))
            drop(self.inbox / f"{self.seed:03d}.png", picture(self.seed))
            drop(self.inbox / f"{self.seed:03d}.txt", f"noise {self.seed % 3}")

    def arrive_damaged(self) -> None:
        for number in range(3):
            drop(self.inbox / f"bad {number}.png", picture(900 + number)[:60])
            drop(self.inbox / f"bad {number}.txt", "noise")

    def edit(self, what: str) -> None:
        """Change the collection in the checkout, as flows/README.md says, and commit that."""
        self.git("merge", "--quiet", "--no-edit", "runs/collection")
        with Repo(str(self.root)) as repo:
            repo.checkout([f"{MINE}.dvc"], force=True)
        batches = sorted({path.parent for path in (self.root / MINE).glob("*/*.png")})
        one = self.rng.choice(sorted(self.rng.choice(batches[1:] or batches).glob("*.png")))
        table, name = one.parent / BATCH_TABLE, one.relative_to(self.root / MINE)
        if what == "delete a batch":
            for path in one.parent.iterdir():
                self.delete(path, forever=path.suffix == ".png")
        elif what in ("rename", "copy"):
            other = one.with_name(f"{what} {one.name}")
            rows = pd.read_csv(table, dtype=str)
            (shutil.copy if what == "copy" else os.rename)(one, other)
            row = rows[rows.file_name == one.name].assign(file_name=other.name)
            rows = pd.concat([rows if what == "copy" else rows[rows.file_name != one.name], row])
            rows.to_csv(table, index=False)
            one.unlink(missing_ok=True)
        else:
            self.delete(one, forever=what != "mistake")
        if what == "replace":
            self.seed += 1
            one.write_bytes(picture(self.seed))
            self.images.add(picture(self.seed))
        with Repo(str(self.root)) as repo:
            repo.add([MINE])
        self.commit(f"{what}: {name}")
        self.mistake = (git(self.root, "rev-parse", "HEAD~1"), name) if what == "mistake" else self.mistake

    def take_back(self) -> None:
        """Bring an image back that was deleted by mistake, as ldm/collection/README.md says."""
        commit, name = self.mistake
        to = str(self.inbox / name.name)
        get = [str(self.forks.python), "-m", "dvc", "get", ".", f"{MINE}/{name}", "--rev", commit, "-o", to]
        subprocess.run(get, cwd=self.root, check=True, capture_output=True)
        drop(self.inbox / name.name, (self.inbox / name.name).read_bytes())
        drop(self.inbox / f"{name.stem}.txt", "noise")

    def delete(self, image: Path, forever: bool) -> None:
        if forever:
            self.deleted[image.read_bytes()] = clock.now()
            self.images.remove(image.read_bytes())
        image.unlink()

    # runs

    def command(self, slot: str, **parameters: Any) -> "subprocess.Popen[str]":
        os.environ["PREFECT__DEPLOYMENT_NAME"] = slot
        folder = self.root if slot == "collect" else prepare(self.root, slot, git(self.root, "branch", "--show-current"))
        call = [str(self.forks.python), "-m", "year", slot, json.dumps(parameters)]
        return subprocess.Popen(call, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, slot: str, expected: str, **parameters: Any) -> str:
        """A run of a deployment, whose state has to be the expected one; returns its message."""
        said = self.command(slot, **parameters).communicate()[0]
        last = said.splitlines()[-1]
        assert last.startswith("["), said[-3000:]
        name, message = json.loads(last)
        print(f"{clock.now():%Y-%m-%d %a} {slot}: {name}, {message}", flush=True)
        assert name == expected, said[-3000:]
        self.happened[f"{slot}: {name}"] += 1
        return str(message)

    def reboot(self, slot: str, **parameters: Any) -> None:
        """Kill everything in mid-run: once the U-Net trains, or the first object is gone."""
        objects = self.root / ".dvc/cache/files"
        before = sum(1 for path in objects.rglob("*") if path.is_file())
        run, deadline = self.command(slot, **parameters), time.monotonic() + 300
        while run.poll() is None and time.monotonic() < deadline:
            if slot == "collect" and sum(1 for path in objects.rglob("*") if path.is_file()) < before:
                break
            if slot == "nightly" and list((self.root / ".ldm/work/train_unet").glob("*/checkpoint/*")):
                break
        assert run.poll() is None, run.communicate()[0]
        self.forks.kill()
        self.server.process.kill()
        run.wait()
        self.server.process.wait()
        self.server = self.start_server()

    # what is measured

    def measure(self) -> None:
        """Bytes of each store, and what the collection itself takes."""
        seen, found = set[tuple[int, int]](), dict.fromkeys(STORES, 0)
        for store, places in STORES.items():
            for place in places:
                files = [self.root / place] if (self.root / place).is_file() else (self.root / place).rglob("*")
                for path in files:
                    facts = path.lstat()
                    if path.is_file() and not path.is_symlink() and (facts.st_dev, facts.st_ino) not in seen:
                        seen.add((facts.st_dev, facts.st_ino))
                        found[store] += facts.st_size
        images = sum(path.stat().st_size for path in (self.root / ".ldm/worktrees/nightly" / MINE).rglob("*") if path.is_file())
        self.disk.append(found | {"images": images})
        (self.folder / "disk.json").write_text(json.dumps(self.disk))

    def age(self) -> None:
        """What Prefect's server and git judge by the system's clock becomes a week older."""
        with sqlite3.connect(self.root / ".ldm/prefect.db", timeout=60) as database:
            for table, column in AGED.items():
                database.execute(f"UPDATE {table} SET {column} = strftime('%Y-%m-%d %H:%M:%f', {column}, '-7 days')")
        database.close()
        for path in (self.root / ".git").rglob("logs/**/*"):
            if path.is_file():
                path.write_text(re.sub(r"> (\d+) ", lambda time: f"> {int(time[1]) - WEEK} ", path.read_text()))
        for path in (self.root / ".git/objects").rglob("*"):
            os.utime(path, (path.stat().st_mtime - WEEK,) * 2)

    def traces(self, contents: list[bytes]) -> list[str]:
        """Files with the bytes, the pixels or the hash of an image, also inside of tars."""
        marks = [*contents, *(np.asarray(Image.open(io.BytesIO(blob))).tobytes() for blob in contents)]
        marks += [hashlib.sha256(blob).hexdigest().encode() for blob in contents]
        found = []
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root)
            if path.is_file() and not path.is_symlink() and ".git" not in name.parts:
                found += [str(name) for part in unpacked(path.read_bytes()) if any(mark in part for mark in marks)]
        return found


def unpacked(blob: bytes) -> Iterator[bytes]:
    """A file's bytes, and the pixels of pictures in it."""
    yield blob
    start = blob.find(b"\x89PNG\r\n")
    while start >= 0:
        with contextlib.suppress(OSError, SyntaxError):  # it is no picture, or a damaged one
            yield np.asarray(Image.open(io.BytesIO(blob[start:])).convert("L")).tobytes()
        start = blob.find(b"\x89PNG\r\n", start + 1)


def test_a_year(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    year, events = Year(tmp_path, monkeypatch), plan()
    try:
        live(year, events, nights=int(os.environ.get("YEAR_NIGHTS", "365")))
        check(year, events)
    finally:
        year.stop()


def live(year: Year, events: dict[int, list[str]], nights: int) -> None:
    changed, others = True, True  # since the last run of nightly, and of rebuild
    for night in range(nights):
        day, today = FIRST + timedelta(days=night), events.get(night, [])
        began = time.monotonic()
        year.calendar.begin(day - timedelta(hours=9))
        year.happened.update(today)
        for what in today:
            if what == "images":
                year.arrive(4)
            elif what == "damaged images":
                year.arrive_damaged()
            elif what == "take back":
                year.take_back()
            elif what in EDITS:
                year.edit(what)
            if what in ("images", "take back", *EDITS):
                changed = others = True
        year.calendar.begin(day)
        nightly = {"start": "champion", "ingest": str(year.inbox)}
        if "reboot in training" in today:
            year.reboot("nightly", **nightly)
        elif "full disk" in today:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("YEAR_FREE_BYTES", "100")
                assert "make room for" in year.run("nightly", "Failed", **nightly)
        else:
            year.run("nightly", "Completed" if changed else "Nothing to do", **nightly)
            changed = False
        if "damaged images" in today:
            assert {name for name in listed(year.inbox) if name.endswith(".png")} == {f"bad {number}.png" for number in range(3)}
            for path in year.inbox.glob("bad *"):  # somebody has read NOT_INGESTED.csv
                path.unlink()
        system = ldm.registry.load("models:/ldm@champion")
        if night % 30 == 0:
            assert system.sample(["noise 1"] * 2, seed=night).shape == (2, 1, 8, 8)
        if "on demand" in today:
            year.calendar.begin(day + timedelta(hours=6))
            year.run("on-demand", "Completed", start="nothing", settings=["train_unet.lr=1e-3"])
        if night % 7 == 5:
            year.calendar.begin(day + timedelta(hours=9))
            year.run("rebuild", "Completed" if others else "Nothing to do", start="nothing")
            others = False
        if night % 7 == 6:
            year.calendar.begin(day + timedelta(hours=5))
            if "reboot in collect" in today:
                year.reboot("collect", keep=KEEP, purge_days=GRACE)
            else:
                said = year.run("collect", "Completed", keep=KEEP, purge_days=GRACE)
                assert "could not be purged" not in said
                due = [blob for blob, when in year.deleted.items() if when < day - timedelta(days=GRACE)]
                assert year.traces(due) == []
            year.age()
            year.measure()
        print(f"{night} {time.monotonic() - began:.1f} s", flush=True)


def check(year: Year, events: dict[int, list[str]]) -> None:
    planned = Counter(what for today in events.values() for what in today)
    assert {what: year.happened[what] for what in planned} == planned
    print(year.happened, f"{len(find({}))} versions", sep="\n")
    print(git(year.root, "log", "--graph", "--format=%ad%d %s", "--date=short", "--glob=heads/runs/*"))

    assert len(year.deleted) == 8 and year.traces(list(year.deleted)) == []
    collection = year.root / ".ldm/worktrees/nightly" / MINE
    assert {path.read_bytes() for path in collection.rglob("*.png")} == year.images
    kept = [name for name in git(year.root, "for-each-ref", "--format=%(refname:lstrip=3)").splitlines() if "nightly/" in name]
    assert KEEP <= len(kept) <= KEEP + 2  # those of champion and previous
    assert len(find({})) <= KEEP + 2

    draw(year.disk, Path(os.environ.get("YEAR_SVG", year.folder / "year.svg")))
    stored = [sum(week[store] for store in STORES) for week in year.disk]
    half, grown = len(stored) // 2, year.disk[-1]["images"] / year.disk[len(stored) // 2]["images"]
    assert max(stored[half:]) <= max(stored[half - 10 : half]) * grown


def draw(disk: list[dict[str, int]], path: Path) -> None:
    """Bytes of each store after each collection of garbage."""
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "year", "font.size": 9}
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    weeks = range(1, len(disk) + 1)
    axes.stackplot(weeks, *([week[store] / 1e6 for week in disk] for store in STORES), labels=STORES)
    times = 1000 * round(sum(disk[-1][store] for store in STORES) / disk[-1]["images"] / 1000)  # as high at the end
    axes.plot(weeks, [times * week["images"] / 1e6 for week in disk], "k--", linewidth=1, label=f"the collection, x {times:,}")
    axes.set(xlabel="weeks", ylabel="MB", xlim=(1, len(disk)))
    axes.legend(*map(reversed, axes.get_legend_handles_labels()), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None})
