"""The part of a chat request that makes the prompt: checked, and brought into the chat formats'
terms.
"""

import re
from collections.abc import Sequence
from typing import Any

from scission.common.errors import RequestError, UnsupportedError
from scission.services.gateway.chat.format import Conversation, Message, ToolCall, ToolResultPart
from scission.services.gateway.openai.schemas import (
    ChatMessage,
    ContentPart,
    ConversationBody,
    NamedToolChoice,
    Tool,
)

_TOOL_NAME = re.compile(r'[^\s"<>]{1,256}')


def read_conversation(body: ConversationBody) -> Conversation:
    """The conversation as a chat format renders it.

    Raises:
        RequestError: names the message or field at fault.
    """
    tools = _read_tools(body)
    options = body.chat_template_kwargs
    thinking = None
    if options is not None:
        thinking = options.thinking if options.thinking is not None else options.enable_thinking
    if thinking is None and body.thinking is not None:
        thinking = body.thinking.type == "enabled"
    effort = body.reasoning_effort or (options.reasoning_effort if options is not None else None)
    is_continued = bool(body.continue_final_message or body.messages[-1].prefix)
    if is_continued and body.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    return Conversation(
        messages=[_read_message(message, i) for i, message in enumerate(body.messages)],
        tools=tools,
        thinking=thinking,
        effort=effort,
        template_options=options.model_dump(exclude_none=True) if options is not None else {},
        documents=body.documents or [],
        drop_thinking=options is None or options.drop_thinking is not False,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=is_continued,
    )


def _read_tools(body: ConversationBody) -> list[dict[str, Any]]:
    """The functions' schemas that the model is told of; none with tool_choice none."""
    tools, choice = body.tools, body.tool_choice
    if tools is not None and not tools:
        raise RequestError("tools must not be an empty list", param="tools")
    names = [_check_tool(tool, i) for i, tool in enumerate(tools or ())]
    if isinstance(choice, NamedToolChoice):
        if choice.function.name not in names:
            raise RequestError(
                f"tool_choice names {choice.function.name[:100]!r}, which is not among the tools",
                param="tool_choice",
            )
        raise UnsupportedError(
            "tool_choice with a named function is not supported: calls cannot be forced yet; "
            "use 'auto' or 'none'.",
            param="tool_choice",
        )
    if choice == "required":
        if not names:
            raise RequestError("tool_choice 'required' needs tools", param="tool_choice")
        raise UnsupportedError(
            "tool_choice 'required' is not supported: calls cannot be forced yet; "
            "use 'auto' or 'none'.",
            param="tool_choice",
        )
    return [] if choice == "none" else [tool.function for tool in tools or ()]


def _check_tool(tool: Tool, i: int) -> str:
    name = tool.function.get("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise RequestError(
            f"tools.{i}.function.name must be a name without blanks, quotes or angle brackets, "
            f"got {str(name)[:60]!r}",
            param=f"tools.{i}.function.name",
        )
    if not isinstance(tool.function.get("parameters"), dict | None):
        raise RequestError(
            f"tools.{i}.function.parameters must be a JSON schema (an object)",
            param=f"tools.{i}.function.parameters",
        )
    return name


def _read_message(message: ChatMessage, i: int) -> Message:
    read: Message = {"role": message.role}
    content = message.content
    if content is None and message.role != "assistant":
        raise RequestError(f"messages.{i}.content is required", param=f"messages.{i}.content")
    if message.name is not None:
        read["name"] = message.name
    if message.role == "tool":
        read["tool_call_id"] = message.tool_call_id or ""
        read["content"] = _tool_parts(content) if isinstance(content, list) else content or ""
        return read
    read["content"] = _text(content, i) if isinstance(content, list) else content or ""
    if message.role == "assistant":
        read["reasoning"] = message.reasoning_content or message.reasoning or ""
        read["tool_calls"] = [
            ToolCall(
                id=call.id or "",
                function={
                    "name": call.function.name,
                    "arguments": call.function.arguments or "",
                },
            )
            for call in message.tool_calls or ()
        ]
    return read


def _text(parts: Sequence[ContentPart], i: int) -> str:
    texts = []
    for part in parts:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise UnsupportedError(
                f"messages.{i}.content: only text parts are served, got {part.type[:40]!r}",
                param=f"messages.{i}.content",
            )
        texts.append(part.text)
    return "\n".join(texts)


def _tool_parts(parts: Sequence[ContentPart]) -> list[ToolResultPart]:
    return [{"type": part.type, "text": part.text or ""} for part in parts]
