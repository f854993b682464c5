"""What was made and where it came from: MLflow runs, lineage, the model registry, serving."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(
    __name__,
    {
        "compare": "versions",
        "find": "versions",
        "load": "versions",
        "lookup": "versions",
        "promote": "versions",
        "register": "versions",
        "rollback": "versions",
    },
)
