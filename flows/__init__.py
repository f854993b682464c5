"""Prefect flows. Sets what Prefect and MLflow read on import; values that the user has set stay."""

import os
import time

from ldm import environment

STARTED = time.monotonic()
TARGET = "evaluate"  # the last stage before registration, which is a side effect and so no stage

environment.set_up()
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
