"""The chat format of a checkpoint that brings a Jinja template of its own."""

from collections.abc import Sequence
from typing import Any, Literal

from scission.common.errors import RequestError, UnsupportedError
from scission.services.gateway.chat.chat_style import ChatStyle
from scission.services.gateway.chat.completion_parser import Opening, TaggedCompletionParser
from scission.services.gateway.chat.format import (
    CompletionParser,
    Conversation,
    MarkerGuard,
    Message,
    RenderedChat,
    ToolCall,
    ToolResultPart,
)
from scission.services.gateway.chat.json_text import read_json
from scission.services.gateway.chat.template_files import ChatTemplates
from scission.services.gateway.chat.template_process import TemplateRenderer
from scission.services.gateway.tokenizer import Tokenizer

# what the template is called with besides chat_template_kwargs
ARGUMENTS = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt"),
        *("continue_final_message", "chat_template", "conversation", "tokenize"),
    }
)
TEXT_PARTS = ("text", "input_text", "output_text")
# other spellings of the switch are the template's own affair: chat_template_kwargs passes them
THINKING_SWITCHES = ("enable_thinking", "thinking")
# set behind the final message to be continued, to find where the template adds something to it
_END_MARK = "FINAL_MESSAGE_ENDS_HERE "  # the blank shows whether the template strips


class TemplateChatFormat:
    """Renders with the checkpoint's template; parses as the chosen style says.

    Every argument is a plain JSON value, and special tokens inside the conversation's texts are
    broken up, so that no message can speak as another.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: ChatTemplates,
        renderer: TemplateRenderer,
        style: ChatStyle,
    ) -> None:
        self._templates = templates
        self._renderer = renderer
        self._style = style
        ids = tokenizer.added_tokens
        eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.stop_token_ids: tuple[int, ...] = eos_ids
        markers: list[str] = []
        if style.thought is not None:
            markers += (style.thought.start, style.thought.end)
        if style.calls is not None:
            markers += style.calls.markers
        self.marker_token_ids = frozenset(ids[marker] for marker in markers if marker in ids)
        special = {text for text, i in ids.items() if i in tokenizer.special_ids}
        self._guard = MarkerGuard(special) if special else None

    async def render(self, conversation: Conversation) -> RenderedChat:
        """Render the prompt text.

        Raises:
            RequestError: the template refuses the conversation or cannot render it.
            UnsupportedError: the template has no place for what the request brings.
        """
        for value, name in (
            (conversation.tools, "tools"),
            (conversation.documents, "documents"),
        ):
            if value and not self._templates.mention(name):
                raise UnsupportedError(
                    f"{name} cannot be used: the model's chat template has no place for them",
                    param=name,
                )
        continued = _continued_field(conversation)
        last = len(conversation.messages) - 1
        arguments: dict[str, Any] = self._clean(
            {
                **_options(conversation),
                "messages": [
                    self._message(message, i, continued if i == last else None)
                    for i, message in enumerate(conversation.messages)
                ],
                "tools": [{"type": "function", "function": tool} for tool in conversation.tools]
                or None,
                "documents": conversation.documents or None,
                "add_generation_prompt": conversation.add_generation_prompt and continued is None,
            }
        )
        prompt = await self._renderer.render(
            self._templates.name_for(has_tools=bool(conversation.tools)), arguments
        )
        text = None
        if continued is not None:
            text = arguments["messages"][-1][continued].removesuffix(_END_MARK)
            prompt = _cut_at_mark(prompt, text)
        opens_in, may_reason = self._opening(prompt, continued, text or "")
        return RenderedChat(prompt, opens_in, may_reason, tuple(conversation.tools))

    def new_parser(self, rendered: RenderedChat, *, parse_tool_calls: bool) -> CompletionParser:
        opening: Opening = "undecided" if rendered.may_reason else "content"
        return TaggedCompletionParser(
            "thought" if rendered.opens_in == "reasoning" else opening,
            self._style.thought,
            self._style.calls if parse_tool_calls else None,
            {tool["name"]: tool for tool in rendered.tools},
        )

    def _opening(
        self, prompt: str, continued: str | None, text: str
    ) -> tuple[Literal["reasoning", "content"], bool]:
        """What the completion starts inside of, and whether it may go on to reason from content."""
        tags = self._style.thought
        if tags is None:
            return "content", False
        if continued is not None and continued != "content":
            return "reasoning", False
        end = (text or prompt).rstrip()
        if end.endswith(tags.start) or text.rfind(tags.start) > text.rfind(tags.end):
            return "reasoning", False
        return "content", not text and not end.endswith(tags.end)

    def _message(self, message: Message, i: int, continued: str | None) -> dict[str, Any]:
        """A message as templates read it: content a text, arguments an object."""
        role = message["role"]
        if role == "developer" and not self._templates.mention(role):
            role = "system"
        if role == "latest_reminder" and not self._templates.mention(role):
            raise RequestError(
                f"messages.{i}.role: {role} is unknown to this model", param=f"messages.{i}.role"
            )
        content = _text_of(message.get("content", ""), i)
        if self._style.strips_contents:
            content = content.lstrip() if continued else content.strip()
        read: dict[str, Any] = {"role": role, "content": content}
        if reasoning := message.get("reasoning"):
            # templates know it by either name
            read["reasoning_content"] = read["thinking"] = reasoning
        if continued == "content":
            read["content"] += _END_MARK
        elif continued is not None:
            read["reasoning_content"] = read["thinking"] = f"{reasoning}{_END_MARK}"
        if calls := message.get("tool_calls"):
            read["tool_calls"] = [_call(call, i, j) for j, call in enumerate(calls)]
        if role == "tool":
            read["tool_call_id"] = message.get("tool_call_id", "")
        if name := message.get("name"):
            read["name"] = name
        return read

    def _clean(self, value: Any) -> Any:
        """The value with special tokens broken up in all its texts, keys included."""
        if self._guard is None:
            return value
        if isinstance(value, str):
            return self._guard.neutralise(value)
        if isinstance(value, dict):
            return {self._clean(key): self._clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._clean(item) for item in value]
        return value


class NoTemplateFormat:
    """Of a checkpoint without a chat template: completions are served, chats are refused."""

    stop_token_ids: tuple[int, ...] = ()
    marker_token_ids: frozenset[int] = frozenset()

    async def render(self, conversation: Conversation) -> RenderedChat:
        """Raises UnsupportedError."""
        raise UnsupportedError(
            "the model has no chat template; use /v1/completions, or start the gateway with "
            "--chat-template",
            param="messages",
        )

    def new_parser(self, rendered: RenderedChat, *, parse_tool_calls: bool) -> CompletionParser:
        return TaggedCompletionParser("content", None, None, {})


def _options(conversation: Conversation) -> dict[str, Any]:
    """The template's own switches: those of the request, by the names it gave them."""
    options = dict(conversation.template_options)
    if taken := ARGUMENTS.intersection(options):
        raise RequestError(
            f"chat_template_kwargs must not have {', '.join(sorted(taken))}",
            param="chat_template_kwargs",
        )
    thinking = conversation.thinking
    if thinking is None and conversation.effort == "none":
        thinking = False
    if thinking is not None:
        for name in THINKING_SWITCHES:
            options.setdefault(name, thinking)
    if conversation.effort is not None:
        options.setdefault("reasoning_effort", conversation.effort)
    return options


def _continued_field(conversation: Conversation) -> str | None:
    """The field of the last message that the completion goes on with, None without one."""
    if not conversation.continue_final_message:
        return None
    last = conversation.messages[-1]
    if last["role"] != "assistant":
        raise RequestError(
            "continue_final_message needs a last message of role assistant", param="messages"
        )
    return "reasoning_content" if last.get("reasoning") and not last.get("content") else "content"


def _cut_at_mark(prompt: str, text: str) -> str:
    """The prompt up to the end of its final message, which is `text`."""
    mark = _END_MARK.strip()
    at = prompt.rfind(mark)
    if at < 0 or text.strip() not in prompt:
        raise RequestError(
            "continue_final_message: the chat template leaves the final message out",
            param="continue_final_message",
        )
    is_stripped = not prompt.startswith(_END_MARK, at)
    return prompt[:at].rstrip() if is_stripped else prompt[:at]


def _text_of(content: str | Sequence[ToolResultPart], i: int) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part["type"] not in TEXT_PARTS:
            raise UnsupportedError(
                f"messages.{i}.content: only text parts are served, got {part['type'][:40]!r}",
                param=f"messages.{i}.content",
            )
    return "\n".join(part["text"] for part in content)


def _call(call: ToolCall, i: int, j: int) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = read_json(function["arguments"] or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        field = f"messages.{i}.tool_calls.{j}.function.arguments"
        raise RequestError(f"{field} must be a JSON object", param=field)
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
