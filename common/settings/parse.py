"""Text of a flag, a variable or a file into a value of the config's types."""

import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal


def parser_of(annotation: Any) -> Callable[[str], Any]:
    """Text -> value of a type of the config; it raises ValueError that says what is expected."""
    if typing.get_origin(annotation) is Literal:
        return lambda text: _parse_choice(text, typing.get_args(annotation))
    parsers: dict[Any, Callable[[str], Any]] = {
        int: _parse_int,
        float: _parse_float,
        bool: _parse_bool,
        str: str,
        Path: lambda text: Path(text).expanduser(),
    }
    return parsers[annotation]


def _parse_choice(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ValueError(f"expected {', '.join(choices[:-1])} or {choices[-1]}")
    return text


_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _parse_int(text: str) -> int:
    """Digits with an optional suffix: k m g are powers of 1000; K M G, Ki.. and KiB.. of 1024."""
    match = re.fullmatch(r"(-?\d[\d_]*)(?:([kmgKMG])|([KMG])i?B?)?", text)
    if not match:
        raise ValueError("expected a whole number, such as 8192, 8k or 2GiB")
    return int(match[1]) * _SUFFIXES[match[2] or match[3] or ""]


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a number") from None


def _parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected true or false")
