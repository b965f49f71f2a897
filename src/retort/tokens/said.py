"""What messages of a chat say, and whether a rendering holds it.

Some chat templates drop a system prompt, the reasoning before an answer, or all content, without a word.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[
    str, Any
]  # role, content (text), and reasoning_content, tool_calls, ... where there are any

_REASONING = re.compile(r"\s*(?:<think>)?(.*)</think>(.*)", re.DOTALL)
_MODES = re.compile(r"/(no_?)?think|/system_override")  # templates obey and remove them


class ChatError(ValueError):
    """A chat that the template refuses, or of which it leaves something out."""


def split_reasoning(message: Message) -> tuple[str, str]:
    """Return (reasoning, answer) of an assistant's message; the reasoning may stand in the content, before </think>."""
    content = str(message.get("content") or "")
    if message.get("reasoning_content"):
        return str(message["reasoning_content"]).strip(), content.strip()
    found = _REASONING.fullmatch(content)
    return (found.group(1).strip(), found.group(2).strip()) if found else ("", content.strip())


def list_said(message: Message) -> list[str]:
    """Return the texts of a message that must be in what is rendered."""
    said = [*split_reasoning(message)]
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call
        arguments = function.get("arguments") or {}
        values = arguments.values() if isinstance(arguments, Mapping) else ()
        said += [str(function.get("name") or ""), *(v for v in values if isinstance(v, str))]
    return [text for text in said if text.strip()]


def find_missing(messages: Sequence[Message], text: str) -> str | None:
    """Return the first text of the messages that is not in `text` (white space apart, plain or as JSON), or None."""
    squeezed = " ".join(text.split())
    for message in messages:
        for said in list_said(message):
            if not any(" ".join(form.split()) in squeezed for form in _list_forms(said)):
                return said
    return None


def _list_forms(said: str) -> Iterator[str]:
    """Yield the forms in which a text may be rendered: as it is, as JSON, without the modes that templates obey."""
    yield said
    yield json.dumps(said, ensure_ascii=False)[1:-1]
    yield json.dumps(said)[1:-1]
    yield _MODES.sub("", said)


def require_context(messages: Sequence[Message], text: str) -> None:
    """Raise ChatError when the text of a message is missing in what is rendered, or out of order."""
    squeezed, begin = " ".join(text.split()), 0
    for message in messages:
        if message["role"] == "system":  # some templates move it
            if (missing := find_missing([message], text)) is not None:
                raise ChatError(describe_missing(message, missing))
            continue
        for said in list_said(message):
            forms = [" ".join(form.split()) for form in _list_forms(said)]
            ends = [at + len(f) for f in forms if (at := squeezed.find(f, begin)) >= 0]
            if not ends:
                raise ChatError(describe_missing(message, said))
            begin = min(ends)


def require_tools(tools: Sequence[Any], text: str, without: str) -> None:
    """Raise ChatError when a tool is missing in `text`, or nothing differs from the chat rendered without tools."""
    for tool in tools:
        name = str((tool.get("function") or tool).get("name") or "")
        if name not in text or text == without:
            raise ChatError(f"the chat template leaves out the tool {name!r}")


def describe_missing(message: Message, missing: str | None) -> str:
    """Return a sentence that says which text of a message is missing."""
    shown = " ".join(str(missing).split())[:60]
    return f"the chat template leaves out what the {message['role']} says ({shown!r})"
