"""Chats in rows: lists of messages under the names of the common formats, made into one form.

A message is a mapping: `role` (system, user, assistant or tool), `content` (text), and `reasoning_content`,
`tool_calls`, `tool_call_id` and `name` where it has them. The assistant's messages with `weight` 0 carry no loss.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from retort.config.sections import Dataset

Message = dict[str, Any]

# Columns that are read, in this order, where dataset.text_column keeps its default and is not there.
CHAT_COLUMNS = ("messages", "conversations", "conversation")
PAIR_COLUMNS = ("prompt", "completion")
TOOLS_COLUMN = "tools"
# In ShareGPT's form a role, whose value is the JSON of a call or of a list of them; in OpenAI's older one a key.
CALL = "function_call"
# Names of roles in chats of OpenAI's form, ShareGPT's and of other collections.
_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", CALL),
    "tool": ("tool", "function", "observation", "function_response", "ipython"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_REASONING = ("reasoning_content", "reasoning", "thinking")


def find_chat(values: Mapping[str, Any], dataset: Dataset) -> list[Message] | None:
    """Return the messages of a row, with its system prompt; None if the row is text, or prompt and response.

    Raises ValueError, which says why, when the row is meant to be a chat and is not one.
    """
    chat = _read_named(values, dataset)
    if chat is None:
        return None
    said = [m for m in chat if m["role"] == "assistant" and _says_something(m)]
    if said and all(message.get("weight") == 0 for message in said):
        raise ValueError("no_learned_turn")
    system = values.get(dataset.system_column) if dataset.system_column is not None else None
    if isinstance(system, str) and system.strip() and chat[0]["role"] != "system":
        return [{"role": "system", "content": system}, *chat]
    return chat


def _read_named(values: Mapping[str, Any], dataset: Dataset) -> list[Message] | None:
    if dataset.messages_column is not None:
        return read_messages(values.get(dataset.messages_column))
    names = _find_pair(values, dataset)
    if names is not None:
        prompt, response = (values.get(name) for name in names)
        is_text = isinstance(prompt, str) and isinstance(response, str)
        if is_text and names != PAIR_COLUMNS and dataset.system_column is None:
            return None
        if not all(
            isinstance(value, str) or _holds_messages(value) for value in (prompt, response)
        ):
            return None  # skipped as what it is
        before = [_without_loss(message) for message in _read_side(prompt, "user")]
        return [*before, *_read_side(response, "assistant")]
    if _holds_messages(text := values.get(dataset.text_column)):
        return read_messages(text)
    if text is None and dataset.text_column == "text":
        for name in CHAT_COLUMNS:
            if values.get(name) is not None:
                return read_messages(values[name])
    return None


def _find_pair(values: Mapping[str, Any], dataset: Dataset) -> tuple[str, str] | None:
    """Return the columns of prompt and response, if the row has them."""
    if dataset.prompt_column is not None and dataset.response_column is not None:
        return dataset.prompt_column, dataset.response_column
    is_open = dataset.text_column == "text" and values.get("text") is None
    is_pair = all(values.get(name) is not None for name in PAIR_COLUMNS)
    return PAIR_COLUMNS if is_open and is_pair else None


def _holds_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def _without_loss(message: Message) -> Message:
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def _says_something(message: Message) -> bool:
    return bool(
        message["content"].strip() or message.get("reasoning_content") or message.get("tool_calls")
    )


def _read_side(value: Any, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else read_messages(value)


def read_messages(value: Any) -> list[Message]:
    """Return the messages of a list of them, or of its JSON text. Raises ValueError, with the reason, for others."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("not_a_chat") from None
    if not isinstance(value, list) or not value:
        raise ValueError("not_a_chat")
    return [_read_message(message) for message in value]


def _read_message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError("not_a_chat")
    name = str(message.get("role", message.get("from"))).strip().lower()
    role = _ROLE_OF.get(name)
    if role is None:
        raise ValueError("unknown_role")
    if name == CALL:
        if not (text := _read_content(message)).strip():
            raise ValueError("bad_tool_calls")
        message = {"role": role, CALL: text}
    found: Message = {"role": role, "content": _read_content(message)}
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise ValueError("not_text")
        found["reasoning_content"] = reasoning
    if calls := _read_calls(message):
        found["tool_calls"] = calls
    if role == "assistant" and message.get("weight") == 0:
        found["weight"] = 0
    for key in ("tool_call_id", "name"):
        if isinstance(message.get(key), str):
            found[key] = message[key]
    return found


def _read_calls(message: Mapping[str, Any]) -> list[Any]:
    """Return the tool calls, OpenAI's older `function_call` too. Raises ValueError for what is no tool call."""
    calls = _read_objects(message.get("tool_calls"), "bad_tool_calls")
    for function in _read_objects(message.get(CALL), "bad_tool_calls"):
        calls.append({"type": "function", "function": function})
    for call in calls:
        function = call.get("function") or call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("bad_tool_calls")
    return calls


def _read_objects(value: Any, reason: str) -> list[Any]:
    """Return a list of objects, of which there may be one alone or JSON text. Raises ValueError, with the reason."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(reason) from None
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        return []
    values = [value] if isinstance(value, Mapping) and value else value
    if isinstance(values, list):
        values = [_load_text(inner) for inner in values]
    if not isinstance(values, list | Mapping) or not all(isinstance(v, Mapping) for v in values):
        raise ValueError(reason)
    return [_drop_empty(inner) for inner in values]


def _load_text(value: Any) -> Any:
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value)
    return value


def _read_content(message: Mapping[str, Any]) -> str:
    """Return the content as text; it may be a list of parts. Raises ValueError for parts that are not text."""
    content = message.get("content")
    content = message.get("value") if content is None else content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if any(text is not None and not isinstance(text, str) for text in texts):
        raise ValueError("not_text")
    if any(isinstance(p, Mapping) and p.get("type") not in (None, "text") for p in parts):
        raise ValueError("not_text")
    return "".join(text for text in texts if text is not None)


def _drop_empty(value: Any) -> Any:
    """Return a value without the keys that are None, which tables add where other rows have them."""
    if isinstance(value, Mapping):
        return {key: _drop_empty(inner) for key, inner in value.items() if inner is not None}
    return value


def find_tools(values: Mapping[str, Any]) -> list[Any] | None:
    """Return the row's tools, as JSON schemas or JSON text; None without any. Raises ValueError for others."""
    return _read_objects(values.get(TOOLS_COLUMN), "bad_tools") or None


def join_texts(messages: list[Message], *, of_assistant: bool) -> str:
    """Return what the assistant says, or all others, one message a line: a chat's response and prompt as text."""
    lines = []
    for message in messages:
        if (message["role"] == "assistant") == of_assistant:
            lines += [message.get("reasoning_content", ""), message["content"]]
            calls = message.get("tool_calls")
            lines.append(json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else "")
    return "\n".join(line for line in lines if line)
