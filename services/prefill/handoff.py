"""What the engine tells the transfer and hears back: at most one open transfer a request.

The bytes are the sender's (common/transfer); here is which rows it may read and when.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from scission.common.transfer.events import (
    Closed,
    Destination,
    Granted,
    SenderEvent,
    StateSource,
    TransferHandle,
)
from scission.protos import transfer_pb2

if TYPE_CHECKING:
    from scission.services.prefill.request import Request
    from scission.services.prefill.state import HeldState


class StateSender(Protocol):
    """The engine thread's side of `common.transfer`'s Sender."""

    def reserve(
        self,
        request_id: str,
        attempt: int,
        destination: Destination,
        num_tokens: int,
        num_sequences: int,
        deadline: float,
        source: StateSource,
    ) -> TransferHandle: ...

    def piece_ready(
        self, handle: TransferHandle, layers: tuple[int, int], tokens: tuple[int, int]
    ) -> None: ...

    def finish(
        self,
        handle: TransferHandle,
        sequences: list[transfer_pb2.Sequence],
        first_token_at: float,
    ) -> None: ...

    def abort(self, handle: TransferHandle, reason: str) -> None: ...

    def poll(self) -> list[SenderEvent]: ...

    def stats(self) -> Mapping[str, int]: ...

    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Transfer:
    """One RESERVE and what follows; it reads `state` until it is closed."""

    handle: TransferHandle
    request: "Request"
    state: "HeldState"
    reserved_at: float
    grant_wait_s: float | None = None  # None: not granted yet


class Handoff:
    """All transfers of this worker; belongs to the engine thread."""

    def __init__(
        self, sender: StateSender, num_layers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sender = sender
        self._num_layers = num_layers
        self._clock = clock
        self._transfers: dict[TransferHandle, Transfer] = {}

    @property
    def num_open(self) -> int:
        """Transfers that are not closed: ended ones whose rows are still read count."""
        return len(self._transfers)

    @property
    def num_in_flight(self) -> int:
        """Transfers that are granted and go on."""
        return sum(
            transfer.grant_wait_s is not None and transfer.request.transfer is transfer
            for transfer in self._transfers.values()
        )

    def open(self, request: "Request") -> None:
        """RESERVE at the request's destination, and offer the rows that are computed already."""
        assert request.destination is not None and request.transfer is None
        state = request.held
        handle = self._sender.reserve(
            request.request_id,
            request.attempt,
            request.destination,
            request.num_tokens,
            len(request.choices),
            request.deadline,
            StateSource(list(state.block_ids), state.slot),
        )
        state.add_reader()
        transfer = Transfer(handle, request, state, self._clock())
        self._transfers[handle] = transfer
        request.transfer = transfer
        if request.num_computed:
            self.offer(request, (0, self._num_layers), (0, request.num_computed))

    def offer(self, request: "Request", layers: tuple[int, int], tokens: tuple[int, int]) -> None:
        """The paged rows of these model layers and tokens are final. Nothing without a transfer."""
        if request.transfer is not None:
            request.held.offer_tokens(tokens[1])
            self._sender.piece_ready(request.transfer.handle, layers, tokens)

    def finish(self, request: "Request") -> None:
        """Everything is final: ship the rings and say what was sampled."""
        if request.transfer is None:
            return
        request.held.offer_slot()
        sequences = [
            transfer_pb2.Sequence(
                choice=sequence.choice,
                tokens=[request.first_tokens[sequence.choice]]
                if sequence.choice in request.first_tokens
                else [],
            )
            for sequence in request.choices
        ]
        self._sender.finish(request.transfer.handle, sequences, request.first_token_at)

    def abort(self, request: "Request", reason: str) -> None:
        """End the request's transfer."""
        assert request.transfer is not None
        self._sender.abort(request.transfer.handle, reason)
        request.transfer = None

    def poll(self) -> Sequence[tuple["Request", SenderEvent]]:
        """What happened to open transfers; what comes of ended ones is dropped."""
        found = []
        for event in self._sender.poll():
            transfer = self._transfers.get(event.handle)
            if transfer is None:
                continue
            if isinstance(event, Closed):
                del self._transfers[event.handle]
                transfer.state.drop_reader()
            elif transfer.request.transfer is transfer:
                if isinstance(event, Granted):
                    transfer.grant_wait_s = event.wait_s
                found.append((transfer.request, event))
        return found

    def stats(self) -> Mapping[str, int]:
        """The sender's running totals."""
        return self._sender.stats()

    def close(self) -> None:
        self._sender.close()
