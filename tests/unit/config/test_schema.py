"""The schema, the records of sections and config/README.md agree."""

import subprocess
import sys
import types
import typing
from dataclasses import fields
from pathlib import Path

import jsonschema
import pytest

from retort.config.reference import readme
from retort.config.schema import Schema, leaves, load_schema, section_schema
from retort.config.sections import SECTIONS, Config
from retort.config.values import read_value

REPOSITORY = Path(__file__).resolve().parents[3]
KEYS = [pytest.param(path, schema, id=".".join(path)) for path, schema in leaves()]


def test_the_schema_is_a_valid_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(load_schema())


@pytest.mark.parametrize("path, schema", KEYS)
def test_every_key_has_a_type_a_description_and_a_valid_default(
    path: tuple[str, ...], schema: Schema
) -> None:
    assert schema["description"].endswith(".") and "type" in schema
    read = read_value(path, schema["default"])
    assert (type(read), read) == (type(schema["default"]), schema["default"])


@pytest.mark.parametrize("section", SECTIONS)
def test_a_record_has_exactly_the_schemas_keys_in_its_order(section: str) -> None:
    assert [f.name for f in fields(SECTIONS[section])] == list(
        section_schema(section)["properties"]
    )
    assert section_schema(section)["additionalProperties"] is False


def test_a_config_has_exactly_the_schemas_sections_in_its_order() -> None:
    assert [f.name for f in fields(Config)] == [
        s for s in load_schema()["properties"] if s != "runs"
    ]


@pytest.mark.parametrize("path, schema", KEYS)
def test_a_field_has_the_types_of_its_schema(path: tuple[str, ...], schema: Schema) -> None:
    hint = typing.get_type_hints(SECTIONS[".".join(path[:-1])])[path[-1]]
    union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    found = {names.get(kind, "array") for kind in union}
    assert found == ({schema["type"]} if isinstance(schema["type"], str) else set(schema["type"]))


def test_runs_may_override_every_section_but_output() -> None:
    runs = load_schema()["properties"]["runs"]["additionalProperties"]["properties"]
    assert set(runs) == set(load_schema()["properties"]) - {"runs", "output"}


def test_the_committed_readme_is_the_generated_one() -> None:
    command = "python -m retort.config.reference > config/README.md"
    committed = (REPOSITORY / "config" / "README.md").read_text(encoding="utf-8")
    assert committed == readme(), f"run: {command}"


def test_the_readme_names_every_key() -> None:
    assert [key for key, _ in leaves() if f"| `{key[-1]}` |" not in readme()] == []


def test_reading_a_config_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'h5py'}"
    code = f"import sys, retort.config.load; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
