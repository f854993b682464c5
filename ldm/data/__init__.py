"""Folders of captioned images, shards, batches and cached latents."""

from ldm.base.lazy import exports

__getattr__, __all__ = exports(__name__, {"reader": "open_shards", "shards": "write_shards"})
