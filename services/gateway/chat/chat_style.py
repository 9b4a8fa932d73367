"""How models with a chat template write thoughts and calls: named ways, and which is whose."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from scission.common.config import ChatOptions
from scission.common.errors import ConfigError
from scission.services.gateway.chat.call_syntax import CallSyntax
from scission.services.gateway.chat.completion_parser import ThoughtTags
from scission.services.gateway.chat.function_xml import FUNCTION, FunctionXmlCalls
from scission.services.gateway.chat.hermes import START as HERMES_START
from scission.services.gateway.chat.hermes import HermesCalls
from scission.services.gateway.chat.mistral import START as MISTRAL_START
from scission.services.gateway.chat.mistral import MistralCalls
from scission.services.gateway.chat.template_files import ChatTemplates

# By the flags' names: those that users know from other servers.
THOUGHTS: Mapping[str, ThoughtTags | None] = {
    "none": None,
    "mistral": ThoughtTags("[THINK]", "[/THINK]", newlines=0),
    "qwen3": ThoughtTags("<think>", "</think>"),
    "step3p5": ThoughtTags("<think>", "</think>", newlines=1, is_ended_by_calls=True),
}
CALLS: Mapping[str, CallSyntax | None] = {
    "none": None,
    "hermes": HermesCalls(),
    "mistral": MistralCalls(),
    "qwen3_coder": FunctionXmlCalls(),
    "step3p5": FunctionXmlCalls(),
}
STEP = "Step3p5ForCausalLM"


@dataclass(frozen=True, slots=True)
class ChatStyle:
    thought: ThoughtTags | None = None
    calls: CallSyntax | None = None
    strips_contents: bool = False  # blanks around messages lead the model into loops


def choose_style(
    architecture: str,
    templates: ChatTemplates,
    added_tokens: Collection[str],
    options: ChatOptions,
) -> ChatStyle:
    """The style that the template shows, unless the options name another.

    Raises:
        ConfigError: a parser is named that belongs to a built-in chat format.
    """
    thought: str = options.reasoning_parser
    calls: str = options.tool_call_parser
    if thought == "auto":
        thought = _thought_shown(architecture, templates, added_tokens)
    if calls == "auto":
        calls = _calls_shown(templates)
    for flag, name, known in (
        ("reasoning_parser", thought, THOUGHTS),
        ("tool_call_parser", calls, CALLS),
    ):
        if name not in known:
            names = ", ".join(known)
            raise ConfigError(
                f"{flag} {name!r} is for a chat format that is built in; for a chat template: "
                f"auto, {names}"
            )
    return ChatStyle(THOUGHTS[thought], CALLS[calls], strips_contents=architecture == STEP)


def _thought_shown(
    architecture: str, templates: ChatTemplates, added_tokens: Collection[str]
) -> str:
    if templates.mention("</think>"):
        return "step3p5" if architecture == STEP else "qwen3"
    return "mistral" if "[/THINK]" in added_tokens else "none"


def _calls_shown(templates: ChatTemplates) -> str:
    # the XML form stands inside the tag of the Hermes form, so it is looked for first
    if templates.mention(FUNCTION):
        return "step3p5"
    if templates.mention(MISTRAL_START):
        return "mistral"
    return "hermes" if templates.mention(HERMES_START) else "none"
