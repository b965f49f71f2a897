"""What an id is made of, as a tree: own keys, files, and the ids of inputs; of a folder of results, or of a config."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retort.artifacts.jobs import build_job
from retort.artifacts.project import Corpus, Logits, Pruned, Run, TeacherModel, Tokens, Validation
from retort.config.handoff import SECTIONS
from retort.corpus.reading import list_corpus_files
from retort.inventory.kinds import KIND_OF
from retort.inventory.layout import Artifact
from retort.inventory.origins import (
    Keys,
    default_of,
    kind_of,
    name_inputs,
    own_keys,
    read_origin,
)
from retort.io.digests import hash_file
from retort.io.files import read_json

# The keys in an id itself, beside the ids of its inputs; a key that begins with "-" is left out again.
_ID_KEYS = {
    "corpus": ("dataset",),
    "synthesis": ("synthesis",),
    "teacher": ("teacher", "-teacher.generation"),
    "tokens": ("dataset", "teacher.model_path", "teacher.revision"),
    "logits": ("cache", "teacher.generation"),
    "validation": ("evaluation",),
    "pruned": ("student", "teacher.model_path", "teacher.revision"),
    "run": ("student", "training", "teacher.mix"),
    "evaluation": ("evaluation",),
    "benchmark": ("evaluation",),
}
_ID_INPUTS = {
    "tokens": ("corpus", "synthesis", "teacher"),
    "logits": ("tokens", "teacher"),
    "validation": ("tokens", "teacher"),
    "pruned": ("teacher", "tokens"),
    "run": ("tokens", "logits", "teacher", "pruned"),
    "evaluation": ("validation",),
}
_AGAIN = "teacher.generation.force_regenerate"
# Of a run that learns from the text alone, keys that its id leaves out (artifacts.build.training_keys).
_OF_TEACHER = ("temperature", "divergence", "skew", "position_weights", "use_cached_logits")


@dataclass(frozen=True)
class Node:
    """What an id is made of.

    keys: its own that differ from their defaults. files: digests of files behind it, by what they are. inputs: by kind.
    commit: of the Retort that made it, None if it is not made or not known. unused: keys that its id leaves out.
    """

    kind: str
    id: str
    keys: Keys = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, "Node"] = field(default_factory=dict)
    commit: str | None = None
    unused: frozenset[str] = frozenset()


def read_node(artifact: Artifact) -> Node:
    """Return the tree of an artifact on the disk, as far as records say; an input that is gone has its id alone."""
    origin, kind = read_origin(artifact), artifact.kind.name
    inputs = {}
    for below, place in origin.inputs.items():
        is_part = below.partition(" ")[0] in _ID_INPUTS.get(kind, ())
        if is_part and not _is_width_alone(kind, below, origin.keys):
            inputs[below] = _read_input(artifact.root, place)
    return Node(
        kind,
        artifact.id,
        _choose(kind, origin.keys, is_alone=not inputs),
        dict(_read_files(artifact))
        | {f"state of the files ({n})": d for n, d in origin.expected.items()},
        inputs,
        origin.commit,
        _list_unused(kind, origin.keys),
    )


def _read_input(root: Path, place: str) -> Node:
    artifact = Artifact(KIND_OF[kind_of(place)], root, place)
    if not artifact.path.is_dir():
        return Node(artifact.kind.name, artifact.id)
    return read_node(artifact)


def plan_node(artifact: Any, root: Path) -> Node:
    """Return the tree of an artifact of a config, made or not; `root`: the folder that its results are in."""
    kind = next(name for name, types in _TYPES.items() if isinstance(artifact, types))
    sections = (
        build_job(kind, artifact).to_json(SECTIONS.get(kind, ()))["config"]
        if kind in SECTIONS
        else {}
    )
    keys = own_keys(kind, sections)
    if isinstance(artifact, Tokens | Pruned) and artifact.teacher:  # jobs need not know it
        again = artifact.teacher.section.generation.force_regenerate
        keys |= {_AGAIN: again} if again != default_of(_AGAIN) else {}
    inputs = {
        below: plan_node(one, root)
        for below, one in _list_inputs(artifact)
        if below.partition(" ")[0] in _ID_INPUTS.get(kind, ())
        and not _is_width_alone(kind, below, keys)
    }
    return Node(
        kind,
        artifact.id,
        _choose(kind, keys, is_alone=False),
        dict(_hash_files(artifact)),
        inputs,
        unused=_list_unused(kind, keys),
    )


_TYPES: dict[str, Any] = {
    "run": Run,
    "logits": Logits,
    "validation": Validation,
    "pruned": Pruned,
    "tokens": Tokens,
    "teacher": TeacherModel,
    "corpus": Corpus,
}


def _list_inputs(artifact: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(artifact, Run):
        several = artifact.logits or artifact.teachers
        kind = "logits" if artifact.logits else "teacher"
        ordered = sorted(several, key=lambda one: one.id)
        yield from name_inputs((kind, one) for one in ordered)
    for kind in ("tokens", "logits", "teacher", "pruned", "corpus"):
        if isinstance(artifact, Run) and kind in ("logits", "teacher"):
            continue
        found = getattr(artifact, kind, None)
        is_read = kind != "corpus" or (found and found.needs_snapshot)
        is_own = not (
            isinstance(artifact, Tokens) and kind == "teacher" and found and not found.corpus
        )
        if found is not None and is_read and is_own:
            yield kind, found


def _is_width_alone(kind: str, below: str, keys: Keys) -> bool:
    """Return whether a run takes only the width of the output layer from a teacher: that is not in its id."""
    is_text = keys.get("training.distillation_type") == "output"
    return kind == "run" and is_text and below.partition(" ")[0] in ("teacher", "logits")


def _list_unused(kind: str, keys: Keys) -> frozenset[str]:
    is_text = kind == "run" and keys.get("training.distillation_type") == "output"
    return frozenset(f"training.{name}" for name in _OF_TEACHER if is_text)


def _choose(kind: str, keys: Keys, *, is_alone: bool) -> Keys:
    """Return the keys that are in an id of a kind; is_alone: its inputs are not known, so theirs too."""
    names = _ID_KEYS.get(kind, ())
    left_out = [name.removeprefix("-") for name in names if name.startswith("-")]
    left_out += _list_unused(kind, keys)
    found = {}
    for key, value in keys.items():
        is_named = is_alone or _is_in(key, names)
        if key == _AGAIN:  # the id of what a teacher makes has it by the teacher's
            is_named = is_alone or kind in ("tokens", "teacher", "pruned")
        if is_named and (key == _AGAIN or not _is_in(key, left_out)):
            found[key] = value
    return found


def _is_in(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _read_files(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """Yield (what, digest) of the files behind an artifact that its record has."""
    wanted = {
        "tokens": (
            "index.json",
            {"tokens of the text": "content", "tokenizer": "tokenizer.fingerprint"},
        ),
        "teacher": (
            "fingerprint.json",
            {"weights": "weights", "tokenizer": "tokenizer.fingerprint"},
        ),
        "run": ("training.json", {"what the student starts from": "student"}),
        "synthesis": ("synthesis.json", {"responses": "responses.digest"}),
    }
    name, facts = wanted.get(artifact.kind.name, ("", {}))
    path = artifact.path / name
    if not name or not path.exists():
        return
    content = read_json(path)
    for what, key in facts.items():
        value = content
        for step in key.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        if isinstance(value, str):
            yield what, value


def _hash_files(artifact: Any) -> Iterator[tuple[str, str]]:
    """Yield (what, digest) of the user's files that an id of a config counts by content."""
    if isinstance(artifact, Run):
        yield "what the student starts from", artifact.student
    if isinstance(artifact, Pruned):
        yield "what the student starts from", artifact.content
    if isinstance(artifact, Tokens):
        if artifact.fingerprint:
            yield "tokenizer", artifact.fingerprint
        if artifact.corpus.synthesis is None:
            yield from (
                (f"file {path}", hash_file(path))
                for path in list_corpus_files(artifact.corpus.dataset)
            )
            yield "state of the files (corpus)", artifact.corpus.stamp
        else:
            yield "synthesis", artifact.corpus.synthesis.id
