"""A byte-level tokenizer and a V4 chat format for tests, small enough to build in a millisecond."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from scission.services.gateway.chat.checkpoint_texts import CheckpointTexts
from scission.services.gateway.chat.deepseek_v4 import EOS, MARKERS, DeepSeekV4Format
from scission.services.gateway.tokenizer import Tokenizer, byte_of_char

PLAIN_MARKERS = ("<think>", "</think>", "｜DSML｜")  # not special in the published tokenizers

TEXTS = CheckpointTexts(
    tools_template=(
        "Tools: <{dsml_token}tool_calls> {thinking_start_token}{thinking_end_token} "
        "{not_ours}\n{tool_schemas}\n"
    ),
    response_format_template="Format: {schema}",
    effort_prefixes={"max": "Think hard.\n\n"},
    is_file_present=True,
)

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ċ", "Ċ")]


def tokenizer_json() -> str:
    """Ids 0..255 are single characters of the byte alphabet, then six merges, then V4's markers."""
    vocabulary = {char: i for i, char in enumerate(byte_of_char())}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens(
        [
            AddedToken(marker, special=marker not in PLAIN_MARKERS, normalized=False)
            for marker in MARKERS
        ]
    )
    return raw.to_str()


def make_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json(), eos_token=EOS)


def make_format(texts: CheckpointTexts = TEXTS) -> DeepSeekV4Format:
    return DeepSeekV4Format(make_tokenizer(), texts)
