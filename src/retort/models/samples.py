"""Samples: the same prompts, continued by the teacher and by each student, to be read beside the numbers.

Prompts are beginnings of held-out texts (or held-out questions), and the user's own. Each is continued twice: greedily,
and sampled with a seed ("drawn"). `score_validation` writes samples.json with the teacher's continuations, `evaluate`
one with the teacher's and a student's.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from retort.config.evaluation import SampleSettings
from retort.io.records import STRICT, Entry, Record
from retort.tokens.chat import DEFAULT_DATE
from retort.tokens.sequences import Sequence, SequenceTable
from retort.tokens.tokenizer import encode_prefix, encode_prompt

SAMPLES_FILE = "samples.json"
_MAX_PROMPT_TOKENS = 32  # of a text without a question


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt as ids and as text, and how the held-out text continues, if it is from one."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    ids: tuple[int, ...]
    text: str
    reference: str | None


@dataclass(frozen=True)
class Sample:
    """Two continuations of one prompt: greedy, and sampled with a seed."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    greedy: str
    drawn: str


@dataclass(frozen=True)
class Samples:
    """Prompts and one model's continuations of them; `missing` says why there are none."""

    prompts: tuple[SamplePrompt, ...]
    continued: tuple[Sample, ...] = ()
    missing: str | None = None


class ModelSamples(Entry):
    """One model's continuations of the prompts, or why there are none."""

    missing: str | None
    continued: tuple[Sample, ...]


class SamplesRecord(
    Record, format="retort-samples", remedy="delete its folder and rerun the same command"
):
    """samples.json: prompts, and the continuations by model ("teacher", "student").

    of: the run's id, or in the teacher's own file the fingerprint of its weights.
    """

    of: str
    prompts: tuple[SamplePrompt, ...]
    models: dict[str, ModelSamples] = Field(min_length=1)

    @model_validator(mode="after")
    def _count(self) -> Self:
        for name, model in self.models.items():
            if len(model.continued) != (len(self.prompts) if model.missing is None else 0):
                num = f"{len(model.continued)} of {len(self.prompts)} continuations"
                raise ValueError(f"{name}: {num}")
        return self


def choose_prompts(
    table: SequenceTable, tokenizer: Any, settings: SampleSettings, *, date: str = DEFAULT_DATE
) -> list[SamplePrompt]:
    """Return prompts from evenly spaced held-out documents, then the user's own. Equal arguments give equal prompts.

    date: what chat templates print that print today's (`TokenIndex.chat_date`).
    """
    first_sequences = np.flatnonzero(np.diff(table.documents, prepend=-1) != 0)
    long_enough = [int(i) for i in first_sequences if table.lengths[i] >= 4]
    count = min(settings.num_samples, len(long_enough))
    chosen = [long_enough[n * len(long_enough) // count] for n in range(count)]
    found = [_cut_prompt(table[i], tokenizer, settings.max_new_tokens) for i in chosen]
    has_questions = len(table) > 0 and not table.loss_mask[table.offsets[:-1]].any()
    encode = partial(encode_prompt, date=date) if has_questions else encode_prefix
    own = [(text, encode(text, tokenizer)) for text in settings.prompts]
    return found + [SamplePrompt(tuple(ids), text, None) for text, ids in own]


def _cut_prompt(row: Sequence, tokenizer: Any, num_new: int) -> SamplePrompt:
    """Cut a sequence where its response begins, or after its first tokens."""
    stop = int(row.segment_starts[1]) if len(row.segment_starts) > 1 else len(row.ids)
    cut = int(np.argmax(row.loss_mask)) + 1
    if cut == 1:  # no question: the loss counts from the first token on
        cut = _find_word_end(row, tokenizer, min(_MAX_PROMPT_TOKENS, stop // 2))
    ids = row.ids[:cut].tolist()
    text = _decode(tokenizer, ids)
    stop = min(stop, cut + int(np.argmin(row.loss_mask[cut - 1 :])))  # where a chat's turn ends
    whole = _decode(tokenizer, row.ids[: min(stop, cut + num_new)].tolist())
    return SamplePrompt(tuple(ids), text, whole[len(text) :] if whole.startswith(text) else None)


def _find_word_end(row: Sequence, tokenizer: Any, longest: int) -> int:
    """Return the largest cut, up to `longest`, that is not within a word; `longest` if there is none."""
    for cut in range(longest, longest // 2, -1):
        before, after = (_decode(tokenizer, row.ids[:end].tolist()) for end in (cut, cut + 1))
        if after.startswith(before) and after[len(before) :][:1].isspace():
            return cut
    return longest


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def write_samples(path: Path, found: dict[str, Samples], *, of: str) -> None:
    """Write samples.json (see `SamplesRecord`): the continuations by model, all of the same prompts."""
    prompts = next(iter(found.values())).prompts
    assert all(samples.prompts == prompts for samples in found.values())
    models = {
        model: ModelSamples(missing=samples.missing, continued=samples.continued)
        for model, samples in found.items()
    }
    SamplesRecord(of=of, prompts=prompts, models=models).write(path)


def read_samples(path: Path, *, of: str | None, whose: str) -> dict[str, Samples]:
    """Read samples.json: continuations by model.

    Raises ValueError as `Record.read` does, and when it holds none of the model `whose`, or is of something else than
    `of` (None: anything).
    """
    record = SamplesRecord.read(path)
    if of not in (None, record.of):
        raise ValueError(f"{path} is of {record.of}, not of {of}: {record.remedy}.")
    if whose not in record.models:
        raise ValueError(f"{path} has no entry of the {whose}: {record.remedy}.")
    return {
        model: Samples(record.prompts, found.continued, found.missing)
        for model, found in record.models.items()
    }


def require_prompts(teacher: Samples, prompts: list[SamplePrompt], *, source: Path) -> None:
    """Raise ValueError unless the teacher's samples, read from `source`, are of the same prompts."""
    if [p.ids for p in teacher.prompts] != [p.ids for p in prompts]:
        raise ValueError(
            f"{source} holds the teacher's continuations of other prompts ({len(teacher.prompts)}) than the student is "
            f"given ({len(prompts)}). Delete {source.parent} and rerun the same command."
        )
