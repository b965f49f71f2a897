"""How long a training step waits for its batch: the share of its time, with and without a process that reads ahead.

    make benchmark-feeding
    python benchmarks/feeding.py [--logits FOLDER] [--steps 20]

The student of benchmarks/training.py (13 million parameters, 2 x 512 tokens a step) trains by Retort's own trainer from
a coded cache (`top_p`, about 18 bytes a position) of the distributions that cache_logits.py makes. Each run is made
twice, with few steps and with more: what the first ones cost (starting a process, loading the decoder) drops out of the
difference.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import cache_logits
from cache import find_codec, select_all
from training import BATCH, build_model

from retort.cache import CacheHeader, LogitCache
from retort.config_schema import fill_defaults, section_schema
from retort.config_sections import build_section
from retort.parts import write_part
from retort.training import Job, train_student

_FEW = 4


class NoTokenizer:
    """What a training asks of a tokenizer, where the student's config says the rest."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __len__(self) -> int:
        return 0

    def save_pretrained(self, folder: Path) -> None:
        """Nothing is to be kept."""


def section(name: str, **values: Any) -> Any:
    """Return a section of the config at its defaults, but for `values`."""
    return build_section(name, fill_defaults(values, section_schema(name)))


def write_cache(path: Path, given: cache_logits.Distributions) -> LogitCache:
    """Write the distributions as one part, which is a cache."""
    codec = find_codec("top_p", 0.005, given)
    table, order, code = select_all(given, codec)
    write_part(path, table, code(), CacheHeader("0" * 12, "0" * 12, "0" * 12, codec), order)
    return LogitCache(path)


def run(folder: Path, cache: LogitCache, *, steps: int, workers: int) -> tuple[float, float]:
    """Train for some steps; return (seconds, seconds of waiting)."""
    student = folder / "student.json"
    config = build_model(cache.header.codec.vocabulary, seed=0).config
    student.write_text(json.dumps(config.to_dict(), default=str))
    job = Job(
        name=f"{workers} workers, {steps} steps",
        identity="benchmark",
        source=cache,
        student=section("student", config=str(student)),
        training=section(
            "training",
            alpha=0.5,
            temperature=1.0,
            max_steps=steps,
            batch_size=BATCH,
            dataloader_num_workers=workers,
            cpu_threads=2,
            device="cpu",
        ),
        tracking=section("tracking"),
        tokenizer=NoTokenizer(),
        vocabulary=cache.header.codec.vocabulary,
    )
    found = train_student(folder / f"{workers}-{steps}", job, say=lambda _: None)
    return found["seconds"], found["seconds_waiting_for_data"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--logits", type=Path, default=cache_logits.default_folder(), help="what to learn from"
    )
    parser.add_argument("--steps", type=int, default=20)
    flags = parser.parse_args()
    given = cache_logits.ensure(flags.logits, cache_logits.Settings())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = write_cache(folder / "part.h5", given)
        for workers in (0, 1):
            few = run(folder, cache, steps=_FEW, workers=workers)
            more = run(folder, cache, steps=_FEW + flags.steps, workers=workers)
            seconds, waited = ((m - f) / flags.steps for f, m in zip(few, more, strict=True))
            print(
                f"{workers} processes read ahead: a step takes {seconds:.3f} s, of which {1000 * waited:.2f} ms "
                f"({waited / seconds:.2%}) waiting for its batch"
            )


if __name__ == "__main__":
    main()
