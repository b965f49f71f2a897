"""The base class of all sections: frozen records that read text by the type of the key, and know what changes ids."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from retort.config.schema import Schema
from retort.config.values import Types, parse_text, read_value, types_of


def _refuse_dashes(text: str) -> str:
    if text == "--":  # argparse drops it
        raise ValueError(
            "is '--', which command lines cannot pass on. Write another value, for a path './--'."
        )
    return text


def _refuse_repeated(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("has a value twice")
    return values


# The types of keys. A key that is a section has that section's class.
Text = Annotated[str, Field(min_length=1), AfterValidator(_refuse_dashes)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=4294967295)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
_T = TypeVar("_T")
_UNIQUE = (AfterValidator(_refuse_repeated), Field(json_schema_extra={"uniqueItems": True}))
Unique = Annotated[tuple[_T, ...], *_UNIQUE]
NonEmptyUnique = Annotated[tuple[_T, ...], Field(min_length=1), *_UNIQUE]


def setting(
    default: Any,
    description: str,
    *,
    changes_id: bool = True,
    is_path: bool = False,
    accepts: str | None = None,
) -> Any:
    """Return the field of a key.

    `changes_id`: another value changes the ids of results. `is_path`: the value may be a local file or folder.
    `accepts`: in words, what a pattern takes.
    """
    extra: dict[str, Any] = {"accepts": accepts} if accepts else {}
    if not changes_id:
        extra["changes_id"] = False
    if is_path:
        extra["is_path"] = True
    return Field(default=default, description=description, json_schema_extra=extra)


class Section(BaseModel):
    """A section of the config; its docstring is the section's description."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    changes_ids: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        """Read text that stands for the section or for values; null means a default."""
        values = parse_text(values) if isinstance(values, str) else values
        if values is None or values == "":  # all keys of the section are commented out
            return {}
        if not isinstance(values, Mapping):
            return values  # refused by pydantic
        known = key_types(cls)
        read = {}
        for name, value in values.items():
            name = str(name)
            if name in known:
                value = read_value(value, known[name])
                if value is None and type(None) not in known[name].kinds:
                    continue
            read[name] = value
        return read


@cache
def key_types(section: type[Section]) -> dict[str, Types]:
    """Return the types of a section's keys, without those of sections in it."""
    fields = section.model_fields.items()
    return {
        name: types_of(field.annotation)
        for name, field in fields
        if subsection(section, name) is None
    }


def subsection(section: type[Section], name: str) -> type[Section] | None:
    """Return the class of a key that is a section, None for any other key."""
    kind = section.model_fields[name].annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def marks(section: type[Section], name: str) -> Mapping[str, Any]:
    """Return what `setting` was told about a key: changes_id, is_path, accepts; only what is unusual."""
    extra = section.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def changes_id(section: type[Section], name: str) -> bool:
    """Return whether another value of a key changes the ids of results."""
    return section.changes_ids and marks(section, name).get("changes_id", True)


@cache
def key_schemas(section: type[Section]) -> Mapping[str, Schema]:
    """Return the JSON schema of each key of a section: description, default, types, ranges."""
    schemas: dict[str, Schema] = section.model_json_schema()["properties"]
    return schemas
