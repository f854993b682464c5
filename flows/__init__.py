"""Prefect flows: when and where the stages of dvc.yaml run.

Sets what Prefect and MLflow read on import; values that the user has set stay.
"""

import os
import time

STARTED = time.monotonic()

for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "true",
}.items():
    os.environ.setdefault(_name, _value)
