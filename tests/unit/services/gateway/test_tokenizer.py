import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from scission.common.errors import CapacityError, CheckpointError
from scission.services.gateway.chat.deepseek_v4 import EOS, USER
from scission.services.gateway.tokenizer import Detokenizer, TextEncoder, Tokenizer
from tests.unit.services.gateway.text_fixtures import make_tokenizer, tokenizer_json

TOKENIZER = make_tokenizer()
LIBRARY = RawTokenizer.from_str(tokenizer_json())
token_ids = st.lists(st.integers(0, TOKENIZER.num_tokens - 1), max_size=40)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200))
def test_decoding_the_encoding_gives_the_text_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()


@given(token_ids, st.booleans())
def test_token_by_token_equals_the_library_decoding_all_at_once(ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(TOKENIZER, skip_ids=TOKENIZER.special_ids if skip else frozenset())
    streamed = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert streamed == LIBRARY.decode(ids, skip_special_tokens=skip)


@given(token_ids)
def test_a_stream_never_shows_half_a_character_that_completes_later(ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER, skip_ids=frozenset())
    whole = LIBRARY.decode(ids, skip_special_tokens=False)
    seen = ""
    for token_id in ids:
        seen += detokenizer.push(token_id)
        assert whole.startswith(seen)


def test_tokens_are_looked_up_by_their_text() -> None:
    assert TOKENIZER.eos_id == TOKENIZER.id_of(EOS)
    assert TOKENIZER.encode(f"a{USER}b", add_special_tokens=False)[1] == TOKENIZER.id_of(USER)
    with pytest.raises(CheckpointError, match="no token"):
        TOKENIZER.id_of("<no such token>")


def test_ids_past_the_vocabulary_stand_for_nothing() -> None:
    beyond = TOKENIZER.num_tokens + 5
    assert TOKENIZER.decode([beyond], skip_special_tokens=False) == ""
    assert TOKENIZER.token_text(beyond) == ""


def test_a_token_that_is_no_whole_character_is_named_by_its_bytes() -> None:
    first_of_two = TOKENIZER.encode("é", add_special_tokens=False)[0]
    assert TOKENIZER.token_text(first_of_two) == r"bytes:\xc3"
    assert TOKENIZER.token_bytes(first_of_two) == b"\xc3"


def test_a_tokenizer_that_is_not_byte_level_is_refused() -> None:
    raw = RawTokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    raw.decoder = decoders.Metaspace()
    with pytest.raises(CheckpointError, match="byte-level"):
        Tokenizer(raw.to_str())
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer("{")


async def test_long_texts_are_encoded_off_the_event_loop_and_bounded() -> None:
    encoder = TextEncoder(TOKENIZER, threads=1, max_waiting=2)
    text = "hello world " * 1000
    expected = TOKENIZER.encode(text, add_special_tokens=False)
    results = await asyncio.gather(
        *(encoder.encode(text, add_special_tokens=False) for _ in range(3)), return_exceptions=True
    )
    assert results[:2] == [expected, expected]
    assert isinstance(results[2], CapacityError)
    assert await encoder.encode("hello", add_special_tokens=False) == TOKENIZER.encode(
        "hello", add_special_tokens=False
    )
