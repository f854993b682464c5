"""Who may use GPUs: runs take turns at a machine's, by locked files, and machines at a team's, by a limit on Prefect's server.

A team that wants the latter creates the limit: `prefect gcl create ldm-gpu --limit 4`. A holder renews its lease; if it dies, its
slots are free after `LEASE_SECONDS`. The limit only shares out: a server that does not answer for as long stops no training.
"""

import contextlib
import contextvars
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from httpx import HTTPStatusError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from ldm.base.errors import InputError, env_count, reason
from ldm.base.files import locked

LIMIT = "ldm-gpu"
LEASE_SECONDS = 60.0  # the shortest that Prefect has
RENEW_SECONDS = 15.0
TURN_SECONDS = 1.0  # between looks at a GPU, or slot, that another run has
TAKEN = (422, 423)  # more slots than the limit has, which is one of 0: paused; slots that others hold
IMPATIENT = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: 10.0}
NVIDIA = Path("/proc/driver/nvidia/gpus")


@contextlib.contextmanager
def take(meta: Mapping[str, Any], stopped: threading.Event, waiting: Callable[[str], object]) -> Iterator[dict[str, str]]:
    """Hold as many of this machine's GPUs as a stage's `meta` in dvc.yaml names (`ranks`: as many as `LDM_PROCESSES`).

    Runs take turns by locked files, which die with their holder. `LDM_GPUS` is the number of GPUs that runs may have. Yields
    the variables that show the stage its GPUs. Slots of the team's limit come last: who holds one is at work.
    """
    device, chosen = os.environ.get("LDM_DEVICE", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [str(number) for number in range(len(list(NVIDIA.glob("*"))))]
    if chosen is not None:  # perhaps none
        every = [name for name in chosen.split(",") if name]
    if "LDM_GPUS" in os.environ:
        every = [*every, *map(str, range(len(every), env_count("LDM_GPUS", 0)))][: env_count("LDM_GPUS", 0)]
    if number := device.partition(":")[2]:  # the user has chosen one, and how it is called
        every = [number]
    wanted = meta.get("gpus", 0)
    needed = 0 if device == "cpu" else min(len(every), env_count("LDM_PROCESSES", 1) if wanted == "ranks" else int(wanted))
    folder, said = Path(tempfile.gettempdir(), f"ldm-gpus-{os.getuid()}"), False
    folder.mkdir(exist_ok=True)
    while True:
        with contextlib.ExitStack() as held:
            ours = list[str]()
            for name in every:
                with contextlib.suppress(BlockingIOError):
                    if len(ours) < needed:
                        held.enter_context(locked(folder / name, wait=False))
                        ours.append(name)
            if len(ours) == needed:
                with _team_slots(needed, stopped, waiting):
                    limited = ours or (wanted and "LDM_GPUS" in os.environ)
                    yield {"CUDA_VISIBLE_DEVICES": ",".join(ours)} if limited and not number else {}
                return
        if not said:
            waiting(f"waits for a GPU that another run has: {needed} of {len(every)} are needed")
            said = True
        if stopped.wait(TURN_SECONDS):
            raise InputError("stopped while it waited for a GPU")


@contextlib.contextmanager
def _team_slots(needed: int, stopped: threading.Event, waiting: Callable[[str], object]) -> Iterator[None]:
    """Hold as many slots of the team's limit, or all that it has if those are fewer; without such a limit, nothing."""
    lease = _lease(needed, stopped, waiting) if needed and PREFECT_API_URL.value() else None
    if lease is None:
        yield
        return
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception), _client() as client:  # the server is away
                client.renew_concurrency_lease(lease, LEASE_SECONDS)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(renew,), daemon=True)  # whose server is this one's
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception), _client() as client:  # else the lease ends by itself
            client.release_concurrency_slots_with_lease(lease)


def _lease(needed: int, stopped: threading.Event, waiting: Callable[[str], object]) -> UUID | None:
    """Wait for slots; None if there is no limit, or no server that answers. One that is busy, or starts again, will."""
    answered, said = time.monotonic(), False
    while True:
        try:
            with _client() as client:
                slots = max(1, min(needed, client.read_global_concurrency_limit_by_name(LIMIT).limit))
                taken = client.increment_concurrency_slots_with_lease([LIMIT], slots, "concurrency", LEASE_SECONDS)
                return UUID(taken.json()["lease_id"])
        except ObjectNotFound:
            return None
        except Exception as error:
            if isinstance(error, HTTPStatusError) and error.response.status_code in TAKEN:
                if not said:
                    waiting(f"waits for the GPUs that other runs have: `prefect gcl inspect {LIMIT}` shows the team's limit")
                answered, said = time.monotonic(), True
            elif time.monotonic() > answered + LEASE_SECONDS:
                waiting(f"goes on without asking for the limit {LIMIT}: Prefect's server does not answer ({reason(error)})")
                return None
        if stopped.wait(TURN_SECONDS):
            raise InputError("stopped while it waited for a GPU")


@contextlib.contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    with temporary_settings(IMPATIENT), get_client(sync_client=True) as client:
        yield client
