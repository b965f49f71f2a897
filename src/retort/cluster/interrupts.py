"""SIGINT and SIGTERM in two stages: the first asks for a clean stop, another one ends the process at once."""

import os
import signal
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

# SLURM signals every process of a job, and srun passes its SIGTERM on: within this time both are one request.
_SAME_REQUEST_S = 2.0


class Interrupts:
    """Handles SIGINT and SIGTERM within a `with` block of the main thread; at its end the handlers before are back.

    first: called with the number of the first signal, which `number` keeps (0: none came); again: called with that of
    another one, when the handlers before are back. A signal that the process ignored before is ignored still.
    """

    def __init__(
        self,
        first: Callable[[int], None],
        again: Callable[[int], None] = signal.raise_signal,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.number = 0
        self._first, self._again, self._clock = first, again, clock
        self._process = os.getpid()
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        """Take over the signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give them back."""
        self._give_back()

    def _give_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _take(self, number: int, _: object) -> None:
        if os.getpid() != self._process:
            return  # a process that was forked from this one, which ends it
        is_same = number == self.number == signal.SIGTERM
        if not self.number:
            self.number, self._since = number, self._clock()
            self._first(number)
        elif not is_same or self._clock() - self._since > _SAME_REQUEST_S:
            self._give_back()
            self._again(number)
