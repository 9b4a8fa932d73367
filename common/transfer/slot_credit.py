"""Which arena slots a receiver's transfers may fill next, and what their senders hear of it."""

from collections import OrderedDict
from collections.abc import Callable

from scission.common.transfer.arena import SlotState, SlotTable
from scission.common.transfer.incoming import Incoming
from scission.protos import transfer_pb2

FIRST_SLOTS = 2  # that a transfer gets with its grant; more as it uses them
SendCredit = Callable[[Incoming, transfer_pb2.Credit], None]


class SlotCredit:
    """Lives on the receiver's I/O thread; `announce` sends what has gathered since the last."""

    def __init__(self, slots: SlotTable, window_slots: int, send: SendCredit) -> None:
        self.slots = slots
        self._window_slots = window_slots
        self._send = send
        self._hungry: OrderedDict[Incoming, None] = OrderedDict()  # granted, without a slot
        self._owed: set[Incoming] = set()

    def begin(self, transfer: Incoming) -> list[int]:
        """The first slots of a transfer; without any it stands in line for one."""
        slots = self._take(transfer, FIRST_SLOTS)
        if not slots:
            self._hungry[transfer] = None
        return slots

    def injected(self, transfer: Incoming, sequence: int, slot: int) -> None:
        """A chunk was written and its slot is empty."""
        transfer.credit_injected.append(sequence)
        self._owed.add(transfer)
        self._recycle(transfer, slot)

    def free_granted(self, transfer: Incoming) -> None:
        """Take back what the transfer has no use for any more."""
        self.slots.free(transfer, self.slots.granted(transfer))
        self._feed()

    def free_all(self, transfer: Incoming) -> None:
        """Nothing of the transfer can be written any more."""
        self.slots.free_all(transfer)
        self._feed()

    def forget(self, transfer: Incoming) -> None:
        """The transfer gets no more slots and hears no more; those it holds stay its own."""
        self._hungry.pop(transfer, None)
        self._owed.discard(transfer)

    def announce(self) -> None:
        """Send the credit that this round gave: one message a transfer."""
        owed, self._owed = self._owed, set()
        for transfer in owed:
            credit = transfer_pb2.Credit(slots=transfer.credit, injected=transfer.credit_injected)
            transfer.credit, transfer.credit_injected = [], []
            self._send(transfer, credit)

    def _recycle(self, transfer: Incoming, slot: int) -> None:
        """Decide where an emptied slot goes: back to its transfer, or to one that has none."""
        coverage = transfer.coverage
        assert coverage is not None
        # a chunk that was asked for again may be written to its slot again: such slots stay with
        # the transfer
        is_movable = not transfer.num_reships
        if is_movable and (coverage.is_complete or self._hungry):
            self.slots.free(transfer, [slot])
            if not coverage.is_complete and not self.slots.num_held(transfer):
                self._hungry[transfer] = None
            self._feed()
            return
        self.slots.mark(transfer, slot, SlotState.GRANTED)
        transfer.credit.append(slot)
        if not coverage.is_complete:
            transfer.credit += self._take(transfer, 1)

    def _take(self, transfer: Incoming, count: int) -> list[int]:
        """Up to `count` free slots, within the window of a transfer."""
        slots: list[int] = []
        while len(slots) < count and self.slots.num_held(transfer) < self._window_slots:
            slot = self.slots.take(transfer)
            if slot is None:
                break
            slots.append(slot)
        return slots

    def _feed(self) -> None:
        """Give free slots to transfers that have none, first come first served."""
        while self._hungry and self.slots.num_free:
            transfer, _ = self._hungry.popitem(last=False)
            transfer.credit += self._take(transfer, 1)
            self._owed.add(transfer)
