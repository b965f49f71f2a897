"""What a job is given: sections of one run's config, from a rule as JSON or from a person as a YAML file.

A rule passes `--config` with the JSON of a `Job`: the sections that its artifact is made of, with paths resolved, and
digests that its input files must still have. The same JSON is kept as config.json beside the artifact, and may be given
back. A person gives a YAML config, `--run` and `--set`.
"""

import argparse
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from retort.cli import script_parser
from retort.config.config_files import add_typed, load_source
from retort.config.dataset import SYNTHESIS
from retort.config.load import complete, differences
from retort.config.schema import merge, show
from retort.config.sections import Config, Dataset
from retort.config.sweeps import expand_runs, nest
from retort.config.yaml_source import Place, Source, read_yaml
from retort.io.files import suggest_path, write_json
from retort.io.run_record import set_origin

CONFIG_FILE = "config.json"

# The sections that the jobs of each kind of artifact get.
SECTIONS = {
    "synthesis": ("synthesis", "evaluation", "teacher"),
    "corpus": ("dataset",),
    "teacher": ("teacher",),
    "demo_teacher": ("dataset",),
    "tokens": ("dataset", "teacher"),
    "logits": ("teacher", "cache", "merge", "output"),
    "validation": ("teacher", "evaluation"),
    "pruned": ("student", "teacher"),
    "run": ("dataset", "teacher", "student", "training", "tracking", "evaluation"),
    "evaluation": ("evaluation", "teacher", "training"),
    "task": ("evaluation", "teacher", "training"),
    "comparison": ("dataset", "evaluation", "teacher"),
}
# Files that several scripts read.
_INPUTS = {
    "index": "index.json of the tokens",
    "fingerprint": "fingerprint.json of the teacher",
}


class Job(BaseModel):
    """What a script works from.

    run: name of the run, None for what runs share. source: name of the config file, if there was one. config: all
    sections; those that the job was not given have their defaults. expected: digests of input files when the workflow
    was planned, by what they are of: "corpus", "tokenizer", "student", "prompts".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Config
    run: str | None = None
    source: str | None = None
    expected: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Job":
        """Return the job that `to_json` described. Raises ValueError for what it cannot be."""
        config = complete(content.get("config") or {})
        try:
            return cls(**{**content, "config": config})
        except ValidationError as error:
            fault = error.errors()[0]
            raise ValueError(
                f"{'.'.join(map(str, fault['loc']))} is {show(fault['input'])} in a job's JSON "
                f"({fault['msg']}), whose keys are {', '.join(cls.model_fields)}."
            ) from None

    def to_json(self, sections: Iterable[str]) -> dict[str, Any]:
        """Return the JSON of some sections; keys at their default are left out."""
        parts = self.config.model_copy(update={"output": self.config.output.of_cache()})
        found = {name: differences(getattr(parts, name)) for name in sections}
        config = {name: values for name, values in found.items() if values}
        about = {"run": self.run, "source": self.source, "expected": self.expected}
        return {name: value for name, value in about.items() if value} | {"config": config}

    def write(self, folder: Path, kind: str) -> None:
        """Write config.json into the folder of an artifact. `expected` is left out: it is of one plan only."""
        content = self.model_copy(update={"expected": {}}).to_json(SECTIONS[kind])
        write_json(folder / CONFIG_FILE, content)

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """The text's tokenizer, as (folder or Hub id, revision): dataset.tokenizer, else the teacher's.

        Raises ValueError when neither is set, or the teacher is the demo's, which has no folder outside its workflow.
        """
        if self.config.dataset.tokenizer is not None:
            return self.config.dataset.tokenizer, None
        if self.config.teacher.imported is not None:
            return str(Path(self.config.teacher.imported) / "tokenizer"), None
        return self.teacher_path, self.config.teacher.revision

    @property
    def teacher_path(self) -> str:
        """Folder or Hub id of the teacher. Raises ValueError when there is none, or it is the demo's."""
        path = self.config.teacher.model_path
        if path in (None, "demo"):
            why = "but a model is needed here" if path is None else "which the workflow trains"
            raise ValueError(
                f"teacher.model_path is {show(path)}, {why}. Give a folder or a Hub id, such as --set "
                "teacher.model_path=models/teacher (the demo's: results/teachers/demo-<id>/model), or the config.json "
                "beside a result."
            )
        return str(path)

    @property
    def dataset(self) -> Dataset:
        """The section of the documents. Raises ValueError for a synthesis, whose file its workflow knows."""
        if self.config.dataset.name == SYNTHESIS:
            raise ValueError(
                f"dataset.name is {SYNTHESIS!r}, which the workflow writes. Give its file, such as --set "
                "dataset.name=json --set dataset.data_files=responses.jsonl, or the config.json beside a result."
            )
        return self.config.dataset


def job_parser(
    docstring: str | None, kind: str, *inputs: str, output: str | None = None
) -> argparse.ArgumentParser:
    """Return the parser of a script whose jobs are of `kind`, one of SECTIONS.

    `--help` begins with the script's docstring as it is written. `inputs`: some of _INPUTS, for which it has flags;
    `output`: what `--output` is; a script adds flags of its own.
    """
    parser = script_parser(docstring)
    parser.set_defaults(kind=kind)
    keys = ", ".join(SECTIONS[kind])
    group = parser.add_argument_group("settings", f"sections {keys}; all keys: config/README.md")
    group.add_argument("--config", help="a config (YAML), or the config.json beside a result")
    group.add_argument("--run", metavar="NAME", help="which of the config's runs")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value of a key, such as training.alpha=0.3; may be repeated",
    )
    for name in inputs:
        parser.add_argument(f"--{name}", required=True, type=Path, help=_INPUTS[name])
    if output:
        parser.add_argument("--output", required=True, type=Path, help=output)
    return parser


def config_parser(docstring: str | None, *, required: bool) -> argparse.ArgumentParser:
    """Return the parser of a script that takes a whole config, with all its runs."""
    parser = script_parser(docstring)
    parser.add_argument("--config", required=required, help="a config (YAML), or the same as JSON")
    return parser


def read_job(args: argparse.Namespace) -> Job:
    """Return the job of parsed arguments (see `job_parser`), and write its config.json beside --output.

    An --output that exists keeps its config.json, until the script has replaced both.

    Raises ValueError, in one sentence, when the config cannot be read or is wrong, and when several runs would do.
    """
    job = _find_job(args)
    set_origin(run=job.run, source=job.source)
    output: Path | None = getattr(args, "output", None)
    if output is not None and not output.exists():
        job.write(output.parent, args.kind)  # now: a kill must not leave the output without it
    return job


def _find_job(args: argparse.Namespace) -> Job:
    changes = read_changes(args.set)
    source = Source({"config": {}}) if args.config is None else read_config_argument(args.config)
    raw = source.values
    if "config" in raw and raw.keys() <= Job.model_fields.keys():
        job = Job.from_json({**raw, "config": merge(raw["config"], changes)})
        if args.run not in (None, job.run):
            raise ValueError(
                f"--run is {args.run!r}, but --config is of {f'run {job.run!r}' if job.run else 'no run'}: it is of "
                "one job only. Leave --run out, or give the config file itself."
            )
        return job
    return _choose_run(source, args, changes)


def read_runs(text: str) -> dict[str, Config]:
    """Return all runs of a whole config, given as a YAML file or as JSON. Raises ValueError for mistakes."""
    return load_source(read_config_argument(text))


def write_config(folder: Path, text: str) -> None:
    """Write the whole config of a `--config` into a folder, as config.json."""
    write_json(folder / CONFIG_FILE, read_config_argument(text).values)


def read_config_argument(text: str) -> Source:
    """Return the content of a `--config`, which is JSON or the path of a YAML or JSON file, unchecked.

    Raises ValueError when there is no such file, or it is neither.
    """
    is_json, path = _is_json(text), Path(text)
    if not (is_json or path.is_file()):
        raise ValueError(
            f"--config {text!r} does not exist (looked in {Path.cwd()}).{suggest_path(path)} Give a YAML config, or "
            "the config.json beside a result."
        )
    if not is_json and path.suffix != ".json":
        return read_yaml(path)
    try:
        values = json.loads(text if is_json else path.read_text(encoding="utf-8"))
    except ValueError as error:
        name = "" if is_json else f" {text!r}"
        raise ValueError(f"--config{name} cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"--config {text!r} is not a config: it should have sections, such as dataset and teacher."
        )
    return Source(values)


def read_changes(words: Iterable[str]) -> dict[str, Any]:
    """Return the values of `--set` as nested sections, which `load` will read by the types of their keys.

    Raises ValueError for what is no KEY=VALUE, and for a key or value that is wrong.
    """
    changes: dict[str, Any] = {}
    for word in words:
        key, is_pair, value = word.partition("=")
        path = tuple(key.strip().split("."))
        if not is_pair or len(path) < 2 or path[0] == "runs":
            raise ValueError(
                f"--set {word!r} should be KEY=VALUE, with a key of a section, such as training.alpha=0.3."
            )
        changes = merge(changes, nest(path, value))
    complete(changes)  # raises ConfigError, which names no run
    return changes


def _choose_run(written: Source, args: argparse.Namespace, changes: dict[str, Any]) -> Job:
    """Return the job of the run that was asked for, or of all runs where their sections are the same."""
    source = None if _is_json(args.config) else Path(args.config).name
    name = source or "the config"
    runs, problems = expand_runs(written.values.get("runs"))
    if problems:
        load_source(written)  # raises ConfigError
    if args.run is not None:
        names = [run.name for run in runs]
        runs = [run for run in runs if run.name == args.run]
        if not runs:
            close = difflib.get_close_matches(args.run, names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{name} has no run {args.run!r}.{hint} Its runs: {', '.join(names) or 'none, so leave --run out'}."
            )
    below = {section: values for section, values in changes.items() if section != "output"}
    chosen = {run.name: merge(run.overrides, below) for run in runs}
    written = add_typed(written, changes, Place("--set"))
    configs = load_source(replace(written, values=written.values | {"runs": chosen}))
    jobs = [Job(run=run, source=source, config=config) for run, config in configs.items()]
    found = [job.to_json(SECTIONS[args.kind])["config"] for job in jobs]
    differing = [s for s in SECTIONS[args.kind] if any(f.get(s) != found[0].get(s) for f in found)]
    if differing:
        raise ValueError(
            f"{name} has {len(jobs)} runs, which differ in {' and '.join(differing)}: choose one with --run. Its "
            f"runs: {', '.join(configs)}."
        )
    return jobs[0] if len(jobs) == 1 else jobs[0].model_copy(update={"run": None})


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{")
