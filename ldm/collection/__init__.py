"""The growing collection of images: what comes in (ingest), what has to go (purge), what is unlike the rest (drift)."""
