"""How shards behind URLs are read, and what a reader counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RemoteSettings:
    """How shards behind URLs are read; `data.remote` of the configuration."""

    mode: str = "auto"
    """auto, cache or range: see `shard_cache`."""
    cache_dir: str | None = None
    """Folder for whole shards and for indexes; None is ~/.cache/scaletransfer. Should be on a disk of the node."""
    cache_bytes: int = 50_000_000_000
    """Limit for the shards in the folder, all processes together."""
    attempts: int = 5
    """How often a request is tried."""
    timeout: float = 60.0
    """Seconds in which a request must be finished; connecting, and silence of the server, are given less."""


@dataclass
class ReadCounters:
    """What a reader did since it was made, in this process."""

    bytes_read: int = 0
    """Bytes handed to the caller."""
    remote_bytes: int = 0
    """Bytes that came from a server, whole shards included."""
    cache_hits: int = 0
    """Remote shards opened that were in the cache."""
    cache_misses: int = 0
    """Remote shards opened that had to be downloaded."""
    retries: int = 0
    """Requests that were repeated."""
