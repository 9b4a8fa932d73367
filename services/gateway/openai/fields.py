"""Fields outside the schemas: known and harmless, known and refused, or unknown."""

import logging
from collections.abc import Mapping
from typing import Any

from scission.common.errors import UnsupportedError

logger = logging.getLogger(__name__)

# Accepted without effect: they label a request or tune what is not ours to tune.
IGNORED = frozenset(
    {
        *(
            "user",
            "metadata",
            "store",
            "service_tier",
            "prompt_cache_key",
            "prompt_cache_retention",
        ),
        *("safety_identifier", "prediction", "verbosity", "spaces_between_special_tokens"),
        *("length_penalty", "early_stopping", "detokenize", "no_stop_trim", "echo_prompt"),
    }
)

_CONSTRAINED = "output cannot be constrained to a grammar or schema yet"

# Refused by name, because ignoring them would give an answer that was not asked for.
REFUSED: dict[str, str] = {
    "structured_outputs": _CONSTRAINED,
    "guided_json": _CONSTRAINED,
    "guided_regex": _CONSTRAINED,
    "guided_choice": _CONSTRAINED,
    "guided_grammar": _CONSTRAINED,
    "guided_decoding_backend": _CONSTRAINED,
    "guided_whitespace_pattern": _CONSTRAINED,
    "json_schema": _CONSTRAINED,
    "regex": _CONSTRAINED,
    "ebnf": _CONSTRAINED,
    "structural_tag": _CONSTRAINED,
    "suffix": "completions go forward only",
    "use_beam_search": "there is no beam search",
    "prompt_embeds": "prompts are text or token ids",
    "input_embeds": "prompts are text or token ids",
    "image_data": "this model reads text only",
    "lora_path": "there are no adapters",
    "logits_processors": "code is not taken from requests",
    "custom_logit_processor": "code is not taken from requests",
    "kv_transfer_params": "prefill and decode are paired by the gateway",
    "functions": "use tools instead",
    "function_call": "use tool_choice instead",
    "audio": "this model writes text only",
    "web_search_options": "there is no web search",
    "chat_template": "templates are not taken from requests",
}


def check_other_fields(others: Mapping[str, Any] | None) -> int:
    """Look through the fields that the schema does not have; the number of unknown ones.

    Raises:
        UnsupportedError: a known field asks for something that is not served.
    """
    if not others:
        return 0
    unknown = []
    for name, value in others.items():
        if name == "response_format":
            _check_response_format(value)
        elif name == "modalities":
            if value not in (None, ["text"]):
                raise UnsupportedError("modalities: only text is served", param=name)
        elif name in REFUSED:
            if value not in (None, False, "", [], {}):
                raise UnsupportedError(f"{name} is not supported: {REFUSED[name]}.", param=name)
        elif name not in IGNORED:
            unknown.append(name)
    if unknown:
        logger.debug("ignored unknown request fields: %s", ", ".join(map(repr, unknown[:20])))
    return len(unknown)


def _check_response_format(value: object) -> None:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind is None or kind == "text":
        return
    raise UnsupportedError(
        f"response_format {str(kind)[:40]!r} is not supported: {_CONSTRAINED}; only 'text' is.",
        param="response_format",
    )
