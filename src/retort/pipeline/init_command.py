"""`retort init`: looks at a corpus and a teacher, and writes a commented config with good values for them."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from retort.cache.methods import build_codec
from retort.config.config_files import load_source
from retort.config.handoff import read_changes
from retort.config.load import complete
from retort.config.recommended import ALPHA, CACHE, TEMPERATURE, choose_learning_rate, choose_warmup
from retort.config.yaml_source import read_yaml
from retort.io.units import format_bytes, format_count
from retort.models.generate import find_context_length
from retort.models.load import count_parameters, load_model_config, output_width
from retort.models.quantized import find_quantization
from retort.models.students import student_config
from retort.pipeline.first_look import (
    Corpus,
    look_at_corpus,
    read_size,
    shape_student,
)
from retort.pipeline.init_flags import ask
from retort.pipeline.preflight import check_project
from retort.pipeline.teacher_checks import check_causal
from retort.pipeline.workflow_files import find_workflow
from retort.tokens.tokenizer import load_tokenizer

_GPU_BYTES = 80e9  # where this machine has none to ask
_HELD_OUT = 100  # documents, for intervals that say something
_MAX_LENGTH = 2048

_TEMPLATE = """\
# yaml-language-server: $schema={schema}
# {about}.
# Written by retort init. All keys: config/README.md; why these values: the module retort.config.recommended.
#
#   {trial}  # a few documents and steps, then the estimate of the whole
#   retort run {output}
dataset:
{dataset}
teacher:
{teacher}
  generation:
    gpus_per_model: {gpus}  # {memory}
    batch_size: {teacher_batch}  # sequences in one forward pass; fewer if memory runs out
cache:
  method: {cache.method}  # keeps every token whose probability is at least
  min_probability: {cache.min_probability}  # and the sum of all others: some {cache_size} for this corpus
  temperatures: [{temperature}]  # training.temperature must be one of these
student:
  {student_key}: {student}  # {size} parameters, {start} weights
training:
  temperature: {temperature}
  num_epochs: {epochs}  # about {steps:,} steps
  batch_size: {batch}  # sequences in a step; with fewer and gradient_accumulation_steps less memory
  learning_rate: {rate}  # for {start} weights of this size
  warmup_steps: {warmup}  # in which it rises
runs:
  text: {{training: {{distillation_type: output}}}}  # learns the text alone, to compare with
  soft: {{training: {{distillation_type: hybrid, alpha: {alpha}}}}}  # alpha is the weight of the text
"""


def write_first_config(args: argparse.Namespace) -> None:
    """Run `retort init` with the flags of `read_init_flags`: look, write, check, and say what to type next.

    Raises ValueError when corpus, teacher or student cannot be used, or the file exists; then nothing is written.
    """
    output = Path(args.output)
    keys = read_changes(args.set)
    if others := keys.keys() - {"dataset", "teacher"}:
        raise ValueError(
            f"--set {min(others)}: give keys of dataset and teacher only, and edit {output} for others."
        )
    keys["teacher"] = {"model_path": args.teacher} | keys.get("teacher", {})
    section = complete({"teacher": keys["teacher"]}).teacher
    teacher = load_model_config(args.teacher, **section.source)
    check_causal(teacher, section)
    tokenizer = load_tokenizer(args.teacher, **section.source)
    corpus = look_at_corpus(args.corpus, keys.get("dataset", {}), tokenizer)
    size = count_parameters(teacher)
    tenth = format_count(max(size / 10, min(1e5, size)))
    student = (
        args.student or ask(f"Student: a size, a config (.json) or a model [{tenth}]: ") or tenth
    )
    shaped = output.with_suffix(".student.json")
    made = [output, shaped] if read_size(student) else [output]
    for path in made:
        if path.exists():
            raise ValueError(f"{path} exists already: remove it, or give another --output.")
    try:
        if num := read_size(student):
            shape = shape_student(num, vocabulary=output_width(teacher))
            shaped.write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")
            student = str(shaped)
        trial = f"retort trial {output}"
        values = _choose_values(corpus, keys["teacher"], teacher, tokenizer, student)
        about = {"output": output, "trial": trial, "schema": _find_schema(output)}
        output.write_text(_TEMPLATE.format(**values, **about), encoding="utf-8")
        found = check_project(load_source(read_yaml(output)))
    except ValueError:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    print(*found.notes, "", f"{output} is written, and passed this check. Next:", sep="\n")
    print(f"  {trial}\n  retort run {output}")


def _choose_values(
    corpus: Corpus, keys: Mapping[str, Any], teacher: Any, tokenizer: Any, student: str
) -> dict[str, Any]:
    """Return what the template is filled with; `teacher`: its config."""
    key = "config" if student.endswith(".json") else "model_path"
    if key == "config" and not Path(student).is_file():
        raise ValueError(f"--student {student!r} does not exist (looked in {Path.cwd()}).")
    width = output_width(teacher)
    section = complete({"student": {key: student}}).student
    config = student_config(section, vocabulary=width, tokenizer=tokenizer)
    size, teacher_size = count_parameters(config), count_parameters(teacher)
    length = _choose_length(corpus, [teacher, config])
    per_step = 1 << (12 if size < 10e6 else 14 if size < 100e6 else 15)  # tokens
    batch = max(4, min(64, per_step // length))
    dataset = _choose_dataset(corpus, length)
    held_out, _ = dataset.get("validation_fraction", (0.0, ""))
    per_epoch = max(1, round(corpus.count_sequences(length) * (1 - held_out) / batch))
    epochs = max(1, min(3 if key == "model_path" else 10, -(-1000 // per_epoch)))
    weights = _count_bytes(teacher, teacher_size)
    per_gpu = (
        torch.cuda.get_device_properties(0).total_memory
        if torch.cuda.is_available()
        else _GPU_BYTES
    )
    gpus = 1 << int(1.3 * weights / per_gpu).bit_length()
    codec = build_codec(CACHE, vocabulary=width)
    cache_size = corpus.num_tokens * codec.bytes_per_position
    template = "a" if getattr(tokenizer, "chat_template", None) else "no"
    return {
        "about": f"{corpus.num_documents:,} documents ({corpus.kind}), about {format_count(corpus.num_tokens)} "
        f"tokens; a teacher of {format_count(teacher_size)} parameters, {width:,} ids, {template} chat template",
        "dataset": _render(dataset),
        "teacher": _render({name: (value, "") for name, value in keys.items()}),
        "gpus": gpus,
        "memory": f"{format_bytes(round(weights))} of weights; GPUs of {format_bytes(round(per_gpu))}",
        "teacher_batch": max(1, min(64, (1 << 14 if gpus == 1 else 1 << 12) // length)),
        "cache": CACHE,
        "cache_size": format_bytes(round(cache_size)),
        "student_key": key,
        "student": student,
        "size": format_count(size),
        "start": "pretrained" if key == "model_path" else "random",
        "epochs": epochs,
        "steps": epochs * per_epoch,
        "batch": batch,
        "rate": choose_learning_rate(size, is_pretrained=key == "model_path"),
        "warmup": choose_warmup(epochs * per_epoch),
        "temperature": TEMPERATURE,
        "alpha": ALPHA,
    }


def _choose_dataset(corpus: Corpus, length: int) -> dict[str, tuple[Any, str]]:
    """Return the keys of `dataset` with their values and comments; what the user set stays."""
    within = sum(n <= length for n in corpus.lengths) / len(corpus.lengths)
    chosen: dict[str, tuple[Any, str]] = {
        **{key: (value, "") for key, value in corpus.keys.items()},
        "max_length": (length, f"tokens in a sequence; {within:.0%} of the documents fit into one"),
        "num_shards": (
            min(8, 1 + corpus.num_tokens // 5_000_000),
            "slices, tokenized side by side",
        ),
    }
    if not {"validation_split", "validation_files"} & corpus.keys.keys():
        share = round(min(0.2, max(0.01, _HELD_OUT / corpus.num_documents)), 3)
        chosen["validation_fraction"] = (
            share,
            f"held out: about {share * corpus.num_documents:,.0f} documents",
        )
    return {**chosen, **{key: (corpus.keys[key], "") for key in corpus.keys}}


def _choose_length(corpus: Corpus, models: Sequence[Any]) -> int:
    """Return the power of two that holds 95 % of the documents, or what these models can read."""
    longest = int(sorted(corpus.lengths)[int(0.95 * (len(corpus.lengths) - 1))])
    limits = filter(None, map(find_context_length, models))
    most = int(corpus.keys.get("max_length") or _MAX_LENGTH)
    return min(max(64, 1 << (longest - 1).bit_length()), most, *limits)


def _count_bytes(teacher: Any, num_parameters: int) -> float:
    """Return the bytes of a model's weights in bfloat16, or as they are quantized."""
    quantization = find_quantization(teacher)
    bits = quantization.get("bits", 8) if quantization else 16
    return float(num_parameters * bits / 8)


def _render(keys: Mapping[str, tuple[Any, str]]) -> str:
    lines = []
    for key, (value, comment) in keys.items():
        text = yaml.safe_dump([value], default_flow_style=True, width=1000).strip()[1:-1]
        lines.append(f"  {key}: {text}{f'  # {comment}' if comment else ''}")
    return "\n".join(lines)


def _find_schema(output: Path) -> str:
    workflow = find_workflow()
    schema = workflow / "workflow" / "schemas" / "config.schema.json"
    is_inside = output.resolve().is_relative_to(workflow)
    return os.path.relpath(schema, output.resolve().parent) if is_inside else str(schema)
