"""Text that streams: how much of its end must wait, as it may be the start of something."""

from collections.abc import Iterable


def held_back(text: str, markers: Iterable[str]) -> int:
    """Length of the longest suffix of `text` that is the beginning, but not all, of a marker."""
    longest = 0
    for marker in markers:
        start = max(0, len(text) - len(marker) + 1)
        while (start := text.find(marker[0], start)) >= 0:
            if marker.startswith(text[start:]):
                longest = max(longest, len(text) - start)
                break
            start += 1
    return longest
