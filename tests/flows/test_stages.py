"""Which GPUs a stage gets, and that runs take turns at them."""

import threading
from pathlib import Path
from typing import Any

import pytest

from flows import stages
from ldm.base.errors import InputError


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with two GPUs, and locks of its own."""
    for number in range(2):
        (tmp_path / f"nvidia/{number}").mkdir(parents=True)
    monkeypatch.setattr(stages, "NVIDIA", tmp_path / "nvidia")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(stages, "TURN_SECONDS", 0.05)
    for name in ("LDM_GPUS", "LDM_DEVICE", "LDM_PROCESSES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("meta", "environment", "expected"),
    [
        ({}, {}, {}),
        ({"gpus": 1}, {}, {"CUDA_VISIBLE_DEVICES": "0"}),
        ({"gpus": 2}, {}, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ({"gpus": 5}, {}, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ({"gpus": "ranks"}, {}, {"CUDA_VISIBLE_DEVICES": "0"}),
        ({"gpus": "ranks"}, {"LDM_PROCESSES": "2"}, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ({"gpus": 1}, {"LDM_DEVICE": "cpu"}, {}),
        ({"gpus": 1}, {"LDM_DEVICE": "cuda:1"}, {}),
        ({"gpus": 1}, {"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "1"}),
        ({"gpus": 1}, {"LDM_GPUS": "0"}, {}),
        ({"gpus": 4}, {"LDM_GPUS": "1"}, {"CUDA_VISIBLE_DEVICES": "0"}),
    ],
)  # fmt: skip
def test_what_a_stage_sees(
    meta: dict[str, Any], environment: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with stages.gpus(meta, threading.Event(), print) as found:
        assert found == expected


def test_runs_take_turns() -> None:
    lines, got, stop = list[str](), threading.Event(), threading.Event()

    def third() -> None:
        with stages.gpus({"gpus": 1}, stop, lines.append) as found:
            assert found == {"CUDA_VISIBLE_DEVICES": "1"}
            got.set()

    with stages.gpus({"gpus": 1}, stop, print):
        with stages.gpus({"gpus": 1}, stop, print) as second:
            assert second == {"CUDA_VISIBLE_DEVICES": "1"}
            waiting = threading.Thread(target=third)
            waiting.start()
            assert not got.wait(0.3) and len(lines) == 1 and "another run has" in lines[0]
        assert got.wait(5)
    waiting.join()


def test_who_waits_can_be_stopped() -> None:
    stop = threading.Event()
    with stages.gpus({"gpus": 2}, stop, print):
        stop.set()
        with pytest.raises(InputError, match="stopped"), stages.gpus({"gpus": 1}, stop, print):
            pass
