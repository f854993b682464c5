"""What time it is, and was when a file changed: one place, so that a test can live through a year."""

from datetime import UTC, datetime


def now() -> datetime:
    return datetime.now(UTC)


def at(seconds: float) -> datetime:
    """The time of a file, a row of a database or a process, which comes from the system in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC)
