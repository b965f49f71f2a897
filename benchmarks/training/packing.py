"""Batches without padding beside padded ones: real tokens a second of a training, forward and backward.

    python -m benchmarks.training.packing [--max-length 1024] [--batch-size 8] [--turns 2]

The student is the Llama of `student.py` (6 layers of 256) with 1,024 ids, so that its output layer, which reads no
padding, is a twentieth of its weights, as in a Llama of 8 billion. Lengths are log-normal; then all documents fill a
row, where there is nothing to gain. All ways run by Retort's own trainer, batch by batch in turn: *padded*, *padding
free* (the same sequences end to end, the default) and *packed* (training.packing: fewer rows, about as many tokens). A
batch's time is the fastest of all turns, on a CPU in processor seconds of one thread; the range is that of the single
turns.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import make_parser
from benchmarks.training.feeding import NoTokenizer
from benchmarks.training.student import build_model
from retort.config.sections import Student, Tracking, Training
from retort.tokens.sequences import SequenceTable, build_table
from retort.training.arguments import training_arguments
from retort.training.job import TrainingJob
from retort.training.loop import build_trainer

_VOCABULARY = 1024


def make_table(lengths: list[int]) -> SequenceTable:
    """Return sequences of random tokens."""
    rng = np.random.default_rng(1)
    return build_table(
        (rng.integers(0, _VOCABULARY, n), [True] * (n - 1) + [False], d, ("", ""))
        for d, n in enumerate(lengths)
    )


class Way:
    """One way to make batches, and the trainer that learns from them."""

    def __init__(
        self,
        name: str,
        folder: Path,
        table: SequenceTable,
        flags: argparse.Namespace,
        *,
        rows: int,
        **keys: Any,
    ) -> None:
        student = folder / "student.json"
        config = build_model(_VOCABULARY, seed=0).config
        student.write_text(json.dumps(config.to_dict(), default=str))
        training = Training(
            alpha=1.0,
            distillation_type="output",
            max_steps=flags.batches,
            batch_size=rows,
            dataloader_num_workers=0,
            device=flags.device,
            **keys,
        )
        job = TrainingJob(
            name=name,
            identity="benchmark",
            source=table,
            student=Student(config=str(student)),
            training=training,
            tracking=Tracking(),
            tokenizer=NoTokenizer(),
            vocabulary=_VOCABULARY,
            max_length=flags.max_length,
        )
        self.trainer = build_trainer(training_arguments(folder / job.name, job), job)
        batches = self.trainer.get_train_dataloader()
        self.batches = [self.trainer._prepare_inputs(batch) for batch in batches]
        self.tokens = np.array([self._count_tokens(batch, table) for batch in self.batches])
        self.clock = time.process_time if flags.device == "cpu" else time.perf_counter
        self.seconds: list[list[float]] = []  # of each batch in each turn

    @staticmethod
    def _count_tokens(batch: dict[str, Any], table: SequenceTable) -> int:
        return int(table.lengths[batch["sequences"].cpu().numpy()].sum())

    def run(self) -> Iterator[None]:
        """Learn from one batch after another, and note the seconds."""
        self.seconds.append([])
        for batch in self.batches:
            started = self.clock()
            loss = self.trainer.compute_loss(
                self.trainer.model, batch, num_items_in_batch=len(batch["counted"])
            )
            loss.backward()  # type: ignore[no-untyped-call]
            self.trainer.window.end_step()  # waits for the device
            self.seconds[-1].append(self.clock() - started)
            self.trainer.model.zero_grad()
            yield

    def width(self) -> float:
        """Return the positions that are read for a token."""
        return float(sum(batch["labels"].numel() for batch in self.batches) / self.tokens.sum())

    def rates(self) -> list[float]:
        """Return tokens a second: of the fastest of each batch, and of every turn."""
        seconds = np.array(self.seconds)
        total = self.tokens.sum()
        return [total / seconds.min(axis=0).sum(), *(total / seconds.sum(axis=1))]


def compare(name: str, lengths: list[int], flags: argparse.Namespace) -> None:
    """Print the tokens a second of each way on sequences of these lengths, and its ratio to the padded one."""
    table = make_table(lengths)
    mean = float(np.mean(lengths))
    rows = max(1, round(flags.batch_size * mean / flags.max_length))  # as many tokens
    with tempfile.TemporaryDirectory() as folder:
        make = partial(Way, folder=Path(folder), table=table, flags=flags)
        ways = [
            make("padded", rows=flags.batch_size, padding_free=False),
            make("padding free", rows=flags.batch_size, padding_free=True),
            make("packed", rows=rows, packing=True),
        ]
        for _ in range(flags.turns):
            for _ in zip(*(way.run() for way in ways), strict=True):
                pass
    plain = ways[0].rates()
    print(f"{name}, {mean:.0f} tokens on average", flush=True)
    for way in ways:
        ratio, *turns = (f / p for f, p in zip(way.rates(), plain, strict=True))
        print(
            f"  {way.trainer.args.run_name:12}: {way.rates()[0]:6,.0f} tokens/s, {way.width():.2f} positions read for "
            f"a token, ratio {ratio:.3f} (turns: {min(turns):.3f} to {max(turns):.3f})",
            flush=True,
        )


def main() -> None:
    """Compare on log-normal lengths and on full rows."""
    parser = make_parser("benchmarks.training.packing", __doc__)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a padded batch")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(5.2, 1.0, 2000).clip(8, flags.max_length).astype(int).tolist()
    compare("log-normal lengths", drawn, flags)
    flags.batch_size, flags.batches = 2, 4
    compare("full rows", [flags.max_length] * 8, flags)


if __name__ == "__main__":
    main()
