"""Tokenizers in the shapes that the served models publish: regular expressions before the bytes,
normalisation, special tokens first or last, added tokens that are flagged special and not.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scission.services.gateway.tokenizer import Detokenizer, Tokenizer
from tests.unit.services.gateway.chat.template_fixtures import SHAPES, raw_tokenizer

PAIRS = {name: (raw_tokenizer(shape), shape) for name, shape in SHAPES.items()}
TOKENIZERS = {name: Tokenizer(raw.to_str()) for name, (raw, _) in PAIRS.items()}
WORDS = [
    "hello",
    " world",
    "12345",
    "e\u0301",
    "Köln",
    "日本",
    "😀",
    "\n\n",
    "'s",
    "<think>",
    "[INST]",
]


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_text_is_encoded_as_the_library_encodes_it(name: str, data: st.DataObject) -> None:
    raw, shape = PAIRS[name]
    words = [*WORDS, *shape.special, *shape.plain]
    characters = st.characters(exclude_categories=["Cs"])
    text = "".join(data.draw(st.lists(st.sampled_from(words) | characters, max_size=12)))
    ids = TOKENIZERS[name].encode(text, add_special_tokens=False)
    assert ids == raw.encode(text, add_special_tokens=False).ids
    decoded = TOKENIZERS[name].decode(ids, skip_special_tokens=False)
    assert decoded == (raw.normalizer.normalize_str(text) if raw.normalizer else text)


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans())
def test_token_by_token_equals_decoding_all_at_once(
    name: str, data: st.DataObject, skip: bool
) -> None:
    raw, tokenizer = PAIRS[name][0], TOKENIZERS[name]
    beyond = tokenizer.num_tokens + 2  # ids of a padded vocabulary
    ids = data.draw(st.lists(st.integers(0, beyond), max_size=30))
    skip_ids = tokenizer.special_ids if skip else frozenset()
    detokenizer = Detokenizer(tokenizer, skip_ids=skip_ids)
    whole = raw.decode(ids, skip_special_tokens=skip)
    seen = ""
    for token_id in ids:
        seen += detokenizer.push(token_id)
        assert whole.startswith(seen)
    assert seen + detokenizer.flush() == whole


@pytest.mark.parametrize("name", SHAPES)
def test_only_flagged_tokens_are_skipped(name: str) -> None:
    tokenizer, shape = TOKENIZERS[name], SHAPES[name]
    for text in (*shape.special, *shape.plain):
        (token_id,) = tokenizer.encode(text, add_special_tokens=False)
        assert token_id == tokenizer.id_of(text)
        shown = tokenizer.decode([token_id], skip_special_tokens=True)
        assert shown == ("" if text in shape.special else text)
