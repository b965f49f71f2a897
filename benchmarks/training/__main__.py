"""A training step from the cache beside other ways to the same gradient: time and memory, as ratios to cross-entropy.

    python -m benchmarks.training [--vocabulary 32768] [--dtype float32] [--chunk-size 128]
    python -m benchmarks.training --device cuda --shape large --vocabulary 128256 --dtype bfloat16

One step is forward and backward of a student (Llama, 6 layers of 256, tied head: 13 million parameters at 32,768 ids,
38 at 131,072) over 2 x 512 tokens, without the optimizer; `--shape large`: 2 layers of 4,096 over 4 x 2,048 tokens. The
teacher keeps 17 tokens a position on average. Every way has a process of its own; they take turns, and the table gives
medians of the fastest step of each turn. Memory is the greatest during the steps, resident on a CPU and allocated on a
GPU, less that before the first one. `liger` (liger-kernel) and `veomni` (its file chunk_topk_distill.py) run when they
can be imported.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.common import REPOSITORY, UnavailableError, format_not_run, make_parser
from benchmarks.training.student import SHAPES, build_model
from benchmarks.training.ways import WAYS, build_step

_STEPS = 4


def read_status(key: str) -> int:
    """Return a number of this process's /proc/self/status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


class Memory:
    """The greatest memory since it was made, less what was used then: resident of a CPU, allocated of a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = read_status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def read(self) -> int:
        """Return it, in bytes."""
        is_cuda = self.device == "cuda"
        return (
            torch.cuda.max_memory_allocated() if is_cuda else read_status("VmHWM")
        ) - self.before


def run_way(flags: argparse.Namespace) -> None:
    """Print the seconds of the fastest step, and the greatest memory of one."""
    torch.set_num_threads(flags.threads)
    shape = SHAPES[flags.shape]
    model = build_model(flags.vocabulary, seed=0, shape=shape).to(flags.device).train()
    try:
        step = build_step(model, shape, flags.way, flags.chunk_size)
    except UnavailableError as error:
        print(json.dumps({"not_run": str(error)}))
        return
    is_bfloat16 = flags.dtype == "bfloat16"
    autocast = torch.autocast(flags.device, dtype=torch.bfloat16, enabled=is_bfloat16)
    wait: Callable[[], None] = torch.cuda.synchronize if flags.device == "cuda" else lambda: None
    memory, seconds = Memory(flags.device), []
    for _ in range(_STEPS):
        wait()
        started = time.perf_counter()
        with autocast:
            loss = step()
        loss.backward()  # type: ignore[no-untyped-call]
        wait()
        seconds.append(time.perf_counter() - started)
        del loss
        model.zero_grad()
    print(json.dumps({"seconds": min(seconds), "bytes": memory.read()}))


@dataclass
class Result:
    """A way's (seconds, bytes) of every turn, or why it did not run."""

    turns: list[tuple[float, float]] = field(default_factory=list)
    not_run: str = ""

    def medians(self) -> tuple[float, float]:
        """Return (seconds, bytes)."""
        seconds, num_bytes = zip(*self.turns, strict=True)
        return statistics.median(seconds), statistics.median(num_bytes)


def measure_ways(ways: Sequence[str], num_turns: int) -> dict[str, Result]:
    """Run every way in a process of its own, in turn, with this process's flags."""
    results = {way: Result() for way in ways}
    command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--way"]
    for _ in range(num_turns):
        for way, result in results.items():
            if result.not_run:
                continue
            done = subprocess.run([*command, way], capture_output=True, text=True, cwd=REPOSITORY)
            if done.returncode:
                result.not_run = f"failed: {done.stderr.strip().splitlines()[-1]}"
                continue
            said = json.loads(done.stdout.splitlines()[-1])
            if "not_run" in said:
                result.not_run = said["not_run"]
            else:
                result.turns.append((said["seconds"], said["bytes"]))
    return results


def print_table(results: dict[str, Result], flags: argparse.Namespace) -> None:
    """Print medians, and their ratios to cross-entropy's. Raises RuntimeError when that one failed."""
    if results["cross-entropy"].not_run:
        raise RuntimeError(f"cross-entropy {results['cross-entropy'].not_run}")
    base_seconds, base_bytes = results["cross-entropy"].medians()
    device = torch.cuda.get_device_name() if flags.device == "cuda" else "cpu"
    positions = SHAPES[flags.shape].positions
    print(f"{flags.vocabulary:,} ids, {flags.dtype}, {positions:,} positions, {device}")
    for way, result in results.items():
        if result.not_run:
            print(format_not_run(way, result.not_run, width=24))
            continue
        seconds, peak = result.medians()
        times = f"{seconds:8.4f} s ({seconds / base_seconds:.2f})"
        print(f"{way:24}{times}{peak / 2**20:8.0f} MiB ({peak / base_bytes:.2f})")


def main() -> None:
    """Let every way run in turn, and print the table."""
    parser = make_parser("benchmarks.training", __doc__)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--chunk-size", type=int, help="positions; default: Retort's own choice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="beside cross-entropy"
    )
    parser.add_argument("--way", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU on this machine")
    if flags.way:
        run_way(flags)
        return
    ways = tuple(dict.fromkeys(("cross-entropy", *flags.ways)))
    print_table(measure_ways(ways, flags.turns), flags)


if __name__ == "__main__":
    main()
