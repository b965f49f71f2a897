"""Paths in a config: `~` and `$NAME` are expanded, and one file or folder has one spelling."""

import os
import re
from pathlib import Path

UNSET_VARIABLE = "unset_variable"  # pydantic's name of that mistake
# What a path must not become: these words have a meaning of their own.
_WORDS = ("demo", "synthesis", "text", "json", "parquet", "csv")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def resolve_path(text: str) -> str:
    """Return a local path without `~`, `$NAME`, `./`, `x/../` and a final slash; a URL as it is."""
    if "://" in text:
        return text
    path = os.path.expanduser(os.path.expandvars(text))  # noqa: PTH111 - Path's raises for an unknown ~user
    plain = os.path.normpath(path)
    if ".." in path.split("/") and os.path.realpath(plain) != os.path.realpath(path):
        return path  # x is a link: x/.. is not the folder that x is in
    return f"./{plain}" if plain.startswith("-") else plain


def resolve_model(text: str) -> str:
    """Return the same for a key that takes a Hub id, or a word such as demo, as well; these stay as they are.

    A path that could be taken for a Hub id begins with `./`, unless it exists.
    """
    plain = resolve_path(text)
    is_ambiguous = plain != text and plain.count("/") < 2 and plain[0] not in "./~"
    if is_ambiguous and (plain in _WORDS or not Path(plain).exists()):
        return f"./{plain}"
    return plain


def explain_unset(value: object) -> str | None:
    """Return what to do if a path, or one of several, has a variable that is not set in the environment."""
    texts = value if isinstance(value, tuple) else (value,)
    for text in texts:
        for match in _VARIABLE.finditer(text) if isinstance(text, str) else ():
            name = match[1] or match[2]
            if name not in os.environ:
                return (
                    f"the environment variable {name} is not set. Set it (export {name}=...), or write the path "
                    "without it."
                )
    return None
