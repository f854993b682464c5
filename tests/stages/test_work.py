"""Unfinished trainings: what names them, who holds them, and what becomes of them when the code changes."""

import contextlib
import fcntl
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import REPOSITORY, set_params

from ldm.base.errors import InputError
from ldm.config import load_settings
from ldm.registry import lineage
from ldm.stages import work
from ldm.stages.work import Work, adopt, drop, find, identify, opened, works

INPUTS = {"shards": "aa"}
LAYOUT = {"device": "cpu", "processes": 1}
SETTINGS = load_settings(REPOSITORY)
PARAMS: dict[str, Any] = {"seed": 0, "autoencoder": SETTINGS.autoencoder.model_dump(), "sampler": "x"}


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The hashes of modules of a stage, to be edited."""
    modules = {"ldm.stages.train_vae": "1", "ldm.training.fit": "1"}
    monkeypatch.setattr(work, "counted", lambda stage: dict(modules))
    monkeypatch.setattr(work, "fingerprint", lambda stage: "-".join(sorted(modules.values())))
    return modules


def today(root: Path = Path()) -> Work:
    return identify(root, "train_vae", PARAMS, INPUTS, LAYOUT)


def begin(root: Path, reached: int, threads: int = 2) -> Work:
    """A training that dies with a checkpoint."""
    with opened(root, today(root), 1000, threads) as found:
        (found.checkpoint / f"{reached:012d}").mkdir(parents=True)
    return found


def test_a_key_names_settings_inputs_layout_code_and_libraries(code: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    key = today().key
    assert key == identify(Path(), "train_vae", dict(reversed(PARAMS.items())), dict(INPUTS), LAYOUT).key
    others = [
        identify(Path(), "train_unet", PARAMS, INPUTS, LAYOUT).key,
        identify(Path(), "train_vae", {**PARAMS, "seed": 1}, INPUTS, LAYOUT).key,
        identify(Path(), "train_vae", PARAMS, {"shards": "ab"}, LAYOUT).key,
        identify(Path(), "train_vae", PARAMS, INPUTS, {**LAYOUT, "processes": 2}).key,
    ]
    code["ldm.training.fit"] = "2"
    others.append(today().key)
    code["ldm.training.fit"] = "1"
    monkeypatch.setattr(work, "version", lambda name: "0.0")
    others.append(today().key)
    assert len({key, *others}) == 7


def test_a_folder_has_one_holder(code: dict[str, str], tmp_path: Path) -> None:
    with opened(tmp_path, today(tmp_path), 1000, 2) as found:
        assert found.folder == tmp_path / ".ldm/work/train_vae" / today().key
        (found.checkpoint / "000000000010").mkdir(parents=True)
        assert found.state(SETTINGS) == "running" and found.reached == 10
        with pytest.raises(InputError, match=r"another process trains this very run"), opened(tmp_path, today(tmp_path), 1000, 2):
            pass
        with pytest.raises(InputError, match=r"another process trains this very run"):
            drop(found)
    assert find(tmp_path, found.key[:6]).state(SETTINGS) == "ready"
    with opened(tmp_path, today(tmp_path), 1000, 2) as again:
        assert again.reached == 10
        again.finish()
    assert not works(tmp_path)
    assert not work.is_running(found) and not found.folder.exists()  # the look has not made it again


def test_a_killed_holder_holds_nothing(code: dict[str, str], tmp_path: Path) -> None:
    reached, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), opened(tmp_path, today(tmp_path), 1000, 2):
            os.write(writes, b".")
            time.sleep(60)
        os._exit(1)
    assert os.read(reached, 1) == b"."
    with pytest.raises(InputError), opened(tmp_path, today(tmp_path), 1000, 2):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with opened(tmp_path, today(tmp_path), 1000, 2):
        pass


def test_other_threads_go_on_from_the_same_checkpoint_and_say_so(code: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    begin(tmp_path, 400, threads=2)
    with opened(tmp_path, today(tmp_path), 1000, 4) as found:
        assert found.reached == 400 and found.tags()["ldm.threads"] == "2, 4"
    assert "was computed with 2 threads, goes on with 4: rounding may differ" in capsys.readouterr().out


def test_a_checkpoint_under_other_code_is_named_and_adopted_on_the_record(
    code: dict[str, str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = begin(tmp_path, 400)
    code["ldm.training.fit"] = "2"
    with opened(tmp_path, today(tmp_path), 1000, 2) as fresh:
        assert fresh.reached == 0 and not fresh.adopted
    said = capsys.readouterr().err
    assert f".ldm/work/train_vae/{old.key}, after 400 of 1,000, written {old.written:%Y-%m-%d %H:%M}\n" in said
    assert "changed since: ldm.training.fit\n" in said and f"`ldm checkpoints adopt {old.key[:8]}`" in said
    assert find(tmp_path, old.key).state(SETTINGS) == "changed: ldm.training.fit"

    monkeypatch.setattr(work, "version", lambda name: "9.9")
    taken = adopt(tmp_path, old.key[:8])
    assert taken.key == today().key and not old.folder.exists() and taken.state(SETTINGS) == "ready"
    (step,) = taken.adopted
    assert (step["reached"], step["code"]) == (400, "1-1") and step["changed"][0] == "ldm.training.fit"
    assert step["changed"][1].startswith("torch ") and step["changed"][1].endswith(" to 9.9")
    code["ldm.stages.train_vae"] = "3"
    again = adopt(tmp_path, taken.key)
    assert [step["changed"] for step in again.adopted][1:] == [["ldm.stages.train_vae"]]
    with opened(tmp_path, today(tmp_path), 1000, 2) as found:
        assert found.reached == 400 and not capsys.readouterr().err
        assert found.tags()["ldm.adopted"].startswith("train_vae: up to 400 by code 1-1, then ldm.training.fit, torch ")
        (tmp_path / "out").mkdir()
        found.note_adopted(tmp_path / "out")
    assert lineage.adopted(tmp_path / "out") == found.tags()["ldm.adopted"]


def test_other_settings_or_inputs_are_other_work(code: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    begin(tmp_path, 400)
    code["ldm.training.fit"] = "2"
    for other in ({**PARAMS, "seed": 1}, INPUTS), (PARAMS, {"shards": "ab"}):
        with opened(tmp_path, identify(tmp_path, "train_vae", *other, LAYOUT), 1000, 2):
            pass
    assert capsys.readouterr().err == ""


def test_what_cannot_be_adopted_is_refused_by_name(code: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="checkpoint 'ab': there is none; here are: none"):
        adopt(tmp_path, "ab")
    old = begin(tmp_path, 400)
    with pytest.raises(InputError, match=r"is of today's code; a run goes on from it by itself"):
        adopt(tmp_path, old.key)
    code["ldm.training.fit"] = "2"
    new = begin(tmp_path, 600)
    with pytest.raises(InputError, match=rf"after 600 of 1,000; .+ `ldm checkpoints drop {new.key[:8]}` first"):
        adopt(tmp_path, old.key)
    with pytest.raises(InputError, match="'': several begin so; here are: "):
        find(tmp_path, "")
    drop(new)
    begin(tmp_path, 200)  # what a run that was stopped to adopt leaves behind
    assert adopt(tmp_path, old.key).reached == 400


def test_a_kill_while_adopting_loses_nothing(code: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the checkpoint moved, and after it moved but before the old folder went."""
    old = begin(tmp_path, 400)
    code["ldm.training.fit"] = "2"
    delete = shutil.rmtree
    killed: Any = {
        "os.rename": lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        "shutil.rmtree": lambda path, **_: delete(path, ignore_errors=True) if path != old.folder else 1 / 0,
    }
    for name, call in killed.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"ldm.stages.work.{name}", call)
            with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
                adopt(tmp_path, old.key)
        assert [found.reached for found in works(tmp_path) if found.reached] == [400]
        if name == "os.rename":  # a run that comes now starts from nothing, and says nothing else
            with opened(tmp_path, today(tmp_path), 1000, 2) as fresh:
                assert not fresh.adopted
    (found,) = (found for found in works(tmp_path) if found.reached)
    assert found.key == today().key and len(found.adopted) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": []}', '{"identity": {"stage": "x"}, "total": 1}'])
def test_a_damaged_record_is_that_of_an_unknown_training(code: dict[str, str], tmp_path: Path, text: str) -> None:
    old = begin(tmp_path, 400)
    (old.folder / "work.json").write_text(text)
    assert works(tmp_path)[0].state(SETTINGS) == "changed: unknown, it was written by an earlier version"
    with opened(tmp_path, today(tmp_path), 1000, 2) as found:  # its own key is proof enough
        assert found.reached == 400


def test_a_stage_that_is_no_more_leaves_what_can_be_dropped(code: dict[str, str], tmp_path: Path, ldm: Any) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    with opened(tmp_path, identify(tmp_path, "train_dit", PARAMS, INPUTS, LAYOUT), 1000, 2) as found:
        (found.checkpoint / "000000000400").mkdir(parents=True)
    assert "changed: there is no stage train_dit any more" in ldm(tmp_path, "checkpoints", "list").stdout
    with pytest.raises(InputError, match="there is no stage train_dit any more; `ldm checkpoints drop"):
        adopt(tmp_path, found.key)
    keys = (found.key[:6], found.key[:8])  # twice the same
    assert ldm(tmp_path, "checkpoints", "drop", "--changed", *keys).stdout.count("dropped") == 1 and not works(tmp_path)


def test_a_folder_that_its_last_holder_deleted_is_not_held_by_two(code: dict[str, str], tmp_path: Path) -> None:
    with opened(tmp_path, today(tmp_path), 1000, 2) as first:
        waiting = (first.folder / "lock").open("w")
        first.finish()
    with opened(tmp_path, today(tmp_path), 1000, 2) as second:
        assert second.folder == first.folder and not work._holds(waiting)
    waiting.close()


def test_a_look_at_the_list_does_not_stop_a_run_that_starts(code: dict[str, str], tmp_path: Path) -> None:
    first = begin(tmp_path, 400)
    with (first.folder / "lock").open("w") as look:
        fcntl.flock(look, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: fcntl.flock(look, fcntl.LOCK_UN)).start()
        with opened(tmp_path, today(tmp_path), 1000, 2) as found:
            assert found.reached == 400


def test_the_commands(code: dict[str, str], tmp_path: Path, ldm: Any) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    assert ldm(tmp_path, "checkpoints", "list").stdout == "no unfinished trainings\n"
    old = begin(tmp_path, 400)
    (old.checkpoint / "000000000400/state.safetensors").write_bytes(bytes(2_000_000))
    code["ldm.training.fit"] = "2"
    strange = tmp_path / ".ldm/work/train_unet/feed"  # of an earlier version of this package
    (strange / "checkpoint/000000000100").mkdir(parents=True)
    head, *rows = ldm(tmp_path, "checkpoints", "list").stdout.splitlines()
    assert head.split() == ["key", "stage", "reached", "size", "written", "state"]
    assert "2.0 MB" in rows[0] and rows[0].endswith("changed: ldm.training.fit") and "written by an earlier version" in rows[1]
    assert ldm(tmp_path, "checkpoints", "adopt", "feed").returncode == 2
    done = ldm(tmp_path, "checkpoints", "adopt", old.key[:8])
    assert done.stdout == f"train_vae: adopted as {today().key[:8]}; the next run with its settings goes on after 400 of 1,000\n"
    set_params(tmp_path, {"autoencoder": {"latent_channels": 2}})
    assert "other settings: autoencoder.latent_channels 1, now 2" in ldm(tmp_path, "checkpoints", "list").stdout
    assert ldm(tmp_path, "checkpoints", "drop").returncode == 2
    assert "dropped feed: train_unet, 100" in ldm(tmp_path, "checkpoints", "drop", "--changed").stdout
    (left,) = works(tmp_path)
    assert "dropped" in ldm(tmp_path, "checkpoints", "drop", left.key[:8]).stdout and not works(tmp_path)
    assert not strange.exists()
