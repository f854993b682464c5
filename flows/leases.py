"""Where the project's Prefect server keeps the leases of concurrency limits: on disk.

Prefect keeps them in memory. A server that ends then forgets who held a slot, while its database still counts the slot as taken,
for ever.
"""

from prefect.server.concurrency.lease_storage import filesystem

from ldm.base.project import find_root


class ConcurrencyLeaseStorage(filesystem.ConcurrencyLeaseStorage):  # the name that Prefect looks for
    """In the project, as its database: another server would end leases of limits that it does not have."""

    def __init__(self) -> None:
        super().__init__(find_root() / ".ldm/leases")
