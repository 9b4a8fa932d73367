"""What of a request's tokens has reached the client: each index of each choice once and in order.

Tokens come from two workers on two streams, and again after a new attempt; whatever order that
makes, what leaves here has consecutive indices per choice, and a choice's finish after its last.
"""

from collections.abc import Iterable, Sequence

from scission.common.types import Finish, Token


class _Choice:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.held: dict[int, Token] = {}  # index -> arrived before one with a lower index
        self.finish: Finish | None = None  # arrived, not delivered
        self.is_done = False


class Delivery:
    """All choices of one request."""

    def __init__(self, num_choices: int) -> None:
        self._choices = [_Choice() for _ in range(num_choices)]
        self._stopped: set[int] = set()
        self.num_duplicates = 0
        self.num_tokens = 0

    @property
    def is_done(self) -> bool:
        """Every choice is finished or stopped."""
        return all(choice.is_done for choice in self._choices)

    @property
    def has_gap(self) -> bool:
        """Something has arrived that waits for a token before it."""
        return any(
            choice.held or choice.finish is not None
            for choice in self._choices
            if not choice.is_done
        )

    @property
    def stopped(self) -> frozenset[int]:
        """Choices that the caller stopped: workers do not know of them by themselves."""
        return frozenset(self._stopped)

    @property
    def unfinished(self) -> list[int]:
        return [number for number, choice in enumerate(self._choices) if not choice.is_done]

    def forced(self) -> list[Sequence[int]]:
        """Per choice the delivered token ids: what a new attempt is fed."""
        return [choice.token_ids for choice in self._choices]

    def num_left(self, max_tokens: int) -> int:
        """The most tokens that any unfinished choice may still get."""
        return max(
            (max_tokens - len(c.token_ids) for c in self._choices if not c.is_done), default=0
        )

    def begin_attempt(self) -> None:
        """Forget what arrived out of order: the new attempt brings it again."""
        for choice in self._choices:
            choice.held.clear()
            choice.finish = None

    def stop(self, number: int) -> None:
        """Take nothing more for a choice."""
        if 0 <= number < len(self._choices) and not self._choices[number].is_done:
            self._choices[number].is_done = True
            self._stopped.add(number)

    def add(
        self, tokens: Iterable[Token], finishes: Iterable[Finish]
    ) -> tuple[list[Token], list[Finish]]:
        """Take what one step brought; returns what may leave now."""
        ready: list[Token] = []
        touched: set[int] = set()
        for token in tokens:
            if token.choice >= len(self._choices):
                continue
            choice = self._choices[token.choice]
            if choice.is_done:
                continue
            position = len(choice.token_ids)
            if token.index < position or token.index in choice.held:
                self.num_duplicates += 1
            elif token.index > position:
                choice.held[token.index] = token
            else:
                choice.token_ids.append(token.token_id)
                ready.append(token)
                if choice.held:
                    ready.extend(_take_held(choice))
                touched.add(token.choice)
        for finish in finishes:
            if finish.choice < len(self._choices) and not self._choices[finish.choice].is_done:
                self._choices[finish.choice].finish = finish
                touched.add(finish.choice)
        self.num_tokens += len(ready)
        return ready, [done for number in sorted(touched) for done in self._take_finish(number)]

    def _take_finish(self, number: int) -> Iterable[Finish]:
        choice = self._choices[number]
        if choice.finish is None or choice.finish.num_tokens > len(choice.token_ids):
            return ()
        choice.is_done = True
        choice.held.clear()
        return (choice.finish,)


def _take_held(choice: _Choice) -> Iterable[Token]:
    while (token := choice.held.pop(len(choice.token_ids), None)) is not None:
        choice.token_ids.append(token.token_id)
        yield token
