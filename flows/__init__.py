"""Prefect flows. Sets what Prefect and MLflow read on import; values that the user has set stay."""

import os
import time
from pathlib import Path

STARTED = time.monotonic()

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
for name in ("NO_PROXY", "no_proxy"):  # what runs here is never asked through a proxy
    hosts = filter(None, [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), "127.0.0.1", "localhost"])
    os.environ[name] = ",".join(dict.fromkeys(",".join(hosts).split(",")))
if not os.access(Path.home(), os.W_OK):  # as in a container with a user id of its own
    os.environ.setdefault("PREFECT_HOME", str(Path.cwd() / ".ldm/prefect"))
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
