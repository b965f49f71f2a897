"""YAML files as plain values that know their lines. Scalars stay text as written: the type of a key decides.

YAML 1.1, which Snakemake reads, makes `no` false, 010 eight and 2026-01-01 a date. Here `no` is a language, a name, or
false for a key that takes true and false.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from retort.config.yaml_errors import explain, split_lines

KeyPath = tuple[str, ...]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "merge", "value", "seq", "map")
_MERGE = "tag:yaml.org,2002:merge"
_MAX_VALUES = 100_000  # aliases of aliases of aliases grow without end
_MAX_REPAIRS = 20
_SURROGATES = re.compile("[\ud800-\udfff]")


class Place(NamedTuple):
    """Where a key is written; line 0: the file without a line, or the command line."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Source:
    """Values as written: text, None, lists and mappings; where each key is; and what cannot be read, with its place."""

    values: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: Sequence[tuple[Place, str]] = ()
    files: tuple[str, ...] = ()  # a later one is laid over those before

    def place(self, path: Sequence[str | int]) -> Place | None:
        """Return the place of a key, or of the innermost section around it that is written, or the file."""
        key = tuple(map(str, path))
        while key and key not in self.places:
            key = key[:-1]
        whole = Place(self.files[-1]) if self.files else None
        return self.places.get(key, whole)

    def refuse_problems(self) -> None:
        """Raise ValueError that lists what cannot be read, if there is any."""
        if self.problems:
            raise ValueError(_list(self.problems))


def read_yaml(path: Path, name: str | None = None) -> Source:
    """Return the values of a YAML or JSON file, which messages call `name`.

    Mistakes in the writing are in `problems`, if what is meant is clear enough to read on. Raises ValueError, with the
    line, when it is not, or when the file cannot be read.
    """
    name = name or str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}:{line}: the file is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Source:
    """Return the values of a text, as `read_yaml` does. Raises ValueError as that does."""
    if text.lstrip().startswith("{") and (source := _parse_json(text, name)):
        return source
    node, problems = _compose(text, name)
    reader = _Reader(name, problems)
    values = reader.read(node, ()) if node else None
    if not isinstance(values, dict):
        what = (
            "is a list"
            if isinstance(values, list)
            else "has no keys"
            if node is None
            else "is one value"
        )
        raise ValueError(
            f"{name} {what}, but lines of 'key: value' are expected, such as student: {{config: student.json}}."
        )
    return Source(values, reader.places, reader.problems, (name,))


def _parse_json(text: str, name: str) -> Source | None:
    """Return the values of JSON, whose lines are not known; None if it is no JSON."""
    problems: list[tuple[Place, str]] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = ", ".join(repr(key) for key in values if keys.count(key) > 1)
            problems.append(
                (Place(name), f"{twice} is set twice in one section. Remove one of the two.")
            )
        return values

    try:
        values = json.loads(
            text, object_pairs_hook=collect, parse_int=str, parse_float=str, parse_constant=str
        )
    except (ValueError, RecursionError):
        return None
    return Source(values, problems=problems, files=(name,))


def _compose(text: str, name: str) -> tuple[yaml.Node | None, list[tuple[Place, str]]]:
    """Return the document's node; what is wrong in the writing is repaired where possible, and listed."""
    problems: list[tuple[Place, str]] = []
    written = split_lines(text)
    for _ in range(_MAX_REPAIRS):
        for loader in (_LOADER, yaml.SafeLoader):  # only the second takes halves of characters
            with contextlib.suppress(yaml.YAMLError, RecursionError):
                return yaml.compose(text, Loader=loader), problems
        line, message, repaired = explain(text)
        # A line that a repair has moved is not what the user wrote.
        if repaired is None or split_lines(text)[line] == written[line]:
            problems.append((Place(name, line + 1), message))
        if repaired is None:
            break
        text = repaired
    raise ValueError(_list(problems))


def _list(problems: Sequence[tuple[Place, str]]) -> str:
    return "\n".join(f"{place}: {message}" for place, message in problems)


class _Reader:
    """Nodes to values; collects places and problems."""

    def __init__(self, name: str, problems: list[tuple[Place, str]]) -> None:
        self.places: dict[KeyPath, Place] = {}
        self.problems = problems
        self._name = name
        self._num_values = 0
        self._around: list[yaml.Node] = []  # the nodes that are being read

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return the value of a node. Raises ValueError for too many, or too deeply nested."""
        self._num_values += 1
        if self._num_values > _MAX_VALUES or len(self._around) > 50:
            raise ValueError(
                f"{self._name}: more values, or deeper nested, than a config can have."
            )
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag not in _TAGS and tag != "!":
            self._add(
                node,
                f"'{tag}' begins with '!', which is a tag in YAML; a config has none. Put text in quotes.",
            )
            if isinstance(node, yaml.ScalarNode):
                return f"{tag} {node.value}".rstrip()
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if any(node is other for other in self._around):
            self._add(node, "an alias refers to the value that it is in. Write the value out.")
            return None
        self._around.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return list(self._items(node, path))
            assert isinstance(node, yaml.MappingNode), node
            return self._mapping(node, path)
        finally:
            self._around.pop()

    def _scalar(self, node: yaml.ScalarNode) -> str | None:
        if node.tag.endswith(":null"):
            return None
        text: str = node.value
        if _SURROGATES.search(text):
            try:
                return text.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                self._add(
                    node,
                    "the text has half a character (such as \\ud83d). Write the character itself.",
                )
                return _SURROGATES.sub("?", text)
        return text

    def _items(self, node: yaml.SequenceNode, path: KeyPath) -> Iterator[Any]:
        for number, item in enumerate(node.value):
            below = (*path, str(number))
            self.places[below] = self._place(item)
            yield self.read(item, below)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if key.tag == _MERGE:  # <<: *base
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            if not isinstance(key, yaml.ScalarNode):
                self._add(
                    key,
                    "braces or brackets are in place of a key. Put text that begins with them in quotes.",
                )
                continue
            name = str(key.value)
            below = (*path, name)
            if name in found:
                self._add_duplicate(key, value, below)
                continue
            self.places[below] = self._place(key)
            found[name] = self.read(value, below)
        for other in merged:
            self._merge(other, path, found)
        return found

    def _merge(self, node: yaml.Node, path: KeyPath, found: dict[str, Any]) -> None:
        """Add the keys of a mapping that `<<` refers to, unless they are there."""
        if not isinstance(node, yaml.MappingNode):
            self._add(node, "'<<' takes an alias of a section, such as *base.")
            return
        known = {key: place for key, place in self.places.items() if key[: len(path)] == path}
        added = self.read(node, path)
        for name in added:
            if name in found:
                self.places.update(
                    {k: p for k, p in known.items() if k[: len(path) + 1] == (*path, name)}
                )
        found.update({name: value for name, value in added.items() if name not in found})

    def _add_duplicate(self, node: yaml.Node, value: yaml.Node, path: KeyPath) -> None:
        what = ".".join(path)
        first = self.places[path].line
        is_section = isinstance(value, yaml.MappingNode)
        advice = "Write all its keys in one place." if is_section else "Remove one of the two."
        where = (
            f"in line {first} already" if first != self._place(node).line else "twice in this line"
        )
        self._add(node, f"{what} is set {where}. {advice}")

    def _place(self, node: yaml.Node) -> Place:
        return Place(self._name, node.start_mark.line + 1, node.start_mark.column + 1)

    def _add(self, node: yaml.Node, message: str) -> None:
        self.problems.append((self._place(node), message))
