"""What the gateway knows of the model it serves: names, limits and the tokens that end a text."""

import time
from dataclasses import dataclass, field

from scission.common.errors import ModelNotFoundError


@dataclass(frozen=True, slots=True)
class ServedModel:
    names: tuple[str, ...]  # what requests may call it; the first is the one that answers carry
    root: str  # shown by /v1/models; a name, not a path of this machine
    max_model_len: int  # tokens, prompt and completion together
    vocab_size: int
    eos_token_ids: frozenset[int]
    created: int = field(default_factory=lambda: int(time.time()))  # unix seconds

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, name: str | None) -> None:
        """Raises ModelNotFoundError unless it is one of the names, or not given at all."""
        if name is not None and name not in self.names:
            known = ", ".join(repr(known) for known in self.names)
            raise ModelNotFoundError(
                f"The model {name[:200]!r} does not exist; served here: {known}.", param="model"
            )
