"""Waits of the client between attempts; what it does with a real server is in test_served.py."""

from tenacity import Future, RetryCallState, Retrying

from retort.synthesis.client import wait_before_retry
from retort.synthesis.providers import LostAnswerError, UnavailableError


def failed_attempt(number: int, error: Exception) -> RetryCallState:
    state = RetryCallState(Retrying(), fn=None, args=(), kwargs={})
    state.attempt_number = number
    state.outcome = Future.construct(number, error, has_exception=True)
    return state


def test_waits_double_with_jitter_to_a_minute_and_follow_retry_after() -> None:
    for number in (1, 2, 5, 9, 40):
        longest = min(60.0, 0.5 * 2 ** min(number - 1, 20))
        waits = {wait_before_retry(failed_attempt(number, LostAnswerError("x"))) for _ in range(40)}
        assert all(longest / 2 <= wait <= longest for wait in waits) and len(waits) > 30
    wait = wait_before_retry(failed_attempt(1, UnavailableError("429", 7.0)))
    assert 7.0 <= wait <= 7.5
