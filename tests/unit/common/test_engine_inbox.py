import threading

from scission.common.engine_inbox import Inbox


def test_items_come_out_in_order_and_once() -> None:
    inbox: Inbox[int] = Inbox()
    for item in range(5):
        inbox.put(item)
    assert inbox.drain(0) == [0, 1, 2, 3, 4]
    assert inbox.drain(0) == []


def test_put_ends_a_wait() -> None:
    inbox: Inbox[str] = Inbox()
    threading.Timer(0.01, inbox.put, ["item"]).start()
    assert inbox.drain(30) == ["item"]


def test_wake_ends_one_wait_and_brings_nothing() -> None:
    inbox: Inbox[str] = Inbox()
    inbox.wake()
    assert inbox.drain(30) == []
    assert inbox.drain(0.001) == []
