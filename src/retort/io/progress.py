"""Progress of a job: a bar on the terminal, if this process has it, and lines in the log every few seconds."""

import logging
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from retort.cli import open_terminal

logger = logging.getLogger(__name__)


class Meter:
    """Counts up to `total`. Without a bar, its lines are shown to the user; with one, they are in the log only.

    describe: what stands beside the bar's count; line: a line of the log, by default count and description; options:
    of tqdm. A line is logged every interval_s.
    """

    def __init__(
        self,
        total: int,
        *,
        unit: str,
        describe: Callable[[], str],
        line: Callable[[], str] | None = None,
        interval_s: float = 10.0,
        has_bar: bool = True,
        **options: Any,
    ) -> None:
        self.done = int(options.get("initial", 0))
        self.describe = describe
        self._line = line or (lambda: f"{self.done:,} of {total:,} {unit}, {describe()}")
        self._interval_s, self._logged = interval_s, time.monotonic()
        self._terminal = open_terminal() if has_bar else None
        self._bar = tqdm(
            total=total,
            unit=f" {unit}",
            file=self._terminal,
            disable=self._terminal is None,
            dynamic_ncols=True,
            **options,
        )

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        """Show the final state, and release the terminal."""
        self.show(is_due=True)
        self.close()

    def close(self) -> None:
        """Release the terminal."""
        self._bar.close()
        if self._terminal is not None:
            self._terminal.close()

    def advance(self) -> None:
        """Count one more unit."""
        self.done += 1
        self.show()

    @property
    def is_due(self) -> bool:
        """Whether it is time for a line."""
        return time.monotonic() - self._logged >= self._interval_s

    def show(self, *, is_due: bool = False) -> None:
        """Move the bar to `done`, and log a line if it is time to, or `is_due` in any case."""
        if self._terminal is not None:
            self._bar.set_postfix_str(self.describe(), refresh=False)
            self._bar.update(max(0, self.done - self._bar.n))
        if is_due or self.is_due:
            self._logged = time.monotonic()
            logger.log(logging.DEBUG if self._terminal else logging.INFO, self._line())
