"""Progress of the teacher's pass: a bar on the terminal, plain lines in the log.

The bar is of all workers together: it looks at which parts have a file. What a worker scores between two looks is its
own. One process shows a bar on a terminal, whoever locks it first; for the others, and where there is no terminal,
there are lines. A bar goes to the terminal itself and never to a log.
"""

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from retort.cli import open_terminal

logger = logging.getLogger(__name__)

_LINE_S = 10.0
# What a narrow terminal cuts off stands last.
_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"
_LOOK_S = 2.0  # between looks at the folder of parts: 10,000 files take 10 ms


class Progress:
    """How far all workers are, and how fast this one is."""

    def __init__(
        self,
        parts: Sequence[dict[str, Any]],
        files: Sequence[Path],
    ) -> None:
        """`parts` of the index, each with the file that it becomes."""
        self.tokens = 0  # of this worker
        self._parts = {path.name: part for path, part in zip(files, parts, strict=True)}
        self._places = {part["name"]: place for place, part in enumerate(parts, start=1)}
        self._folder = files[0].parent if files else Path()
        self._seen: set[str] = set()
        # Of the parts that have a file, whoever made it, and of all parts.
        self._done = dict.fromkeys(("parts", "sequences", "tokens", "positions", "bytes"), 0)
        self._all = {name: sum(part[name] for part in parts) for name in ("sequences", "tokens")}
        self._num_done = 0
        self._part_tokens = 0  # of the part that this worker is at
        self._started = self._said = time.monotonic()
        self._part_started: dict[str, float] = {}
        self._look()
        self._terminal = open_terminal()
        self._bar = self._open_bar(self._terminal) if self._terminal else None

    def _open_bar(self, terminal: TextIO) -> "tqdm[Any]":
        return tqdm(
            desc="teacher",
            total=self._all["tokens"],
            initial=self._done["tokens"],
            unit=" tokens",
            unit_scale=True,
            smoothing=0,  # others' parts come whole, in bursts
            bar_format=_BAR,
            file=terminal,
            dynamic_ncols=True,
            mininterval=0.5,
            postfix=self._describe(),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        """Show where it ended, and let go of the terminal."""
        self._part_tokens = 0
        self._look()
        if self._bar is not None:
            self._show()
            self._bar.close()
        if self._terminal is not None:
            self._terminal.close()

    def start_part(self, part: dict[str, Any]) -> None:
        """This worker begins a part."""
        self._part_tokens = 0
        self._part_started[part["name"]] = time.monotonic()

    def add(self, tokens: int) -> None:
        """This worker has scored so many tokens more."""
        self.tokens += tokens
        self._part_tokens += tokens
        self.refresh()

    def end_part(self, part: dict[str, Any], path: Path) -> None:
        """A part of this worker's has its file; told by the thread that writes, while the next one is begun."""
        seconds = time.monotonic() - self._part_started.pop(part["name"])
        self._num_done += 1
        size = path.stat().st_size if path.exists() else 0  # merged and removed by others meanwhile
        logger.debug(
            f"part {self._places[part['name']]} of {len(self._parts)} done: {part['sequences']:,} samples, "
            f"{part['tokens']:,} tokens, {size:,} bytes, {seconds:.1f} s"
        )

    def refresh(self) -> None:
        """Look at the parts and show it, if it was not done a moment ago; while waiting for others, too."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._look()
        if self._bar is not None:
            self._show()
        if now - self._said >= _LINE_S:
            self._said = now
            rate = self.tokens / (now - self._started)
            logger.log(
                logging.INFO if self._bar is None else logging.DEBUG,
                f"{self._describe()}  here: {self._num_done} parts, {self.tokens:,} tokens, {rate:,.0f} tokens/s",
            )

    def _look(self) -> None:
        self._looked = time.monotonic()
        try:
            entries = list(os.scandir(self._folder))
        except FileNotFoundError:  # merged and removed, or not made yet
            return
        for entry in entries:
            part = self._parts.get(entry.name)
            if part is None or entry.name in self._seen:
                continue
            with suppress(FileNotFoundError):  # merged and removed meanwhile
                self._done["bytes"] += entry.stat().st_size
                self._done["parts"] += 1
                self._seen.add(entry.name)
                for name in ("sequences", "tokens", "positions"):
                    self._done[name] += part[name]

    def _describe(self) -> str:
        done = self._done
        per_position = (
            f", {done['bytes'] / done['positions']:.1f} B/position" if done["positions"] else ""
        )
        return (
            f"parts {done['parts']:,}/{len(self._parts):,}, samples {done['sequences']:,}/{self._all['sequences']:,}, "
            f"{done['bytes'] / 1e6:,.1f} MB{per_position}"
        )

    def _show(self) -> None:
        assert self._bar is not None
        now = min(self._done["tokens"] + self._part_tokens, self._all["tokens"])
        self._bar.set_postfix_str(self._describe(), refresh=False)
        self._bar.update(max(0, now - self._bar.n))
