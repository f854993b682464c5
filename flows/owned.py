"""Run a module until its owner ends: `python -m flows.owned MODULE ARGUMENTS…`, with a pipe from the owner as stdin."""

import os
import runpy
import signal
import sys
import threading
import time

END_SECONDS = 60.0  # to end by itself


def _watch() -> None:
    os.read(0, 1)  # nothing is ever written
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_watch, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
