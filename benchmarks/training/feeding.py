"""How long a training step waits for its batch: the share of its time, with and without a process that reads ahead.

    python -m benchmarks.training.feeding [--logits FOLDER] [--steps 20]

The student of `student.py` (13 million parameters, 2 x 512 tokens a step) trains by Retort's own trainer from a coded
cache (`top_p`, about 18 bytes a position) of the distributions of `python -m benchmarks.distributions`. Each run is
made twice, with few steps and with more: what the first ones cost (starting a process, loading the decoder) drops
out of the difference.
"""

import json
import tempfile
from pathlib import Path

from benchmarks.cache.ours import make_codec, write_cache
from benchmarks.common import make_parser
from benchmarks.distributions.build import default_folder, load_or_make
from benchmarks.training.student import SHAPES, build_model
from retort.cache.reader import LogitCache
from retort.config.sections import Student, Tracking, Training
from retort.training.job import TrainingJob
from retort.training.loop import train_student

_FEW_STEPS = 4


class NoTokenizer:
    """What a training needs of a tokenizer: the student's config says the rest."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __len__(self) -> int:
        return 0

    def get_vocab(self) -> dict[str, int]:
        """Return no tokens."""
        return {}

    def save_pretrained(self, folder: Path) -> None:
        """Write nothing."""


def run(
    folder: Path, cache: LogitCache, *, steps: int, workers: int, threads: int = 2
) -> tuple[float, float]:
    """Train for some steps; return (seconds, seconds of waiting)."""
    student = folder / "student.json"
    config = build_model(cache.header.codec.vocabulary, seed=0).config
    student.write_text(json.dumps(config.to_dict(), default=str))
    job = TrainingJob(
        name=f"{workers} workers, {steps} steps",
        identity="benchmark",
        source=cache,
        student=Student(config=str(student)),
        training=Training(
            alpha=0.5,
            temperature=1.0,
            max_steps=steps,
            batch_size=SHAPES["small"].batch,
            dataloader_num_workers=workers,
            cpu_threads=threads,
            device="cpu",
        ),
        tracking=Tracking(),
        tokenizer=NoTokenizer(),
        vocabulary=cache.header.codec.vocabulary,
    )
    found = train_student(folder / f"{workers}-{steps}", job)
    return found.seconds, found.seconds_waiting_for_data


def main() -> None:
    """Print the table."""
    parser = make_parser("benchmarks.training.feeding", __doc__)
    parser.add_argument(
        "--logits",
        type=Path,
        default=default_folder(),
        help="the distributions, made there if there are none (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=20, help="measured steps; default: 20")
    flags = parser.parse_args()
    data = load_or_make(flags.logits)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codec = make_codec("top_p", 0.005, data)
        _, cache = write_cache(folder / "part.h5", data, codec)
        for workers in (0, 1):
            few = run(folder, cache, steps=_FEW_STEPS, workers=workers)
            more = run(folder, cache, steps=_FEW_STEPS + flags.steps, workers=workers)
            seconds, waited = ((m - f) / flags.steps for f, m in zip(few, more, strict=True))
            print(
                f"{workers} processes read ahead: a step takes {seconds:.3f} s, of which {1000 * waited:.2f} ms "
                f"({waited / seconds:.2%}) waiting for its batch"
            )


if __name__ == "__main__":
    main()
