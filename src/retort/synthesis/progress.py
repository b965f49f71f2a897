"""Progress of a synthesis: a bar on a terminal; otherwise a log line every ten seconds."""

import logging
import time
from collections.abc import Callable

from tqdm import tqdm

from retort.cli import open_terminal

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0


class Progress:
    """Counts up to `total` units; `describe` returns what is shown beside the count, such as the cost so far."""

    def __init__(self, total: int, *, unit: str, describe: Callable[[], str]) -> None:
        self.total, self.unit, self.describe = total, unit, describe
        self.done = 0
        self._last_log = time.monotonic()
        self._terminal = open_terminal()
        self._bar = tqdm(
            total=total,
            desc=unit,
            file=self._terminal,
            disable=self._terminal is None,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._show(is_last=True)
        self._bar.close()
        if self._terminal is not None:
            self._terminal.close()

    def advance(self) -> None:
        """Count one more unit."""
        self.done += 1
        self._show()

    def _show(self, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if not self._bar.disable:
            self._bar.set_postfix_str(self.describe(), refresh=False)
            self._bar.update(self.done - self._bar.n)
        elif is_last or now - self._last_log >= _LOG_INTERVAL_S:
            self._last_log = now
            logger.info(f"{self.done:,} of {self.total:,} {self.unit}, {self.describe()}")
