"""Text to token ids and back, from a checkpoint's `tokenizer.json` alone.

All served models have byte-level tokenizers, so a token is a fixed string of bytes and text is the
UTF-8 reading of the tokens' bytes in a row: that is how the detokenizer works, one table look-up
per token. No `transformers` here (it would pull torch into the gateway); special tokens are looked
up by their text, never by number.
"""

import asyncio
import codecs
import json
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import tokenizers

from scission.common.errors import CapacityError, CheckpointError, ContextLengthError

# Encoding costs about 0.1 us a character on the event loop; above this it goes to a thread, which
# releases the GIL.
INLINE_ENCODE_CHARS = 4096
SHRINKING = 4


@lru_cache(maxsize=1)
def byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, the others for characters from
    U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table


class Tokenizer:
    """A byte-level tokenizer; ids without an entry (padded vocabularies) stand for no bytes."""

    def __init__(
        self, definition: str, *, eos_token: str | None = None, bos_token: str | None = None
    ) -> None:
        """`definition` is the text of a tokenizer.json.

        Raises:
            CheckpointError: it cannot be read, is not byte-level, or lacks one of the named tokens.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        if not _is_byte_level(json.loads(definition).get("decoder")):
            raise CheckpointError(
                "tokenizer.json: only byte-level tokenizers (decoder ByteLevel) are served"
            )
        # truncation or padding stored in the file would silently change prompts
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_tokens: dict[str, int] = {token.content: i for i, token in added.items()}
        self.special_ids: frozenset[int] = frozenset(
            i for i, token in added.items() if token.special
        )
        self._token_bytes = self._make_token_bytes()
        self.longest_token_bytes = max(map(len, self._token_bytes), default=0)
        self.eos_id = None if eos_token is None else self.id_of(eos_token)
        self.bos_id = None if bos_token is None else self.id_of(bos_token)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read DIR/tokenizer.json, and the names of BOS and EOS from DIR/tokenizer_config.json
        where it exists.

        Raises:
            CheckpointError: a file is missing or cannot be read.
        """
        try:
            definition = (folder / "tokenizer.json").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"no readable tokenizer.json in the model folder: {error}"
            ) from error
        config: dict[str, object] = {}
        config_file = folder / "tokenizer_config.json"
        if config_file.exists():
            try:
                config = json.loads(config_file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"tokenizer_config.json cannot be read: {error}") from error
        return cls(
            definition,
            eos_token=_token_text(config.get("eos_token")),
            bos_token=_token_text(config.get("bos_token")),
        )

    def id_of(self, text: str) -> int:
        """The id of the token whose text this is.

        Raises:
            CheckpointError: there is no such token.
        """
        token_id = self._tokenizer.token_to_id(text)
        if token_id is None:
            raise CheckpointError(f"tokenizer.json has no token {text!r}")
        return int(token_id)

    @property
    def num_tokens(self) -> int:
        """One more than the highest id that has a text."""
        return len(self._token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the whole text; lone surrogates must have been refused before."""
        # the batch form skips the offsets and releases the GIL, the single one does neither
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[
            0
        ]
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        detokenizer = Detokenizer(
            self, skip_ids=self.special_ids if skip_special_tokens else frozenset()
        )
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds to the text (special tokens: their own text)."""
        if 0 <= token_id < len(self._token_bytes):
            return self._token_bytes[token_id]
        return b""

    def token_text(self, token_id: int) -> str:
        r"""A name for the token alone: its text, or `bytes:\xe2\x80` where that is no UTF-8."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _make_token_bytes(self) -> list[bytes]:
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        alphabet = byte_of_char()
        for text, token_id in vocabulary.items():
            if text in self.added_tokens:
                table[token_id] = text.encode()
            else:
                try:
                    table[token_id] = bytes(map(alphabet.__getitem__, text))
                except (
                    KeyError
                ):  # not in the alphabet: the library, too, takes such a token's text as it is
                    table[token_id] = text.encode()
        return table


class Detokenizer:
    """One choice's text, token by token: never half a character, whole text equal to decoding all
    at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_ids: Collection[int]) -> None:
        self._table = tokenizer._token_bytes
        self._skip_ids = skip_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is certain after this token; "" while a character is incomplete."""
        if token_id in self._skip_ids or token_id >= len(self._table):
            return ""
        return self._decoder.decode(self._table[token_id])

    def flush(self) -> str:
        """The end of the text: an incomplete character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class TextEncoder:
    """Encodes prompts without holding up the event loop: short texts at once, long ones in a
    bounded thread pool.
    """

    def __init__(self, tokenizer: Tokenizer, *, threads: int = 2, max_waiting: int = 64) -> None:
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._max_waiting = max_waiting
        self._num_waiting = 0

    async def encode(
        self, text: str, *, add_special_tokens: bool, max_tokens: int | None = None
    ) -> list[int]:
        """The token ids of the whole text.

        Raises:
            ContextLengthError: without tokenising it, the text is sure to be far over `max_tokens`.
            CapacityError: too many long texts wait already.
        """
        if max_tokens is not None:
            # normalisation may shorten a text, though never by as much
            fewest = len(text) // (SHRINKING * self._tokenizer.longest_token_bytes)
            if fewest > max_tokens:
                raise ContextLengthError(
                    f"This model's maximum context length is {max_tokens} tokens. However, your "
                    f"prompt has {len(text)} characters, which are at least {fewest} tokens.",
                    param="prompt",
                )
        if len(text) <= INLINE_ENCODE_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if self._num_waiting >= self._max_waiting:
            raise CapacityError("too many long prompts wait to be tokenised", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._pool,
                lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens),
            )
        finally:
            self._num_waiting -= 1


def _is_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    parts: Iterable[object] = decoder.get("decoders", [decoder])
    return any(isinstance(part, dict) and part.get("type") == "ByteLevel" for part in parts)


def _token_text(entry: object) -> str | None:
    """tokenizer_config.json names a token by its text or by an object with `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None
