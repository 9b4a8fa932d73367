from scission.common.ended_attempts import EndedAttempts


def test_an_ended_attempt_covers_itself_and_lower_ones() -> None:
    ended = EndedAttempts()
    ended.add("a", 2, now=0.0)
    ended.add("a", 1, now=0.0)
    assert [ended.covers("a", attempt, 0.0) for attempt in range(4)] == [True, True, True, False]
    assert not ended.covers("b", 0, 0.0)


def test_attempts_are_forgotten_by_age_and_by_number() -> None:
    ended = EndedAttempts(max_remembered=2, for_s=10.0)
    for number, name in enumerate("abc"):
        ended.add(name, 0, now=float(number))
    assert [ended.covers(name, 0, 3.0) for name in "abc"] == [False, True, True]
    assert not ended.covers("c", 0, 12.0)
