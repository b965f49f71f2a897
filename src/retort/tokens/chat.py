"""Chats to tokens by the tokenizer's chat template, and which tokens the assistant says.

A *turn* is one message of the assistant, as the template renders it after the generation prompt, up to and including
the token that ends it. Where the template has `{% generation %}` marks, these say what a turn is. Elsewhere each turn
is found by rendering the chat step by step: what comes before the turn, with a generation prompt, must be the beginning
of what is rendered with it. An empty `<think></think>` that a template adds, and the line break after an end, are no
part of a turn.

Some templates render an earlier turn in another way than a last one, or leave its reasoning out. Such a turn becomes a
rendering of its own, which ends with it: the prompt as the model sees it, and the whole turn.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from retort.cli import first_line
from retort.tokens.controls import ControlTokens
from retort.tokens.said import (
    ChatError,
    Message,
    describe_missing,
    find_missing,
    list_said,
    require_context,
    require_tools,
    split_reasoning,
)

# Templates that print today's date print this one, so that tokens do not depend on the day.
DEFAULT_DATE = "2026-01-01"
_PROBE = "retort0probe"
_REPR = re.compile(r"['\"]type['\"]:\s*['\"]text['\"]")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPENED_THINK = re.compile(r"<think>\s*\Z")
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")


@dataclass(frozen=True)
class _Turn:
    """A turn as the last one of `text`, by characters: header, then text[start:content_end], then its end."""

    text: str
    header: int  # where the header ends
    start: int  # after the header and an empty <think></think>
    content_end: int
    end: int
    is_open: bool  # nothing ends it


class ChatFormat:
    """A tokenizer's chat template. `date`: the day (YYYY-MM-DD) that templates with a date print."""

    def __init__(self, tokenizer: Any, *, date: str = DEFAULT_DATE) -> None:
        """Raises ValueError when the template renders no content of messages."""
        self.tokenizer = tokenizer
        self._date_macro = _define_date(date)
        self._control_tokens = ControlTokens(tokenizer)
        names = {str(t) for t in tokenizer.added_tokens_decoder.values()} | {
            *tokenizer.all_special_tokens
        }
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._has_parts = False
        tail = self._find_tail()
        end = self._controls.search(tail)
        self.end_ids: list[
            int
        ] = []  # the token with which the template ends a turn, if there is one
        if end is not None:
            self.end_ids = [int(tokenizer.convert_tokens_to_ids(end.group()))]

    def _find_tail(self) -> str:
        """Return what the template adds after a last turn; choose between content as text and as a list of parts."""
        probe = [{"role": role, "content": f"{_PROBE}{role}"} for role in ("user", "assistant")]
        error: ChatError | None = None
        for self._has_parts in (False, True):
            try:
                text = self._render(probe)
            except ChatError as found:
                error = error or found
                continue
            if _REPR.search(text):  # the parts themselves, printed as Python or JSON
                continue
            if all(message["content"] in text for message in probe):
                return text.rpartition(f"{_PROBE}assistant")[2]
        reason = f": {error}" if error else ""
        raise ValueError(
            "the tokenizer's chat template renders neither messages whose content is text nor those whose content is "
            f"a list of parts{reason}. Use a tokenizer with another chat template, or one without."
        )

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a chat up to where the assistant's next turn begins. Raises ChatError."""
        return self._ids(self._render(messages, prompt=True))

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        turns: str = "all",
        append_eos: bool = True,
    ) -> list[tuple[list[int], list[bool]]]:
        """Return renderings of a chat as (ids, whether each token is said by the assistant); most often there is one.

        turns: "all" or "last". append_eos: end a turn that the template leaves open. What follows the last turn is left
        out. Raises ChatError when the template raises, or when what a message says is not in what is rendered.
        """
        said = [
            i
            for i, m in enumerate(messages)
            if m["role"] == "assistant" and list_said(m) and m.get("weight") != 0
        ]
        if not said:
            raise ChatError("it has no assistant's turn with content")
        chat = messages[: said[-1] + 1]
        wanted = said if turns == "all" else said[-1:]
        has_end = append_eos and self.tokenizer.eos_token_id is not None
        eos = [self.tokenizer.eos_token_id] if has_end else []
        if tools:
            require_tools(tools, self._render(chat, tools), self._render(chat))
        found = [
            self._encode_spans(text, spans, eos if is_open else [])
            for text, spans, is_open in self._list_renderings(chat, wanted, tools)
        ]
        assert any(any(mask) for _, mask in found), messages
        return found

    def _list_renderings(
        self, chat: Sequence[Message], wanted: list[int], tools: list[Any] | None
    ) -> Iterator[tuple[str, list[tuple[int, int]], bool]]:
        """Yield (text, spans of its turns by characters, whether nothing ends the last) that hold all wanted turns."""
        if _MARKS.search(self.tokenizer.get_chat_template(tools=tools)):
            full, spans = self._render_marks(chat, tools)
            spans = _select_spans(chat, spans, wanted)
            if spans and not find_missing(chat, full):
                yield full, spans, not self.end_ids
                return
        full = self._render(chat, tools)
        spans, others, is_open = [], [], False
        for i in wanted:
            turn = self._find_turn(chat, i, full, tools)
            span = self._place(turn, full)
            if span is None:
                others.append((chat[:i], turn))
            else:
                spans.append(span)
                is_open = turn.is_open and i == len(chat) - 1
        if spans:
            require_context([m for m in chat if m["role"] != "assistant"], full)
            yield full, spans, is_open
        for before, turn in others:
            require_context([m for m in before if m["role"] != "assistant"], turn.text)
            yield turn.text, [(turn.start, turn.end)], turn.is_open

    def _find_turn(
        self, chat: Sequence[Message], i: int, full: str, tools: list[Any] | None
    ) -> _Turn:
        """Return turn `i`, rendered as the last one. Raises ChatError when the template leaves something of it out."""
        message = chat[i]
        head = self._render(chat[:i], tools, prompt=True) if i else ""
        whole = full if i == len(chat) - 1 else self._render(chat[: i + 1], tools)
        probe = self._render([*chat[:i], {"role": "assistant", "content": _PROBE}], tools)
        before, found, tail = probe.rpartition(_PROBE)
        if not found:
            raise ChatError("the chat template renders nothing of an assistant's message")
        base = _OPENED_THINK.sub("", head)
        gap = before[len(base) :]
        if not before.startswith(base):
            gap = before[len(before.rstrip()) :]
            gap = "" if head.endswith(gap) else gap
        if gap.strip() and (i == 0 or head == self._render(chat[:i], tools)):
            # There is no generation prompt: the header is part of the message, but the assistant does not say it.
            base = head = before[: len(before) - len(gap)] + re.sub(
                _EMPTY_THINK.pattern + r"\Z", "", gap
            )
            gap = ""
        rest, reasoning = whole[len(base) :], split_reasoning(message)[0]
        if whole.startswith(base) and not find_missing([message], rest):
            has_head = bool(reasoning) and whole.startswith(head)
            start = len(head) if has_head else len(base)
            if not reasoning and (empty := _EMPTY_THINK.match(whole, start)):
                start = self._skip_empty_think(chat[:i], tools, whole, empty.end())
            return self._close(whole, len(base), start, tail)
        is_moved = not whole.startswith(base)
        thought = {"role": "assistant", "content": reasoning}
        drops_reasoning = bool(reasoning) and find_missing([thought], rest) is not None
        if message.get("tool_calls") or not (is_moved or drops_reasoning):
            raise ChatError(describe_missing(message, find_missing([message], rest)))
        text = head + self._compose(message, head, gap)
        return self._close(text + tail, len(head), len(head), tail)

    @staticmethod
    def _compose(message: Message, head: str, gap: str) -> str:
        """Return what follows the prompt, where the template leaves the reasoning out or moves the system prompt."""
        body = str(message["content"])
        if message.get("reasoning_content"):
            body = f"<think>\n{message['reasoning_content']}\n</think>\n\n{body}"
        if _OPENED_THINK.search(head):
            return re.sub(r"\A\s*<think>\s*", "", body)
        return body if "<think>" in gap else gap + body.lstrip() if gap.isspace() else gap + body

    def _skip_empty_think(
        self, before: Sequence[Message], tools: list[Any] | None, whole: str, end: int
    ) -> int:
        """Return where the response begins after an empty <think></think>: where the template's own prompt without
        thinking ends, if that is the beginning of `whole`, else at `end`."""
        if not before:
            return end
        quiet = self._render(before, tools, prompt=True, enable_thinking=False)
        return len(quiet) if "</think>" in quiet[-20:] and whole.startswith(quiet) else end

    def _close(self, text: str, header: int, start: int, tail: str) -> _Turn:
        """Return the turn from `start` to the end of `text`, which ends with `tail` unless the turn calls a tool."""
        if text.endswith(tail):
            content_end = len(text) - len(tail)
            end = self._controls.search(text, content_end)
        else:
            last = re.search(rf"(?:{self._controls.pattern})\s*\Z", text[start:])
            content_end = start + last.start() if last else len(text)
            end = self._controls.match(text, content_end)
        return _Turn(text, header, start, content_end, end.end() if end else len(text), end is None)

    def _place(self, turn: _Turn, full: str) -> tuple[int, int] | None:
        """Return where `full` has a turn, by characters; None if it has another text there."""
        if full.startswith(turn.text[: turn.end]):
            return turn.start, turn.end
        said = turn.text[turn.start : turn.content_end]
        if not full.startswith(turn.text[: turn.header] + said):
            return None
        end = turn.header + len(said)
        ending = turn.text[turn.content_end : turn.end]
        if full.startswith(ending, end):
            return turn.header, end + len(ending)
        other = self._controls.match(full, end)  # gpt-oss ends an earlier turn with another token
        return (turn.header, other.end()) if other and ending else None

    def _render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        prompt: bool = False,
        **options: Any,
    ) -> str:
        error: Exception | None = None
        for has_text_arguments in (False, True):  # of tool calls; templates want either form
            shown = [self._show(m, has_text_arguments) for m in messages]
            try:
                text: str = self.tokenizer.apply_chat_template(
                    shown,
                    tools=tools,
                    chat_template=self._template(tools),
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **options,
                )
                return text
            except Exception as found:  # a template may raise anything
                error = error or found
                if not any(m.get("tool_calls") for m in messages):
                    break
        assert error is not None
        raise ChatError(
            f"the chat template refuses it ({type(error).__name__}: {first_line(error)})"
        ) from error

    def _render_marks(
        self, chat: Sequence[Message], tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return (text, spans by characters) by the template's own marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), (spans,) = render_jinja_template(
                conversations=[[self._show(m, False) for m in chat]],
                tools=tools,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise ChatError(f"the chat template refuses it ({first_line(error)})") from error
        return text, [(start, end) for start, end in spans if end > start]

    def _template(self, tools: list[Any] | None) -> str:
        template: str = self.tokenizer.get_chat_template(tools=tools)
        return self._date_macro + template if "strftime_now" in template else template

    def _show(self, message: Message, has_text_arguments: bool) -> dict[str, Any]:
        """Return a message as the template wants it."""
        shown = {
            key: value for key, value in message.items() if value is not None and key != "weight"
        }
        if self._has_parts:
            shown["content"] = [{"type": "text", "text": message["content"]}]
        if "reasoning_content" in shown:  # gpt-oss reads the other name
            shown["thinking"] = shown["reasoning_content"]
        if message.get("tool_calls"):
            shown["tool_calls"] = [_show_call(c, has_text_arguments) for c in message["tool_calls"]]
        return shown

    def _ids(self, text: str) -> list[int]:
        return self._control_tokens.encode_rendered(text)

    def _encode_spans(
        self, text: str, spans: list[tuple[int, int]], eos: list[int]
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a text, then `eos`, and which are in a span.

        Where a token would reach over the edge of a span, the two sides are tokenized separately, as when a model
        continues a prompt.
        """
        edges = sorted({edge for span in spans for edge in span} - {0, len(text)})
        ids: list[int] = []
        counts = {0: 0}  # tokens before each edge, by character
        begin, whole = 0, self._ids(text)
        for edge in edges:
            head = self._ids(text[begin:edge])
            if whole[: len(head)] != head:
                ids += head
                begin, whole, head = edge, self._ids(text[edge:]), []
            counts[edge] = len(ids) + len(head)
        ids += whole
        counts[len(text)] = len(ids)
        mask = [False] * len(ids) + [True] * len(eos)
        for start, end in spans:
            mask[counts[start] : counts[end]] = [True] * (counts[end] - counts[start])
        return ids + eos, mask


def _select_spans(
    chat: Sequence[Message], spans: list[tuple[int, int]], wanted: list[int]
) -> list[tuple[int, int]]:
    """Return the marked spans of the wanted turns; none if it cannot be told of which turn each span is."""
    assistant = [i for i, m in enumerate(chat) if m["role"] == "assistant"]
    said = [i for i in assistant if list_said(chat[i])]
    if wanted == said:
        return spans
    for turns in (assistant, said):
        if len(turns) == len(spans):
            return [span for i, span in zip(turns, spans, strict=True) if i in wanted]
    return []


def describe_date(tokenizer: Any, date: str) -> dict[str, str]:
    """Return {"chat_date": date} if the tokenizer's chat template prints a date, else nothing: for a record."""
    template = getattr(tokenizer, "chat_template", None)
    return {"chat_date": date} if "strftime_now" in str(template) else {}


def find_template_ends(tokenizer: Any) -> list[int]:
    """Return the ids of the token with which the tokenizer's chat template ends a turn; none without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    try:
        return ChatFormat(tokenizer).end_ids
    except ValueError:  # a template for something else than chats
        return []


def _define_date(date: str) -> str:
    """Return a Jinja macro that takes the place of transformers' function `strftime_now`, which prints today's date.

    (Functions cannot be passed to a template: transformers replaces them by text.)
    """
    day = datetime.fromisoformat(date)
    values = {
        f"%{letter}": day.strftime(f"%{letter}") for letter in "aAwdebBmyYHIpMSfjUWcxXGuVFTDR"
    }
    values |= {"%-d": str(day.day), "%-m": str(day.month), "%%": "%"}
    replaced = "".join(f".replace({key!r}, {value!r})" for key, value in values.items())
    # "+" keeps the line break that a template may begin with.
    return "{% macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro +%}"


def _show_call(call: Mapping[str, Any], has_text_arguments: bool) -> dict[str, Any]:
    """Return a tool call with its arguments as a mapping, or as JSON text."""
    function = dict(call.get("function") or call)
    arguments = function.get("arguments")
    if has_text_arguments and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif not has_text_arguments and isinstance(arguments, str):
        with suppress(ValueError):
            function["arguments"] = json.loads(arguments)
    return {
        "type": "function",
        **{k: v for k, v in call.items() if v is not None},
        "function": function,
    }
