"""MLflow: runs, the lineage of results, registered versions, serving."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(__name__, {"registration": "compare promote register rollback", "versions": "find load lookup"})
