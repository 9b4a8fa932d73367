"""Decode's half of the hand-offs: reservations wait for room, are granted, and become state.

It stands between the transfer receiver, which knows the protocol, and the engine, which knows the
requests' lives.
"""

from dataclasses import dataclass

from scission.common.cache.storage import CacheStorage
from scission.common.transfer.events import (
    Aborted,
    Failed,
    Ready,
    ReserveRequested,
    TransferHandle,
)
from scission.common.transfer.receiver import Receiver
from scission.services.decode.admission import Reservation, ReservationQueue, Rooms
from scission.services.decode.meters import DecodeMeters
from scission.services.decode.request import Phase, Request, Room


@dataclass(frozen=True, slots=True)
class Arrived:
    """All state of a request lies in its room; `commit` or `withdraw` must follow."""

    request: Request
    room: Room
    ready: Ready


@dataclass(frozen=True, slots=True)
class Lost:
    """A request's transfer has ended, by the prefill's will or by a failure; its room is free."""

    request: Request
    reason: str


class Handoffs:
    """All transfers of this decode that are not over. Owned by the engine thread."""

    def __init__(
        self,
        receiver: Receiver,
        storage: CacheStorage,
        rooms: Rooms,
        queue: ReservationQueue,
        meters: DecodeMeters,
    ) -> None:
        self._receiver = receiver
        self._storage = storage
        self._rooms = rooms
        self._queue = queue
        self._meters = meters
        self._by_handle: dict[TransferHandle, Request] = {}
        # The room that was there when the most senior one found too little of it.
        self._was_too_little: tuple[int, int] | None = None

    def announce(self, request: Request, now: float) -> None:
        """The gateway has announced a request: its reservation may be here already."""
        reservation = self._queue.announce(request)
        if reservation is not None:
            self._wait(request, reservation.handle)
            self.grant_waiting(now)

    def reserve(self, event: ReserveRequested, request: Request | None, now: float) -> None:
        """Grant or queue a reservation; `request` is None when it has not been announced yet."""
        handle = event.handle
        if self._queue.is_full:
            self._receiver.refuse(handle, "full")
            return
        self._queue.add(Reservation(handle, event.num_tokens, now, request))
        if request is not None:
            self._wait(request, handle)
            self.grant_waiting(now)
        position = self._queue.position(handle)
        if position is not None:
            self._receiver.wait(handle, position)

    def refuse(self, handle: TransferHandle, reason: str) -> None:
        """Answer a reservation that is not queued."""
        self._receiver.refuse(handle, reason)

    def refuse_waiting(self, reason: str) -> None:
        """Empty the queue; the requests that waited are merely announced again."""
        for reservation in self._queue.all():
            self._refuse(reservation, reason)

    def expire(self, now: float) -> None:
        """Refuse reservations that nobody has announced for too long."""
        for reservation in self._queue.unannounced(now):
            self._refuse(reservation, "unknown_request")

    def grant_waiting(self, now: float) -> None:
        """Give room to reservations, the most senior first, until one finds too little."""
        if not len(self._queue) or not self._is_worth_a_look():
            return
        for reservation in self._queue.in_order():
            request = reservation.request
            assert request is not None
            if not self._is_sound(reservation, request):
                self._refuse(reservation, "too_large")
                continue
            room = self._rooms.take(request, reservation.num_tokens)
            if room is None:
                self._was_too_little = self._rooms.num_free
                return
            self._grant(reservation, request, room, now)

    def receive(self, budget_bytes: int) -> tuple[list[Arrived | Lost | ReserveRequested], bool]:
        """Inject what has arrived, within the budget.

        Returns:
            What happened, and whether more may be at hand already.
        """
        injected = self._receiver.inject(budget_bytes)
        events = self._receiver.poll()
        happened: list[Arrived | Lost | ReserveRequested] = []
        for event in events:
            match event:
                case ReserveRequested():
                    happened.append(event)
                case Ready(handle=handle):
                    request = self._by_handle.get(handle)
                    if request is not None and request.room is not None:
                        happened.append(Arrived(request, request.room, event))
                case Aborted(handle=handle, reason=reason) | Failed(handle=handle, reason=reason):
                    self._queue.remove(handle)
                    request = self._by_handle.pop(handle, None)
                    if request is not None:
                        self._free_room(request)
                        happened.append(Lost(request, reason))
        return happened, bool(injected or events)

    def commit(self, request: Request) -> None:
        """The state is taken over; the room belongs to the running sequences from now on."""
        assert request.handle is not None
        request.room = None
        request.phase = Phase.RUNNING
        self._receiver.commit(request.handle)

    def withdraw(self, request: Request, reason: str) -> None:
        """The request ends here: end its transfer, unless that is over, and free its room."""
        handle = request.handle
        if handle is None or self._by_handle.pop(handle, None) is None:
            return
        self._queue.remove(handle)
        if request.phase in (Phase.WAITING, Phase.ARRIVING):
            self._receiver.abort(handle, reason)
            self._meters.aborted(reason)
        self._free_room(request)

    def _wait(self, request: Request, handle: TransferHandle) -> None:
        request.handle = handle
        request.phase = Phase.WAITING
        self._by_handle[handle] = request
        self._was_too_little = None

    def _is_worth_a_look(self) -> bool:
        if self._was_too_little is None:
            return True
        blocks, slots = self._rooms.num_free
        return blocks > self._was_too_little[0] or slots > self._was_too_little[1]

    def _is_sound(self, reservation: Reservation, request: Request) -> bool:
        """The prefill asks for no more than the request can need, and that could ever be had."""
        return 0 < reservation.num_tokens <= max(
            request.num_known(choice) for choice in range(request.num_choices)
        ) and self._rooms.can_ever_fit(request, reservation.num_tokens)

    def _grant(self, reservation: Reservation, request: Request, room: Room, now: float) -> None:
        handle, num_tokens = reservation.handle, reservation.num_tokens
        self._queue.remove(handle)
        request.phase = Phase.ARRIVING
        request.room = room
        request.num_tokens = num_tokens
        self._storage.reset_slot(room.slots[0])
        num_blocks = self._storage.layout.num_blocks(num_tokens)
        self._receiver.grant(handle, room.block_ids[0][:num_blocks], room.slots[0])
        self._meters.decode.admission_wait.observe(now - reservation.arrived_at)

    def _refuse(self, reservation: Reservation, reason: str) -> None:
        self._queue.remove(reservation.handle)
        self._by_handle.pop(reservation.handle, None)
        if reservation.request is not None:
            reservation.request.phase = Phase.ANNOUNCED
            reservation.request.handle = None
        self._receiver.refuse(reservation.handle, reason)

    def _free_room(self, request: Request) -> None:
        if request.room is not None:
            self._rooms.give_back(request.room)
            request.room = None
