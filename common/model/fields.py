"""Typed look-ups in a config.json that name the field and the architecture when one is wrong."""

from collections.abc import Mapping
from typing import Any

from scission.common.errors import CheckpointError


class ConfigFields:
    """The fields of config.json, or of one section of it; nothing is guessed.

    Every method raises CheckpointError naming a field that is missing or of another type.
    """

    def __init__(self, raw: Mapping[str, Any], architecture: str, prefix: str = "") -> None:
        """
        Args:
            raw: the fields.
            architecture: what needs them.
            prefix: of names in messages, such as `text_config.`.
        """
        self._raw = raw
        self._architecture = architecture
        self._prefix = prefix

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._raw.get(name) is not None

    def value(self, name: str, *types: type) -> Any:
        if name not in self._raw:
            raise CheckpointError(
                f"config.json lacks {self._prefix}{name}, which {self._architecture} needs"
            )
        found = self._raw[name]
        # True is an int to Python, not to a config
        if not isinstance(found, types) or (isinstance(found, bool) and bool not in types):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise self.error(f"{self._prefix}{name} must be {wanted}, got {found!r}")
        return found

    def integer(self, name: str) -> int:
        return int(self.value(name, int))

    def number(self, name: str) -> float:
        return float(self.value(name, int, float))

    def flag(self, name: str) -> bool:
        return bool(self.value(name, bool))

    def integers(self, name: str) -> tuple[int, ...]:
        """One or a list of them."""
        found = self.value(name, int, list)
        found = found if isinstance(found, list) else [found]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in found):
            raise self.error(f"{self._prefix}{name} must hold integers, got {found!r}")
        return tuple(found)

    def section(self, name: str) -> "ConfigFields":
        return ConfigFields(self.value(name, dict), self._architecture, f"{self._prefix}{name}.")

    def expect(self, name: str, wanted: object) -> None:
        """Raise unless the field is there and equal: what the model is served with only."""
        found = self.value(name, type(wanted))
        if found != wanted:
            raise self.error(
                f"{self._prefix}{name} is {found!r}; this model is served with {wanted!r} only"
            )

    def error(self, message: str) -> CheckpointError:
        """An error that names the file and the architecture."""
        return CheckpointError(f"config.json ({self._architecture}): {message}")
