"""Run ahead on GPUs: forwards of the next batches are queued before the results of a batch are looked at.

Work on a GPU is queued in streams. Forwards are queued in each GPU's default stream; head and selection, after which
the host waits for the result, in a stream of their own. So the host waits for one batch while the GPUs work on the next
ones; of a teacher that is spread over G GPUs, each works on another batch. Kernels and shapes stay the same, and so do
the bytes.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Queued:
    """A tensor that a GPU may not have computed yet; `event` is None on a CPU, which computes at once."""

    values: Tensor
    event: Any = None

    @classmethod
    def mark(cls, values: Tensor) -> "Queued":
        """Return a tensor that was queued just now in its device's default stream."""
        if values.device.type == "cpu":
            return cls(values)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(values.device))
        return cls(values, event)


class SideStreams:
    """A stream on each of some GPUs, beside the default ones; nothing for a CPU."""

    def __init__(self, devices: set[torch.device]) -> None:
        gpus = sorted((d for d in devices if d.type != "cpu"), key=str)
        self._streams = [torch.cuda.Stream(gpu) for gpu in gpus]  # type: ignore[no-untyped-call]

    @contextmanager
    def after(self, queued: Queued) -> Iterator[Tensor]:
        """Yield the values; work in the block waits for them, not for what was queued after them."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(torch.cuda.stream(stream))
                if queued.event is not None:
                    stream.wait_event(queued.event)
                    if stream.device == queued.values.device:
                        queued.values.record_stream(stream)
            yield queued.values
