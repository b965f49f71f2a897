"""Messages for unknown keys, and for values in place of sections, with what was probably meant.

A key is suggested for a misspelling, for the same name in another section, or because other_names.yaml says so: never
because two names look alike, as `eval_steps` and `max_steps` do.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import Any

import yaml

from retort.config.schema import KEY_PREFIXES, KeyPath, dotted, show
from retort.config.sections import key_paths, section_at, section_paths
from retort.config.values import parse_text

NAMES_FILE = "other_names.yaml"  # in the package
# The key that was probably meant when a section is given one value.
_SHORTHAND = {
    "dataset": "dataset.name",
    "student": "student.config",
    "teacher": "teacher.model_path",
    "evaluation.benchmarks": "evaluation.benchmarks.tasks",
    "evaluation.humaneval": "evaluation.humaneval.file",
    "evaluation.samples": "evaluation.samples.num_samples",
}
# Values by other names.
_SAME = {
    "bf16": "bfloat16",
    "bfloat16": "bf16",
    "fp16": "float16",
    "half": "float16",
    "float16": "fp16",
    "fp32": "float32",
    "float": "float32",
    "gpu": "cuda",
    "kl": "forward_kl",
    "fkl": "forward_kl",
    "rkl": "reverse_kl",
    "skl": "skew_forward_kl",
    "skew_kl": "skew_forward_kl",
    "srkl": "skew_reverse_kl",
    "tv": "total_variation",
    "tvd": "total_variation",
    "js": "jensen_shannon",
    "jsd": "jensen_shannon",
    "nucleus": "top_p",
    "ce": "output",
    "cross_entropy": "output",
    "adamw": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "wsd": "warmup_stable_decay",
}
_OTHER_BASE = re.compile(r"[-+]?0[\dxob][\da-fA-F_]*|\d+(:\d\d)+")  # octal, hexadecimal, base 60
_ALL_KEYS = "config/README.md lists all keys."
_SECRET = (
    "API keys do not belong in a config, which is recorded and shared. Set an environment variable: export "
    "OPENAI_API_KEY=..., or the one that synthesis.api_key_variable names."
)


def not_a_section(path: Sequence[str | int], value: Any) -> str:
    """Return the message for a value that is given instead of a section."""
    prefix, inner = _split_run(path)
    if path == ("runs",):
        hint = "Write one entry per student, such as runs: {soft: {training: {alpha: 0.2}}}."
    elif meant := _SHORTHAND.get(".".join(map(str, inner))):
        shown = show(value).strip("'")
        hint = f"Did you mean {prefix}{meant}: {shown}?"
    elif isinstance(value, str) and ":" in value.rstrip(":") and ": " not in value:
        hint = f"A space is missing after the colon: write {value.replace(':', ': ', 1)!r}."
    elif isinstance(value, list):
        hint = "Write its keys without '- ' before them."
    else:
        section = section_at(inner)
        keys = list(section.model_fields) if section else []
        more = ", ..." if len(keys) > 5 else ""
        hint = (
            f"Its keys, {', '.join(keys[:5])}{more}, go in the lines below it, indented."
            if keys
            else ""
        )
    what = "a section of 'key: value' lines is expected"
    return f"{dotted(path)} is {show(value)}, but {what}. {hint}".rstrip()


def unknown_key(path: Sequence[str | int], value: Any) -> str:
    """Return the message for an unknown key or section."""
    value = parse_text(value) if isinstance(value, str) else value
    prefix, place = _split_run(path)
    known = section_at(place[:-1])
    inner = tuple(step for step in place if isinstance(step, str))
    name = inner[-1]
    hint: str | None
    if name == "api_key" or (isinstance(value, str) and value.startswith(KEY_PREFIXES)):
        hint = _SECRET
    elif name == "runs":
        hint = "Runs are listed once, at the top of the config."
    else:
        hint = (
            _other_name(inner, value, prefix)
            or _misspelling(inner, prefix, known.model_fields if known else ())
            or _same_name(inner, value, prefix)
            or _keys_below(inner, value, prefix)
        )
    odd = next((f" (which has {c!r}, U+{ord(c):04X})" for c in name if not c.isascii()), "")
    return f"Unknown config key {dotted(path)}{odd}. {hint or _ALL_KEYS}"


def suggest_value(value: Any, takes: str) -> str | None:
    """Return what to write instead of a value that was nearly right; `takes` is the phrase for the key's values."""
    if takes.startswith("a list") and isinstance(value, str | int | float):
        return f"Write it in brackets, [{value}]"
    if isinstance(value, list) and "a list" not in takes:
        return "Write it under runs, where each value of a list makes a run of its own"
    if not isinstance(value, str) or ("a number" not in takes and "an integer" not in takes):
        return None
    if _OTHER_BASE.fullmatch(value):
        return "YAML's versions read it as different numbers. Write it in digits that do not begin with 0"
    if found := re.fullmatch(r"([\d.]+) ?%", value):
        return f"Write {float(found[1]) / 100:g}"
    if re.fullmatch(r"\d+,\d+", value):
        return f"Write {value.replace(',', '.')}, with a point" if "number" in takes else None
    return (
        "Write it in digits, without a unit" if re.fullmatch(r"[\d.]+ ?[A-Za-z]+", value) else None
    )


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the one of `known` that `word` is another name or a misspelling of, None if there is none."""
    known = list(known)
    if (same := _SAME.get(word.lower())) in known:
        return same
    found = [name for name in known if _is_misspelling(word, name)]
    return min(found, key=lambda name: _distance(word, name)) if found else None


def _other_name(inner: KeyPath, value: Any, prefix: str) -> str | None:
    """Return the hint for a name of another tool."""
    names = _other_names()
    text = names.get(".".join(inner)) or names.get(inner[-1])
    if text is None:
        return None
    keys, _, note = (part.strip() for part in text.partition("|"))
    if not keys:
        return f"There is no such setting. {note}"
    places = [_with_prefix(key.strip(), prefix) for key in keys.split(",")]
    return f"{_write_as(places, None if note else value)} {note}".rstrip()


def _misspelling(inner: KeyPath, prefix: str, siblings: Iterable[str]) -> str | None:
    """Return the hint for a key or section whose name is misspelled: in its own section, else anywhere."""
    name, names = inner[-1], {path[-1] for path in _paths()}
    meant = closest(name, [*siblings, *(["runs"] if len(inner) == 1 else [])])
    places = [(*inner[:-1], meant)] if meant else []
    if not places and name not in names and (meant := closest(name, names)):
        places = [path for path in _paths() if path[-1] == meant]
    shown = [_with_prefix(".".join(path), prefix) for path in places]
    return f"Did you mean {' or '.join(shown)}?" if 0 < len(shown) <= 2 else None


def _same_name(inner: KeyPath, value: Any, prefix: str) -> str | None:
    """Return the hint for a key that is in another section, or is written with dots."""
    name = inner[-1]
    if "." in name and tuple(name.split(".")) in set(_paths()):
        return f"Write it without the dot: {_nested((*inner[:-1], *name.split('.')), value)}."
    places = [path for path in _paths() if path[-1] == name]
    if near := [path for path in places if path[0] == inner[0]]:
        places = near
    shown = [_with_prefix(".".join(path), prefix) for path in places]
    return _write_as(shown, value) if 0 < len(shown) <= 4 else None


def _keys_below(inner: KeyPath, value: Any, prefix: str) -> str | None:
    """Return the hint for an unknown section: where its keys are."""
    if not isinstance(value, Mapping):
        return None
    if len(inner) == 1 and value and not prefix and all(section_at((str(key),)) for key in value):
        return "If it is a run, indent it below runs."
    known = {path[-1]: path for path in reversed(_paths())}
    moves = []
    for name in map(str, value):
        if other := _other_names().get(".".join((*inner, name))) or _other_names().get(name):
            places = other.partition("|")[0].strip()
        else:
            places = ".".join(known.get(name, ()))
        moves += [f"{name} -> {_with_prefix(places, prefix)}"] if places else []
    return f"Its keys have moved: {'; '.join(moves)}." if moves else None


@cache
def _other_names() -> dict[str, str]:
    """Return what other_names.yaml says of each name."""
    text = (files("retort.config") / NAMES_FILE).read_text(encoding="utf-8")
    tools: dict[str, dict[str, str]] = yaml.safe_load(text)
    return {name: text for names in tools.values() for name, text in names.items()}


@cache
def _paths() -> tuple[KeyPath, ...]:
    return tuple(chain(key_paths(), section_paths(), [("runs",)]))


def _with_prefix(key: str, prefix: str) -> str:
    """Return a key with the prefix of the run that it is written in, if a run can have it."""
    return key if key.split(".")[0] == "output" else prefix + key


def _split_run(path: Sequence[str | int]) -> tuple[str, tuple[str | int, ...]]:
    """Return ("runs.<name>.", rest of the path) for a key in a run, ("", path) for another."""
    if path[:1] == ("runs",) and len(path) > 2:
        return f"runs.{path[1]}.", tuple(path[2:])
    return "", tuple(path)


def _write_as(places: Sequence[str], value: Any) -> str:
    is_plain = isinstance(value, str | int | float) and len(places) == 1
    return f"Write it as {' or '.join(places)}{f': {show(value)}' if is_plain else ''}."


def _nested(path: Sequence[str], value: Any) -> str:
    """Return a key and its value as YAML in one line."""
    text = show(value) if isinstance(value, str | int | float) else "..."
    for name in reversed(path[1:]):
        text = f"{{{name}: {text}}}"
    return f"{path[0]}: {text}"


# ---------------------------------------------------------------------------------------------------------
# Misspellings


def _is_misspelling(word: str, known: str) -> bool:
    """Return whether one slip makes `word` of `known`: in capitals, in what divides words, or in a long word's letters.

    Words of a name are compared one by one, so that min_steps is none of max_steps, nor top_p of top_k.
    """
    words, others = _words(word), _words(known)
    if "".join(words) == "".join(others):
        return True
    if len(words) != len(others):
        joined = "".join(words), "".join(others)
        return min(map(len, joined)) >= 8 and _distance(*joined) == 1
    wrong = [(a, b) for a, b in zip(words, others, strict=True) if a != b]
    return len(wrong) == 1 and all(_is_slip(a, b) for a, b in wrong)


def _words(name: str) -> list[str]:
    """Return the words of a name: max_steps, max-steps and maxSteps have two."""
    divided = "".join(f"_{c}" if c.isupper() else c for c in name) if not name.isupper() else name
    return [w for w in divided.replace("-", "_").replace(" ", "_").lower().split("_") if w]


def _is_slip(word: str, known: str) -> bool:
    if {word, known} == {word.rstrip("s"), word.rstrip("s") + "s"}:  # a plural
        return True
    if re.sub(r"\D", "", word) != re.sub(r"\D", "", known):  # beta1 is none of beta2
        return False
    shorter = min(len(word), len(known))
    return shorter >= 4 and _distance(word, known) <= (2 if shorter >= 8 else 1)


def _distance(a: str, b: str) -> int:
    """Return the optimal string alignment distance: letters inserted, deleted, replaced, or neighbours swapped.

    Above 2 it is not computed.
    """
    if abs(len(a) - len(b)) > 2:
        return 3
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, last = last, row
    return last[-1]
