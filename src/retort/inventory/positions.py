"""What a cache says of one sequence: the teacher's surprise at each token of the text, and one position's tokens.

*Surprise* is minus the log of the probability, in nats at temperature 1, that the teacher gave the token that stands in
the text. A token that is not among those kept has at most the mass of the tail, so its surprise is a lower bound.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.cache.codec import SparseTargets
from retort.cache.reader import LogitCache

# Surprise in nats from which a token is marked more strongly: probabilities of 0.37, 0.05 and 0.007.
LEVELS = (1.0, 3.0, 5.0)
_ANSI = ("", "\x1b[30;48;5;229m", "\x1b[30;48;5;215m", "\x1b[97;48;5;160m")
_RESET = "\x1b[0m"
_MARKS = (("", ""), ("[", "]"), ("[[", "]]"), ("[[[", "]]]"))
_COLOURS = ("transparent", "#fff3b0", "#ffb347", "#e5484d")


@dataclass(frozen=True)
class Surprise:
    """The teacher's surprise at the tokens of a sequence.

    pieces: the text of each of T tokens. nats float64 [T]: NaN where no position predicts the token. is_bound [T]:
    whether it is a lower bound.
    """

    pieces: list[str]
    nats: NDArray[np.float64]
    is_bound: NDArray[np.bool_]

    @property
    def mean(self) -> float:
        """Mean over the predicted tokens, in nats."""
        return float(np.nanmean(self.nats)) if np.isfinite(self.nats).any() else float("nan")

    def level(self, token: int) -> int:
        """Return how strongly a token is marked, 0 for one that was expected or is not predicted."""
        nats = self.nats[token]
        return 0 if np.isnan(nats) else sum(bool(nats >= least) for least in LEVELS)


def measure_surprise(cache: LogitCache, index: int, pieces: list[str]) -> Surprise:
    """Return the surprise at each token of a sequence; pieces: their texts. Raises ValueError for a damaged record."""
    row, targets = cache.table[index], cache.read_targets(index)
    nats = np.full(len(row.ids), np.nan)
    is_bound = np.zeros(len(row.ids), np.bool_)
    for position, token in enumerate(np.flatnonzero(row.loss_mask[:-1]) + 1):
        logprob, is_kept = find_logprob(targets, position, int(row.ids[token]))
        nats[token], is_bound[token] = max(0.0, -logprob), not is_kept
    return Surprise(pieces, nats, is_bound)


def find_logprob(targets: SparseTargets, position: int, token: int) -> tuple[float, bool]:
    """Return the logprob of a token at a position, and True; for one that is not kept exactly, a bound, and False."""
    first, stop = targets.offsets[position : position + 2].tolist()
    if targets.num_exact is not None:
        stop = first + int(targets.num_exact[position])
    ids, logprobs = targets.ids[first:stop], targets.logprobs[first:stop]
    found = np.flatnonzero(ids == token)
    if len(found):
        return float(logprobs[found[0]]), True
    # Outside are all others together: at temperature 1, what the kept ones leave.
    outside = 1.0 - float(np.exp(logprobs.astype(np.float64)).sum())
    return float(np.log(max(outside, 1e-12))), False


def split_text(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; a character of several tokens is that of the last one.

    Without a tokenizer (None), it is the id and a space.
    """
    if tokenizer is None:
        return [f"{token} " for token in ids]
    pieces, begin, done = (
        [],
        0,
        0,
    )  # texts of ids[begin:done] are known; a token's text depends on what is before it
    for stop in range(1, len(ids) + 1):
        before, text = (_decode(tokenizer, ids[begin:n]) for n in (done, stop))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and stop < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        begin, done = done, stop
    return pieces


def name_token(tokenizer: Any, before: Sequence[int], token: int) -> str:
    """Return the text of a token after others, quoted; of a part of a character, its name in the vocabulary."""
    if tokenizer is None:
        return str(token)
    near = [int(one) for one in before[-4:]]
    text = _decode(tokenizer, [*near, token])[len(_decode(tokenizer, near)) :]
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = str(tokenizer.convert_ids_to_tokens(token))
    return repr(text)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    words = [int(one) for one in ids]
    return str(
        tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def highlight(found: Surprise, *, is_coloured: bool) -> str:
    """Return the text with the tokens that surprised the teacher marked, in ANSI colours or by brackets."""
    parts = []
    for token, piece in enumerate(found.pieces):
        level = found.level(token)
        if not level or not piece:
            parts.append(piece)
        elif is_coloured:
            lines = piece.split("\n")  # a colour would run to the end of the line
            parts.append(
                "\n".join(f"{_ANSI[level]}{line}{_RESET}" if line else "" for line in lines)
            )
        else:
            begin, end = _MARKS[level]
            inside = piece.strip() or piece.strip("\n") or " "
            before, after = piece.split(inside, 1) if inside in piece else ("", piece)
            parts.append(f"{before}{begin}{inside}{end}{after}")
    return "".join(parts)


def describe_levels(*, is_coloured: bool) -> str:
    """Return the legend of `highlight`."""
    texts = [f"{least:g} nats or more" for least in LEVELS]
    if is_coloured:
        marks = [f"{_ANSI[level]} {text} {_RESET}" for level, text in enumerate(texts, 1)]
    else:
        marks = [
            f"{begin}{text}{end}" for (begin, end), text in zip(_MARKS[1:], texts, strict=True)
        ]
    return f"surprise of {', '.join(marks)}"


def render_html(found: Surprise, *, title: str) -> str:
    """Return a page with the text, each token coloured by the surprise at it, which a pointer over it shows."""
    spans = []
    for token, piece in enumerate(found.pieces):
        nats = found.nats[token]
        sign = ">= " if found.is_bound[token] else ""
        at_most = "at most " if found.is_bound[token] else ""
        about = f"{sign}{nats:.2f} nats, probability {at_most}{np.exp(-nats):.4f}"
        about = "not predicted" if np.isnan(nats) else about
        style = f' style="background:{_COLOURS[found.level(token)]}"' if found.level(token) else ""
        spans.append(f'<span title="{token}: {about}"{style}>{html.escape(piece)}</span>')
    legend = " ".join(
        f'<span style="background:{colour}">{least:g} nats or more</span>'
        for colour, least in zip(_COLOURS[1:], LEVELS, strict=True)
    )
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>'
        f'<body style="font:16px/1.6 serif;max-width:50em;margin:2em auto;padding:0 1em"><h1 style="font-size:1.1em">'
        f"{html.escape(title)}</h1><p>Surprise: {legend}; mean {found.mean:.3f} nats.</p>"
        f'<p style="white-space:pre-wrap">{"".join(spans)}</p></body></html>\n'
    )
