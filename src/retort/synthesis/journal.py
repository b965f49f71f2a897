"""The journal of answers: a file to which one whole line is added for each thing that happened, and never changed.

*sent* is written before a request goes out, with the most that it can cost; *answer* or *away* (turned away: nothing
paid) follows. So after a kill it is known what is there, what was paid, and what may have been paid besides: requests
that were sent and never answered.

Each line has the digest of its prompt, and that alone says to which prompt an answer belongs: where the prompts of the
Hub changed meanwhile, an answer moves to the place where its prompt is now, or to none. And each ends with a seal: a
digest of it, and of what else is asked. A line that was edited, or asked with other settings, is refused.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from retort.synthesis.prompts import Prompt
from retort.synthesis.providers import Answer

logger = logging.getLogger(__name__)


@dataclass
class Paid:
    """What a journal says was paid: of answers exactly, of lost requests at most."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    lost_requests: int = 0
    lost_input_tokens: int = 0
    lost_output_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All tokens, lost ones at their most."""
        of_answers = self.input_tokens + self.output_tokens
        return of_answers + self.lost_input_tokens + self.lost_output_tokens

    def cost(self, price_in: float, price_out: float) -> float:
        """Return the price of all that was or may have been paid, at prices of a million tokens."""
        read = self.input_tokens + self.lost_input_tokens
        written = self.output_tokens + self.lost_output_tokens
        return (read * price_in + written * price_out) / 1e6


@dataclass
class Journal:
    """The answers to these prompts, by the place of the prompt; opened by `with`, by one process at a time.

    `asked` says what is asked besides the prompts: of whom, and how.
    """

    path: Path
    prompts: Sequence[Prompt]
    asked: str = ""
    answers: dict[int, Answer] = field(default_factory=dict)
    paid: Paid = field(default_factory=Paid)
    # The most that requests in flight can cost, by prompt: (input, output) tokens of each attempt.
    open: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def __enter__(self) -> "Journal":
        self._keys = [_digest(prompt.text) for prompt in self.prompts]
        self._places = {key: place for place, key in enumerate(self._keys)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._read()
        # Of a process that was killed: nobody waits for these answers any more.
        for key in list(self.open):
            self._lose(key)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _read(self) -> None:
        """Take up every whole line; a torn last one, of a kill or a full disk, is cut off."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                logger.warning(f"{self.path}: the last line was torn by a kill, and is cut off")
                break
            try:
                event = json.loads(line)
                is_ours = event.pop("seal") == self._seal(event)
                if is_ours:
                    self._take(event)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, is no line of a journal ({error!r}). Put the file back as it was; "
                    "it holds answers that were paid for."
                ) from None
            if not is_ours:
                raise ValueError(
                    f"{self.path}, line {number}, was changed, or was asked with other settings than these. Put the "
                    "file back as it was, for it holds answers that were paid for; or write to another folder."
                )
            end += len(line)
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def _seal(self, event: Mapping[str, Any]) -> str:
        return xxhash.xxh3_64_hexdigest(f"{self.asked}\n{_to_line(event)}".encode())

    def _take(self, event: Mapping[str, Any]) -> None:
        key, what = str(event["prompt"]), event["event"]
        if what == "sent":
            self.open.setdefault(key, []).append((event["input"], event["output"]))
        elif what == "lost":
            self._lose(key)
        elif what == "away":
            self._close(key)
        elif what == "answer":
            answer = Answer(**event["answer"])
            self._close(key)
            if key in self._places:
                self.answers[self._places[key]] = answer
            self.paid.requests += 1
            self.paid.input_tokens += answer.input_tokens
            self.paid.output_tokens += answer.output_tokens
        else:
            raise ValueError(f"event {what!r}")

    def _close(self, key: str) -> tuple[int, int]:
        attempts = self.open.get(key) or [(0, 0)]
        bound = attempts.pop()
        if not attempts:
            self.open.pop(key, None)
        return bound

    def _lose(self, key: str) -> None:
        while key in self.open:
            read, written = self._close(key)
            self.paid.lost_requests += 1
            self.paid.lost_input_tokens += read
            self.paid.lost_output_tokens += written

    def _add(self, what: str, place: int, *, is_lasting: bool = False, **facts: Any) -> None:
        event = {"event": what, "place": place, "prompt": self._keys[place], **facts}
        line = _to_line({**event, "seal": self._seal(event)})
        self._file.write(f"{line}\n".encode())
        self._file.flush()
        if is_lasting:
            os.fsync(self._file.fileno())
        self._take(event)

    def send(self, place: int, bound: tuple[int, int]) -> None:
        """Note, before it goes out, that a request is sent, and the most (input, output) tokens that it can cost."""
        self._add("sent", place, input=bound[0], output=bound[1])

    def turn_away(self, place: int) -> None:
        """Note that a request was not taken: nothing is paid."""
        self._add("away", place)

    def lose(self, place: int) -> None:
        """Note that a request has no answer, and may have been paid for."""
        self._add("lost", place)

    def keep(self, place: int, answer: Answer) -> None:
        """Write an answer; it is on the disk when this returns."""
        self._add("answer", place, is_lasting=True, answer=asdict(answer))

    @property
    def reserved(self) -> Paid:
        """What is paid, and what the requests in flight may cost besides."""
        bounds = [bound for attempts in self.open.values() for bound in attempts]
        total = Paid(**asdict(self.paid))
        total.lost_input_tokens += sum(read for read, _ in bounds)
        total.lost_output_tokens += sum(written for _, written in bounds)
        return total


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _to_line(event: Mapping[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=True, separators=(",", ":"))
