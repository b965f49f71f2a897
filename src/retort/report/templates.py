"""The report's words, in Jinja templates beside this file."""

from collections.abc import Sequence
from typing import Any

import jinja2

from retort.report.samples import mark_lines


def list_names(names: Sequence[str], *, most: int = 4) -> str:
    """Return names joined by commas; of more than `most`, the first ones and the number of the others."""
    shown = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return ", ".join(shown)


def write_kl(value: float) -> str:
    """Return the KL of a cache to its teacher."""
    return format(value, ".1e" if 0 < value < 1e-3 else ".4f")


def _typeset(text: str) -> str:
    """Return the text of a cell with a minus sign for a hyphen, and an en dash for an undefined value."""
    if text == "-":
        return "\N{EN DASH}"
    return text.replace("-", "\N{MINUS SIGN}") if text[:1] in "+-0123456789" else text


_FILTERS = {"names": list_names, "number": format, "kl": write_kl}
_FILTERS |= {"typeset": _typeset, "lines": mark_lines}


def render(name: str, **values: Any) -> str:
    """Return a template filled in; values are escaped in those of HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("retort.report", ""),
        autoescape=name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _FILTERS
    return environment.get_template(name).render(values)


def render_sentences(name: str, **values: Any) -> list[str]:
    """Return the paragraphs of a template filled in, each on one line."""
    paragraphs = [" ".join(text.split()) for text in render(name, **values).split("\n\n")]
    return [text for text in paragraphs if text]
