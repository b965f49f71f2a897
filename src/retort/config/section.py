"""The base class of all sections: frozen records that read text by the type of the key, and know what changes ids."""

import ast
import inspect
import itertools
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from retort.config.paths import UNSET_VARIABLE, explain_unset, resolve_model, resolve_path
from retort.config.schema import Schema, is_empty
from retort.config.values import Types, parse_text, read_value, types_of


def _refuse_repeated(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("has a value twice")
    return values


# The types of keys. A key that is a section has that section's class.
Text = Annotated[str, Field(min_length=1)]
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
    *,
    changes_id: bool = True,
    is_path: bool = False,
    is_model: bool = False,
    accepts: str | None = None,
) -> Any:
    """Return the field of a key that is not like most.

    `changes_id`: another value changes the ids of results. `is_path`: it is a local file or folder.
    `is_model`: it may be one, or an id on the Hub or a word. `accepts`: in words, what a pattern takes.
    """
    marks = {"changes_id": changes_id, "is_path": is_path, "is_model": is_model, "accepts": accepts}
    usual = {"changes_id": True, "is_path": False, "is_model": False, "accepts": None}
    extra: dict[str, Any] = {k: v for k, v in marks.items() if v != usual[k]}
    return Field(default=default, json_schema_extra=extra)


def _add_descriptions(schema: dict[str, Any], section: type["Section"]) -> None:
    """Add what is written below each key to the section's JSON schema."""
    # pydantic's own use_attribute_docstrings would read the source whenever a Snakefile is parsed
    for kind in section.__mro__[: section.__mro__.index(Section)]:
        (tree,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(tree, ast.ClassDef)
        for key, below in itertools.pairwise(tree.body):
            if isinstance(key, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(key.target, ast.Name) and isinstance(below.value, ast.Constant)
                text = " ".join(str(below.value.value).split())
                schema["properties"][key.target.id]["description"] = text


class Section(BaseModel):
    """A section of the config; its docstring is its description, and so is the text below each key."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra=_add_descriptions,
    )
    changes_ids: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        """Read text that stands for the section or for values; null means a default."""
        values = parse_text(values) if isinstance(values, str) else values
        if is_empty(values):  # all keys of the section are commented out
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

    @field_validator("*", mode="after")
    @classmethod
    def _resolve(cls, value: Any, info: ValidationInfo) -> Any:
        """Give every path one spelling."""
        known = marks(cls, str(info.field_name))
        if not (known.get("is_path") or known.get("is_model")):
            return value
        if explain_unset(value):
            raise PydanticCustomError(UNSET_VARIABLE, "an environment variable is not set")
        resolve = resolve_model if known.get("is_model") else resolve_path
        if isinstance(value, tuple):
            return tuple(map(resolve, value))
        return resolve(value) if isinstance(value, str) else value


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


def item_section(section: type[Section], name: str) -> type[Section] | None:
    """Return the class of the items of a key that is a list of sections, None for any other key."""
    items = get_args(section.model_fields[name].annotation)[:1]
    is_list = bool(items) and isinstance(items[0], type) and issubclass(items[0], Section)
    return items[0] if is_list else None


def marks(section: type[Section], name: str) -> Mapping[str, Any]:
    """Return what `setting` was told about a key: changes_id, is_path, is_model, accepts; only what is unusual."""
    extra = section.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def changes_id(section: type[Section], name: str) -> bool:
    """Return whether another value of a key changes the ids of results."""
    return section.changes_ids and marks(section, name).get("changes_id", True)


def is_default(section: Section, key: str) -> bool:
    """Return whether a key has its default; 0 is not false."""
    value, default = getattr(section, key), type(section).model_fields[key].default
    return type(value) is type(default) and bool(value == default)


@cache
def key_schemas(section: type[Section]) -> Mapping[str, Schema]:
    """Return the JSON schema of each key of a section: description, default, types, ranges."""
    schemas: dict[str, Schema] = section.model_json_schema()["properties"]
    return schemas
