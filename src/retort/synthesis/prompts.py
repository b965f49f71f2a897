"""What a model is asked, in order: prompts of files or of the Hub, or templates filled with topics; none twice.

Templates are drawn so that every beginning of the list has its categories and languages in the stated proportions: it
does not matter how many of them are asked.
"""

import random
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from retort.artifacts.syntheses import choose_reader, list_prompt_files
from retort.config.schema import fill_defaults, section_schema
from retort.config.sections import Dataset, Synthesis, build_section
from retort.corpus.readers import Columns, naming, open_bytes, read_file, require
from retort.corpus.reading import read_rows
from retort.corpus.sources import open_source

_LABELS = ("category", "language")
_KEYS = ("templates", "topics", "categories", "languages")
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Prompt:
    """One thing that is asked, with its labels."""

    text: str
    category: str | None = None
    language: str | None = None


@dataclass(frozen=True)
class Prompts:
    """All prompts in the order in which they are asked, and how many were left out."""

    prompts: list[Prompt]
    empty: int
    twice: int


def read_prompts(section: Synthesis) -> Prompts:
    """Return what is asked. Raises ValueError, naming the file, where it cannot be read or nothing is left."""
    read = _fill_templates(section) if section.templates else _read_rows(section)
    seen: set[str] = set()
    kept: list[Prompt] = []
    empty = twice = 0
    for prompt in read:
        key = _normalize(prompt.text)
        empty += not key
        twice += key in seen
        if key and key not in seen:
            seen.add(key)
            kept.append(prompt)
    if not kept:
        raise ValueError(
            f"there is no prompt in {section.templates or section.prompts!r}: {empty} are empty. Give at least one."
        )
    return Prompts(kept, empty=empty, twice=twice)


def _normalize(text: str) -> str:
    """Return what two prompts share that differ in case, white space or the form of a letter alone."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# ---------------------------------------------------------------------------------------------------------
# Files and the Hub


def _read_rows(section: Synthesis) -> Iterator[Prompt]:
    rows = _read_files(section) if list_prompt_files(section) else _read_hub(section)
    for number, row in enumerate(rows, start=1):
        text = row.get(section.prompt_column)
        if not isinstance(text, str):
            raise ValueError(
                f"prompt {number} of {section.prompts!r} has {text!r} in the column {section.prompt_column!r}, but "
                "text is expected. Mend the row, or set synthesis.prompt_column."
            )
        if not _is_whole(text):
            raise ValueError(
                f"prompt {number} of {section.prompts!r} holds half a character (such as \\ud83d in JSON), "
                f"which cannot be sent: {text[:40]!r}. Mend the row."
            )
        labels = {name: None if row.get(name) is None else str(row[name]) for name in _LABELS}
        yield Prompt(text, **labels)


def _is_whole(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _read_files(section: Synthesis) -> Iterator[Mapping[str, Any]]:
    columns = Columns((section.prompt_column,), _LABELS)
    for path in list_prompt_files(section):
        reader = choose_reader(path)
        assert reader is not None, path
        if reader == "lines":
            for line in _read_lines(path):
                yield {section.prompt_column: line}
        else:
            yield from (row() for row in read_file(path, reader, columns))


def _read_lines(path: Path) -> Iterator[str]:
    with naming(path), open_bytes(path) as file:
        for line in file:
            if text := line.decode("utf-8").lstrip("\ufeff").strip():  # what some editors put first
                yield text


def _read_hub(section: Synthesis) -> Iterator[Mapping[str, Any]]:
    name = section.prompts if isinstance(section.prompts, str) else section.prompts[0]  # type: ignore[index]
    values = {"name": name, "split": section.prompts_split, "text_column": section.prompt_column}
    dataset: Dataset = build_section("dataset", fill_defaults(values, section_schema("dataset")))
    for row in read_rows(open_source(dataset, section.prompts_split)):
        columns = row()
        require(Columns((section.prompt_column,), ()), columns, where=str(name))
        yield columns


# ---------------------------------------------------------------------------------------------------------
# Templates


@dataclass(frozen=True)
class _Templates:
    """A file of templates: texts by category, topics by category, weights that sum to 1."""

    texts: dict[str | None, list[str]]
    topics: dict[str | None, list[str]]
    categories: dict[str | None, float]
    languages: dict[str | None, float]


def _fill_templates(section: Synthesis) -> Iterator[Prompt]:
    """Yield filled templates until one kind of prompt is used up: from there on, proportions could not be kept."""
    path = Path(str(section.templates))
    given = _read_templates(path)
    cells = {
        (c, lang): _fill_cell(given, c, lang, seed=section.seed)
        for c, lang in product(given.categories, given.languages)
    }
    weights = {(c, lang): given.categories[c] * given.languages[lang] for c, lang in cells}
    taken = dict.fromkeys(cells, 0)
    for number in range(1, sum(map(len, cells.values())) + 1):
        # The kind that is furthest behind its share: so every beginning of the list is within one of it.
        cell = max(cells, key=lambda cell: weights[cell] * number - taken[cell])
        if taken[cell] == len(cells[cell]):
            return
        category, language = cell
        yield Prompt(cells[cell][taken[cell]], category, language)
        taken[cell] += 1


def _fill_cell(
    given: _Templates, category: str | None, language: str | None, *, seed: int
) -> list[str]:
    """Return every template of a category with every topic, each once, in an order of the seed."""
    values = {"language": language or "", "category": category or ""}
    topics = given.topics.get(category, given.topics.get(None, []))
    filled = [
        text.format(topic=topic, **values)
        for text, topic in product(given.texts[category], topics or [""])
    ]
    once = list({_normalize(text): text for text in filled}.values())
    random.Random(f"{seed} {category} {language}").shuffle(once)
    return once


def _read_templates(path: Path) -> _Templates:
    """Read and check a file of templates. Raises ValueError, with the key, for what it cannot mean."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"synthesis.templates {str(path)!r} is not YAML: {error}. Mend the file."
        ) from None
    if not isinstance(raw, dict) or not raw.get("templates") or not set(raw) <= set(_KEYS):
        raise ValueError(
            f"synthesis.templates {str(path)!r} has the keys {', '.join(map(str, raw or ()))}, but expected are "
            f"templates and, where wanted, {', '.join(_KEYS[1:])} (docs/synthesis.md)."
        )
    texts = _by_category(raw["templates"], "templates", path)
    categories = _read_weights(raw.get("categories"), "categories", path)
    if categories is None:
        categories = {name: 1 / len(texts) for name in texts}
    languages = _read_weights(raw.get("languages"), "languages", path) or {None: 1.0}
    if set(categories) != set(texts):
        raise ValueError(
            f"synthesis.templates {str(path)!r}: categories are {_list(categories)}, but templates are of "
            f"{_list(texts)}. Give each category its templates."
        )
    topics = _by_category(raw.get("topics", []), "topics", path)
    for name, known in texts.items():
        _check_texts(known, has_topics=bool(topics.get(name, topics.get(None))), path=path)
    return _Templates(texts, topics, categories, languages)


def _by_category(value: Any, key: str, path: Path) -> dict[str | None, list[str]]:
    """Return texts by category; a plain list is of all categories (None)."""
    groups = value if isinstance(value, dict) else {None: value}
    for texts in groups.values():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"synthesis.templates {str(path)!r}: {key} must be a list of texts, or one such list by category."
            )
    return {None if name is None else str(name): texts for name, texts in groups.items()}


def _read_weights(value: Any, key: str, path: Path) -> dict[str | None, float] | None:
    if value is None:
        return None
    numbers = value.values() if isinstance(value, dict) else []
    if not numbers or not all(isinstance(n, int | float) and n > 0 for n in numbers):
        raise ValueError(
            f"synthesis.templates {str(path)!r}: {key} must give each name a proportion, such as "
            "{python: 0.7, bash: 0.3}."
        )
    if abs(sum(numbers) - 1) > _TOLERANCE:
        raise ValueError(
            f"synthesis.templates {str(path)!r}: {key} sum to {sum(numbers):g}, but proportions sum to 1. Mend them."
        )
    return {str(name): float(number) for name, number in value.items()}


def _check_texts(texts: Iterable[str], *, has_topics: bool, path: Path) -> None:
    """Raise ValueError for a template that cannot be filled."""
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
