from hypothesis import given
from hypothesis import strategies as st

from scission.common.timers import MIN_CLEARED, Timers


def test_a_key_is_due_once_at_the_time_it_was_last_set_to() -> None:
    timers = Timers[str]()
    assert timers.next_at is None
    timers.set("a", 1.0)
    timers.set("b", 2.0)
    timers.set("a", 3.0)
    assert timers.next_at == 2.0
    assert timers.take_due(1.5) == []
    assert timers.take_due(3.0) == ["b", "a"]
    assert timers.take_due(9.0) == []
    assert timers.next_at is None


def test_forgotten_keys_take_no_room() -> None:
    timers = Timers[int]()
    for key in range(10 * MIN_CLEARED):
        timers.set(key, 600.0 + key)
        if key >= 8:
            timers.discard(key - 8)
    assert len(timers._heap) <= MIN_CLEARED + 1
    assert len(timers.take_due(1e9)) == 8


@given(
    st.lists(
        st.tuples(st.sampled_from(["set", "discard", "due"]), st.integers(0, 3), st.integers(0, 9))
    )
)
def test_timers_equal_a_table_of_times(calls: list[tuple[str, int, int]]) -> None:
    timers = Timers[int]()
    table: dict[int, float] = {}
    for call, key, at in calls:
        match call:
            case "set":
                timers.set(key, at)
                table[key] = at
            case "discard":
                timers.discard(key)
                table.pop(key, None)
            case _:
                due = timers.take_due(at)
                assert sorted(due) == sorted(k for k, t in table.items() if t <= at)
                assert [table[k] for k in due] == sorted(table[k] for k in due)
                table = {k: t for k, t in table.items() if t > at}
        assert timers.next_at == min(table.values(), default=None)
