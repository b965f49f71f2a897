"""In which keys artifacts differ from others of their kind, or from what a config needs; and which are of trials."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from retort.inventory.layout import Artifact
from retort.inventory.origins import (
    Keys,
    Origin,
    default_of,
    knows,
    own_keys_of,
    trace_inputs,
)

_LIMITS = ("dataset.max_samples", "training.max_steps")
_TRIAL = 10  # a trial has at most a tenth of the documents, or steps, of the others


def find_trials(
    artifacts: Sequence[Artifact], origins: Mapping[str, Origin], keys: Mapping[str, Keys]
) -> set[str]:
    """Return the places of trials: of a tenth of the documents or steps of another one of the same file and run.

    What was made from a trial is one too.
    """
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for one in artifacts:
        groups.setdefault((one.kind.name, one.run, origins[one.place].source), []).append(one.place)
    found = set()
    for places in groups.values():
        for key in _LIMITS:
            known = [place for place in places if knows(place, key, origins)]
            values = {place: keys[place].get(key) for place in known}
            most = max(
                (v if isinstance(v, int) else float("inf") for v in values.values()), default=0
            )
            found |= {p for p, v in values.items() if isinstance(v, int) and 0 < v <= most / _TRIAL}
    return found | {place for place in origins if trace_inputs(place, origins) & found}


def compare_kinds(
    artifacts: Sequence[Artifact], origins: Mapping[str, Origin], keys: Mapping[str, Keys]
) -> tuple[dict[str, Keys], dict[str, str]]:
    """Return, by place, the keys in which an artifact is not like more than half of its kind, and its twin.

    A twin has another id and the same keys: other files are behind it.
    """
    differs: dict[str, Keys] = {one.place: {} for one in artifacts}
    twins: dict[str, str] = {}
    for kind in {one.kind.name: one.kind for one in artifacts}.values():
        places = [one.place for one in artifacts if one.kind == kind]
        for key in dict.fromkeys(key for place in places for key in keys[place]):
            values = {p: repr(_value(keys[p], key)) for p in places if knows(p, key, origins)}
            counts = Counter(values.values())
            for place, value in values.items():
                if len(counts) > 1 and 2 * counts[value] <= len(values):
                    differs[place][key] = _value(keys[place], key)
        if not kind.is_small:
            twins |= _find_twins(places, origins, keys)
    return differs, twins


def compare_nearest(
    artifact: Artifact, origins: Mapping[str, Origin], keys: Keys, wanted: Sequence[Keys]
) -> Keys:
    """Return the keys in which an artifact differs from the nearest run of the configs."""
    differences = []
    for run in wanted:
        other = own_keys_of(artifact.kind.name, run)
        names = [key for key in {**keys, **other} if knows(artifact.place, key, origins)]
        differences.append(
            {k: _value(keys, k) for k in names if _value(keys, k) != _value(other, k)}
        )
    return min(differences, key=len, default={})


def _value(keys: Keys, key: str) -> Any:
    return keys[key] if key in keys else default_of(key)


def _find_twins(
    places: Sequence[str], origins: Mapping[str, Origin], keys: Mapping[str, Keys]
) -> dict[str, str]:
    first: dict[tuple[str, ...], str] = {}
    twins = {}
    for place in places:
        about = repr(sorted(keys[place].items())), *origins[place].inputs
        if keys[place] and (twin := first.setdefault(about, place)) != place:
            twins[place] = twin
    return twins
