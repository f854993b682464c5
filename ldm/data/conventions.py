"""Where captions come from, and which folders are batches. A module of its own, as settings import no table reader."""

import contextlib
import re
from datetime import date
from typing import Literal

Convention = Literal["auto", "tables", "text files", "folder names", "none"]  # as `data.captions` says; `captions.py` reads them
BATCH_TABLE = "metadata.csv"  # the captions of a batch


def batch_date(folder: str) -> date | None:
    """The day of a batch, which ingest names `YYYY-MM-DD` or `YYYY-MM-DD-N` at the top of a collection; None for other names."""
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}(-\d+)?", folder, re.ASCII):
        with contextlib.suppress(ValueError):  # 2025-02-30
            return date.fromisoformat(folder[:10])
    return None
