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
    prompts: dict[tuple[int, ...], SamplePrompt] = {}
    lines: dict[tuple[int, ...], dict[tuple[int, Continuation], None]] = {}  # a set in order
    for run, samples in found.items():
        teacher = teachers.get(run, "teacher") if has_several else "teacher"
        for rank, (whose, name) in enumerate((("teacher", teacher), ("student", run))):
            for prompt, continuation in _pair(samples.get(whose), name):
                prompts.setdefault(prompt.ids, prompt)
                lines.setdefault(prompt.ids, {})[rank, continuation] = None
    blocks = []
    for ids, prompt in prompts.items():
        text = [] if prompt.reference is None else [Continuation(REFERENCE, prompt.reference)]
        ranked = sorted(lines[ids], key=lambda line: line[0])
        blocks.append(SampleBlock(prompt.text, (*text, *(line for _, line in ranked))))
    return blocks


def _pair(samples: Samples | None, name: str) -> list[tuple[SamplePrompt, Continuation]]:
    if samples is None:
        return []
    if samples.missing is not None:
        return [(prompt, Continuation(name, missing=samples.missing)) for prompt in samples.prompts]
    lines = [Continuation(name, found.greedy, found.drawn) for found in samples.continued]
    return list(zip(samples.prompts, lines, strict=True))


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
