"""Progress of the teacher's pass: a bar on the terminal, plain lines in the log.

The bar covers all workers: it counts the parts that have a file, and the tokens of this worker's current part. One
process, the first to lock the terminal, shows a bar; the others log lines, as do all without a terminal. The bar is
written to the terminal itself, never to a log.
"""

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from retort.cache.parts import RECEIPT_SUFFIX
from retort.io.progress import Meter
from retort.tokens.index import Part

logger = logging.getLogger(__name__)

# A narrow terminal cuts off the end.
_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"


class Progress:
    """Progress of all workers, and speed of this one."""

    def __init__(
        self,
        parts: Sequence[Part],
        files: Sequence[Path],
        *,
        log_interval_s: float = 10.0,
        poll_interval_s: float = 2.0,
    ) -> None:
        """parts, files: of the index, with the path of each.

        A line is logged every log_interval_s; the folder is listed every poll_interval_s (10 ms for 10,000 files).
        """
        self.tokens = 0  # scored by this worker
        self._poll_interval_s = poll_interval_s
        self._parts = {path.name: part for path, part in zip(files, parts, strict=True)}
        self._numbers = {part.name: number for number, part in enumerate(parts, start=1)}
        self._folder = files[0].parent if files else Path()
        self._are_receipts = bool(files) and files[0].name.endswith(RECEIPT_SUFFIX)
        self._seen: set[str] = set()
        # Totals of the parts that have a file, by any worker, and of all parts.
        self._done = dict.fromkeys(("parts", "sequences", "tokens", "positions", "bytes"), 0)
        self._all = {
            "sequences": sum(part.sequences for part in parts),
            "tokens": sum(part.tokens for part in parts),
        }
        self._num_done = 0
        self._part_tokens = 0  # scored of this worker's current part
        self._started = time.monotonic()
        self._part_started: dict[str, float] = {}
        self._poll()
        self._meter = Meter(
            self._all["tokens"],
            unit="tokens",
            describe=self._describe,
            line=self._describe_line,
            interval_s=log_interval_s,
            initial=self._done["tokens"],
            desc="teacher",
            unit_scale=True,
            smoothing=0,  # other workers' parts arrive whole, in bursts
            bar_format=_BAR,
            mininterval=0.5,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        """Show the final state, and release the terminal."""
        self._part_tokens = 0
        self._poll()
        self._show()
        self._meter.close()

    def start_part(self, part: Part) -> None:
        """Note that this worker starts a part."""
        self._part_tokens = 0
        self._part_started[part.name] = time.monotonic()

    def add(self, tokens: int) -> None:
        """Add tokens that this worker has scored."""
        self.tokens += tokens
        self._part_tokens += tokens
        self.refresh()

    def end_part(self, part: Part, path: Path) -> None:
        """Note that this worker's part is written; called by the writing thread, maybe after the next `start_part`."""
        seconds = time.monotonic() - self._part_started.pop(part.name)
        self._num_done += 1
        size = path.stat().st_size if path.exists() else 0  # already merged and removed by others
        logger.debug(
            f"part {self._numbers[part.name]} of {len(self._parts)} done: {part.sequences:,} samples, "
            f"{part.tokens:,} tokens, {size:,} bytes, {seconds:.1f} s"
        )

    def refresh(self) -> None:
        """Count the parts and show the progress, if it is time to; called while waiting for other workers too."""
        if time.monotonic() - self._polled >= self._poll_interval_s:
            self._poll()
        self._show()

    def _poll(self) -> None:
        self._polled = time.monotonic()
        try:
            entries = list(os.scandir(self._folder))
        except FileNotFoundError:  # not made yet, or merged and removed
            return
        for entry in entries:
            part = self._parts.get(entry.name)
            if part is None or entry.name in self._seen:
                continue
            with suppress(FileNotFoundError):  # merged and removed since
                self._done["bytes"] += entry.stat().st_size
                self._done["parts"] += 1
                self._seen.add(entry.name)
                self._done["sequences"] += part.sequences
                self._done["tokens"] += part.tokens
                self._done["positions"] += part.positions

    def _describe(self) -> str:
        done = self._done
        if self._are_receipts:  # the bytes are in a store
            return (
                f"parts {done['parts']:,}/{len(self._parts):,}, samples "
                f"{done['sequences']:,}/{self._all['sequences']:,}"
            )
        per_position = (
            f", {done['bytes'] / done['positions']:.1f} B/position" if done["positions"] else ""
        )
        return (
            f"parts {done['parts']:,}/{len(self._parts):,}, samples {done['sequences']:,}/{self._all['sequences']:,}, "
            f"{done['bytes'] / 1e6:,.1f} MB{per_position}"
        )

    def _describe_line(self) -> str:
        rate = self.tokens / (time.monotonic() - self._started)
        return f"{self._describe()}  here: {self._num_done} parts, {self.tokens:,} tokens, {rate:,.0f} tokens/s"

    def _show(self) -> None:
        self._meter.done = min(self._done["tokens"] + self._part_tokens, self._all["tokens"])
        self._meter.show()
