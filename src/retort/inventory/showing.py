"""`retort show`: a cache, with the teacher's distributions as text, or the facts of any other result."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retort.cache.finished import MANIFEST
from retort.cache.reader import CACHE_FILE, LogitCache
from retort.inventory.facts import describe_artifact, describe_record, find_artifact
from retort.inventory.positions import (
    describe_levels,
    find_logprob,
    highlight,
    measure_surprise,
    name_token,
    render_html,
    split_text,
)
from retort.inventory.tables import format_size
from retort.io.files import read_json, write_atomically
from retort.teacher.records import Manifest
from retort.tokens.tokenizer import identify_tokenizer, load_tokenizer, without_torch

_BAR = 30  # columns of a probability of 1


@dataclass(frozen=True)
class Choice:
    """Which sequence of a cache to show, and which of its positions; how many tokens of that; where to write a page."""

    sequence: int | None = None
    position: int | None = None
    top: int = 10
    page: Path | None = None
    tokenizer: str | None = None


def show_path(path: Path, choice: Choice) -> str:
    """Return what is to know of a result. Raises ValueError for what is none, and for an index beyond it."""
    if not path.exists():
        raise ValueError(
            f"{path} does not exist (looked in {Path.cwd()}). `retort ls` lists what is there."
        )
    cache_path = _find_cache_file(path)
    if cache_path:
        return show_cache(cache_path, choice)
    if choice.sequence is not None or choice.position is not None:
        raise ValueError(
            f"{path} is no logit cache, and only these have sequences to show: give results/logits/<id>."
        )
    if artifact := find_artifact(path):
        is_record = (
            path.is_file() and path.suffix == ".json" and path.name not in artifact.kind.finished
        )
        return (
            describe_record(path)
            if is_record and path.name != "config.json"
            else describe_artifact(artifact)
        )
    if path.is_file() and path.suffix == ".json":
        return describe_record(path)
    raise ValueError(f"{path} is no result of Retort. `retort ls` lists those of a folder.")


def _find_cache_file(path: Path) -> Path | None:
    if path.is_dir():
        return path / CACHE_FILE if (path / CACHE_FILE).exists() else None
    if path.name == MANIFEST:
        return path.with_name(CACHE_FILE)
    is_part = path.suffix == ".h5" and not path.name.startswith("shard_")
    return path if is_part else None


def show_cache(path: Path, choice: Choice) -> str:
    """Return the header, counts and fidelity of a cache, and a sequence of it if one is chosen.

    Raises ValueError for a damaged file, and for an index beyond its sequences or positions.
    """
    cache = LogitCache(path)
    if choice.sequence is None:
        if choice.position is not None or choice.page:
            raise ValueError("--position and --html are of one sequence: give --sequence too.")
        return "\n".join(_describe_cache(cache))
    _require(
        choice.sequence,
        len(cache),
        "--sequence",
        f"{path} has sequences",
        " (see `retort show` without it)",
    )
    row = cache.table[choice.sequence]
    _require(
        choice.position,
        row.num_positions,
        "--position",
        f"sequence {choice.sequence} has positions",
        "",
    )
    tokenizer, note = _load_tokenizer(cache, choice.tokenizer)
    notes = [note] if note else []
    if choice.position is not None:
        return "\n".join([*notes, *_describe_position(cache, choice, tokenizer)])
    found = measure_surprise(cache, choice.sequence, split_text(tokenizer, row.ids.tolist()))
    head = (
        f"sequence {choice.sequence} of {len(cache):,}: document {cache.table.documents[choice.sequence]}, "
        f"{len(row.ids):,} tokens, {row.num_positions:,} positions, mean surprise {found.mean:.3f} nats"
    )
    if choice.page:
        write_atomically(choice.page, render_html(found, title=f"{path}, {head}").encode())
        notes.append(f"written: {choice.page}")
    coloured = has_colours()
    text = highlight(found, is_coloured=coloured)
    return "\n".join([*notes, head, describe_levels(is_coloured=coloured), "", text])


def _require(index: int | None, number: int, flag: str, what: str, hint: str) -> None:
    """Raise ValueError for an index that is not one of `number`."""
    if index is not None and not 0 <= index < number:
        raise ValueError(f"{flag} is {index}, but {what} 0 to {number - 1:,}{hint}.")


def has_colours() -> bool:
    """Return whether stdout is a terminal that shows colours, and NO_COLOR (no-color.org) does not forbid them."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def _describe_cache(cache: LogitCache) -> Iterator[str]:
    header, codec = cache.header, cache.header.codec
    size = cache.path.stat().st_size
    positions = cache.table.num_positions
    entry = {
        k: v for k, v in codec.to_json().items() if v is not None and k not in ("method", "order")
    }
    settings = ", ".join(f"{key} {_words(value)}" for key, value in entry.items())
    facts = {
        "method": f"{codec.method}: {settings}",
        "teacher": f"{_find_model(cache)[0] or 'not recorded'}, weights {header.teacher}",
        "tokenizer": header.tokenizer,
        "tokens": header.tokens,
        "sequences": f"{len(cache):,}, of {len(np.unique(cache.table.documents)):,} documents",
        "length": f"{cache.table.lengths.min()} to {cache.table.lengths.max()} tokens",
        "positions": f"{positions:,}",
        "bytes a position": f"{(cache.record_bytes + cache.table_bytes) / max(1, positions):.1f} of distributions"
        + ("" if cache.is_virtual else f", {size / max(1, positions):.1f} of the file"),
        "file": format_size(size)
        + (", virtual: the records are in parts/" if cache.needs_parts else "")
        + (
            f", the records are in {cache.stored[0].url.rpartition('/')[0]}" if cache.stored else ""
        ),
        "parts": f"{len(cache.columns['part_checksums']):,}"
        + (f", {cache.halved_parts} in halved batches" if cache.halved_parts else ""),
    }
    if cache.kind:
        facts["made on"] = str(cache.kind)
    manifest = cache.path.with_name(MANIFEST)
    if manifest.exists() and (fidelity := Manifest.read(manifest).fidelity):
        facts["fidelity"] = (
            f"KL(live teacher || cache) {fidelity.kl:.3g} nats, agreement {fidelity.agreement:.2%}, tail mass "
            f"{fidelity.tail_mass:.3g}, on {fidelity.positions:,} positions"
        )
    yield f"logit cache {cache.path}"
    yield from (f"  {name:<16}  {value}" for name, value in facts.items())
    yield f"a sequence as text: --sequence 0 to {len(cache) - 1}; one of its positions: --position too"


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _describe_position(cache: LogitCache, choice: Choice, tokenizer: Any) -> Iterator[str]:
    index, position = choice.sequence, choice.position
    assert index is not None and position is not None
    row, targets = cache.table[index], cache.read_targets(index)
    token = int(
        np.flatnonzero(row.loss_mask[:-1])[position]
    )  # the last token that the teacher sees
    before, following = row.ids[: token + 1].tolist(), int(row.ids[token + 1])
    first, stop = targets.offsets[position : position + 2].tolist()
    order = np.argsort(-targets.logprobs[first:stop], kind="stable")
    ids, probabilities = (
        targets.ids[first:stop][order],
        np.exp(targets.logprobs[first:stop][order].astype(np.float64)),
    )
    logprob, is_kept = find_logprob(targets, position, following)
    begin = "".join(split_text(tokenizer, before[-40:]))
    yield f"sequence {index}, position {position} of {row.num_positions} (after token {token} of {len(row.ids)})"
    yield f"  after      ...{begin[-160:]!r}"
    bound = "" if is_kept else "at most "
    yield f"  the text   {name_token(tokenizer, before, following)}, probability {bound}{np.exp(logprob):.4g}"
    names = [name_token(tokenizer, before, int(one)) for one in ids[: choice.top]]
    width = max(map(len, names), default=0)
    for place, (name, p) in enumerate(zip(names, probabilities, strict=False), 1):
        mark = "  <- the text" if ids[place - 1] == following else ""
        yield f"  {place:>4}  {name:<{width}}  {p:.4f}  {'#' * round(_BAR * p)}{mark}".rstrip()
    rest = probabilities[choice.top :]
    if len(rest):
        yield f"  and {len(rest)} more with {rest.sum():.4f} together (--top {len(ids)} shows all)"
    if targets.num_exact is not None:
        exact = int(targets.num_exact[position])
        yield f"  {exact} are exact; {stop - first - exact} are a sample, weighted to stand for all others"
        return
    temperatures = cache.header.codec.temperatures
    vocabulary = min(cache.header.codec.vocabulary, len(tokenizer) if tokenizer else 1 << 60)
    for temperature, tail in zip(temperatures, targets.tail_logprobs[position], strict=True):
        others = vocabulary - (stop - first)
        yield f"  tail       {np.exp(float(tail)):.4g} in {others:,} other tokens, at temperature {temperature:g}"


def _load_tokenizer(cache: LogitCache, given: str | None) -> tuple[Any, str]:
    """Return the tokenizer of a cache and "", or None and why tokens are shown as numbers.

    Raises ValueError for a tokenizer that was given and is another one.
    """
    path, revision = (given, None) if given else _find_model(cache)
    if path is None:
        return (
            None,
            "Its tokenizer is not recorded beside it, so tokens are numbers: give --tokenizer.",
        )
    try:
        with without_torch():
            tokenizer = load_tokenizer(path, revision=revision)
    except ValueError as error:
        if given:
            raise
        return None, f"Tokens are shown as numbers ({error}). Give --tokenizer."
    found = identify_tokenizer(path, tokenizer).fingerprint
    if found != cache.header.tokenizer:
        what = f"the tokenizer in {path!r} is {found}, that of the cache {cache.header.tokenizer}"
        if given:
            raise ValueError(f"--tokenizer: {what}. Give the folder or Hub id of that one.")
        return None, f"Tokens are shown as numbers: {what}. Give --tokenizer."
    return tokenizer, ""


def _find_model(cache: LogitCache) -> tuple[str | None, str | None]:
    """Return the teacher's folder or Hub id, whose tokenizer is the cache's, and its revision, if they are recorded."""
    folders = [cache.path.parent, cache.path.parent.parent]  # of a cache, or of a part
    path = next(
        (folder / "config.json" for folder in folders if (folder / "config.json").exists()), None
    )
    config = read_json(path).get("config") or {} if path else {}
    teacher = config.get("teacher") or {}
    return teacher.get("model_path"), teacher.get("revision")
