"""scission-nano's tokenizer: bytes, whole common words after a space, and the chat's markers.

A digit is always a token of its own, and so is a letter of a word in quotes: what is counted,
reversed or added is seen one by one. A word after a space is one token where it is common: merges
lead from the space to the word letter by letter, so that every prefix is a token, too.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, THINK_END, DSML = "<think>", "</think>", "｜DSML｜"
ORDINARY = (THINK, THINK_END, DSML)
SPECIAL = (
    USER, ASSISTANT, "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>",
    "<｜domain｜>", "<｜title｜>", "<｜read_url｜>",
)  # fmt: skip


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Made from the words that are common in `texts`; deterministic."""
    counts = Counter(word for text in texts for word in re.findall(r"(?<= )[A-Za-z]+", text))
    alphabet = byte_alphabet()
    pieces = dict.fromkeys([BOS, EOS, PAD, *alphabet])
    merges: dict[tuple[str, str], None] = {}
    room = vocab_size - len(SPECIAL) - len(ORDINARY)
    for word, _ in sorted(
        counts.items(), key=lambda item: (-item[1] * (len(item[0]) - 1), item[0])
    ):
        steps = [(("Ġ" + word)[:i], word[i - 1]) for i in range(1, len(word) + 1)]
        new = dict.fromkeys(left + right for left, right in steps if left + right not in pieces)
        if len(pieces) + len(new) <= room:
            pieces |= new
            merges |= dict.fromkeys(steps)
    vocabulary = {piece: i for i, piece in enumerate((*pieces, *SPECIAL, *ORDINARY))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, *SPECIAL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ORDINARY])
    return tokenizer


def to_json(tokenizer: Tokenizer) -> str:
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False) + "\n"


def byte_alphabet() -> list[str]:
    """The visible character that stands for each byte: byte-level BPE's usual choice."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
