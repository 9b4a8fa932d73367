"""Logprobs in the formats of the two endpoints, and prompt logprobs in vLLM's."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from scission.common.types import Token, TokenLogprobs
from scission.services.gateway.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no -inf


class TokenNames:
    """Names tokens for people: their text, or `token_id:N` where a client asked for that."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def bytes_of(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id))


class CompletionLogprobs:
    """The columns of /v1/completions: tokens, token_logprobs, top_logprobs, text_offset.

    `text_offset` counts the characters that are complete before the token, in the text of all
    tokens (special tokens that are left out of the shown text add nothing).
    """

    def __init__(
        self, names: TokenNames, tokenizer: Tokenizer, skip_ids: frozenset[int], top: int
    ) -> None:
        self._names = names
        self._tokenizer = tokenizer
        self._skip_ids = skip_ids
        self._top = top
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._start_columns()

    def _start_columns(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(
        self, token_id: int, logprobs: TokenLogprobs | None, *, is_prompt: bool = False
    ) -> None:
        """Append one token; an echoed prompt shows its special tokens, too."""
        self._tokens.append(self._names(token_id))
        self._offsets.append(self._offset)
        if is_prompt or token_id not in self._skip_ids:
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        if logprobs is None:
            self._logprobs.append(None)
            self._tops.append(None)
            return
        self._logprobs.append(max(logprobs.logprob, LEAST))
        tops: dict[str, float] = {}
        for top_id, value in _top_entries(token_id, logprobs, self._top):
            # two tokens may share a text: the likelier one keeps the name
            tops.setdefault(self._names(top_id), value)
        self._tops.append(tops)

    def add_all(self, tokens: Iterable[Token]) -> None:
        for token in tokens:
            self.add(token.token_id, token.logprobs)

    def take(self) -> dict[str, Any]:
        """The columns since the last call."""
        columns = {
            "text_offset": self._offsets,
            "token_logprobs": self._logprobs,
            "tokens": self._tokens,
            "top_logprobs": self._tops,
        }
        self._start_columns()
        return columns


def chat_logprobs(tokens: Iterable[Token], names: TokenNames, top: int) -> dict[str, Any]:
    """The `logprobs` object of a chat choice; `top` alternatives for each token."""
    content = []
    for token in tokens:
        logprobs = token.logprobs
        if logprobs is None:
            continue
        entries = zip(logprobs.top_ids[:top], logprobs.top_logprobs[:top], strict=True)
        content.append(
            {
                **_chat_entry(token.token_id, logprobs.logprob, names),
                "top_logprobs": [_chat_entry(i, value, names) for i, value in entries],
            }
        )
    return {"content": content, "refusal": None}


def prompt_logprobs_json(
    prompt: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    top: int,
    names: TokenNames,
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token null or {token id: {logprob, rank, ...}}."""
    result: list[dict[str, Any] | None] = []
    for token_id, logprobs in zip(prompt, entries, strict=True):
        if logprobs is None:
            result.append(None)
            continue
        own = {
            "logprob": max(logprobs.logprob, LEAST),
            "rank": logprobs.rank,
            "decoded_token": names(token_id),
        }
        row = {str(token_id): own}
        tops = zip(logprobs.top_ids[:top], logprobs.top_logprobs[:top], strict=True)
        for rank, (top_id, value) in enumerate(tops, start=1):
            entry = {"logprob": max(value, LEAST), "rank": rank, "decoded_token": names(top_id)}
            row.setdefault(str(top_id), entry)
        result.append(row)
    return result


def _top_entries(token_id: int, logprobs: TokenLogprobs, top: int) -> Iterable[tuple[int, float]]:
    """The `top` likeliest, and the token itself if it is not among them."""
    ids = logprobs.top_ids[:top]
    for i, value in zip(ids, logprobs.top_logprobs, strict=False):
        yield i, max(value, LEAST)
    if token_id not in ids:
        yield token_id, max(logprobs.logprob, LEAST)


def _chat_entry(token_id: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {
        "token": names(token_id),
        "logprob": max(logprob, LEAST),
        "bytes": names.bytes_of(token_id),
    }
