"""What time it is: one place, so that a test can live through a year."""

from datetime import UTC, datetime


def now() -> datetime:
    return datetime.now(UTC)
