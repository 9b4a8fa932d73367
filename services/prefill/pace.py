"""How fast prompts are computed of late, and so how long what waits will take."""

PAST = 0.9  # weight of the past against the newest step


class Pace:
    def __init__(self) -> None:
        self._tokens_per_s = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """A step has computed so many tokens in so long."""
        rate = num_tokens / max(seconds, 1e-6)
        past = self._tokens_per_s or rate
        self._tokens_per_s = PAST * past + (1 - PAST) * rate

    def seconds_for(self, num_tokens: int) -> float:
        """0 before the first step."""
        return num_tokens / self._tokens_per_s if self._tokens_per_s else 0.0
