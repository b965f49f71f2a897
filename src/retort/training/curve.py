"""training_log.csv: the curve of a training."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from retort.io.files import write_atomically

LOG_COLUMNS = (
    "step",
    "total_loss",
    "hard_loss",
    "soft_loss",
    "perplexity",
    "eval_loss",
    "eval_kl",
    "learning_rate",
    "tokens_per_second",
)


def write_log(path: Path, log_history: list[dict[str, Any]]) -> None:
    """Write Trainer's log history as CSV (LOG_COLUMNS), a row for each step that was logged or evaluated after."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        if "total_loss" in entry or "eval_loss" in entry:
            rows[entry["step"]] = rows.get(entry["step"], {}) | entry
    text = io.StringIO()
    writer = csv.DictWriter(text, LOG_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([json.loads(json.dumps(row)) for row in rows.values()])
    write_atomically(path, text.getvalue().encode())
