"""Several processes (ranks) on this machine that run one training stage."""

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std, SubprocessContext

from ldm.stages.stage import BAD_INPUT, BUSY, CHECKPOINT_SECONDS, END_SECONDS, INTERRUPTED, on_signals

HARMLESS = signal.SIGCONT  # `close` sends a signal, waits, and kills; ranks are stopped by their pipe, and need none

logging.getLogger("torch.distributed.elastic").propagate = False  # this module reports what happened
logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())


def run_ranks(stage: str, count: int) -> int:
    """Run a stage as `count` ranks; returns the stage's exit code when all of them have ended.

    Their stdin is a pipe of which only this process holds the other end: they stop when this process closes it or is killed.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:  # TCPStore itself would listen on all interfaces
        port = listening.getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    common = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "LDM_OWNER_PIPE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 opens no store
        "GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback,
    }  # fmt: skip
    envs = {rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)}
    command = dict.fromkeys(range(count), ("-m", f"ldm.stages.{stage}"))
    read, write = os.pipe()
    os.dup2(read, 0)
    with tempfile.TemporaryDirectory() as folder:
        logs = DefaultLogsSpecs(folder, redirects=dict.fromkeys(range(1, count), Std.ERR))
        ranks = SubprocessContext(stage, sys.executable, command, envs, logs)
        codes: dict[int, int | None] = {0: None}
        try:
            ranks.start()  # from here on, signals raise `SignalException`
            while None in codes.values() and not any(codes.values()):
                time.sleep(0.1)
                codes = _exit_codes(ranks)
        except SignalException:
            on_signals(signal.SIG_IGN)
            os.close(write)
            ranks.close(HARMLESS, timeout=CHECKPOINT_SECONDS)
            return 0 if set(_exit_codes(ranks).values()) == {0} else INTERRUPTED
        ranks.close(HARMLESS, timeout=END_SECONDS)  # ranks that wait for one that failed notice by themselves, or are killed
        failed = {rank: code for rank, code in codes.items() if code}
        refused = {rank: code for rank, code in _exit_codes(ranks).items() if code in (BAD_INPUT, BUSY)}
        if not refused and set(failed.values()) <= {INTERRUPTED}:
            return INTERRUPTED if failed else 0
        for rank in list(refused)[:1] or failed:
            if rank:
                sys.stderr.write(Path(ranks.stderrs[rank]).read_text())
            if not refused:
                print(f"error: process {rank} of this training ended with exit code {failed[rank]}", file=sys.stderr, flush=True)
    return next(filter(None, refused.values()), 1)


def _exit_codes(ranks: SubprocessContext) -> dict[int, int | None]:
    return {rank: handler.proc.poll() for rank, handler in ranks.subprocess_handlers.items()}
