"""Who gets room: reservations in order of seniority, room for a prompt plus bounded growth.

A reservation that waits holds no memory. Nobody overtakes the most senior one that waits, so that a
large request is not starved by small ones; a reservation whose request has not been announced yet
holds nobody up.
"""

from dataclasses import dataclass

from scission.common.cache.block_pool import BlockPool, SlotPool, State
from scission.common.transfer.events import TransferHandle
from scission.services.decode.request import Request, Room


class Rooms:
    """Blocks and slots as rooms for whole requests."""

    def __init__(
        self,
        blocks: BlockPool,
        slots: SlotPool,
        *,
        block_size: int,
        growth_tokens: int,
        max_model_len: int,
    ) -> None:
        """`growth_tokens`: room for output that admission takes beforehand, at most, per choice."""
        self._blocks = blocks
        self._slots = slots
        self._block_size = block_size
        self._growth_tokens = growth_tokens
        self._max_model_len = max_model_len

    @property
    def num_free(self) -> tuple[int, int]:
        """Free blocks and slots."""
        return self._blocks.num_free, self._slots.num_free

    def can_ever_fit(self, request: Request, num_tokens: int) -> bool:
        """The empty pools would have room for the request."""
        counts, _ = self._needed(request, num_tokens)
        return sum(counts) <= self._blocks.total and len(counts) <= self._slots.total

    def take(self, request: Request, num_tokens: int) -> Room | None:
        """Room for state of `num_tokens` positions and all live choices of the request, or None."""
        counts, num_shared = self._needed(request, num_tokens)
        if len(counts) > self._slots.num_free:
            return None
        ids = self._blocks.allocate(sum(counts), State.RESERVED)
        if ids is None:
            return None
        slots = self._slots.allocate(len(counts), State.RESERVED)
        assert slots is not None
        per_choice = []
        for count in counts:
            per_choice.append(ids[:count])
            ids = ids[count:]
        return Room(per_choice, slots, sorted(request.live_choices), num_shared)

    def give_back(self, room: Room) -> None:
        """Free a room whose state never came."""
        for ids in room.block_ids:
            self._blocks.release(ids, State.RESERVED)
        self._slots.release(room.slots, State.RESERVED)

    def _needed(self, request: Request, num_tokens: int) -> tuple[list[int], int]:
        """Blocks for each live choice, and how many of the first one's the others share."""
        num_shared = num_tokens // self._block_size
        counts: list[int] = []
        for choice in sorted(request.live_choices):
            known = max(num_tokens, request.num_known(choice))
            # The last token is drawn, but its state is never needed.
            longest = min(
                len(request.prompt_token_ids) + request.params.max_tokens, self._max_model_len
            )
            tokens = max(num_tokens, min(longest - 1, known + self._growth_tokens))
            counts.append(-(-tokens // self._block_size) - (num_shared if counts else 0))
        return counts, num_shared


@dataclass(slots=True)
class Reservation:
    """A prefill's wish for room; `request` is None until the gateway has announced it."""

    handle: TransferHandle
    num_tokens: int  # positions whose state will come
    arrived_at: float
    request: Request | None


class ReservationQueue:
    """The reservations that wait, bounded."""

    def __init__(self, max_waiting: int, max_unannounced_s: float) -> None:
        self._max_waiting = max_waiting
        self._max_unannounced_s = max_unannounced_s
        self._waiting: dict[TransferHandle, Reservation] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= self._max_waiting

    @property
    def num_tokens(self) -> int:
        """Tokens whose state waits for room."""
        return sum(reservation.num_tokens for reservation in self._waiting.values())

    def add(self, reservation: Reservation) -> None:
        assert not self.is_full
        self._waiting[reservation.handle] = reservation

    def remove(self, handle: TransferHandle) -> None:
        self._waiting.pop(handle, None)

    def announce(self, request: Request) -> Reservation | None:
        """The waiting reservation of an attempt that is announced just now, if there is one."""
        for reservation in self._waiting.values():
            handle = reservation.handle
            if (handle.request_id, handle.attempt) == (request.request_id, request.attempt):
                reservation.request = request
                return reservation
        return None

    def position(self, handle: TransferHandle) -> int | None:
        """How many stand before it; None when it does not wait (any more)."""
        if handle not in self._waiting:
            return None
        order = [reservation.handle for reservation in self.in_order()]
        return order.index(handle) if handle in order else len(order)

    def in_order(self) -> list[Reservation]:
        """The announced ones, most senior first; equals in order of arrival."""
        announced = [r for r in self._waiting.values() if r.request is not None]
        return sorted(announced, key=_seniority)

    def all(self) -> list[Reservation]:
        return list(self._waiting.values())

    def unannounced(self, now: float) -> list[Reservation]:
        """Those that have waited too long for their announcement."""
        since = now - self._max_unannounced_s
        return [r for r in self._waiting.values() if r.request is None and r.arrived_at <= since]

    def next_expiry(self) -> float | None:
        """When the first unannounced reservation will have waited too long."""
        arrivals = [r.arrived_at for r in self._waiting.values() if r.request is None]
        return min(arrivals) + self._max_unannounced_s if arrivals else None


def _seniority(reservation: Reservation) -> tuple[int, float]:
    assert reservation.request is not None
    return reservation.request.seniority
