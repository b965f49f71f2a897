"""Sections, prompts and answers for tests of a synthesis."""

import json
from pathlib import Path
from typing import Any

from retort.config.sections import Evaluation, Synthesis
from retort.synthesis.contamination import ProblemNgrams
from retort.synthesis.providers import Answer

SCRIPT = Path(__file__).resolve().parents[2] / "workflow" / "scripts" / "synthesize.py"
STARTS = ("Once upon a time there was a", "One day a little", "Lily and Tom saw a", "A small")
ENDS = ("girl", "boy", "frog", "bear", "duck", "cat")
PROMPTS = [f"{start} {end}" for end in ENDS for start in STARTS]
NO_PROBLEMS = ProblemNgrams([], length=13)


def synthesis_section(**values: Any) -> Synthesis:
    """Return the section `synthesis`: a server's model `m`, and the schema's defaults, except for `values`."""
    given = {"provider": "openai", "model": "m", "prompts": "prompts.jsonl"} | values
    section: Synthesis = Synthesis.model_validate(given)
    return section


def evaluation_section(**values: Any) -> Evaluation:
    """Return the section `evaluation`: the schema's defaults except for `values`."""
    section: Evaluation = Evaluation.model_validate(values)
    return section


def make_answer(text: str, finish: str = "stop") -> Answer:
    """Return an answer that used 3 tokens of input and 5 of output."""
    return Answer(text, finish, input_tokens=3, output_tokens=5, model="m-1")


def write_file(folder: Path, name: str, text: str) -> str:
    """Write a text file; return its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "prompts.jsonl") -> str:
    """Write JSON lines; return their path."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_file(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def list_answered(journal: Path) -> set[int]:
    """Return the indices of the prompts that have an answer in a journal."""
    if not journal.exists():
        return set()
    lines = [line for line in journal.read_bytes().split(b"\n")[:-1] if b'"event":"answer"' in line]
    return {json.loads(line)["index"] for line in lines}


def compute_spent(journal: Path) -> dict[str, float]:
    """Return a journal's tokens, and their cost at 1000 and 2000 per million, with lost requests at their bounds."""
    read = written = 0
    sent: dict[int, tuple[int, int]] = {}
    for line in journal.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "sent":
            sent[event["index"]] = event["input"], event["output"]
        elif event["event"] == "lost":
            read, written = read + sent[event["index"]][0], written + sent[event["index"]][1]
        elif event["event"] == "answer":
            answer = event["answer"]
            read, written = read + answer["input_tokens"], written + answer["output_tokens"]
    return {"tokens": read + written, "cost": (read * 1000 + written * 2000) / 1e6}
