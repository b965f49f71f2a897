"""`retort estimate`: what a config will need, from the configs of its models, before anything is run."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from retort.artifacts.build import build_project
from retort.artifacts.project import Project, Run, TeacherModel, Tokens
from retort.cluster.gpus import detect_gpus
from retort.config.sections import Config
from retort.estimate.gpus import Gpu, detect_gpu, find_gpu
from retort.estimate.options import Models, Options
from retort.estimate.records import KEPT_FILE, Estimate
from retort.estimate.table import summarize
from retort.estimate.text import UncountedError
from retort.estimate.whole import estimate_project
from retort.models.load import load_model_config, output_width
from retort.models.students import student_config
from retort.pipeline.demo_teacher import DEMO_TEACHER, DemoTokenizer, demo_config, foresee_tokenizer
from retort.pipeline.pruned_student import shape_student
from retort.pipeline.workflow_files import find_workflow
from retort.tokens.tokenizer import load_tokenizer

_SOME_TOKENS = 1_000_000  # where only memory is looked at
_MINUTES_OF_PROFILE = Path("profiles") / "slurm" / "config.yaml"


def estimate_config(configs: Mapping[str, Config], options: Options) -> Estimate:
    """Return the estimate of all runs of a config.

    Raises ValueError as the check of the inputs does, and where the text cannot be counted.
    """
    project = build_project(configs)
    return estimate_project(project, find_models(project, options), options)


def find_kept_path(configs: Mapping[str, Config]) -> Path:
    """Return where the estimate of a config is kept, beside the record of its check."""
    folder = next(iter(configs.values())).output.results_dir
    return Path(folder) / "checks" / build_project(configs).check_id / KEPT_FILE


def keep_estimate(found: Estimate, configs: Mapping[str, Config]) -> str:
    """Keep an estimate for the report of the run; return a sentence on it.

    Raises ValueError where the run has begun: its report shows what was estimated before.
    """
    path = find_kept_path(configs)
    if path.with_name("inputs.json").exists():
        raise ValueError(
            f"the run of this config has begun ({path.parent} has its check), so an estimate of now is not kept. Leave "
            "--keep out, or remove that folder."
        )
    found.write(path)
    return f"kept for the report of the run: {path}"


def estimate_in_short(
    configs: Mapping[str, Config], *, kept_path: Path | None = None
) -> tuple[list[str], list[str]]:
    """Return lines on what a config needs, for its check, and what does not fit the GPUs that are known, or the disk.

    Little is read and nothing is run. Where the text cannot be counted here, memory alone is looked at. kept_path:
    where the estimate is written, unless one is kept there already. Raises ValueError as `estimate_config` does.
    """
    generations = [config.teacher.generation for config in configs.values()]
    named = dict.fromkeys(g.gpu_type for g in generations if g.gpu_type)
    options = choose_options(gpu=next(iter(named), None), num_gpus=None, may_run=False)
    number = max(g.gpus_per_model * (g.num_workers or 1) for g in generations)
    number = max(number, *(c.training.gpus * c.training.nodes for c in configs.values()))
    options = replace(options, is_quick=True)
    if named:
        options = replace(options, num_devices=number, is_counted=False)
    try:
        found = estimate_config(configs, options)
        if kept_path is not None and not kept_path.exists():
            found.write(kept_path)
        return summarize(found), list(found.faults)
    except UncountedError as error:
        found = estimate_config(configs, replace(options, tokens=_SOME_TOKENS))
        return [f"estimate: {error}"], [text for text in found.faults if "disk" not in text]


def choose_options(
    *,
    gpu: str | None,
    num_gpus: int | None,
    tokens: float | None = None,
    price: float | None = None,
    utilization: float | None = None,
    may_run: bool = True,
) -> Options:
    """Return the options of a command line; without a GPU named, the devices are those of this machine.

    Raises ValueError for a GPU that is not known, and for numbers that cannot be meant.
    """
    for name, value, least, most in (
        ("--num-gpus", num_gpus, 1, 1_000_000),
        ("--tokens", tokens, 2, 1e18),
        ("--price-per-gpu-hour", price, 0, 1e6),
        ("--utilization", utilization, 0.001, 1),
    ):
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} is {value:g}: give a number from {least:g} to {most:g}.")
    here = detect_gpu()
    chosen: Gpu | None = find_gpu(gpu) if gpu else here
    if num_gpus is not None and chosen is None:
        raise ValueError(
            f"--num-gpus is {num_gpus}, but this machine has no GPU: name one with --gpu, such as --gpu h100-80."
        )
    slots, attempts = read_slots()
    number = num_gpus or (max(1, len(detect_gpus())) if chosen else len(os.sched_getaffinity(0)))
    return Options(
        gpu=chosen,
        num_devices=number,
        tokens=None if tokens is None else round(tokens),
        price=price,
        utilization=utilization,
        may_run=may_run and (gpu is None or chosen == here),
        slots=slots,
        attempts=attempts,
    )


def read_slots() -> tuple[dict[str, int], int]:
    """Return the minutes of SLURM jobs by rule, and how often one is tried: of ./profiles/slurm, else of ours."""
    for folder in (Path(), find_workflow()):
        with suppress(OSError, yaml.YAMLError, AttributeError):
            found = yaml.safe_load((folder / _MINUTES_OF_PROFILE).read_text(encoding="utf-8"))
            rules: dict[str, Any] = found.get("set-resources") or {}
            slots = {rule: keys.get("runtime") for rule, keys in rules.items()}
            minutes = {rule: value for rule, value in slots.items() if type(value) is int}
            return minutes, 1 + int(found.get("retries") or 0)
    return {}, 1


def find_models(project: Project, options: Options) -> Models:
    """Return the configs of a project's models. Raises ValueError for one that cannot be used."""
    teachers = {id: _load_teacher(teacher) for id, teacher in project.teachers.items()}
    tokenizers = {id: _load_tokenizer(tokens, options) for id, tokens in project.tokens.items()}
    students = {}
    for name, run in project.runs.items():
        width = 0
        if run.teacher is not None:
            width = output_width(teachers[run.teacher.id])
        students[name] = _shape(run, tokenizers[run.tokens.id], width)
    return Models(teachers, students, tokenizers)


def _load_teacher(teacher: TeacherModel) -> PretrainedConfig:
    if teacher.corpus is not None:
        return demo_config(teacher.corpus.dataset)
    section = teacher.section
    return load_model_config(str(section.model_path), **section.source)


def _load_tokenizer(tokens: Tokens, options: Options) -> Any:
    """Return the tokenizer of a text, None where it cannot be loaded and the number of tokens is given.

    The demo's is trained here where it does not exist yet and models may be run.
    """
    if tokens.teacher is not None and tokens.teacher.corpus is not None:
        if Path(tokens.tokenizer).is_dir():
            return load_tokenizer(tokens.tokenizer)
        can_train = options.may_run and options.tokens is None
        return foresee_tokenizer(tokens.corpus.dataset) if can_train else DemoTokenizer()
    section = tokens.teacher.section if tokens.teacher else None
    try:
        return load_tokenizer(tokens.tokenizer, **(section.source if section else {}))
    except ValueError:
        if options.tokens is None:
            raise
        return None


class _NoTokenizer:
    """Stands for a tokenizer that is not there: its ids are those of the teacher's output layer."""

    bos_token_id = eos_token_id = pad_token_id = None
    chat_template = None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        """Return no token: none is known."""
        return {}


def _shape(run: Run, tokenizer: Any, width: int) -> PretrainedConfig:
    """Return the config that a run's student will have."""
    known = tokenizer if tokenizer is not None else _NoTokenizer(width)
    if isinstance(known, DemoTokenizer):
        width = DEMO_TEACHER.vocabulary
    pruned = None
    if run.config.student.is_pruned:
        pruned, wrong = shape_student(run.config)
        if wrong:
            raise ValueError(wrong[0])
    vocabulary = max(width, len(known))
    return student_config(run.config.student, vocabulary=vocabulary, tokenizer=known, pruned=pruned)
