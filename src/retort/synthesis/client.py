"""The client of a server: concurrent requests within its rate limits, retries, and a budget.

Waits between attempts double from half a second to a minute, each drawn uniformly between half of it and all of it;
when the server says how long to wait (Retry-After), that long. Before a request is sent, its largest possible cost is
added to what is paid and in flight: when the sum exceeds the budget, nothing more is sent.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from retort.config.sections import Synthesis
from retort.io.progress import Meter
from retort.synthesis.journal import Journal, Usage
from retort.synthesis.prompts import LabeledPrompt
from retort.synthesis.providers import (
    Answer,
    LostAnswerError,
    Provider,
    RejectedPromptError,
    UnavailableError,
    bound_tokens,
)

logger = logging.getLogger(__name__)

_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 60.0
_MAX_RETRY_AFTER_S = 600.0  # longer is an outage
_MAX_REJECTED = 10  # before the first answer: the settings are wrong, not the prompts
_BYTES_PER_TOKEN = 4  # of English, roughly
_GUESSED_OVERHEAD_TOKENS = 8  # of a message beside its text

_Limiter = Callable[[float], Awaitable[None]]


class BudgetError(ValueError):
    """The budget allows no further request; the message says which key to raise."""


def wait_before_retry(state: RetryCallState) -> float:
    """Return the seconds to wait before the next attempt: Retry-After, or an exponential backoff, with jitter."""
    error = state.outcome.exception() if state.outcome else None
    retry_after_s = error.retry_after_s if isinstance(error, UnavailableError) else None
    if retry_after_s is not None:
        return min(retry_after_s, _MAX_RETRY_AFTER_S) + random.uniform(0, _FIRST_WAIT_S)
    longest_s = min(_MAX_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(state.attempt_number - 1, 30))
    return random.uniform(longest_s / 2, longest_s)


def describe_estimate(section: Synthesis, prompts: Sequence[LabeledPrompt]) -> str:
    """Return a line on the tokens and the cost of these prompts: a guess, and an upper bound for responses."""
    texts = [p.text + (section.system_prompt or "") for p in prompts]
    num_input = sum(len(t.encode()) // _BYTES_PER_TOKEN + _GUESSED_OVERHEAD_TOKENS for t in texts)
    num_output = section.max_tokens * len(prompts)
    line = (
        f"{len(prompts):,} prompt{'s' * (len(prompts) != 1)} to ask: about {num_input:,} tokens in, at most "
        f"{num_output:,} out"
    )
    prices = _prices(section)
    if any(prices):
        input_cost = Usage(input_tokens=num_input).cost(*prices)
        output_cost = Usage(output_tokens=num_output).cost(*prices)
        return f"{line}; about {input_cost:,.4f} for the prompts and at most {output_cost:,.4f} for the responses"
    return f"{line}; no price is set (synthesis.price_per_million_input, price_per_million_output)"


def describe_usage(section: Synthesis, usage: Usage) -> str:
    """Return the tokens and the cost so far, in a few words."""
    prices = _prices(section)
    cost = f", {usage.cost(*prices):,.4f} paid" if any(prices) else ""
    lost = f", {usage.lost_requests} lost (at their upper bound)" if usage.lost_requests else ""
    return f"{usage.tokens:,} tokens{cost}{lost}"


def _prices(section: Synthesis) -> tuple[float, float]:
    return section.price_per_million_input, section.price_per_million_output


class Client:
    """Sends prompts to a provider, and writes each answer into the journal as it arrives."""

    def __init__(
        self,
        section: Synthesis,
        prompts: Sequence[LabeledPrompt],
        journal: Journal,
        provider: Provider,
    ) -> None:
        self.section, self.prompts = section, prompts
        self.journal, self.provider = journal, provider
        self._num_rejected = 0  # not in the journal: these are free to send again
        self._limit_requests, self._limit_tokens = _build_limiters(section, prompts)
        self._error: ValueError | OSError | None = None
        # Tokens that answers used beyond their bounds: of a server's long system prompt, or a max_tokens it ignores.
        self._excess = (0, 0)
        for index, answer in journal.answers.items():
            self._learn_excess(index, answer)

    async def request_answers(self, indices: Sequence[int]) -> None:
        """Request the answers to these prompts. Requests in flight are awaited even when it must stop: they are paid.

        Raises BudgetError when the budget is used up, ValueError when no request can succeed, and OSError when the
        journal cannot be written.
        """
        self._landed = asyncio.Condition()

        def describe() -> str:
            return describe_usage(self.section, self.journal.usage)

        with Meter(len(indices), unit="answers", describe=describe) as progress:
            queue = iter(indices)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.section.concurrency, len(indices))):
                    group.create_task(self._work(queue, progress))
        if self._error:
            raise self._error

    async def _work(self, queue: Iterator[int], progress: Meter) -> None:
        for index in queue:
            if self._error:
                return
            try:
                await self._request_answer(index)
            except (ValueError, OSError) as error:  # OSError: the disk may be full
                self._error = self._error or error
            else:
                progress.advance()

    async def _request_answer(self, index: int) -> None:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.section.max_attempts),
            wait=wait_before_retry,
            retry=retry_if_exception_type((UnavailableError, LostAnswerError)),
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            await retrying(self._attempt, index)
        except RejectedPromptError as error:
            self._num_rejected += 1
            if not self.journal.answers and self._num_rejected >= _MAX_REJECTED:
                raise ValueError(
                    f"the server rejects every prompt ({error}): check the sampling settings of synthesis, such as "
                    "temperature, top_p and max_tokens."
                ) from None
        except (UnavailableError, LostAnswerError) as error:
            raise ValueError(
                f"prompt {index} has no answer after {self.section.max_attempts} attempts ({error}). Answers so far "
                "are saved: rerun the same command when the server works again, or raise synthesis.max_attempts or "
                "timeout_s."
            ) from None

    async def _attempt(self, index: int) -> None:
        await self._limit_requests(1)
        await self._limit_tokens(sum(bound_tokens(self.section, self.prompts[index].text)))
        await self._reserve(index)
        try:
            answer = await self.provider.answer(self.prompts[index].text)
        except (UnavailableError, RejectedPromptError, ValueError):
            self.journal.add_unavailable(index)
            raise
        except LostAnswerError:
            self.journal.add_lost(index)
            raise
        else:
            self._learn_excess(index, answer)
            self.journal.add_answer(index, answer)
        finally:
            with suppress(asyncio.CancelledError):
                async with self._landed:
                    self._landed.notify_all()

    def _bound(self, index: int) -> tuple[int, int]:
        """Return upper bounds of the (input, output) tokens of a request, given the answers so far."""
        num_input, num_output = bound_tokens(self.section, self.prompts[index].text)
        return num_input + self._excess[0], num_output + self._excess[1]

    def _learn_excess(self, index: int, answer: Answer) -> None:
        num_input, num_output = bound_tokens(self.section, self.prompts[index].text)
        excess = answer.input_tokens - num_input, answer.output_tokens - num_output
        self._excess = max(self._excess[0], excess[0]), max(self._excess[1], excess[1])

    async def _reserve(self, index: int) -> None:
        """Record a request as sent; first wait while requests in flight may still leave budget for it."""
        async with self._landed:
            while reason := self._exceeds_budget(bound := self._bound(index)):
                if self._error or not self.journal.in_flight:
                    raise BudgetError(reason)
                await self._landed.wait()
            if self._error:
                raise self._error
            self.journal.add_sent(index, bound)

    def _exceeds_budget(self, bound: tuple[int, int]) -> str | None:
        section, reserved, usage = self.section, self.journal.reserved, self.journal.usage
        prices = _prices(section)
        cost = reserved.cost(*prices) + Usage(0, *bound).cost(*prices)
        tokens = reserved.tokens + sum(bound)
        for key, total, limit, paid in (
            ("max_cost", cost, section.max_cost, usage.cost(*prices)),
            ("max_total_tokens", tokens, section.max_total_tokens, usage.tokens),
        ):
            if limit is not None and total > limit:
                return (
                    f"the budget is used up: synthesis.{key} is {limit:,}, {paid:,.6g} are spent, and one more request "
                    f"could cost {total - paid:,.6g}. {len(self.journal.answers):,} answers are saved: raise "
                    f"synthesis.{key} and rerun the same command, or lower synthesis.num_examples to this number."
                )
        return None


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    wait_s = state.next_action.sleep if state.next_action else 0.0
    logger.info(f"attempt {state.attempt_number} failed ({error}); retrying in {wait_s:.1f} s")


def _build_limiters(
    section: Synthesis, prompts: Sequence[LabeledPrompt]
) -> tuple[_Limiter, _Limiter]:
    """Return what to await before a request, with its number of requests (1) and of tokens.

    Neither allows bursts: requests are evenly spaced, and the token bucket holds one request of the largest size.
    """

    async def no_wait(amount: float) -> None:
        pass

    requests: _Limiter = no_wait
    tokens: _Limiter = no_wait
    if section.requests_per_minute is None and section.tokens_per_minute is None:
        return requests, tokens
    from aiolimiter import AsyncLimiter  # of the extra synth

    if section.requests_per_minute is not None:
        requests = AsyncLimiter(1, 60 / section.requests_per_minute).acquire
    if section.tokens_per_minute is not None:
        largest = max(sum(bound_tokens(section, p.text)) for p in prompts)
        tokens = AsyncLimiter(largest, 60 * largest / section.tokens_per_minute).acquire
    return requests, tokens
