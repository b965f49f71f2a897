"""Properties of what rules hand to scripts."""

import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snakemake.utils import QuotedFormatter

from retort.artifacts.jobs import write_argument
from retort.config.dataset import Dataset
from retort.config.handoff import SECTIONS, Job, job_parser, read_job
from retort.config.load import complete, read_key
from retort.config.output import Output
from retort.config.schema import ConfigError, Schema, merge
from retort.config.section import key_schemas, key_types
from retort.config.sections import section_at, section_paths
from retort.config.sweeps import nest
from retort.config.teacher import Teacher

ODD = [
    *("--", "-x", "--flag", "a b", "%s", "[a]", "'", '"', "a\nb", "{x}", "$HOME `x` \\"),
    *("\0", "é 東京", "\ud800"),
]
PARTS: dict[str, Schema] = {}  # of the lists in these sections
for section in (Dataset, Teacher):
    PARTS |= section.model_json_schema()["$defs"]
TEXTS = st.text(min_size=1, max_size=9) | st.sampled_from(ODD)


def values_of(schema: Schema) -> st.SearchStrategy[Any]:
    """Return a strategy for values as a user writes them, most of them valid."""
    if "anyOf" in schema:
        return st.one_of([values_of(option) for option in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if "$ref" in schema:
        part = PARTS[schema["$ref"].rpartition("/")[2]]
        keys = {key: values_of(kind) for key, kind in part["properties"].items()}
        return st.fixed_dictionaries({}, optional=keys)
    if "pattern" in schema:
        return st.sampled_from(["interleaved", "contiguous", "my.module:assign", "A_KEY"])
    drawn = {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(schema.get("minimum", 0), schema.get("maximum", 2**40)),
        "number": st.floats(0, 1e6, allow_subnormal=False),
        "string": TEXTS,
        "array": st.deferred(lambda: st.lists(values_of(schema["items"]), max_size=3)),
    }
    return drawn[schema["type"]]


@st.composite
def configs(draw: st.DrawFn, sections: tuple[str, ...]) -> Any:
    """Draw a config: some keys of these sections at their default, others at any valid value."""
    values: dict[str, Any] = {}
    for path in section_paths():
        kind = section_at(path)
        assert kind is not None
        for key in key_types(kind) if path[0] in sections else ():
            if draw(st.booleans()):
                try:
                    value = read_key((*path, key), draw(values_of(key_schemas(kind)[key])))
                except ConfigError:
                    continue
                values = merge(values, nest((*path, key), value))
    return complete(values)


@pytest.mark.parametrize("kind", SECTIONS)
@settings(max_examples=40)
@given(data=st.data())
def test_a_script_reads_the_job_that_a_rule_gave(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = data.draw(configs(tuple(name for name in SECTIONS[kind] if name != "output")))
    if "output" in SECTIONS[kind]:  # of which a job gets a store alone
        store = data.draw(st.sampled_from([None, "s3://bucket/a b/'"]))
        config = config.model_copy(update={"output": Output(cache_dir=store)})
    job = Job(
        run=data.draw(st.none() | TEXTS),
        source=data.draw(st.none() | TEXTS),
        config=config,
        expected=data.draw(st.dictionaries(st.sampled_from(["corpus", "student"]), TEXTS)),
    )
    folder = tmp_path_factory.getbasetemp()
    text = write_argument(job.to_json(SECTIONS[kind]), folder)
    command = QuotedFormatter().format("printf %s {config:q}", config=text)
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    args = job_parser("", kind).parse_args(["--config", done.stdout.decode()])
    found = read_job(args)
    assert found == job
    assert write_argument(found.to_json(SECTIONS[kind]), folder) == text, "0 is not false"
