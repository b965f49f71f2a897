"""How busy GPUs are while something runs, as NVML says through nvidia-smi."""

import statistics
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

INTERVAL_S = 0.3


def read_busy(gpus: Sequence[str]) -> list[int]:
    """Return for each GPU, by its UUID, the percent of the last sample period in which a kernel ran on it."""
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", f"--id={','.join(gpus)}", *query]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@contextmanager
def sample_busy(gpus: Sequence[str]) -> Iterator[list[list[int]]]:
    """Yield a list that gets the samples of the GPUs, at intervals, until the block ends."""
    samples: list[list[int]] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(INTERVAL_S):
            samples.append(read_busy(gpus))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


def mean_busy(samples: list[list[int]]) -> list[float]:
    """Return the mean percent of each GPU, without the first and last two samples: the work began and ended in them."""
    assert len(samples) > 10, f"{len(samples)} samples are too few"
    return [statistics.mean(column) for column in zip(*samples[2:-2], strict=True)]
