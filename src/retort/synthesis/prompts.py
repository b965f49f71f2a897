"""The prompts of a synthesis, in order, without duplicates: from files or the Hub, or templates filled with topics.

Filled templates are interleaved so that every prefix of the list has the stated proportions of categories and
languages: they hold however many prompts are asked.
"""

import random
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from retort.artifacts.responses import choose_prompt_reader, list_prompt_files
from retort.config.sections import Dataset, Synthesis
from retort.config.values import read_value, types_of
from retort.config.yaml_source import read_yaml
from retort.corpus.readers import Columns, read_file, require_columns
from retort.corpus.reading import read_rows
from retort.corpus.sources import open_source
from retort.io.text_files import explain_read_errors, open_utf8

_LABELS = ("category", "language")
_KEYS = ("templates", "topics", "categories", "languages")
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class LabeledPrompt:
    """A prompt and its labels; `language` is a human or a programming language."""

    text: str
    category: str | None = None
    language: str | None = None


@dataclass(frozen=True)
class PromptList:
    """The prompts in the order in which they are asked, and how many were left out."""

    prompts: list[LabeledPrompt]
    num_empty: int
    num_duplicates: int


def read_prompts(section: Synthesis) -> PromptList:
    """Return the prompts of a section.

    Raises ValueError, naming the file, when a source cannot be read, has invalid rows, or gives no prompt.
    """
    source = _fill_templates(section) if section.templates else _read_rows(section)
    seen: set[str] = set()
    prompts: list[LabeledPrompt] = []
    num_empty = num_duplicates = 0
    for prompt in source:
        key = _normalize(prompt.text)
        num_empty += not key
        num_duplicates += key in seen
        if key and key not in seen:
            seen.add(key)
            prompts.append(prompt)
    if not prompts:
        raise ValueError(
            f"{section.templates or section.prompts!r} has no prompt ({num_empty} are empty). Give at least one."
        )
    return PromptList(prompts, num_empty, num_duplicates)


def _normalize(text: str) -> str:
    """Return a key that is equal for prompts that differ only in case, white space or Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# ---------------------------------------------------------------------------------------------------------
# Files and the Hub


def _read_rows(section: Synthesis) -> Iterator[LabeledPrompt]:
    rows = _read_files(section) if list_prompt_files(section) else _read_hub(section)
    for number, row in enumerate(rows, start=1):
        text = row.get(section.prompt_column)
        if not isinstance(text, str):
            raise ValueError(
                f"prompt {number} of {section.prompts!r} has {text!r} in the column {section.prompt_column!r}, but "
                "text is expected. Correct the row, or set synthesis.prompt_column."
            )
        if _has_surrogate(text):
            raise ValueError(
                f"prompt {number} of {section.prompts!r} has half a character (a lone surrogate, such as \\ud83d in "
                f"JSON), which cannot be sent: {text[:40]!r}. Correct the row."
            )
        labels = {name: None if row.get(name) is None else str(row[name]) for name in _LABELS}
        yield LabeledPrompt(text, **labels)


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _read_files(section: Synthesis) -> Iterator[Mapping[str, Any]]:
    columns = Columns((section.prompt_column,), _LABELS)
    for path in list_prompt_files(section):
        reader = choose_prompt_reader(path)
        assert reader is not None, path
        if reader == "lines":
            for line in _read_lines(path):
                yield {section.prompt_column: line}
        else:
            yield from (row() for row in read_file(path, reader, columns))


def _read_lines(path: Path) -> Iterator[str]:
    with explain_read_errors(path), open_utf8(path) as file:
        for line in file:
            if text := line.decode("utf-8").strip():
                yield text


def _read_hub(section: Synthesis) -> Iterator[Mapping[str, Any]]:
    assert section.prompts is not None
    name = section.prompts if isinstance(section.prompts, str) else section.prompts[0]
    values = {"name": name, "split": section.prompts_split, "text_column": section.prompt_column}
    dataset = Dataset.model_validate(values)
    for row in read_rows(open_source(dataset, section.prompts_split)):
        columns = row()
        require_columns(Columns((section.prompt_column,), ()), columns, where=str(name))
        yield columns


# ---------------------------------------------------------------------------------------------------------
# Templates


@dataclass(frozen=True)
class _Templates:
    """A file of templates: texts and topics by category; weights of categories and languages, which sum to 1."""

    texts: dict[str | None, list[str]]
    topics: dict[str | None, list[str]]
    categories: dict[str | None, float]
    languages: dict[str | None, float]


def _fill_templates(section: Synthesis) -> Iterator[LabeledPrompt]:
    """Yield filled templates until one kind of prompt is used up: beyond, the proportions could not be kept."""
    templates = _read_templates(Path(str(section.templates)))
    cells = {
        (c, lang): _fill_cell(templates, c, lang, seed=section.seed)
        for c, lang in product(templates.categories, templates.languages)
    }
    weights = {(c, lang): templates.categories[c] * templates.languages[lang] for c, lang in cells}
    num_taken = dict.fromkeys(cells, 0)
    for number in range(1, sum(map(len, cells.values())) + 1):
        # The cell furthest below its share: the counts of every prefix are then within one of the proportions.
        cell = max(cells, key=lambda cell: weights[cell] * number - num_taken[cell])
        if num_taken[cell] == len(cells[cell]):
            return
        category, language = cell
        yield LabeledPrompt(cells[cell][num_taken[cell]], category, language)
        num_taken[cell] += 1


def _fill_cell(
    templates: _Templates, category: str | None, language: str | None, *, seed: int
) -> list[str]:
    """Return every template of a category with every topic, without duplicates, shuffled by the seed."""
    values = {"language": language or "", "category": category or ""}
    topics = templates.topics.get(category, templates.topics.get(None, []))
    filled = [
        text.format(topic=topic, **values)
        for text, topic in product(templates.texts[category], topics or [""])
    ]
    distinct = list({_normalize(text): text for text in filled}.values())
    random.Random(f"{seed} {category} {language}").shuffle(distinct)
    return distinct


def _read_templates(path: Path) -> _Templates:
    """Return a checked file of templates. Raises ValueError, with the key, when its content is invalid."""
    try:
        source = read_yaml(path)
        source.refuse_problems()
    except ValueError as error:
        raise ValueError(f"synthesis.templates is {str(path)!r}: {error}") from None
    raw = source.values
    if not raw.get("templates") or not set(raw) <= set(_KEYS):
        raise ValueError(
            f"synthesis.templates {str(path)!r} has the keys {', '.join(raw)}, but expected are "
            f"templates and, optionally, {', '.join(_KEYS[1:])} (docs/synthesis.md)."
        )
    texts = _by_category(raw["templates"], "templates", path)
    categories = _read_weights(raw.get("categories"), "categories", path)
    if categories is None:
        categories = {name: 1 / len(texts) for name in texts}
    languages = _read_weights(raw.get("languages"), "languages", path) or {None: 1.0}
    if set(categories) != set(texts):
        raise ValueError(
            f"synthesis.templates {str(path)!r}: categories are {_list(categories)}, but templates are for "
            f"{_list(texts)}. Give each category its templates."
        )
    topics = _by_category(raw.get("topics", []), "topics", path)
    for name, known in texts.items():
        _check_texts(known, has_topics=bool(topics.get(name, topics.get(None))), path=path)
    return _Templates(texts, topics, categories, languages)


def _by_category(value: Any, key: str, path: Path) -> dict[str | None, list[str]]:
    """Return texts by category; a plain list applies to all categories (None)."""
    groups = value if isinstance(value, dict) else {None: value}
    for texts in groups.values():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"synthesis.templates {str(path)!r}: {key} must be a list of texts, or one such list by category."
            )
    return groups


def _read_weights(value: Any, key: str, path: Path) -> dict[str | None, float] | None:
    if value is None:
        return None
    read = types_of(float)
    weights = value if isinstance(value, dict) else {}
    numbers = [read_value(number, read) for number in weights.values()]
    if not numbers or not all(isinstance(n, float) and n > 0 for n in numbers):
        raise ValueError(
            f"synthesis.templates {str(path)!r}: {key} must give each name a proportion, such as "
            "{python: 0.7, bash: 0.3}."
        )
    if abs(sum(numbers) - 1) > _TOLERANCE:
        raise ValueError(
            f"synthesis.templates {str(path)!r}: {key} sum to {sum(numbers):g}, but proportions must sum to 1. "
            "Correct them."
        )
    return dict(zip(weights, numbers, strict=True))


def _check_texts(texts: Iterable[str], *, has_topics: bool, path: Path) -> None:
    """Raise ValueError when a template cannot be filled."""
    for text in texts:
        try:
            text.format(topic="", language="", category="")
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"synthesis.templates {str(path)!r}: the template {text!r} cannot be filled ({error}): it may name "
                "{topic}, {language} and {category}; other braces are written twice."
            ) from None
        if "{topic}" in text and not has_topics:
            raise ValueError(
                f"synthesis.templates {str(path)!r}: the template {text!r} names {{topic}}, but its category has no "
                "topics. List some under topics."
            )


def _list(names: Iterable[str | None]) -> str:
    return ", ".join(sorted(str(name) for name in names))
