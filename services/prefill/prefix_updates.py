"""What the engine thread tells the registration of its prefix cache."""

import threading
from collections.abc import Mapping

from scission.protos import cluster_pb2


class PrefixUpdates:
    """Recorded by the engine thread, taken by the registration's; an update names no hash twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: set[bytes] = set()
        self._changed: dict[bytes, bool] = {}

    def record(self, changes: Mapping[bytes, bool]) -> None:
        """Hashes where a hit can end now (True) or no longer (False)."""
        if not changes:
            return
        with self._lock:
            self._changed.update(changes)
            for block_hash, is_end in changes.items():
                if is_end:
                    self._ends.add(block_hash)
                else:
                    self._ends.discard(block_hash)

    def take(self, full: bool) -> cluster_pb2.PrefixUpdate:
        """All of them, or what changed since the last call that asked for changes."""
        with self._lock:
            if full:
                return cluster_pb2.PrefixUpdate(added=sorted(self._ends))
            changed, self._changed = self._changed, {}
        return cluster_pb2.PrefixUpdate(
            added=[block_hash for block_hash, is_end in changed.items() if is_end],
            evicted=[block_hash for block_hash, is_end in changed.items() if not is_end],
        )
