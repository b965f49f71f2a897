"""Samples of the page: what each model wrote after a prompt, side by side."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from retort.models.samples import SamplePrompt, Samples

REFERENCE = "held-out text"


@dataclass(frozen=True)
class Continuation:
    """A model's continuations of a prompt, greedy and sampled; `missing` is the reason if it has none."""

    name: str
    greedy: str = ""
    sampled: str | None = None
    missing: str | None = None


@dataclass(frozen=True)
class SampleBlock:
    """A prompt and its continuations: of the held-out text, the teachers and the students."""

    prompt: str
    lines: tuple[Continuation, ...]


def build_samples(
    found: Mapping[str, Mapping[str, Samples]], teachers: Mapping[str, str]
) -> list[SampleBlock]:
    """Return a block for each prompt, in the order given: the held-out text first, then teachers, then runs.

    `found`: the samples by run, then by "teacher" or "student"; `teachers`: the label of each run's teacher.
    """
    has_several = len(set(teachers.values())) > 1
    lines: dict[SamplePrompt, dict[tuple[int, Continuation], None]] = {}  # each a set in order
    for run, samples in found.items():
        teacher = teachers.get(run, "teacher") if has_several else "teacher"
        for rank, (whose, name) in enumerate((("teacher", teacher), ("student", run)), start=1):
            for prompt, line in _continue(samples.get(whose), name):
                text = prompt.reference
                first = {} if text is None else {(0, Continuation(REFERENCE, text)): None}
                lines.setdefault(prompt, first)[rank, line] = None
    ranked = {prompt: sorted(of_it, key=lambda line: line[0]) for prompt, of_it in lines.items()}
    return [SampleBlock(p.text, tuple(line for _, line in of_it)) for p, of_it in ranked.items()]


def _continue(samples: Samples | None, name: str) -> list[tuple[SamplePrompt, Continuation]]:
    if samples is None:
        return []
    lines = [Continuation(name, found.greedy, found.drawn) for found in samples.continued]
    missing = [Continuation(name, missing=samples.missing)] * len(samples.prompts)
    return list(zip(samples.prompts, lines if samples.missing is None else missing, strict=True))


def mark_lines(text: str) -> str:
    """Return a generated text with a sign for every empty line, of which small models write dozens."""
    if not text:
        return "(nothing)"
    sign = "\N{RETURN SYMBOL}"

    def mark(empty: re.Match[str]) -> str:
        count = len(empty[0]) - 1
        return (sign * count if count <= 3 else f"{sign}\N{MULTIPLICATION SIGN}{count}") + "\n"

    whole = re.sub(r"\n\n+", mark, text)
    return whole.removesuffix("\n") + (sign if text.endswith("\n") else "")
