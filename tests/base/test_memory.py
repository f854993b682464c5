"""Parts that fit into memory: the measured peak against arithmetic by hand, and what happens where a part does not fit."""

import resource
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from ldm.base import memory
from ldm.base.memory import MOST, Parts, budget, measured

CPU = torch.device("cpu")
FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes"


def test_the_peak_is_that_of_tensors_that_live_at_one_time() -> None:
    x = torch.zeros(1000)  # was there before

    def function() -> Tensor:
        a = x + 1  # 4,000 bytes
        b = (a * 2).double()  # with a: 4,000 and, for a moment, 4,000 and 8,000
        del a
        b.add_(1)  # in place
        return b.view(10, 100)[:, :50].sum(1)  # a view, then 80 bytes

    result, taken = measured(function, CPU)
    assert result.tolist() == [150.0] * 10
    assert taken == memory.WORKSPACE * (4000 + 4000 + 8000)


def test_a_networks_peak_is_about_what_its_process_takes() -> None:
    """A fresh process takes more than the tensors, for workspaces, and less than what is set aside."""
    code = """
import sys, torch
from pathlib import Path
from ldm.base.memory import WORKSPACE, measured

def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

torch.set_num_threads(1)
net = torch.nn.Sequential(*[torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]).eval()
x = torch.randn(1, 64, 512, 512)
with torch.inference_mode():
    net(x[..., :32, :32])
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    before = status("VmRSS")
    _, taken = measured(lambda: net(x), torch.device("cpu"))
print(taken / WORKSPACE / 1024, status("VmHWM") - before, taken / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tensors, process, set_aside = map(float, done.stdout.split())
    assert tensors == 2 * 64 * 512 * 512 * 4 / 1024
    assert 0.9 * tensors < process < 1.1 * set_aside


@pytest.mark.parametrize(("limit", "size"), [("1", MOST), ("8e-5", 4), ("8.1e-5", 8), ("1.7e-4", 16), ("1e-9", 1)])
def test_parts_follow_from_what_one_takes(limit: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item takes 5,008 bytes of tensors, and as much again is set aside."""
    monkeypatch.setenv("LDM_MEMORY_GB", limit)
    x, seen = torch.zeros(300, 1250), list[int]()

    def function(part: slice) -> Tensor:
        seen.append(part.stop - part.start)
        return x[part] + torch.arange(part.start, part.stop)[:, None]

    parts = Parts(CPU)
    found = torch.cat(list(parts(function, 300, kind="a")))
    assert torch.equal(found[:, 7], torch.arange(300.0))
    assert seen[:2] == [1, min(size, 300)]  # one is measured, and computed again with the others
    seen.clear()
    assert len(torch.cat(list(parts(function, 5, kind="a")))) == 5  # its kind has been measured
    assert seen[0] == min(size, 5)
    seen.clear()
    assert len(torch.cat(list(parts(function, 5, kind="b", one=lambda: function(slice(0, 1)))))) == 5
    assert seen[:2] == [1, min(size, 5)]


def test_nothing_is_measured_of_no_items() -> None:
    assert list(Parts(CPU)(lambda part: pytest.fail("called"), 0)) == []


def test_what_does_not_fit_is_tried_smaller_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    parts, tried = Parts(CPU, "texts"), list[int]()

    def function(part: slice) -> list[int]:
        tried.append(part.stop - part.start)
        if tried[-1] > 10:
            raise RuntimeError(FULL)
        return list(range(part.start, part.stop))

    found = [number for part in parts(function, 100) for number in part]
    assert found == list(range(100))
    assert tried[:6] == [1, 100, 50, 25, 12, 6] and set(tried[5:]) == {6, 4}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "memory: 100 texts do not fit at once; trying 50" and len(lines) == 4


def test_a_rest_that_did_not_fit_does_not_make_later_parts_small() -> None:
    parts, tried, fails = Parts(CPU), list[int](), True

    def function(part: slice) -> None:
        tried.append(part.stop - part.start)
        if fails and tried[-1] == 3:
            raise RuntimeError(FULL)

    list(parts(function, MOST + 3))
    assert tried == [1, MOST, 3, 1, 1, 1]
    fails = False
    list(parts(function, MOST))
    assert tried[6:] == [MOST]


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("no memory"), KeyboardInterrupt()])
def test_other_errors_are_not_taken_for_full_memory(error: BaseException) -> None:
    def function(part: slice) -> None:
        if part.stop > 1:
            raise error

    with pytest.raises(type(error)):
        list(Parts(CPU)(function, 10))


def test_one_that_does_not_fit_fails() -> None:
    def function(part: slice) -> None:
        raise RuntimeError(FULL)

    with pytest.raises(RuntimeError, match="allocate memory"):
        list(Parts(CPU)(function, 10))


def test_torchs_own_error_is_known() -> None:
    """Of a process that may not have the memory."""
    code = """
import resource, torch
from ldm.base.memory import _out_of_memory
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
try:
    torch.empty(1 << 40, dtype=torch.uint8)
except RuntimeError as error:
    print(_out_of_memory(error))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_the_budget_is_a_share_of_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_MEMORY_GB", raising=False)
    monkeypatch.setattr(memory, "_host", lambda: (10 * 10**9, 64 * 10**9))
    assert budget(CPU) == 5 * 10**9  # little is free
    monkeypatch.setattr(memory, "_host", lambda: (40 * 10**9, 64 * 10**9))
    assert budget(CPU) == 8 * 10**9
    monkeypatch.setattr(memory, "_host", lambda: (30 * 10**9, 64 * 10**9))
    assert budget(CPU) == 8 * 10**9  # a little more or less that is free changes nothing
    monkeypatch.setenv("LDM_MEMORY_GB", "2.5")
    assert budget(CPU) == 2.5 * 10**9


def test_the_machines_memory_is_known() -> None:
    free, total = memory._host()
    assert 0 < free < total
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < total


def test_measuring_changes_no_result() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3)), torch.randn(2, 3, 20, 20)
    with torch.inference_mode():
        assert torch.equal(measured(lambda: net(x), CPU)[0], net(x))
