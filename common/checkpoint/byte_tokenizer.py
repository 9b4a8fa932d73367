"""A byte-level BPE tokenizer made on the spot: 256 bytes, a few merges, DeepSeek-V4's special
tokens.

Every text has an encoding, and the markers of the chat encoding are single tokens, so that a random
model can be served like a trained one. Ids 0, 1 and 2 are those of the published tokenizer.
"""

import json
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
# added tokens that decoding keeps even when special tokens are skipped
_ORDINARY = (THINK_OPEN, THINK_CLOSE, "｜DSML｜")
_MARKERS = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
# pairs of pieces that become one token; Ġ is a space and Ċ a line break in the byte alphabet
_MERGES = (
    "Ċ Ċ|Ġ Ġ|Ġ t|h e|Ġt he|i n|e r|o n|a n|r e|Ġ a|Ġ s|Ġ w|o u|a t|e n|i s|i t|o r|e s|in g|"
    "Ġ o|Ġ b|Ġ c|Ġ i|Ġ f|Ġ m|Ġ p|a l|a r|Ġo f|an d|Ġt o|Ġi n|l l|Ġ d|e d"
)


def build_tokenizer() -> Tokenizer:
    """Deterministic; needs no network. Ids: BOS, EOS, pad, the bytes in order, merges, markers."""
    alphabet = byte_alphabet()
    merges = [(left, right) for left, right in (pair.split(" ") for pair in _MERGES.split("|"))]
    pieces = [BOS, EOS, PAD, *alphabet, *(left + right for left, right in merges)]
    pieces += [*_MARKERS, *_ORDINARY]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces), "a piece is listed twice"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, *_MARKERS]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in _ORDINARY])
    return tokenizer


def tokenizer_config(max_length: int) -> dict[str, object]:
    """The fields of tokenizer_config.json, as the published checkpoints have them."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }


def readable_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of printable ASCII, line breaks and merges, and of what ends a text or its reasoning."""
    vocabulary = tokenizer.get_vocab()
    alphabet = byte_alphabet()
    pieces = [alphabet[byte] for byte in (ord("\n"), *range(0x20, 0x7F))]
    pieces += [pair.replace(" ", "") for pair in _MERGES.split("|")]
    return [vocabulary[piece] for piece in (*pieces, EOS, THINK_CLOSE)]


def byte_alphabet() -> list[str]:
    """The visible character that stands for each byte, by byte: byte-level BPE's usual choice."""
    return list(_byte_characters())


def _byte_characters() -> Iterator[str]:
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    num_hidden = 0
    for byte in range(256):
        if byte in visible:
            yield chr(byte)
        else:
            yield chr(256 + num_hidden)
            num_hidden += 1


def tokenizer_json() -> str:
    """The content of tokenizer.json."""
    described = json.loads(build_tokenizer().to_str())
    return json.dumps(described, ensure_ascii=False, indent=1) + "\n"
