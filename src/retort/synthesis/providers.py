"""Who answers: OpenAI-compatible servers and Anthropic, through their official clients; a request becomes an answer.

The clients' own retries are off: each attempt is counted by the rate limit and against the budget (room `asking`).
What goes wrong is one of three: *turned away* costs nothing and may be tried again, *lost* may have been paid for,
and a ValueError ends the job. A key comes from the environment, and is cut out of everything that a server says.
"""

import asyncio
import os
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from retort.cli import first_line
from retort.config.sections import Synthesis

PACKAGES = {
    "openai": "openai>=3.57",
    "anthropic": "anthropic>=2.14",
    "aiolimiter": "aiolimiter>=1.2",
}
KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
# Said to the clients, which would else look for OPENAI_BASE_URL: a key goes where the config says.
_ADDRESSES = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}
HIDDEN = "***"
# Of a message's frame, beside its text: role, separators.
_FRAME_TOKENS = 64
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_FATAL = (401, 402, 403, 404, 405)
_TOO_SHORT_KEY = 4
# Shorter ones are words that a server of one's own is content with: EMPTY, test.
_SECRET_LETTERS = 16


@dataclass(frozen=True)
class Answer:
    """What a model wrote. `finish` is stop, length (cut at max_tokens), refusal, or another word of the provider's."""

    text: str
    finish: str
    input_tokens: int
    output_tokens: int
    model: str  # as the provider names what answered


class TurnedAway(Exception):  # noqa: N818
    """The server did not take the request: nothing is paid; `after_s` is what it asks to wait, where it does."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        super().__init__(why)
        self.after_s = after_s


class Lost(Exception):  # noqa: N818
    """The request went out and no answer came back whole: it may have been paid for."""


class Rejected(Exception):  # noqa: N818
    """The server will never answer this prompt (too long, say): nothing is paid."""


class Provider(Protocol):
    """Anything that answers one prompt."""

    async def answer(self, prompt: str) -> Answer:
        """Return the answer. Raises TurnedAway, Lost, Rejected, or ValueError where no prompt will be answered."""

    async def check(self) -> str:
        """Return a note on the server. Raises ValueError where it does not answer or does not serve the model."""

    async def close(self) -> None:
        """Let go of all connections."""


def bound_tokens(section: Synthesis, prompt: str) -> tuple[int, int]:
    """Return the most (input, output) tokens that a request can be charged for: a token is one byte at least."""
    text = prompt + (section.system_prompt or "")
    return len(text.encode()) + _FRAME_TOKENS, section.max_tokens


def read_key(section: Synthesis) -> str | None:
    """Return the key from the environment; None for a server of one's own that wants none.

    Raises ValueError, without showing it, where it is missing or no header can hold it.
    """
    provider = str(section.provider)
    variable = section.api_key_variable or KEY_VARIABLES[provider]
    key = os.environ.get(variable, "").strip()
    if not key:
        if section.base_url is not None and section.api_key_variable is None:
            return None
        raise ValueError(
            f"synthesis.provider is {provider}, but {variable} is not in the environment. Type: export {variable}=... "
            "(in the shell, never in a config), and run the same command again."
        )
    if not key.isascii() or not key.isprintable() or " " in key or len(key) < _TOO_SHORT_KEY:
        raise ValueError(
            f"{variable} holds what cannot be a key: white space, a sign that is not ASCII, or fewer than "
            f"{_TOO_SHORT_KEY} letters. Set it anew."
        )
    return key


def require_client(section: Synthesis) -> None:
    """Raise ValueError, with the line that installs it, where a client or the limiter of rates is missing."""
    wanted = {str(section.provider): f"synthesis.provider is {section.provider}"}
    if section.requests_per_minute or section.tokens_per_minute:
        wanted["aiolimiter"] = "synthesis.requests_per_minute or tokens_per_minute is set"
    for name, why in wanted.items():
        if find_spec(name) is None:
            raise ValueError(
                f"{why}, which needs {name}; it is not installed here. Type: {sys.executable} -m pip install "
                f"'{PACKAGES[name]}'"
            )


def open_provider(section: Synthesis) -> Provider:
    """Return the section's provider, not asked yet. Raises ValueError where its client or key is missing."""
    provider = str(section.provider)
    require_client(section)
    key = read_key(section)
    kinds: dict[str, Any] = {"openai": _OpenAI, "anthropic": _Anthropic}
    return cast(Provider, kinds[provider](section, key))


class _Client(ABC):
    """What the two clients, which one generator writes, have in common; `kind` is the class of the library's client."""

    kind: ClassVar[str]

    def __init__(self, section: Synthesis, key: str | None) -> None:
        self.section, self.key = section, key
        self.library: Any = import_module(str(section.provider))
        self.client = getattr(self.library, self.kind)(
            api_key=key or "none",
            base_url=section.base_url or _ADDRESSES[str(section.provider)],
            timeout=section.timeout_s,
            max_retries=0,
            # The key would go along to wherever a server points.
            http_client=self.library.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    @abstractmethod
    async def _create(self, section: Synthesis, prompt: str) -> Any:
        """Send a request; return the client's message."""

    @abstractmethod
    def _read(self, message: Any, most: tuple[int, int]) -> Answer:
        """Return what a message says; tokens that it does not count are at their `most`.

        Raises _NotUnderstood where it is no answer.
        """

    async def answer(self, prompt: str) -> Answer:
        library = self.library
        try:
            # The client's own time limit is of each read: a body that trickles in would never end.
            async with asyncio.timeout(self.section.timeout_s):
                message = await self._create(self.section, prompt)
            return self._read(message, bound_tokens(self.section, prompt))
        except (TimeoutError, library.APITimeoutError):
            raise Lost(f"no answer in {self.section.timeout_s:g} s") from None
        except library.APIStatusError as error:
            self._raise_status(error)
            raise
        except library.APIConnectionError as error:
            why = self.hide(first_line(error.__cause__ or error))
            if "ConnectError" in type(error.__cause__).__name__:
                raise TurnedAway(f"no connection: {why}") from None
            raise Lost(f"the connection broke: {why}") from None
        # ValueError: no JSON, no UTF-8, a number of five thousand digits.
        except (
            library.APIResponseValidationError,
            ValueError,
            RecursionError,
            _NotUnderstood,
        ) as error:
            why = self.hide(first_line(error))[:300]
            raise Lost(f"the answer is not what the API promises: {why}") from None

    def _raise_status(self, error: Any) -> None:
        status = int(error.status_code)
        why = self.hide(f"status {status}: {first_line(error)}")[:300]
        is_broke = "insufficient_quota" in str(getattr(error, "code", "") or "")
        if 300 <= status < 400:
            where = self.hide(str(error.response.headers.get("location")))
            raise ValueError(
                f"{self.section.base_url} sends on to {where}, and the key is not sent after it: set "
                "synthesis.base_url to the address that answers."
            ) from None
        if status in _FATAL or is_broke:
            raise ValueError(
                f"{self.section.provider} refused the request ({why}). Check synthesis.model "
                f"({self.section.model!r}), synthesis.base_url, the key in the environment and the account; what was "
                "answered is kept."
            ) from None
        if status in _RETRIED or status >= 500:
            raise TurnedAway(why, read_retry_after(error.response.headers)) from None
        raise Rejected(why) from None

    async def check(self) -> str:
        where = self.section.base_url or self.section.provider
        try:
            async with asyncio.timeout(min(self.section.timeout_s, 30)):
                served = [model.id async for model in self.client.models.list()]
        except self.library.APIStatusError as error:
            if int(error.status_code) in (401, 403) or int(error.status_code) < 400:
                self._raise_status(error)
            return f"{where} does not list its models; {self.section.model!r} is taken on trust"
        except Exception as error:
            raise ValueError(
                f"{where} does not answer ({self.hide(first_line(error.__cause__ or error))}): start the server, or "
                "correct synthesis.base_url."
            ) from None
        model = str(self.section.model)
        # `transformers serve` lists what is in the Hub's cache, and serves folders besides.
        if served and model not in served and not Path(model).exists():
            shown = self.hide(", ".join(served[:8]))
            raise ValueError(
                f"synthesis.model is {model!r}, but {where} serves {shown}{' ...' if len(served) > 8 else ''}. "
                "Set synthesis.model to one of these."
            )
        return f"{where} serves {model}"

    async def close(self) -> None:
        await self.client.close()

    def hide(self, text: str) -> str:
        """Return text without the key, however a server echoes it."""
        return text.replace(self.key, HIDDEN) if self.key else text

    def _clean(self, text: Any) -> str:
        """Return a text of an answer without the key. Raises _NotUnderstood for what is no text."""
        if not isinstance(text, str):
            raise _NotUnderstood(f"text is expected, not {text!r}")
        return self.hide(text) if self.key and len(self.key) >= _SECRET_LETTERS else text

    def _sampling(self) -> dict[str, Any]:
        section = self.section
        given = {"temperature": section.temperature, "top_p": section.top_p}
        return {key: value for key, value in given.items() if value is not None}


class _NotUnderstood(Exception):  # noqa: N818
    """A body that is JSON, but no answer."""


class _OpenAI(_Client):
    """Chat completions of any server that speaks OpenAI's protocol."""

    kind = "AsyncOpenAI"

    async def _create(self, section: Synthesis, prompt: str) -> Any:
        system = [{"role": "system", "content": section.system_prompt}] * bool(
            section.system_prompt
        )
        # OpenAI's newer models know the newer name alone; other servers, the older one.
        longest = "max_completion_tokens" if section.base_url is None else "max_tokens"
        return await self.client.chat.completions.create(
            model=section.model,
            messages=[*system, {"role": "user", "content": prompt}],
            seed=section.seed,
            **{longest: section.max_tokens},
            **self._sampling(),
        )

    def _read(self, message: Any, most: tuple[int, int]) -> Answer:
        # As some servers that pass requests on have it, with status 200.
        if said := getattr(message, "error", None):
            raise _NotUnderstood(f"it holds an error, {said}")
        try:
            choice, usage = message.choices[0], message.usage
            refusal = getattr(choice.message, "refusal", None)
            finish = {"content_filter": "refusal"}.get(choice.finish_reason, choice.finish_reason)
            return Answer(
                text=self._clean(choice.message.content or refusal or ""),
                finish="refusal" if refusal else self._clean(str(finish)),
                input_tokens=_count(usage, "prompt_tokens", most[0]),
                output_tokens=_count(usage, "completion_tokens", most[1]),
                model=self._clean(str(message.model)),
            )
        except (AttributeError, TypeError, IndexError, ValueError) as error:
            raise _NotUnderstood(first_line(error)) from None


class _Anthropic(_Client):
    """Messages of Anthropic's API."""

    kind = "AsyncAnthropic"

    async def _create(self, section: Synthesis, prompt: str) -> Any:
        system = {"system": section.system_prompt} if section.system_prompt else {}
        return await self.client.messages.create(
            model=section.model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=section.max_tokens,
            extra_body=self._sampling(),  # the client of today has no words for it; older models take it
            **system,
        )

    def _read(self, message: Any, most: tuple[int, int]) -> Answer:
        finishes = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}
        try:
            text = "".join(block.text for block in message.content if block.type == "text")
            usage = message.usage
            read = (_count(usage, f"cache_{how}_input_tokens", 0) for how in ("read", "creation"))
            return Answer(
                text=self._clean(text),
                finish=finishes.get(message.stop_reason, self._clean(str(message.stop_reason))),
                input_tokens=_count(usage, "input_tokens", most[0]) + sum(read),
                output_tokens=_count(usage, "output_tokens", most[1]),
                model=self._clean(str(message.model)),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise _NotUnderstood(first_line(error)) from None


def _count(usage: Any, name: str, most: int) -> int:
    """Return the tokens that a server counted; the most that they can be, where it says no such number."""
    number = getattr(usage, name, None)
    return number if isinstance(number, int) and number >= 0 else most


def read_retry_after(headers: Any) -> float | None:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3: seconds or a date); None where it does not."""
    if value := headers.get("retry-after-ms"):
        try:
            return max(0.0, float(value) / 1000)
        except ValueError:
            pass
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
