"""`retort trial CONFIG`: a few documents and steps through every rule, in a folder of its own, then the estimate.

It ends in some two minutes on most machines: every rule's job takes seconds to start, and the work is cut to fit.
"""

import argparse
import contextlib
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from retort.artifacts.build import build_project
from retort.artifacts.project import Run
from retort.config.config_files import load_source, read_files
from retort.config.load import differences
from retort.config.sections import Config
from retort.config.yaml_source import read_yaml
from retort.estimate.options import Measured, Rates
from retort.estimate.records import Estimate
from retort.estimate.table import describe
from retort.io.files import write_atomically
from retort.pipeline.estimating import choose_options, estimate_config, keep_estimate
from retort.pipeline.run_command import run_workflow
from retort.training.record import TrainingRecord

_SECONDS = (
    5.0  # of the work of all passes of teachers, and of each training, as far as they can be cut
)
_MOST_DOCUMENTS, _LEAST_DOCUMENTS = 100, 12
_MOST_STEPS, _LEAST_STEPS = 10, 3
_MOST_RUNS = 2  # each starts five jobs, which take some seconds to begin
_ABOUT = (
    "Take a few documents and steps of CONFIG through every rule, one job after the other. Results go to a folder of "
    "their own, the config's with -trial at its end. It ends with the estimate of the whole run. Options that are not "
    "listed here go to Snakemake."
)


@dataclass(frozen=True)
class Size:
    """What a trial is cut to: documents, steps, and runs by name."""

    documents: int
    steps: int
    runs: tuple[str, ...]


def run_trial(words: Sequence[str]) -> None:
    """Run `retort trial` with these words of the command line; exits with Snakemake's status where it fails.

    Raises ValueError for a config that is wrong, and where a model does not fit into memory.
    """
    parser = argparse.ArgumentParser("retort trial", description=_ABOUT)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the config of the run (YAML)")
    parser.add_argument("--documents", type=int, metavar="N", help="documents (default: a few)")
    parser.add_argument("--keep", action="store_true", help="the estimate, for the run's report")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of a run (default: a few)")
    flags, options = parser.parse_known_args(words)
    for name in ("documents", "steps"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}: give 1 or more.")
    if not flags.config.is_file():
        raise ValueError(
            f"The config {str(flags.config)!r} does not exist (looked in {Path.cwd()})."
        )
    configs = load_source(read_files([flags.config.absolute()], {}) or read_yaml(flags.config))
    found = estimate_first(configs)
    size = choose_size(configs, found)
    size = replace(
        size, documents=flags.documents or size.documents, steps=flags.steps or size.steps
    )
    written = write_trial(configs, size)
    left_out = len(configs) - len(size.runs)
    print(
        f"trial: {size.documents} documents, {size.steps} steps of {', '.join(size.runs)}"
        f"{f' ({left_out} runs like them are left out)' if left_out else ''}; results go to {written.parent}",
        flush=True,
    )
    run_jobs(written, options)
    print("\nThe whole run, by this trial's speed:\n", flush=True)
    rates = read_rates(written, configs, found)
    whole = estimate_config(configs, replace(choose_options(gpu=None, num_gpus=None), rates=rates))
    print(*describe(whole), sep="\n")
    if flags.keep:
        print(keep_estimate(whole, configs))
    _require_fit(whole.faults)


def estimate_first(configs: Mapping[str, Config]) -> Estimate:
    """Return a quick estimate of the whole. Raises ValueError for a model that this machine's memory cannot hold."""
    quick = replace(choose_options(gpu=None, num_gpus=None, may_run=False), is_quick=True)
    found = estimate_config(configs, quick)
    _require_fit([fault for fault in found.faults if "disk" not in fault])
    return found


def _require_fit(faults: Sequence[str]) -> None:
    if faults:
        raise ValueError("it does not fit:\n" + "\n".join(f"- {fault}" for fault in faults))


def choose_size(configs: Mapping[str, Config], found: Estimate) -> Size:
    """Return what fits into some seconds of each job, by the estimate of the whole."""
    passes = [teacher.hours * teacher.copies * 3600 for teacher in found.teachers]
    whole = min(text.documents or text.sequences for text in found.texts)
    per_document = _MOST_RUNS * max(passes, default=0.0) / max(1, whole)
    documents = _MOST_DOCUMENTS if not per_document else int(_SECONDS / per_document)
    per_step = max(run.hours * 3600 / max(1, run.steps) for run in found.runs)
    steps = int(_SECONDS / max(per_step, 1e-9))
    return Size(
        documents=min(max(documents, _LEAST_DOCUMENTS), _MOST_DOCUMENTS),
        steps=min(max(steps, _LEAST_STEPS), _MOST_STEPS, *(run.steps for run in found.runs)),
        runs=choose_runs(configs),
    )


def choose_runs(configs: Mapping[str, Config]) -> tuple[str, ...]:
    """Return the runs of a trial: at first those with another teacher or cache, then other kinds and students."""
    chosen: list[str] = []
    seen: set[str] = set()
    for name, config in configs.items():
        kinds = {
            str(differences(config.teacher)) + str(differences(config.cache)),
            config.training.distillation_type,
            str(differences(config.student)),
        }
        if kinds - seen and len(chosen) < _MOST_RUNS:
            chosen.append(name)
            seen |= kinds
    return tuple(chosen)


def write_trial(configs: Mapping[str, Config], size: Size) -> Path:
    """Write the config of a trial into its folder, and return its path."""
    output = next(iter(configs.values())).output
    folder = f"{output.results_dir}-trial"
    runs = {name: cut(configs[name], size) for name in size.runs}
    content = {"output": {"results_dir": folder}, "runs": runs}
    path = Path(folder) / "trial.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
    return path


def cut(config: Config, size: Size) -> dict[str, Any]:
    """Return the sections of a run, as far as they differ from the defaults, cut to the size of a trial."""
    dataset, training, evaluation = config.dataset, config.training, config.evaluation
    shards = dataset.num_shards if dataset.sharding == "files" else 1
    samples = evaluation.samples
    changed: dict[str, dict[str, Any]] = {
        "dataset": {
            "max_samples": min(size.documents, dataset.max_samples or size.documents),
            "num_shards": shards,
            "streaming_chunk_size": min(dataset.streaming_chunk_size, -(-size.documents // 2)),
        },
        "training": {
            "max_steps": min(size.steps, training.max_steps or size.steps),
            "logging_steps": size.steps,
            "warmup_steps": 0,
            "save_steps": 1000,
        },
        "evaluation": {
            "max_positions": min(1024, evaluation.max_positions),
            "fidelity_positions": min(1024, evaluation.fidelity_positions),
            "samples": differences(samples)
            | {"num_samples": min(1, samples.num_samples), "max_new_tokens": 8},
        },
    }
    if evaluation.benchmarks.tasks:
        changed["evaluation"]["benchmarks"] = differences(evaluation.benchmarks) | {"limit": 2}
    sections = {name: differences(getattr(config, name)) for name in Config.model_fields}
    sections.pop("output", None)
    for name, keys in changed.items():
        sections[name] = sections[name] | keys
    return {name: _plain(keys) for name, keys in sections.items() if keys}


def _plain(value: Any) -> Any:
    """Return values as YAML writes them without tags."""
    if isinstance(value, Mapping):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(below) for below in value]
    return value


def run_jobs(config: Path, options: Sequence[str]) -> None:
    """Run the workflow, one job at a time. Raises SystemExit where it fails."""
    words = [str(config), *options]
    if not any(word.startswith(("--cores", "-c", "--jobs", "-j", "--profile")) for word in options):
        words += ["--cores", "1"]
    try:
        run_workflow(words)
    except SystemExit as ended:
        if ended.code:
            raise


def read_rates(trial: Path, configs: Mapping[str, Config], found: Estimate) -> Rates:
    """Return the seconds of a step of each run, and its memory, from the records of a trial's run like it."""
    project = build_project(load_source(read_yaml(trial)))
    speeds = {name: speed for name, run in project.runs.items() if (speed := _read_speed(run))}
    memory = {name: _read_memory(project.runs[name]) for name in speeds}
    share = sum(t.positions for t in found.texts) / sum(t.tokens for t in found.texts)
    rates: dict[str, Measured] = {}
    for run in found.runs:
        alike = [n for n in speeds if _is_alike(configs[n], configs[run.name])]
        if alike:
            one = run.name if run.name in alike else alike[0]
            seconds = run.tokens * share / max(1, run.steps) / speeds[one]
            rates[run.name] = Measured(seconds, memory[one])
    return Rates(student=rates, source="measured by this trial" if rates else "")


def _is_alike(a: Config, b: Config) -> bool:
    """Say whether the steps of two runs take as long."""
    names = (
        "batch_size",
        "gradient_accumulation_steps",
        "lora",
        "optim",
        "packing",
        "padding_free",
    )
    keys = all(getattr(a.training, n) == getattr(b.training, n) for n in names)
    return keys and a.student == b.student and a.dataset == b.dataset


def _read_memory(run: Run) -> int | None:
    """Return the most memory of a run's training; None where it is not recorded."""
    return TrainingRecord.read(run.folder / "training.json").summary.peak_memory


def _read_speed(run: Run) -> float | None:
    """Return the positions a second of a run after its first step; None without a second line in its log."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        with (run.folder / "training_log.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if len(rows) > 1:
            return float(rows[-1]["tokens_per_second"])
    return None
