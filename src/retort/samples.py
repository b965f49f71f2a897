"""The same prompts, continued by the teacher and by each student: what a reader looks at beside the numbers.

Prompts are beginnings of held-out texts (or held-out questions), and prompts of the user's own. Each is continued
twice: by the most probable token each time (greedy), and drawn with a seed. `score_validation` writes the teacher's
side, `evaluate` puts each student's beside it, in a samples.json of its own.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retort.config import Evaluation
from retort.provenance import read_json, write_json
from retort.tokens import Sequence, SequenceTable, encode_beginning, encode_prompt

SAMPLES_FILE = "samples.json"
SAMPLES_FORMAT = "retort-samples"
SAMPLES_VERSION = 1
_PROMPT_TOKENS = 32  # of a text that has no question


@dataclass(frozen=True)
class Prompt:
    """What is continued: ids that a model reads, the same as text, and what the held-out text says there, if any."""

    ids: tuple[int, ...]
    text: str
    reference: str | None


@dataclass(frozen=True)
class Sample:
    """Two continuations of one prompt."""

    greedy: str
    drawn: str


@dataclass(frozen=True)
class Samples:
    """Prompts and one model's continuations of them; `missing` says why there are none."""

    prompts: tuple[Prompt, ...]
    continued: tuple[Sample, ...] = ()
    missing: str | None = None


def choose_prompts(table: SequenceTable, tokenizer: Any, settings: Evaluation) -> list[Prompt]:
    """Return prompts from evenly spaced held-out documents, then the user's own. Equal arguments, equal prompts."""
    begins = np.flatnonzero(np.diff(table.documents, prepend=-1) != 0)
    long_enough = [int(i) for i in begins if table.lengths[i] >= 4]
    count = min(settings.num_samples, len(long_enough))
    chosen = [long_enough[place * len(long_enough) // count] for place in range(count)]
    found = [_cut_prompt(table[i], tokenizer, settings.sample_max_new_tokens) for i in chosen]
    asks = len(table) > 0 and not table.loss_mask[table.offsets[:-1]].any()
    encode = encode_prompt if asks else encode_beginning
    own = [(text, encode(text, tokenizer)) for text in settings.sample_prompts]
    return found + [Prompt(tuple(ids), text, None) for text, ids in own]


def _cut_prompt(row: Sequence, tokenizer: Any, num_new: int) -> Prompt:
    """Cut a sequence where its response begins, or after its first tokens."""
    stop = int(row.segment_starts[1]) if len(row.segment_starts) > 1 else len(row.ids)
    cut = int(np.argmax(row.loss_mask)) + 1
    if cut == 1:  # no question: the text counts from its first token on
        cut = min(_PROMPT_TOKENS, stop // 2)
    ids = row.ids[:cut].tolist()
    decode = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text: str = tokenizer.decode(ids, **decode)
    whole: str = tokenizer.decode(row.ids[: min(stop, cut + num_new)].tolist(), **decode)
    return Prompt(tuple(ids), text, whole[len(text) :] if whole.startswith(text) else None)


def write_samples(path: Path, found: dict[str, Samples]) -> None:
    """Write samples.json: the prompts, and under each model's name ("teacher", "student") its continuations."""
    prompts = next(iter(found.values())).prompts
    assert all(samples.prompts == prompts for samples in found.values())
    models = {
        whose: {"missing": samples.missing, "continued": [asdict(s) for s in samples.continued]}
        for whose, samples in found.items()
    }
    header = {"format": SAMPLES_FORMAT, "version": SAMPLES_VERSION}
    write_json(path, header | {"prompts": [asdict(p) for p in prompts], "models": models})


def read_samples(path: Path) -> dict[str, Samples]:
    """Read samples.json: continuations by model. Raises ValueError where it is damaged, foreign or newer."""
    try:
        content = read_json(path)
        if (content["format"], content["version"]) != (SAMPLES_FORMAT, SAMPLES_VERSION):
            raise ValueError(f"it is {content['format']!r} version {content['version']!r}")
        prompts = tuple(
            Prompt(tuple(p["ids"]), p["text"], p["reference"]) for p in content["prompts"]
        )
        found = {
            whose: Samples(prompts, tuple(Sample(**s) for s in m["continued"]), m["missing"])
            for whose, m in content["models"].items()
        }
        if any(m.missing is None and len(m.continued) != len(prompts) for m in found.values()):
            raise ValueError("prompts and continuations differ in number")
        texts = [p.text for p in prompts] + [p.reference or "" for p in prompts]
        texts += [t for m in found.values() for s in m.continued for t in (s.greedy, s.drawn)]
        texts += [m.missing or "" for m in found.values()]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("something that was written is no text")
        if not found:
            raise ValueError("it names no model")
    except (AttributeError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no samples that can be read ({error!r}): delete it, with what lies beside it, and run the "
            "same command again."
        ) from None
    return found


def require_prompts(teacher: Samples, prompts: list[Prompt], *, source: Path) -> None:
    """Raise ValueError unless the teacher was given the same prompts."""
    if [p.ids for p in teacher.prompts] != [p.ids for p in prompts]:
        raise ValueError(
            f"{source} holds the teacher's continuations of other prompts ({len(teacher.prompts)}) than the student is "
            f"given ({len(prompts)}). Delete {source.parent} and run the same command again."
        )
