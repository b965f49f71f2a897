"""From prompts to responses: a local model, interruptions, a Hub that changes, refusals."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from retort.artifacts.responses import SynthesisRecord, refuse_other_responses
from retort.config.handoff import Job
from retort.synthesis.filters import AnswerFilter
from retort.synthesis.journal import Journal
from retort.synthesis.prompts import LabeledPrompt
from retort.synthesis.run import collect_examples, synthesize
from support.hub import NAME, serve
from support.jobs import config_words, make_job
from support.sections import replace
from support.synthesis import (
    NO_PROBLEMS,
    SCRIPT,
    make_answer,
    synthesis_section,
    write_file,
)


def test_each_round_asks_as_many_prompts_as_were_dropped(tmp_path: Path) -> None:
    texts = ["One.", "One.", "", "Four.", "Five.", "Six."]
    prompts = [LabeledPrompt(f"p{i}") for i in range(len(texts))]
    rounds: list[list[int]] = []
    with Journal(tmp_path / "journal.jsonl", prompts) as journal:
        journal.add_answer(1, make_answer(texts[1]))  # before an interruption

        def ask(indices: Sequence[int]) -> None:
            rounds.append(list(indices))
            for index in reversed(indices):  # in whatever order they arrive
                journal.add_answer(index, make_answer(texts[index]))

        section = synthesis_section(num_examples=3, near_duplicates=None)
        answer_filter = AnswerFilter(section, NO_PROBLEMS)
        found = collect_examples(section, prompts, journal, answer_filter, ask)
    assert rounds == [[0, 2], [3, 4]]
    assert [row["number"] for row in found.rows] == [0, 3, 4] and found.num_asked == 5
    assert {r: n for r, n in found.num_dropped.items() if n} == {"duplicate": 1, "empty": 1}


@pytest.fixture
def local(tmp_path: Path, tiny_teacher: Path) -> Job:
    prompts = write_file(tmp_path, "p.txt", "".join(f"Say {i} times that\n" for i in range(22)))
    section = synthesis_section(
        provider="local", model=str(tiny_teacher), prompts=prompts, batch_size=4, max_tokens=12,
        keep_truncated=True, check_language=False, near_duplicates=None,
    )  # fmt: skip
    return make_job(synthesis=section, teacher=replace(make_job().config.teacher, device="cpu"))


def change(job: Job, **keys: Any) -> Job:
    config = replace(job.config, synthesis=replace(job.config.synthesis, **keys))
    return job.model_copy(update={"config": config})


def run_local(folder: Path, job: Job) -> tuple[bytes, SynthesisRecord]:
    record = folder / "answers" / "mine" / "synthesis.json"
    synthesize(record, job)
    return record.with_name("responses.jsonl").read_bytes(), SynthesisRecord.read(record)


def test_a_local_model_answers_the_same_wherever_it_was_interrupted(
    tmp_path: Path, local: Job
) -> None:
    whole, record = run_local(tmp_path / "whole", local)
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["number"] for row in rows] == list(range(22))
    assert len({row["response"] for row in rows}) > 15
    assert record.paid.requests == 22 and record.responses.rows == 22
    journal = tmp_path / "whole" / "answers" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for kept in (1, 6, 13):  # in the middle of batches, with a torn line
        folder = tmp_path / str(kept)
        (folder / "answers").mkdir(parents=True)
        (folder / "answers" / "journal.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
        assert run_local(folder, local)[0] == whole
    seven = change(local, num_examples=7)
    fewer, _ = run_local(tmp_path / "whole", seven)
    assert whole.startswith(fewer) and fewer.count(b"\n") == 7
    assert journal.read_bytes() == b"".join(lines), "fewer examples ask nothing"


@pytest.mark.slow
def test_prompts_of_a_hub_are_asked_once_however_they_change(tmp_path: Path, local: Job) -> None:
    """Answers stay with their prompts when rows of the dataset change, and only new prompts are asked."""
    data, record = tmp_path / "hub", tmp_path / "answers" / "mine" / "synthesis.json"
    data.mkdir()
    asked = change(local, prompts=NAME, prompt_column="question", temperature=0.0).config
    command = [sys.executable, str(SCRIPT), "--output", str(record)]
    command += config_words("synthesis", synthesis=asked.synthesis, teacher=asked.teacher)

    def run(prompts: list[str], cache: str) -> tuple[dict[str, str], int]:
        rows = "".join(json.dumps({"question": prompt}) + "\n" for prompt in prompts)
        (data / "train.jsonl").write_text(rows)
        with serve(data) as hub:
            environment = os.environ | hub.environment | {"HF_HOME": str(tmp_path / cache)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = record.with_name("responses.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert [row["prompt"] for row in found] == prompts
        paid = SynthesisRecord.read(record).paid.requests
        return {row["prompt"]: row["response"] for row in found}, paid

    first, paid = run(["Say one", "Tell me of two", "And three", "Then four of them"], "before")
    assert paid == 4
    second, paid = run(["Tell me of two", "Now five", "Say one", "Then four of them"], "after")
    assert paid == 5
    assert all(second[prompt] == first[prompt] for prompt in first if prompt in second)


def test_too_few_responses_are_refused_with_the_dropped_ones(tmp_path: Path, local: Job) -> None:
    strict = change(local, min_characters=10_000, num_examples=5)
    with pytest.raises(
        ValueError, match=r"all 22 prompts are asked, and 0 responses of the 5 .*22 too_short"
    ):
        run_local(tmp_path, strict)


def test_responses_that_were_edited_are_refused(tmp_path: Path, local: Job) -> None:
    run_local(tmp_path, local)
    record = tmp_path / "answers" / "mine" / "synthesis.json"
    refuse_other_responses(record)
    with record.with_name("responses.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="is not what was written"):
        refuse_other_responses(record)


def test_prompts_that_changed_since_the_plan_are_refused(tmp_path: Path, local: Job) -> None:
    with pytest.raises(ValueError, match="changed since the plan"):
        run_local(tmp_path, local.model_copy(update={"expected": {"prompts": "0" * 12}}))


@pytest.mark.parametrize(
    "output, message",
    [
        ("answers", "is a folder"),
        ("p.txt", "is a prompt file"),
        ("p.txt/x.jsonl", "be created"),
    ],
)
def test_an_invalid_output_is_refused_before_anything_is_asked(
    tmp_path: Path, local: Job, output: str, message: str
) -> None:
    (tmp_path / "answers").mkdir()
    before = (tmp_path / "p.txt").read_bytes()
    with pytest.raises(ValueError, match=message):
        run_local(tmp_path, change(local, output=str(tmp_path / output)))
    assert (tmp_path / "p.txt").read_bytes() == before
    assert not (tmp_path / "answers" / "journal.jsonl").exists()
