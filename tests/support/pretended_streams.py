"""Streams and events of pretended GPUs, on a clock that is computed: no test waits, and no busy machine disturbs it.

A stream keeps its order, and waits for its events. Of the default stream a GPU does one operation at a time; those of
another stream are done beside it, and what is at work in the default stream takes as much longer. The host's own time
counts only where it waits.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(eq=False)
class _Work:
    """An operation in a stream: what it waits for, when it was queued, and when it ends, if that is known."""

    gpu: int
    seconds: float
    queued_at: float
    after: list["_Work"] = field(default_factory=list)
    ends_at: float | None = None


@dataclass(eq=False)
class Stream:
    """A stream on a GPU; `last`: the operation that was queued last."""

    clock: "Clock"
    device: torch.device
    queue: deque[_Work] = field(default_factory=deque)
    last: _Work | None = None
    awaited: list[_Work] = field(default_factory=list)
    free_at: float = 0.0
    at_work: _Work | None = None

    def wait_event(self, event: "Event") -> None:
        """Let what is queued from now on wait for an event."""
        if event.work is not None:
            self.awaited.append(event.work)

    def wait_stream(self, other: "Stream") -> None:
        """Let what is queued from now on wait for what is queued in another stream."""
        if other.last is not None:
            self.awaited.append(other.last)


@dataclass(eq=False)
class Event:
    """A point in a stream."""

    clock: "Clock"
    work: _Work | None = None

    def record(self, stream: Stream) -> None:
        """Mark what was queued so far."""
        self.work = stream.last


class Clock:
    """The time of the host, and what the GPUs have done until then. busy: seconds of work of each GPU."""

    def __init__(self, gpus: int) -> None:
        self.now, self.busy = 0.0, [0.0] * gpus
        self._default = [Stream(self, torch.device("cuda", g)) for g in range(gpus)]
        self._streams = list(self._default)
        self._current = list(self._default)

    def new_stream(self, device: Any) -> Stream:
        """Stand in for torch.cuda.Stream."""
        stream = Stream(self, torch.device(device))
        self._streams.append(stream)
        return stream

    def current(self, device: Any = None) -> Stream:
        """Stand in for torch.cuda.current_stream."""
        return self._current[0 if device is None else torch.device(device).index or 0]

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        """Stand in for torch.cuda.stream."""
        gpu = stream.device.index or 0
        before, self._current[gpu] = self._current[gpu], stream
        try:
            yield
        finally:
            self._current[gpu] = before

    def run(self, device: torch.device, seconds: float) -> None:
        """Queue an operation in the current stream of a GPU."""
        if seconds == 0.0:
            return
        stream, gpu = self.current(device), device.index or 0
        work = _Work(gpu, seconds, self.now, stream.awaited)
        stream.awaited, stream.last = [], work
        stream.queue.append(work)

    def meet(self, first: torch.device, second: torch.device) -> None:
        """Let two GPUs' current streams wait for each other."""
        streams = self.current(first), self.current(second)
        works = [stream.last for stream in streams]
        for stream, work in zip(streams, reversed(works), strict=True):
            stream.awaited += [work] if work is not None else []

    def wait_for(self, stream: Stream) -> None:
        """Let the host wait for all that is queued in a stream."""
        while stream.queue:
            self._advance()
        if stream.last is not None and stream.last.ends_at is not None:
            self.now = max(self.now, stream.last.ends_at)

    def wait_for_all(self) -> None:
        """Let the host wait for all GPUs."""
        for stream in self._streams:
            self.wait_for(stream)

    def _advance(self) -> None:
        """Let the operation that can begin first be done."""
        begins, stream = min(
            ((at, s) for s in self._streams if (at := self._begin(s)) is not None),
            key=lambda found: found[0],
        )
        work = stream.queue.popleft()
        work.ends_at = stream.free_at = begins + work.seconds
        work.after, stream.at_work = [], work
        self.busy[work.gpu] += work.seconds
        main = self._default[work.gpu]
        if main is not stream and main.at_work is not None and main.free_at > begins:
            main.free_at += work.seconds
            main.at_work.ends_at = main.free_at

    @staticmethod
    def _begin(stream: Stream) -> float | None:
        """Return when the stream's next operation can begin, None while it waits for another."""
        if not stream.queue:
            return None
        work = stream.queue[0]
        ends = [before.ends_at for before in work.after]
        if any(end is None for end in ends):
            return None
        return max([work.queued_at, stream.free_at, *(end for end in ends if end is not None)])
