"""MLflow: runs, the lineage of results, registered versions, serving."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(
    __name__,
    {
        "compare": "promotion",
        "find": "versions",
        "load": "versions",
        "lookup": "versions",
        "promote": "promotion",
        "register": "registration",
        "rollback": "promotion",
    },
)
