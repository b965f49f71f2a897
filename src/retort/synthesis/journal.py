"""The journal of answers: an append-only file of JSON lines, one for each event, which survives a kill.

*sent* is written before a request goes out, with upper bounds of its tokens; *answer*, *lost* or *unavailable* (not
accepted, free) follows. So after a kill the journal shows which answers exist, what was paid, and what may have been
paid besides: the requests without an answer.

Each line has the digest of its prompt, and only this digest assigns an answer to a prompt: when the prompts of a Hub
dataset change, an answer moves to its prompt's new index, or is left unused. Each line also has a checksum of itself
and of the other settings of the request (the key `checksum`): an edited line, or one of other settings, is refused.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from retort.synthesis.prompts import LabeledPrompt
from retort.synthesis.providers import Answer

logger = logging.getLogger(__name__)


@dataclass
class Usage:
    """Requests and tokens that were paid: exact for answers, upper bounds for lost requests."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    lost_requests: int = 0
    lost_input_tokens: int = 0
    lost_output_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All tokens, with the upper bounds of lost requests."""
        answered = self.input_tokens + self.output_tokens
        return answered + self.lost_input_tokens + self.lost_output_tokens

    def cost(self, input_price: float, output_price: float) -> float:
        """Return the price of all tokens, given prices per million tokens."""
        num_input = self.input_tokens + self.lost_input_tokens
        num_output = self.output_tokens + self.lost_output_tokens
        return (num_input * input_price + num_output * output_price) / 1e6


@dataclass
class Journal:
    """The answers to `prompts`, by the prompt's index; a context manager, for one process at a time.

    `settings` identifies the request's other settings: the model and how it samples.
    Entering it raises ValueError when a line was edited, is not a journal's, or has other settings.
    """

    path: Path
    prompts: Sequence[LabeledPrompt]
    settings: str = ""
    answers: dict[int, Answer] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    # Requests without an answer yet, by the prompt's digest: bounds of (input, output) tokens of each attempt.
    in_flight: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def __enter__(self) -> "Journal":
        self._keys = [_digest(prompt.text) for prompt in self.prompts]
        self._indices = {key: index for index, key in enumerate(self._keys)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._read()
        # Left by a process that was killed: these answers can no longer arrive.
        for key in list(self.in_flight):
            self._apply_lost(key)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> None:
        """Apply every complete line; cut off an incomplete last one, left by a kill or a full disk."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                logger.warning(
                    f"{self.path}: the last line is incomplete after a kill, and is removed"
                )
                break
            try:
                event = json.loads(line)
                is_valid = event.pop(_read_key(event)) == self._checksum(event)
                if is_valid:
                    self._apply(event)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, is not a line of a journal ({error!r}). Restore the file: it holds "
                    "answers that were paid for."
                ) from None
            if not is_valid:
                raise ValueError(
                    f"{self.path}, line {number}, was edited, or has other settings than this run. Restore the file, "
                    "which holds answers that were paid for, or write to another folder."
                )
            end += len(line)
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def _checksum(self, event: Mapping[str, Any]) -> str:
        return xxhash.xxh3_64_hexdigest(f"{self.settings}\n{_to_line(event)}".encode())

    def _apply(self, event: Mapping[str, Any]) -> None:
        key, kind = str(event["prompt"]), event["event"]
        if kind == "sent":
            self.in_flight.setdefault(key, []).append((event["input"], event["output"]))
        elif kind == "lost":
            self._apply_lost(key)
        elif kind in ("unavailable", "away"):
            self._pop_attempt(key)
        elif kind == "answer":
            answer = Answer(**event["answer"])
            self._pop_attempt(key)
            if key in self._indices:
                self.answers[self._indices[key]] = answer
            self.usage.requests += 1
            self.usage.input_tokens += answer.input_tokens
            self.usage.output_tokens += answer.output_tokens
        else:
            raise ValueError(f"event {kind!r}")

    def _pop_attempt(self, key: str) -> tuple[int, int]:
        attempts = self.in_flight.get(key) or [(0, 0)]
        bound = attempts.pop()
        if not attempts:
            self.in_flight.pop(key, None)
        return bound

    def _apply_lost(self, key: str) -> None:
        while key in self.in_flight:
            num_input, num_output = self._pop_attempt(key)
            self.usage.lost_requests += 1
            self.usage.lost_input_tokens += num_input
            self.usage.lost_output_tokens += num_output

    def _append(self, kind: str, index: int, *, is_synced: bool = False, **facts: Any) -> None:
        event = {"event": kind, "index": index, "prompt": self._keys[index], **facts}
        line = _to_line({**event, "checksum": self._checksum(event)})
        self._file.write(f"{line}\n".encode())
        self._file.flush()
        if is_synced:
            os.fsync(self._file.fileno())
        self._apply(event)

    def add_sent(self, index: int, bound: tuple[int, int]) -> None:
        """Record, before it is sent, a request and the upper bounds of its (input, output) tokens."""
        self._append("sent", index, input=bound[0], output=bound[1])

    def add_unavailable(self, index: int) -> None:
        """Record that the server did not accept a request, which is free."""
        self._append("unavailable", index)

    def add_lost(self, index: int) -> None:
        """Record that a request has no answer, and may be charged."""
        self._append("lost", index)

    def add_answer(self, index: int, answer: Answer) -> None:
        """Record an answer; it is on disk (fsync) when this returns."""
        self._append("answer", index, is_synced=True, answer=asdict(answer))

    @property
    def reserved(self) -> Usage:
        """The usage so far, with the upper bounds of the requests in flight."""
        bounds = [bound for attempts in self.in_flight.values() for bound in attempts]
        total = Usage(**asdict(self.usage))
        total.lost_input_tokens += sum(num_input for num_input, _ in bounds)
        total.lost_output_tokens += sum(num_output for _, num_output in bounds)
        return total


def _read_key(event: Mapping[str, Any]) -> str:
    """Return the checksum's key: before version 0.3 it was `seal` (and an index `place`, *unavailable* `away`)."""
    return "checksum" if "checksum" in event else "seal"


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _to_line(event: Mapping[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=True, separators=(",", ":"))
