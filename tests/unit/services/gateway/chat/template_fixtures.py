"""Tokenizers and chat templates in the shapes of three published models, for tests."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from scission.common.config import ChatOptions
from scission.services.gateway.chat.chat_style import choose_style
from scission.services.gateway.chat.template_files import read_chat_templates
from scission.services.gateway.chat.template_format import TemplateChatFormat
from scission.services.gateway.chat.template_process import TemplateRenderer
from scission.services.gateway.tokenizer import Tokenizer, byte_of_char

TEMPLATES = Path(__file__).parent / "templates"
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ċ", "Ċ"), ("1", "2")]

# the published pre-tokenizers' patterns
_QWEN3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_STEP_SPLITS = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", r"[A-Za-z]+|[^\s]|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class ModelShape:
    """What of a checkpoint's folder its chat side depends on."""

    architecture: str
    template: str  # file in TEMPLATES
    special: tuple[str, ...]
    plain: tuple[str, ...]  # added, not flagged special
    config: dict[str, Any]  # tokenizer_config.json
    splits: tuple[str, ...]
    is_normalised: bool = False
    ignores_merges: bool = False
    are_special_first: bool = False


QWEN3 = ModelShape(
    architecture="Qwen3ForCausalLM",
    template="qwen3.jinja",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    plain=(
        *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        *("<think>", "</think>"),
    ),
    config={"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    splits=(_QWEN3_SPLIT,),
    is_normalised=True,
)
MINISTRAL_3 = ModelShape(
    architecture="Mistral3ForConditionalGeneration",
    template="ministral_3.jinja",
    special=(
        *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>", "[SYSTEM_PROMPT]"),
        *("[/SYSTEM_PROMPT]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
    ),
    plain=(),
    config={
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "unk_token": "<unk>",
    },
    splits=(_TEKKEN_SPLIT,),
    ignores_merges=True,
    are_special_first=True,
)
STEP_3_5 = ModelShape(
    architecture="Step3p5ForCausalLM",
    template="step_3_5.jinja",
    special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|im_start|>", "<|im_end|>"),
    plain=(
        *("<think>", "</think>", "<tool_call>", "</tool_call>"),
        *("<tool_response>", "</tool_response>"),
    ),
    config={"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<|im_end|>"},
    splits=_STEP_SPLITS,
)
SHAPES = {"qwen3": QWEN3, "ministral 3": MINISTRAL_3, "step 3.5": STEP_3_5}


def raw_tokenizer(shape: ModelShape) -> RawTokenizer:
    first = len(shape.special) if shape.are_special_first else 0
    vocabulary = {text: i for i, text in enumerate(shape.special[:first])}
    vocabulary |= {char: first + i for i, char in enumerate(byte_of_char())}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    raw = RawTokenizer(
        models.BPE(vocab=vocabulary, merges=MERGES, ignore_merges=shape.ignores_merges)
    )
    if shape.is_normalised:
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in shape.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, normalized=False) for text in shape.special])
    raw.add_tokens([AddedToken(text, normalized=False) for text in shape.plain])
    return raw


def write_folder(shape: ModelShape, folder: Path) -> Path:
    """The files of a checkpoint that its chat side reads."""
    raw_tokenizer(shape).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(shape.config), encoding="utf-8")
    text = (TEMPLATES / shape.template).read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    sizes = {"vocab_size": 1000, "max_position_embeddings": 2000}
    if shape is MINISTRAL_3:
        sizes = {"text_config": sizes}
    config = {"architectures": [shape.architecture], "eos_token_id": 2, **sizes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@lru_cache
def renderer_of(file: str, *variables: tuple[str, str]) -> TemplateRenderer:
    """One renderer a template, as its processes take a moment to start."""
    text = (TEMPLATES / file).read_text(encoding="utf-8")
    return TemplateRenderer({"default": text}, dict(variables), processes=1)


def make_template_format(folder: Path, shape: ModelShape) -> TemplateChatFormat:
    """The format of a folder that `write_folder` wrote."""
    tokenizer = Tokenizer.from_folder(folder)
    templates = read_chat_templates(folder)
    assert templates is not None
    style = choose_style(shape.architecture, templates, tokenizer.added_tokens, ChatOptions())
    renderer = renderer_of(shape.template, *templates.variables.items())
    return TemplateChatFormat(tokenizer, templates, renderer, style)
