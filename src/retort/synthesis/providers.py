"""OpenAI-compatible servers and Anthropic, through their official clients: one request, one answer.

The clients' own retries are off: `retort.synthesis.client` counts each attempt against the rate limit and the budget.
The API key comes from the environment, and is removed from all text that a server sends.
"""

import asyncio
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from retort.cli import first_line
from retort.config.sections import Synthesis

PACKAGES = {
    "openai": "openai>=3.57",
    "anthropic": "anthropic>=2.14",
    "aiolimiter": "aiolimiter>=1.2",
}
KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
# Always passed to the clients, which otherwise read OPENAI_BASE_URL: the key goes only where the config says.
_BASE_URLS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}
_REDACTED = "***"
_OVERHEAD_TOKENS = 64  # of a message beside its text: role, separators
_RETRYABLE_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_FATAL_STATUSES = (401, 402, 403, 404, 405)
_MIN_KEY_LENGTH = 4
# Shorter keys are words that self-hosted servers accept (EMPTY, test), and may occur in any response.
_MIN_SECRET_LENGTH = 16


@dataclass(frozen=True)
class Answer:
    """What a model wrote. `finish`: stop, length (cut at max_tokens), refusal, or a reason of the provider's own."""

    text: str
    finish: str
    input_tokens: int
    output_tokens: int
    model: str  # the name that the provider reports


class UnavailableError(Exception):
    """The server did not accept the request: free, worth a retry, after `retry_after_s` if the server says so."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class LostAnswerError(Exception):
    """The request was sent, but no complete answer came back: it may be charged."""


class RejectedPromptError(Exception):
    """The server will never answer this prompt (too long, for example): free."""


def bound_tokens(section: Synthesis, prompt: str) -> tuple[int, int]:
    """Return upper bounds of the (input, output) tokens of a request: each token covers at least one byte."""
    text = prompt + (section.system_prompt or "")
    return len(text.encode()) + _OVERHEAD_TOKENS, section.max_tokens


def read_key(section: Synthesis) -> str | None:
    """Return the API key from the environment; None when it is not set and `base_url` needs none.

    Raises ValueError, without showing the key, when it is required and not set, or cannot be sent in a header.
    """
    provider = str(section.provider)
    variable = section.api_key_variable or KEY_VARIABLES[provider]
    key = os.environ.get(variable, "").strip()
    if not key:
        if section.base_url is not None and section.api_key_variable is None:
            return None
        raise ValueError(
            f"synthesis.provider is {provider}, but {variable} is not in the environment. Type: export {variable}=... "
            "(in the shell, never in a config), and rerun the same command."
        )
    if not key.isascii() or not key.isprintable() or " " in key or len(key) < _MIN_KEY_LENGTH:
        raise ValueError(
            f"{variable} is not a valid key: it has white space, a character that is not ASCII, or fewer than "
            f"{_MIN_KEY_LENGTH} characters. Set it again."
        )
    return key


def require_client(section: Synthesis) -> None:
    """Raise ValueError, with the command that installs it, when a package that `section` needs is missing."""
    needed = {str(section.provider): f"synthesis.provider is {section.provider}"}
    if section.requests_per_minute or section.tokens_per_minute:
        needed["aiolimiter"] = "synthesis.requests_per_minute or tokens_per_minute is set"
    for name, reason in needed.items():
        if find_spec(name) is None:
            raise ValueError(
                f"{reason}, which needs {name}, but it is not installed. Type: {sys.executable} -m pip install "
                f"'{PACKAGES[name]}'"
            )


def open_provider(section: Synthesis) -> "Provider":
    """Return the provider of a section; nothing is sent yet.

    Raises ValueError when its client or its key is missing.
    """
    require_client(section)
    providers: dict[str, type[Provider]] = {"openai": _OpenAI, "anthropic": _Anthropic}
    return providers[str(section.provider)](section, read_key(section))


class Provider(ABC):
    """A service that answers one prompt at a time.

    One generator writes the client libraries of both services, so their errors have the same names.
    """

    client_class: ClassVar[str]

    def __init__(self, section: Synthesis, key: str | None) -> None:
        self.section, self.key = section, key
        self.library: Any = import_module(str(section.provider))
        self.client = getattr(self.library, self.client_class)(
            api_key=key or "none",
            base_url=section.base_url or _BASE_URLS[str(section.provider)],
            timeout=section.timeout_s,
            max_retries=0,
            # A redirect would carry the key to another server.
            http_client=self.library.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    @abstractmethod
    async def _create(self, section: Synthesis, prompt: str) -> Any:
        """Send a request; return the client library's message."""

    @abstractmethod
    def _parse(self, message: Any, bound: tuple[int, int]) -> Answer:
        """Return the answer in a message; token counts that it lacks are taken from `bound`.

        Raises _MalformedAnswerError when it holds no answer.
        """

    async def answer(self, prompt: str) -> Answer:
        """Return the answer to a prompt.

        Raises UnavailableError, LostAnswerError or RejectedPromptError for this request, and ValueError when no
        request can succeed.
        """
        library = self.library
        try:
            # The client's own timeout applies to each read: a body that trickles in would never end.
            async with asyncio.timeout(self.section.timeout_s):
                message = await self._create(self.section, prompt)
            return self._parse(message, bound_tokens(self.section, prompt))
        except (TimeoutError, library.APITimeoutError):
            raise LostAnswerError(f"no answer in {self.section.timeout_s:g} s") from None
        except library.APIStatusError as error:
            self._raise_status(error)
        except library.APIConnectionError as error:
            reason = self._redact(first_line(error.__cause__ or error))
            if "ConnectError" in type(error.__cause__).__name__:
                raise UnavailableError(f"no connection: {reason}") from None
            raise LostAnswerError(f"the connection broke: {reason}") from None
        # ValueError: invalid JSON or UTF-8, or a number of five thousand digits.
        except (
            library.APIResponseValidationError,
            ValueError,
            RecursionError,
            _MalformedAnswerError,
        ) as error:
            reason = self._redact(first_line(error))[:300]
            raise LostAnswerError(f"the answer does not follow the API: {reason}") from None

    def _raise_status(self, error: Any) -> NoReturn:
        status = int(error.status_code)
        reason = self._redact(f"status {status}: {first_line(error)}")[:300]
        is_quota_used_up = "insufficient_quota" in str(getattr(error, "code", "") or "")
        if 300 <= status < 400:
            target = self._redact(str(error.response.headers.get("location")))
            raise ValueError(
                f"{self.section.base_url} redirects to {target}, and the key is not sent there: set "
                "synthesis.base_url to the address that answers."
            ) from None
        if status in _FATAL_STATUSES or is_quota_used_up:
            raise ValueError(
                f"{self.section.provider} refused the request ({reason}). Check synthesis.model "
                f"({self.section.model!r}), synthesis.base_url, the key in the environment and the account. Answers so "
                "far are saved."
            ) from None
        if status in _RETRYABLE_STATUSES or status >= 500:
            raise UnavailableError(reason, read_retry_after(error.response.headers)) from None
        raise RejectedPromptError(reason) from None

    async def check(self) -> str:
        """Return a note on the server. Raises ValueError when it does not answer or does not serve the model."""
        where = self.section.base_url or self.section.provider
        try:
            async with asyncio.timeout(min(self.section.timeout_s, 30)):
                served = [model.id async for model in self.client.models.list()]
        except self.library.APIStatusError as error:
            if int(error.status_code) in (401, 403) or int(error.status_code) < 400:
                self._raise_status(error)
            return f"{where} does not list its models; {self.section.model!r} is not checked"
        except Exception as error:
            raise ValueError(
                f"{where} does not answer ({self._redact(first_line(error.__cause__ or error))}): start the server, or "
                "correct synthesis.base_url."
            ) from None
        model = str(self.section.model)
        # `transformers serve` lists the models in the Hub's cache, but serves folders too.
        if served and model not in served and not Path(model).exists():
            shown = self._redact(", ".join(served[:8]))
            raise ValueError(
                f"synthesis.model is {model!r}, but {where} serves {shown}{' ...' if len(served) > 8 else ''}. "
                "Set synthesis.model to one of these."
            )
        return f"{where} serves {model}"

    async def close(self) -> None:
        """Close all connections."""
        await self.client.close()

    def _redact(self, text: str) -> str:
        """Return a message of the server without the key, which some servers repeat."""
        return text.replace(self.key, _REDACTED) if self.key else text

    def _redact_text(self, text: Any) -> str:
        """Return a text of an answer without the key. Raises _MalformedAnswerError when it is not a string."""
        if not isinstance(text, str):
            raise _MalformedAnswerError(f"expected text, not {text!r}")
        return self._redact(text) if self.key and len(self.key) >= _MIN_SECRET_LENGTH else text

    def _sampling(self) -> dict[str, Any]:
        section = self.section
        given = {"temperature": section.temperature, "top_p": section.top_p}
        return {key: value for key, value in given.items() if value is not None}


class _MalformedAnswerError(Exception):
    """The body is JSON, but not an answer."""


class _OpenAI(Provider):
    """Chat completions of any OpenAI-compatible server."""

    client_class = "AsyncOpenAI"

    async def _create(self, section: Synthesis, prompt: str) -> Any:
        system = [{"role": "system", "content": section.system_prompt}] * bool(
            section.system_prompt
        )
        # OpenAI's newer models accept only the newer name; other servers only the older one.
        limit = "max_completion_tokens" if section.base_url is None else "max_tokens"
        return await self.client.chat.completions.create(
            model=section.model,
            messages=[*system, {"role": "user", "content": prompt}],
            seed=section.seed,
            **{limit: section.max_tokens},
            **self._sampling(),
        )

    def _parse(self, message: Any, bound: tuple[int, int]) -> Answer:
        # Some gateways return an error with status 200.
        if error := getattr(message, "error", None):
            raise _MalformedAnswerError(f"it holds an error, {error}")
        try:
            choice, usage = message.choices[0], message.usage
            refusal = getattr(choice.message, "refusal", None)
            finish = {"content_filter": "refusal"}.get(choice.finish_reason, choice.finish_reason)
            return Answer(
                text=self._redact_text(choice.message.content or refusal or ""),
                finish="refusal" if refusal else self._redact_text(str(finish)),
                input_tokens=_count(usage, "prompt_tokens", bound[0]),
                output_tokens=_count(usage, "completion_tokens", bound[1]),
                model=self._redact_text(str(message.model)),
            )
        except (AttributeError, TypeError, IndexError, ValueError) as error:
            raise _MalformedAnswerError(first_line(error)) from None


class _Anthropic(Provider):
    """The Messages API of Anthropic."""

    client_class = "AsyncAnthropic"

    async def _create(self, section: Synthesis, prompt: str) -> Any:
        system = {"system": section.system_prompt} if section.system_prompt else {}
        return await self.client.messages.create(
            model=section.model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=section.max_tokens,
            extra_body=self._sampling(),  # not parameters of the current client, but older models accept them
            **system,
        )

    def _parse(self, message: Any, bound: tuple[int, int]) -> Answer:
        finishes = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}
        try:
            text = "".join(block.text for block in message.content if block.type == "text")
            usage = message.usage
            cached = (_count(usage, f"cache_{how}_input_tokens", 0) for how in ("read", "creation"))
            return Answer(
                text=self._redact_text(text),
                finish=finishes.get(
                    message.stop_reason, self._redact_text(str(message.stop_reason))
                ),
                input_tokens=_count(usage, "input_tokens", bound[0]) + sum(cached),
                output_tokens=_count(usage, "output_tokens", bound[1]),
                model=self._redact_text(str(message.model)),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise _MalformedAnswerError(first_line(error)) from None


def _count(usage: Any, name: str, bound: int) -> int:
    """Return the number of tokens that a server reports, or `bound` when it reports no valid number."""
    number = getattr(usage, name, None)
    return number if isinstance(number, int) and number >= 0 else bound


def read_retry_after(headers: Any, *, clock: Callable[[], float] = time.time) -> float | None:
    """Return the seconds that a server asks to wait; None when it does not ask.

    Reads retry-after-ms, then Retry-After (RFC 9110, section 10.2.3: seconds or a date); `clock` gives Unix time.
    """
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
        return max(0.0, parsedate_to_datetime(value).timestamp() - clock())
    except (ValueError, OverflowError):
        return None
