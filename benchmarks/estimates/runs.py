"""What is estimated before a whole run beside what the run then takes: tokens, bytes, time and memory.

    python -m benchmarks.estimates.runs --data ../shared/data

Three runs, one job at a time: `stories`, real stories and a small real teacher; `many`, 20,000 short documents; `demo`,
the demo with one seed and fewer steps, whose teacher does not exist beforehand, so its speed and its bytes are assumed.
Each is estimated by `retort estimate --keep`, run by `retort run`, and read as the report does. Times are of the wall:
they mean something on a machine that does nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from benchmarks.common import REPOSITORY, UnavailableError, log, make_parser
from retort.artifacts.build import build_project
from retort.config.config_files import load_source
from retort.config.yaml_source import read_yaml
from retort.evaluation.records import Metrics
from retort.pipeline.estimating import find_kept_path
from retort.report.estimated import Records, compare_with_estimate

_STUDENT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
_DOCUMENTS = 20_000


def write_stories(folder: Path, data: Path, steps: int) -> dict[str, Any]:
    """Return a config of the stories and their teacher, with students that are written into `folder`."""
    return _describe(folder, data, data / "text" / "tinystories" / "train.jsonl", 512, steps)


def write_many(folder: Path, data: Path, steps: int) -> dict[str, Any]:
    """Return a config of 20,000 documents, a line of Shakespeare each."""
    with (data / "text" / "tinyshakespeare" / "input.txt").open(encoding="utf-8") as file:
        lines = list(islice((line.strip() for line in file if line.strip()), _DOCUMENTS))
    rows = [json.dumps({"text": line}) for line in lines]
    (folder / "lines.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return _describe(folder, data, Path("lines.jsonl"), 128, steps)


def _describe(folder: Path, data: Path, text: Path, length: int, steps: int) -> dict[str, Any]:
    student = _STUDENT | {"max_position_embeddings": length}
    (folder / "student.json").write_text(json.dumps(student), encoding="utf-8")
    return {
        "dataset": {
            "name": "json",
            "data_files": str(text),
            "max_length": length,
            "num_shards": 2,
            "streaming_chunk_size": 1000,
            "validation_fraction": 0.05,
        },
        "teacher": {
            "model_path": str(data / "models" / "stories260K"),
            "generation": {"num_workers": 1},
        },
        "cache": {"method": "top_p", "min_probability": 0.001, "temperatures": [1.0]},
        "student": {"config": "student.json"},
        "training": {
            "temperature": 1.0,
            "max_steps": steps,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "warmup_steps": 10,
        },
        "runs": {
            "text": {"training": {"distillation_type": "output"}},
            "both": {"training": {"distillation_type": "hybrid", "alpha": 0.1}},
        },
    }


def write_demo(folder: Path, data: Path, steps: int) -> dict[str, Any]:
    """Return the demo's config with one seed, one worker and so many steps."""
    config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text(encoding="utf-8"))
    config["student"]["config"] = str(REPOSITORY / config["student"]["config"])
    config["teacher"]["generation"]["num_workers"] = 1
    config["training"]["max_steps"] = steps
    for run in config["runs"].values():
        run["training"]["seed"] = 0
    return dict(config)


RUNS = {"stories": write_stories, "many": write_many, "demo": write_demo}


def measure(name: str, data: Path, steps: int) -> pd.DataFrame:
    """Estimate and do a run in a folder of its own; return the rows of its report."""
    if name != "demo" and not data.is_dir():
        raise UnavailableError(f"no folder {data}: give --data")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        config = RUNS[name](Path(folder), data, steps)
        Path("run.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        for words in (["estimate", "run.yaml", "--keep"], ["run", "run.yaml", "--cores", "1"]):
            started = time.monotonic()
            _call(words)
            log(f"{name}: retort {words[0]} in {time.monotonic() - started:.0f} s")
        configs = load_source(read_yaml(Path("run.yaml")))
        project = build_project(configs)
        records = Records(
            find_kept_path(configs),
            [tokens.folder / "index.json" for tokens in project.tokens.values()],
            [logits.folder / "manifest.json" for logits in project.logits.values()],
        )
        metrics = {key: Metrics.read(run.metrics_path) for key, run in project.runs.items()}
        return compare_with_estimate(records, metrics)


def _call(words: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "retort", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"retort {' '.join(words)} failed:\n{done.stdout}{done.stderr}")


def main() -> None:
    """Print a table for each run."""
    parser = make_parser("benchmarks.estimates.runs", __doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--only", choices=list(RUNS), help="one of the runs")
    flags: argparse.Namespace = parser.parse_args()
    data = flags.data.resolve()
    for name in [flags.only] if flags.only else RUNS:
        try:
            table = measure(name, data, flags.steps)
        except UnavailableError as error:
            print(f"{name}: not run ({error})")
            continue
        print(f"\n{name}")
        print(table.to_string(index=False, float_format="%.3f"), flush=True)


if __name__ == "__main__":
    main()
