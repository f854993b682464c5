"""A training with batches of three seconds stops at a checkpoint within 30 s, however it is stopped, and goes on from there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from schedules import Schedule
from tiny import TINY, clone, set_params

from ldm.versioning.git import git

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
ENDS = ("Completed", "Nothing to do", "Failed")  # a run that crashed is started again
SECONDS = 3  # a batch takes, while the file `slow` is there
LIMIT = 30.0
LOOP = "    for images_seen in range(resumed, schedule.images, schedule.batch_size):\n"
SLOW = f"""\
        import os, pathlib
        hold = pathlib.Path(os.environ["HOLD"])
        if (hold / "slow").exists():
            time.sleep({SECONDS})
        if distributed.rank() == 0:
            with (hold / "batches").open("a") as file:
                file.write(f"{{time.time()}} {{os.getpid()}} {{images_seen}}\\n")
"""
BATCH = {"train_vae": 32, "train_unet": 64}  # images, of 512; a checkpoint is due after 256


class Trained:
    """The project on a schedule, and what its trainings did: time, process and position of each batch."""

    def __init__(self, folder: Path) -> None:
        self.root, hold = clone(folder / "project"), folder / "hold"
        set_params(self.root, TINY)
        file = self.root / "ldm/training/fit.py"
        assert file.read_text().count(LOOP) == 1
        file.write_text(file.read_text().replace(LOOP, LOOP + SLOW))
        git(self.root, "commit", "--quiet", "-am", "tiny, and slow when asked")
        hold.mkdir()
        self.schedule, self._batches, self._slow = Schedule(self.root, hold), hold / "batches", hold / "slow"
        self.schedule.command("flows.schedule", "start")

    def forget(self) -> None:
        self._slow.unlink(missing_ok=True)
        self.schedule.wait(lambda: not self.schedule.at_work("prefect.engine"))
        self.schedule.forget()
        git(self.root, "checkout", "--quiet", ".")
        self._batches.unlink(missing_ok=True)

    def slow(self, stage: str) -> None:
        """Wait until a stage is at work, and slow down its batches."""
        self.schedule.wait(lambda: self.schedule.at_work(f"-m ldm.stages.{stage}"), 240)
        self._slow.touch()
        before = len(self.batches())
        self.schedule.wait(lambda: len(self.batches()) > before + 1, 120)

    def batches(self) -> list[tuple[float, int, int]]:
        lines = self._batches.read_text().splitlines() if self._batches.exists() else []
        return [(float(at), int(pid), int(seen)) for at, pid, seen in map(str.split, lines)]

    def stopped(self, stage: str, since: float) -> int:
        """Wait until no process of a run is left; returns the images seen at the checkpoint, where the next run goes on."""
        self.schedule.wait(lambda: not self.schedule.at_work("-m ldm.stages") + self.schedule.at_work("ldm.versioning"), LIMIT)
        assert time.time() - since < LIMIT
        (times, pids, positions) = zip(*self.batches()[-2:], strict=True)
        assert times[1] - times[0] >= SECONDS and pids[0] == pids[1]
        (work,) = (self.root / ".ldm/work" / stage).iterdir()
        reached = max(int(path.name) for path in (work / "checkpoint").iterdir() if path.name.isdigit())
        assert reached == positions[1] + BATCH[stage] and reached % 256 != 0
        self._slow.unlink()
        return reached

    def lock(self, state: object) -> str:
        """`dvc.lock` of a completed run."""
        name, message = (getattr(state, part) for part in ("name", "message"))
        assert name == "Completed", message
        return git(self.root, "show", f"{message.split(': ')[0]}:dvc.lock")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    made = Trained(tmp_path_factory.mktemp("cancel"))
    try:
        yield made
    finally:
        made.schedule.command("flows.schedule", "stop")
        assert made.schedule.processes() == {}


@pytest.fixture(scope="module")
def undisturbed(trained: Trained) -> str:
    return trained.lock(trained.schedule.state(trained.schedule.run("rebuild"), *ENDS, seconds=300))


@pytest.mark.parametrize(
    ("how", "stage"),
    [
        ("API", "train_vae"), ("SIGTERM", "train_unet"), ("SIGTERM to the group", "train_vae"), ("make unschedule", "train_unet"),
    ],
)  # fmt: skip
def test_a_scheduled_training_stops_at_a_checkpoint_and_goes_on(how: str, stage: str, trained: Trained, undisturbed: str) -> None:
    from prefect.states import Cancelling

    schedule = trained.schedule
    trained.forget()
    run = schedule.run("rebuild")
    trained.slow(stage)
    (flow,), start = schedule.at_work("prefect.engine"), time.time()
    if how == "API":
        with schedule.client() as client:
            client.set_flow_run_state(run, Cancelling())
        assert schedule.state(run, "Cancelled", *ENDS, seconds=LIMIT).name == "Cancelled"
    elif how == "SIGTERM":
        os.kill(flow, signal.SIGTERM)
    elif how == "SIGTERM to the group":  # also to the worker
        os.killpg(os.getpgid(flow), signal.SIGTERM)
    else:
        schedule.command("flows.schedule", "stop")
        assert schedule.processes() == {}
    reached = trained.stopped(stage, start)
    if how == "make unschedule":
        schedule.command("flows.schedule", "start")
    if how == "API":
        run = schedule.run("rebuild")
    state = schedule.state(run, *ENDS, seconds=300)
    assert trained.lock(state) == undisturbed
    check_that_it_went_on(trained, stage, reached)


def check_that_it_went_on(trained: Trained, stage: str, reached: int) -> None:
    """No batch was done twice, and none was left out."""
    positions = [seen for _, _, seen in trained.batches()]
    expected = {name: list(range(0, 512, batch)) for name, batch in BATCH.items()}
    assert positions == expected["train_vae"] + expected["train_unet"]
    pids = {seen: pid for _, pid, seen in (trained.batches()[:16] if stage == "train_vae" else trained.batches()[16:])}
    assert pids[reached] != pids[reached - BATCH[stage]]


@pytest.mark.parametrize(
    ("number", "stage", "ranks"),
    [(signal.SIGTERM, "train_vae", "1"), (signal.SIGINT, "train_unet", "1"), (signal.SIGTERM, "train_unet", "2")],
)
def test_a_signal_to_the_group_of_a_terminal(
    number: signal.Signals, stage: str, ranks: str, trained: Trained, undisturbed: str
) -> None:
    """`ldm run` in the checkout: Ctrl-C and the SIGTERM of a batch system reach every process of the group."""
    trained.forget()
    command, env = [sys.executable, "-m", "ldm.cli", "run"], trained.schedule.env | {"LDM_PROCESSES": ranks}
    foreground = subprocess.Popen(
        command, cwd=trained.root, env=env, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    trained.slow(stage)
    start = time.time()
    os.killpg(foreground.pid, number)
    said, _ = foreground.communicate(timeout=LIMIT)
    assert foreground.returncode in (128 + number, -number), said
    reached = trained.stopped(stage, start)
    assert f"stopped at a checkpoint after {reached} images" in said
    trained.schedule.command("ldm.cli", "run", LDM_PROCESSES=ranks)
    assert ranks != "1" or (trained.root / "dvc.lock").read_text().strip() == undisturbed
    check_that_it_went_on(trained, stage, reached)
