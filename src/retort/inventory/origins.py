"""Where artifacts come from: the config keys and inputs that they were made from, as their records say."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from retort.config.handoff import CONFIG_FILE
from retort.config.load import differences
from retort.config.output import Output
from retort.config.schema import flatten
from retort.config.section import Section, changes_id
from retort.config.sections import Config, section_at
from retort.inventory.layout import Artifact
from retort.io.run_record import RUN_FILE

# Of each kind, the keys of its config.json that its content depends on, beside what its inputs depend on.
_OWN_KEYS = {
    "corpus": ("dataset",),
    "synthesis": ("synthesis", "evaluation"),
    "teacher": ("teacher", "dataset"),
    "tokens": (
        "dataset",
        "teacher.model_path",
        "teacher.revision",
        "teacher.generation.force_regenerate",
    ),
    "validation": ("teacher", "evaluation"),
    "logits": ("teacher", "cache"),
    "pruned": ("student", "teacher"),
    "run": ("dataset", "teacher", "student", "training"),
    "evaluation": ("evaluation",),
    "benchmark": ("evaluation",),
}
# Kinds whose keys are part of those of another one that is made from them.
INPUTS = {
    "tokens": ("corpus", "teacher"),
    "validation": ("tokens", "teacher"),
    "logits": ("tokens", "teacher"),
    "pruned": ("teacher", "tokens"),
    "run": ("tokens", "logits", "pruned", "teacher"),
}
_PLACE = re.compile(
    r"(?:^|/)((?:corpora|tokens|logits|validation|pruned)/[0-9a-f]{12}"
    r"|teachers/(?:demo-)?[0-9a-f]{12}|syntheses/(?:api-)?[0-9a-f]{12}/[0-9a-f]{12})(?:/|$)"
)
_FOLDERS = {
    "corpora": "corpus",
    "tokens": "tokens",
    "logits": "logits",
    "validation": "validation",
    "pruned": "pruned",
    "teachers": "teacher",
    "syntheses": "synthesis",
}
_T = TypeVar("_T")
Keys = dict[str, Any]  # dotted key -> value, of those that change ids


@dataclass(frozen=True)
class Origin:
    """What the records beside an artifact say.

    kind: of the artifact. source: name of the config file. keys: its own, those at their default left out.
    inputs: the place of each artifact that it was made from, by kind; empty before it is finished.
    expected: digests that files behind it had, by what they are of. commit: of the Retort that made it.
    finished: when, in UTC. is_read: whether its config.json could be read. store: URL of a cache's parts, if they are
    in a store.
    """

    kind: str = ""
    source: str | None = None
    keys: Keys = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    finished: str | None = None
    is_read: bool = False
    store: str | None = None


def read_origin(artifact: Artifact) -> Origin:
    """Return where an artifact comes from. What cannot be read is left out: a list must show damaged results too."""
    job = _read(artifact.path / CONFIG_FILE)
    made = find_made(artifact)
    config = job.get("config")
    words = [word for word in made.get("command") or [] if isinstance(word, str)]
    asked = next((_parse(word) for word in words if word.startswith("{")), {})
    return Origin(
        kind=artifact.kind.name,
        source=job.get("source") or made.get("source"),
        keys=own_keys(artifact.kind.name, config if isinstance(config, dict) else {}),
        inputs=_find_inputs(words, output=artifact.place),
        expected=asked.get("expected") or {},
        commit=made.get("commit"),
        finished=made.get("finished"),
        is_read=isinstance(config, dict),
        store=_find_store(artifact, config),
    )


def _find_store(artifact: Artifact, config: object) -> str | None:
    """Return the URL of the objects of a cache whose parts are in a store."""
    output = config.get("output") if isinstance(config, dict) else None
    url = output.get("cache_dir") if isinstance(output, dict) else None
    if artifact.kind.name != "logits" or not isinstance(url, str):
        return None
    return Output(cache_dir=url).find_store(artifact.path)


def own_keys(kind: str, sections: Mapping[str, Any]) -> Keys:
    """Return the keys of a kind of artifact in sections of a config, of those that change ids."""
    found = {key: value for key, value in flatten(sections) if _changes_id(key)}
    return _choose(found, _OWN_KEYS.get(kind, ()))


def own_keys_of(kind: str, keys: Keys) -> Keys:
    """Return those of a run's keys that a kind of artifact depends on, directly or by what it is made from."""
    names = [
        *_OWN_KEYS.get(kind, ()),
        *(n for below in INPUTS.get(kind, ()) for n in _OWN_KEYS[below]),
    ]
    return _choose(keys, names)


def _choose(keys: Keys, names: Iterable[str]) -> Keys:
    """Return the keys that are named, or lie in a section that is."""
    names = list(names)
    return {k: v for k, v in keys.items() if any(k == n or k.startswith(f"{n}.") for n in names)}


def config_keys(config: Config) -> Keys:
    """Return the keys of a run's config that change ids and differ from their defaults."""
    sections = {name: differences(getattr(config, name)) for name in Config.model_fields}
    return {key: _plain(value) for key, value in flatten(sections) if _changes_id(key)}


def whole_keys(place: str, origins: Mapping[str, Origin]) -> Keys:
    """Return the keys of an artifact and of all that it was made from."""
    origin = origins.get(place, Origin())
    keys: Keys = {}
    for below in origin.inputs.values():
        keys |= whole_keys(below, origins)
    return keys | origin.keys


def knows(place: str, key: str, origins: Mapping[str, Origin]) -> bool:
    """Return whether an artifact has a value of a key: what it was made from is not known before it is finished."""
    origin, section = origins.get(place, Origin()), key.partition(".")[0]
    if not origin.is_read:
        return False
    own = {name.partition(".")[0] for name in _OWN_KEYS.get(origin.kind, ())}
    return section in own or any(knows(below, key, origins) for below in origin.inputs.values())


def trace_inputs(place: str, origins: Mapping[str, Origin]) -> set[str]:
    """Return the places of all that an artifact was made from, directly or not."""
    found: set[str] = set()
    for below in origins.get(place, Origin()).inputs.values():
        found |= {below} | trace_inputs(below, origins)
    return found


def kind_of(place: str) -> str:
    """Return the kind of artifact of an input's place."""
    return _FOLDERS[place.partition("/")[0]]


@cache
def default_of(key: str) -> Any:
    """Return the default of a dotted key, None for one that this version does not know."""
    *path, name = key.split(".")
    section = section_at(path)
    if section is None or name not in section.model_fields:
        return None
    return _plain(section.model_fields[name].get_default(call_default_factory=True))


@cache
def _changes_id(key: str) -> bool:
    """Return whether a dotted key changes ids; True for one that this version does not know."""
    path = key.split(".")
    for length in range(1, len(path)):
        section = section_at(path[:length])
        if section is None:
            return True
        if not section.changes_ids:
            return False
    section = section_at(path[:-1])
    return section is None or path[-1] not in section.model_fields or changes_id(section, path[-1])


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, Section):
        return differences(value)
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def find_made(artifact: Artifact) -> dict[str, Any]:
    """Return the record of the command that made an artifact, {} where there is none yet."""
    names: Iterable[str] = (
        RUN_FILE,
        *(name for name in artifact.kind.finished if name.endswith(".json")),
    )
    for name in names:
        content = _read(artifact.path / name)
        content = content if "command" in content else content.get("made") or {}
        if isinstance(content, dict) and "command" in content:
            return content
    return {}


def _find_inputs(words: Iterable[str], *, output: str) -> dict[str, str]:
    """Return the places in a command line, by kind, without that of its output; see `name_inputs`."""
    places = {
        match[1] for word in words if not word.startswith("{") for match in _PLACE.finditer(word)
    }
    found = [place for place in sorted(places) if not output.startswith(place)]
    return dict(name_inputs((kind_of(place), place) for place in found))


def name_inputs(found: Iterable[tuple[str, _T]]) -> Iterator[tuple[str, _T]]:
    """Yield inputs by kind, in the order of their ids: of several teachers the further ones as "logits 2" and so on."""
    seen: Counter[str] = Counter()
    for kind, one in found:
        seen[kind] += 1
        yield kind if seen[kind] == 1 else f"{kind} {seen[kind]}", one


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
