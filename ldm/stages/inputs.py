"""The shards that a stage reads."""

import json
import os
from pathlib import Path

from ldm.base.errors import InputError
from ldm.base.files import canonical_json, content_hash
from ldm.base.paths import SHARD_CACHE, SHARDS
from ldm.data.reader import ShardReader, open_shards


def stage_shards(root: Path, split: str) -> ShardReader:
    """A split of `data/shards`, or of the same shards at the URL `LDM_SHARDS`, which come through `.ldm/shards`.

    That folder holds `LDM_SHARD_CACHE_GB` (default 50) at most. If `data/shards` has an index, the one at the URL must be equal.
    """
    url, local = os.environ.get("LDM_SHARDS"), root / SHARDS
    if not url:
        return open_shards(local, split)
    size = os.environ.get("LDM_SHARD_CACHE_GB") or "50"
    try:
        limit = int(float(size) * 1e9)
    except (ValueError, OverflowError):
        raise InputError(f"LDM_SHARD_CACHE_GB is {size!r}; set it to a number of gigabytes") from None
    reader = open_shards(url, split, cache=root / SHARD_CACHE, cache_bytes=limit)
    index = local / "index.json"
    if index.is_file() and json.loads(index.read_text(encoding="utf-8")) != reader.index:
        raise InputError(f"LDM_SHARDS {url}: its index.json is not that of {local}; copy {local} there again")
    return reader


def index_hash(reader: ShardReader) -> str:
    """Identity of the shards: the hash of their index, which has the hash of each."""
    return content_hash(canonical_json(reader.index).encode())
