"""Records: the small JSON files beside results, one class for each, written and read in one way.

A file begins with its `format` and `version`. Raise a class's version when a key is added, renamed or removed.
"""

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from pydantic_core import ErrorDetails, from_json

from retort.io.digests import digest
from retort.io.files import format_json, write_json, write_once

JsonObject = dict[str, JsonValue]
# Known keys only, no value of another type, and finite numbers.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Entry(BaseModel):
    """A section of a record, immutable. (A dataclass can be one too; its `__pydantic_config__` is STRICT.)"""

    # Built when first used: each job parses the Snakefile, which reads one kind of record.
    model_config = ConfigDict(**STRICT, frozen=True, defer_build=True)


class Record(Entry):
    """A JSON file. A class gives its `format` and `version`, and `remedy`: what to do about a file that is refused.

    has_digest: the file has a digest of its content, and one that was edited is refused.
    """

    format: ClassVar[str]
    version: ClassVar[int]
    remedy: ClassVar[str]
    has_digest: ClassVar[bool] = False

    def __init_subclass__(
        cls,
        *,
        format: str,
        version: int = 1,
        remedy: str = "delete it and rerun the same command",
        **config: Any,
    ) -> None:
        super().__init_subclass__(**config)
        cls.format, cls.version, cls.remedy = format, version, remedy

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file. Raises ValueError, in one sentence, when it is missing, damaged, foreign, older or newer."""
        try:
            found: JsonValue = from_json(path.read_bytes())
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            fault = "does not exist" if is_missing else f"cannot be read ({error.strerror})"
            raise cls._refusal(path, fault) from None
        except ValueError as error:
            raise cls._refusal(path, f"is not JSON ({error})") from None
        if not isinstance(found, dict) or found.get("format") != cls.format:
            has = f" ({found.get('format')!r})" if isinstance(found, dict) else ""
            raise cls._refusal(path, f"is another kind of file{has}")
        version = number if isinstance(number := found.get("version"), int) else 0
        content = {key: found[key] for key in found.keys() - {"format", "version"}}
        recorded = content.pop("digest", None) if cls.has_digest else None
        is_edited = recorded not in (None, digest(content))
        if version != cls.version:
            age = "a newer" if version > cls.version else "an older"
            upgraded = cls.upgrade(content, version) if version < cls.version else None
            if upgraded is None:
                raise cls._refusal(path, f"was written by {age} Retort (version {version})")
            content = upgraded
        try:
            record = cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            raise cls._refusal(path, _describe(error.errors()[0])) from None
        if is_edited:
            raise cls._refusal(path, f"was edited: its content does not have the digest {recorded}")
        return record

    @classmethod
    def upgrade(cls, content: JsonObject, version: int) -> JsonObject | None:
        """Return the content of an older version's file as this version has it; None where that cannot be read."""
        return None

    def write(self, path: Path) -> None:
        """Write the file atomically, and its folder: equal records give equal bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self._to_json())

    def write_once(self, path: Path) -> None:
        """Write the file unless it exists; of several writers at once the first wins. Raises OSError: no hard links."""
        write_once(path, format_json(self._to_json()))

    def _to_json(self) -> dict[str, Any]:
        content = self.model_dump(mode="json")
        header = {"format": self.format, "version": self.version}
        own = {"digest": digest(content)} if self.has_digest else {}
        return header | content | own

    @classmethod
    def _refusal(cls, path: Path, fault: str) -> ValueError:
        return ValueError(
            f"{path} {fault}; expected {cls.format} version {cls.version}: {cls.remedy}."
        )


def _describe(error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"has no {key!r}"
    if error["type"] == "extra_forbidden":
        return f"has an unknown key {key!r}"
    return f"has {key} = {error['input']!r} ({error['msg'].lower()})"
