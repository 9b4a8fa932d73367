"""The prefix cache: full blocks of computed prompts under the hash of all tokens up to their end.

A hit needs every block of a prefix and, where the layout has rings or tails, a snapshot of them at
its end. Snapshots are state slots, few, and the least recently used makes room; blocks stay until
their room is needed. Both are held in state CACHED: a block that a request shares is never evicted.
Hashes come from `common/prefix_hash.py`; tensors are not touched here.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from scission.common.cache.block_pool import BlockPool, SlotPool, State


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest cached prefix; `snapshot`, the slot to copy from, is None without slot state."""

    num_tokens: int
    block_ids: tuple[int, ...]
    snapshot: int | None


@dataclass(slots=True)
class _Entry:
    block: int
    parent: bytes | None
    num_children: int = 0


class PrefixCache:
    """Cached blocks and snapshots of one worker; owned by the engine thread."""

    def __init__(
        self,
        blocks: BlockPool,
        slots: SlotPool,
        block_size: int,
        max_snapshots: int,
        *,
        needs_snapshots: bool = True,
        is_enabled: bool = True,
    ) -> None:
        """`max_snapshots` bounds the slots held here; 0 of them turn the cache off if needed."""
        self.is_enabled = is_enabled and (max_snapshots > 0 or not needs_snapshots)
        self._blocks = blocks
        self._slots = slots
        self._block_size = block_size
        self._max_snapshots = max_snapshots
        self._needs_snapshots = needs_snapshots
        # Least recently used first; a touched chain is laid down deepest block first, so that a
        # block always comes before its parents and the ends of chains go first.
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._snapshots: OrderedDict[bytes, int] = OrderedDict()
        self._num_pending = 0  # snapshot slots handed out, not yet kept or given back
        self._changed: dict[bytes, bool] = {}  # hash -> a prefix may end here now
        self.num_evicted = 0  # blocks, ever

    @property
    def ends(self) -> list[bytes]:
        """The hashes at which a hit can end: what gateways route by."""
        return list(self._snapshots if self._needs_snapshots else self._entries)

    def take_changes(self) -> dict[bytes, bool]:
        """Hashes where a hit can end now (True) or no longer (False), as against the last call."""
        changed, self._changed = self._changed, {}
        return changed

    def match(self, hashes: Sequence[bytes], num_tokens: int) -> PrefixHit | None:
        """The longest hit that leaves at least one of the prompt's `num_tokens` to compute.

        Marks it as used. The caller shares the blocks before anything else can be evicted.
        """
        length = 0
        best = 0
        for block_hash in hashes[: max(0, num_tokens - 1) // self._block_size]:
            if block_hash not in self._entries:
                break
            length += 1
            if not self._needs_snapshots or block_hash in self._snapshots:
                best = length
        if best == 0:
            return None
        chain = hashes[:best]
        self._touch(chain)
        snapshot = None
        if self._needs_snapshots:
            self._snapshots.move_to_end(chain[-1])
            snapshot = self._snapshots[chain[-1]]
        return PrefixHit(
            num_tokens=best * self._block_size,
            block_ids=tuple(self._entries[block_hash].block for block_hash in chain),
            snapshot=snapshot,
        )

    def insert(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """Cache the blocks of a computed prefix, from its first block on; the caller holds them.

        Where a hash is known already, its first block stays and the caller's own is not cached.
        """
        if not self.is_enabled:
            return
        parent: bytes | None = None
        for block_hash, block in zip(hashes, block_ids, strict=True):
            if block_hash not in self._entries:
                self._blocks.share([block], State.CACHED)
                self._entries[block_hash] = _Entry(block, parent)
                if parent is not None:
                    self._entries[parent].num_children += 1
                if not self._needs_snapshots:
                    self._changed[block_hash] = True
            parent = block_hash
        self._touch(hashes)

    def take_snapshot_slot(self, block_hash: bytes) -> int | None:
        """A slot (ACTIVE) for a snapshot at the block's end; None: there is one, or no room for it.

        The least recently used snapshot makes room. The slot comes back by `keep_snapshot` or
        `drop_snapshot`.
        """
        if not self.is_enabled or not self._needs_snapshots or block_hash in self._snapshots:
            return None
        if len(self._snapshots) + self._num_pending >= self._max_snapshots:
            if not self._snapshots:
                return None
            self._evict_snapshot(next(iter(self._snapshots)))
        slot = self._slots.take(State.ACTIVE)
        if slot is not None:
            self._num_pending += 1
        return slot

    def keep_snapshot(self, block_hash: bytes, slot: int) -> None:
        """The slot is filled: a hit may end at the block's end from now on."""
        if block_hash in self._snapshots or block_hash not in self._entries:
            self.drop_snapshot(slot)
            return
        self._num_pending -= 1
        self._slots.move([slot], State.ACTIVE, State.CACHED)
        self._snapshots[block_hash] = slot
        self._changed[block_hash] = True

    def drop_snapshot(self, slot: int) -> None:
        """The slot was not filled after all."""
        self._num_pending -= 1
        self._slots.release([slot], State.ACTIVE)

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` blocks that nobody else holds, the oldest chain ends first.

        Returns how many were freed.
        """
        victims: list[bytes] = []
        left: dict[bytes, int] = {}  # children that stay, of parents that lose some
        for block_hash, entry in self._entries.items():
            if len(victims) >= num_blocks:
                break
            children = left.get(block_hash, entry.num_children)
            if children == 0 and self._blocks.num_holders(entry.block) == 1:
                victims.append(block_hash)
                if entry.parent is not None:
                    left[entry.parent] = (
                        left.get(entry.parent, self._entries[entry.parent].num_children) - 1
                    )
        for block_hash in victims:
            self._evict_entry(block_hash)
        return len(victims)

    def clear(self) -> None:
        """Give up everything that nobody else holds."""
        self.evict(len(self._entries))

    def _touch(self, chain: Sequence[bytes]) -> None:
        for block_hash in reversed(chain):
            self._entries.move_to_end(block_hash)

    def _evict_entry(self, block_hash: bytes) -> None:
        if block_hash in self._snapshots:
            self._evict_snapshot(block_hash)
        entry = self._entries.pop(block_hash)
        assert entry.num_children == 0
        if entry.parent is not None:
            self._entries[entry.parent].num_children -= 1
        self._blocks.release([entry.block], State.CACHED)
        self.num_evicted += 1
        if not self._needs_snapshots:
            self._changed[block_hash] = False

    def _evict_snapshot(self, block_hash: bytes) -> None:
        self._slots.release([self._snapshots.pop(block_hash)], State.CACHED)
        self._changed[block_hash] = False
