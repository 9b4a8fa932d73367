import random

from hypothesis import given
from hypothesis import strategies as st

from scission.common.types import Finish, FinishReason, Token
from scission.services.gateway.delivery import Delivery


def finish(choice: int, num_tokens: int) -> Finish:
    return Finish(choice, FinishReason.LENGTH, num_tokens=num_tokens)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=3),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_any_order_and_repetition_delivers_each_index_once_and_in_order(
    lengths: list[int], copies: int, rng: random.Random
) -> None:
    delivery = Delivery(len(lengths))
    events: list[Token | Finish] = [
        Token(choice, index, 100 * choice + index)
        for choice, length in enumerate(lengths)
        for index in range(length)
        for _ in range(copies)
    ]
    events += [finish(choice, length) for choice, length in enumerate(lengths)]
    rng.shuffle(events)
    delivered: dict[int, list[int]] = {choice: [] for choice in range(len(lengths))}
    ended: list[int] = []
    for event in events:
        tokens = [event] if isinstance(event, Token) else []
        finishes = [event] if isinstance(event, Finish) else []
        ready, done = delivery.add(tokens, finishes)
        for token in ready:
            assert token.choice not in ended
            assert token.index == len(delivered[token.choice])
            delivered[token.choice].append(token.token_id)
        ended += [each.choice for each in done]
    assert sorted(ended) == list(range(len(lengths)))
    assert delivery.is_done and not delivery.has_gap
    assert [list(forced) for forced in delivery.forced()] == list(delivered.values())
    assert all(len(delivered[choice]) == length for choice, length in enumerate(lengths))


def test_a_finish_waits_for_the_last_token() -> None:
    delivery = Delivery(1)
    assert delivery.add([Token(0, 0, 5)], [finish(0, 2)]) == ([Token(0, 0, 5)], [])
    assert delivery.has_gap
    assert delivery.add([Token(0, 1, 6)], []) == ([Token(0, 1, 6)], [finish(0, 2)])


def test_a_new_attempt_forgets_what_never_left() -> None:
    delivery = Delivery(1)
    delivery.add([Token(0, 0, 5), Token(0, 2, 7)], [finish(0, 3)])
    delivery.begin_attempt()
    assert not delivery.has_gap
    assert [list(forced) for forced in delivery.forced()] == [[5]]
    ready, _ = delivery.add([Token(0, 1, 8)], [])
    assert ready == [Token(0, 1, 8)]
    assert delivery.num_left(10) == 8


def test_a_stopped_choice_takes_nothing_more() -> None:
    delivery = Delivery(2)
    delivery.stop(1)
    assert delivery.add([Token(1, 0, 5)], [finish(1, 1)]) == ([], [])
    assert delivery.stopped == {1} and delivery.unfinished == [0]
    delivery.add([], [finish(0, 0)])
    assert delivery.is_done


def test_tokens_of_choices_that_do_not_exist_are_ignored() -> None:
    assert Delivery(1).add([Token(3, 0, 5)], [finish(3, 1)]) == ([], [])
