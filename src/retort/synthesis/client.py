"""Asking a server: several requests at a time, no faster than it allows, again where that helps, within a budget.

Waits between attempts double from half a second to a minute, each drawn between half and whole; where the server says
how long to wait (Retry-After), that long. Before a request goes out, the most that it can cost is added to what is
paid and what is in flight: where the sum would pass the budget, nothing more is sent.
"""

import asyncio
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tqdm import tqdm

from retort.cli import open_terminal
from retort.config.sections import Synthesis
from retort.synthesis.journal import Journal, Paid
from retort.synthesis.prompts import Prompt
from retort.synthesis.providers import Answer, Lost, Provider, Rejected, TurnedAway, bound_tokens

logger = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
_LONGEST_ASKED_WAIT_S = 600.0  # a Retry-After beyond it is an outage
_LINE_S = 10.0
_MANY_REJECTED = 10  # in a row, at the beginning: it is not the prompts


class Stopped(ValueError):  # noqa: N818
    """The budget allows no further request; the sentence says what to raise."""


def wait_before_retry(state: RetryCallState) -> float:
    """Return the seconds before another attempt: the server's own word, else a doubling wait with jitter."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.after_s if isinstance(error, TurnedAway) else None
    longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(state.attempt_number - 1, 30))
    drawn = random.uniform(longest / 2, longest)
    if asked is None:
        return drawn
    return min(asked, _LONGEST_ASKED_WAIT_S) + random.uniform(0, _FIRST_WAIT_S)


def describe_estimate(section: Synthesis, prompts: Sequence[Prompt]) -> str:
    """Return what asking these prompts will take, before the first request: a guess, and what it cannot pass."""
    texts = [p.text + (section.system_prompt or "") for p in prompts]
    guessed = Paid(
        input_tokens=sum(
            len(t.encode()) // 4 + 8 for t in texts
        ),  # English: some four bytes a token
        output_tokens=section.max_tokens * len(prompts),
    )
    line = (
        f"{len(prompts):,} prompt{'s' * (len(prompts) != 1)} to ask: about {guessed.input_tokens:,} tokens in, at most "
        f"{guessed.output_tokens:,} out"
    )
    prices = section.price_per_million_input, section.price_per_million_output
    if any(prices):
        read = Paid(input_tokens=guessed.input_tokens).cost(*prices)
        written = guessed.cost(*prices) - read
        return f"{line}; about {read:,.4f} for the prompts and at most {written:,.4f} for the responses"
    return f"{line}; no price is set (synthesis.price_per_million_input, price_per_million_output)"


def describe_paid(section: Synthesis, paid: Paid) -> str:
    """Return what was paid so far, in a few words."""
    prices = section.price_per_million_input, section.price_per_million_output
    cost = f", {paid.cost(*prices):,.4f} paid" if any(prices) else ""
    lost = f", {paid.lost_requests} lost (counted at their most)" if paid.lost_requests else ""
    return f"{paid.tokens:,} tokens{cost}{lost}"


class Asker:
    """Asks the prompts of given places, and writes each answer into the journal as it comes."""

    def __init__(
        self,
        section: Synthesis,
        prompts: Sequence[Prompt],
        journal: Journal,
        provider: Provider,
    ) -> None:
        self.section, self.prompts = section, prompts
        self.journal, self.provider = journal, provider
        # By place; not in the journal, for they cost nothing to ask again.
        self.rejected: dict[int, str] = {}
        self._requests, self._tokens = _limiters(section, prompts)
        self._stopped: ValueError | OSError | None = None
        # What answers cost beyond what they could: a server's long system prompt, or a max_tokens that it passes over.
        self._beyond = (0, 0)
        for place, answer in journal.answers.items():
            self._learn(place, answer)

    async def ask(self, places: Sequence[int]) -> None:
        """Ask these prompts. What is in flight when asking must stop is waited for: it will have been paid.

        Raises Stopped where the budget ends, ValueError where the server refuses for good.
        """
        self._landed = asyncio.Condition()
        with _Progress(self, len(places)) as self._progress:
            queue = iter(places)
            count = min(self.section.concurrency, len(places))
            async with asyncio.TaskGroup() as group:
                for _ in range(count):
                    group.create_task(self._work(queue))
        if self._stopped:
            raise self._stopped

    async def _work(self, queue: Iterator[int]) -> None:
        for place in queue:
            if self._stopped:
                return
            try:
                await self._ask_one(place)
            except (ValueError, OSError) as error:  # the disk may be full
                self._stopped = self._stopped or error
            self._progress.show()

    async def _ask_one(self, place: int) -> None:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.section.max_attempts),
            wait=wait_before_retry,
            retry=retry_if_exception_type((TurnedAway, Lost)),
            before_sleep=self._note_retry,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    await self._attempt(place)
        except Rejected as error:
            self.rejected[place] = str(error)
            if not self.journal.answers and len(self.rejected) >= _MANY_REJECTED:
                raise ValueError(
                    f"the server rejects every prompt ({error}): check the settings of synthesis that are sent along, "
                    "such as temperature, top_p and max_tokens."
                ) from None
        except (TurnedAway, Lost) as error:
            raise ValueError(
                f"prompt {place} has no answer after {self.section.max_attempts} attempts ({error}). What was answered "
                "is kept: run the same command again when the server is well, or raise synthesis.max_attempts or "
                "timeout_s."
            ) from None

    async def _attempt(self, place: int) -> None:
        await self._requests()
        await self._tokens(sum(bound_tokens(self.section, self.prompts[place].text)))
        await self._reserve(place)
        try:
            answer = await self.provider.answer(self.prompts[place].text)
        except (TurnedAway, Rejected, ValueError):
            self.journal.turn_away(place)
            raise
        except Lost:
            self.journal.lose(place)
            raise
        else:
            self._learn(place, answer)
            self.journal.keep(place, answer)
        finally:
            with suppress(asyncio.CancelledError):
                async with self._landed:
                    self._landed.notify_all()

    def _bound(self, place: int) -> tuple[int, int]:
        """Return the most (input, output) tokens that a request can cost, by what is known so far."""
        read, written = bound_tokens(self.section, self.prompts[place].text)
        return read + self._beyond[0], written + self._beyond[1]

    def _learn(self, place: int, answer: Answer) -> None:
        read, written = bound_tokens(self.section, self.prompts[place].text)
        beyond = answer.input_tokens - read, answer.output_tokens - written
        self._beyond = max(self._beyond[0], beyond[0]), max(self._beyond[1], beyond[1])

    async def _reserve(self, place: int) -> None:
        """Note that a request goes out; wait while only what is in flight stands between it and the budget."""
        async with self._landed:
            while why := self._passes_budget(bound := self._bound(place)):
                if self._stopped or not self.journal.open:
                    raise Stopped(why)
                await self._landed.wait()
            if self._stopped:
                raise self._stopped
            self.journal.send(place, bound)

    def _passes_budget(self, bound: tuple[int, int]) -> str | None:
        section, reserved = self.section, self.journal.reserved
        prices = section.price_per_million_input, section.price_per_million_output
        cost = reserved.cost(*prices) + Paid(input_tokens=bound[0], output_tokens=bound[1]).cost(
            *prices
        )
        limits = {
            "max_cost": (cost, section.max_cost, self.journal.paid.cost(*prices)),
            "max_total_tokens": (
                reserved.tokens + sum(bound),
                section.max_total_tokens,
                self.journal.paid.tokens,
            ),
        }
        for key, (reached, limit, paid) in limits.items():
            if limit is not None and reached > limit:
                return (
                    f"the budget is used up: synthesis.{key} is {limit:,}, {paid:,.6g} are spent, and one more request "
                    f"could cost {reached - paid:,.6g}. {len(self.journal.answers):,} answers are kept: raise "
                    f"synthesis.{key} and run the same command again, or lower synthesis.num_examples to what is there."
                )
        return None

    def _note_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        wait = state.next_action.sleep if state.next_action else 0.0
        logger.info(f"attempt {state.attempt_number} in vain ({error}); again in {wait:.1f} s")


def _limiters(section: Synthesis, prompts: Sequence[Prompt]) -> tuple[Any, Any]:
    """Return what to wait for before a request, and before so many tokens.

    Neither lets a burst through: requests go out evenly spaced, and the bucket of tokens holds one largest request.
    """

    async def at_once(amount: int = 1) -> None:
        """Nothing to wait for."""

    requests = tokens = at_once
    if section.requests_per_minute is None and section.tokens_per_minute is None:
        return requests, tokens
    from aiolimiter import AsyncLimiter

    if section.requests_per_minute is not None:
        requests = AsyncLimiter(1, 60 / section.requests_per_minute).acquire  # type: ignore[assignment]
    if section.tokens_per_minute is not None:
        largest = max(sum(bound_tokens(section, p.text)) for p in prompts)
        seconds = 60 * largest / section.tokens_per_minute
        tokens = AsyncLimiter(largest, seconds).acquire  # type: ignore[assignment]
    return requests, tokens


class _Progress:
    """A bar with the running cost on a terminal; without one, a line every ten seconds."""

    def __init__(self, asker: Asker, total: int) -> None:
        self.asker, self.total = asker, total
        self.before = len(asker.journal.answers) + len(asker.rejected)
        self.said = time.monotonic()
        self.terminal = open_terminal()
        self.bar = (
            tqdm(
                total=total, desc="answers", file=self.terminal, dynamic_ncols=True, smoothing=0.05
            )
            if self.terminal
            else None
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.show(is_last=True)
        if self.bar is not None and self.terminal is not None:
            self.bar.close()
            self.terminal.close()

    def show(self, *, is_last: bool = False) -> None:
        asker, now = self.asker, time.monotonic()
        done = len(asker.journal.answers) + len(asker.rejected) - self.before
        words = describe_paid(asker.section, asker.journal.paid)
        if self.bar is not None:
            self.bar.set_postfix_str(words, refresh=False)
            self.bar.update(done - self.bar.n)
        elif is_last or now - self.said >= _LINE_S:
            self.said = now
            logger.info(f"{done:,} of {self.total:,} answered, {words}")
