"""The models of the sections, the JSON schema and config/README.md agree."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from retort.config.load import read_key
from retort.config.reference import json_schema, readme
from retort.config.section import key_schemas
from retort.config.sections import key_paths, section_at
from retort.config.values import types_of

REPOSITORY = Path(__file__).resolve().parents[3]
KEYS = [pytest.param(path, id=".".join(path)) for path in key_paths()]
CONFIGS = [REPOSITORY / "config" / "config.yaml", *(REPOSITORY / "config/examples").glob("*.yaml")]


@pytest.mark.parametrize("path", KEYS)
def test_every_key_has_a_description_and_a_valid_default_of_its_type(
    path: tuple[str, ...],
) -> None:
    section = section_at(path[:-1])
    assert section is not None
    schema = key_schemas(section)[path[-1]]
    assert schema["description"].endswith(".")
    default = section.model_fields[path[-1]].default
    read = read_key(path, default)
    assert (type(read), read) == (type(default), default)
    kinds = types_of(section.model_fields[path[-1]].annotation).kinds
    words = [
        choice.get("const") for choice in schema.get("anyOf", [])
    ]  # of a Literal beside a type
    assert type(default) in kinds or not kinds - {type(None)} or default in words


def test_the_committed_readme_and_schema_are_the_generated_ones() -> None:
    assert (REPOSITORY / "config" / "README.md").read_text("utf-8") == readme(), "run: make docs"
    schema = REPOSITORY / "workflow" / "schemas" / "config.schema.json"
    assert json.loads(schema.read_text("utf-8")) == json_schema(), "run: make docs"


def test_the_readme_names_every_key() -> None:
    assert [key for key in key_paths() if f"| `{key[-1]}` |" not in readme()] == []


def test_the_json_schema_accepts_the_shipped_configs_and_names_a_mistake() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    for path in CONFIGS:
        assert not list(validator.iter_errors(yaml.safe_load(path.read_text("utf-8")))), path
    mistakes: list[dict[str, Any]] = [
        {"training": {"alhpa": 0.5}},
        {"training": {"alpha": 2}},
        {"cache": {"temperatures": []}},
        {"runs": {"a": {"output": {"results_dir": "x"}}}},
        {"runs": {"a b": {}}},
        {"runs": {"a": {"training": {"alpha": [0.5, 2]}}}},
    ]
    assert [m for m in mistakes if validator.is_valid(m)] == []
    assert validator.is_valid({"runs": {"a": {"training": {"alpha": [0.5, 1]}}, "b": None}})


def test_the_first_line_of_every_config_leads_an_editor_to_the_schema() -> None:
    for path in CONFIGS:
        first = path.read_text("utf-8").splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        schema = path.parent / first.split("=", 1)[1]
        assert json.loads(schema.read_text("utf-8")) == json_schema(), path


def test_reading_a_config_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'h5py', 'jsonschema'}"
    code = f"import sys, retort.config.load; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
