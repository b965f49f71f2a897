"""The model card of a finished student: what it came from, how it was trained, how to load it."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from retort.config.sections import Student, Training
from retort.io.files import temporary_name
from retort.training.origin import Origin, describe_section
from retort.training.record import TrainingSummary

CARD = "README.md"
# Around the held-out numbers, which `evaluate` writes: all else in a card may be edited.
SCORES = ("<!-- held-out numbers, by Retort -->", "<!-- end of the held-out numbers -->")
MODEL = "path-or-hub-id"  # of the student, in the lines that load it
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A language model of {{ "{:,}".format(parameters) }} parameters that learned from {{ way }}, by Retort.

| | |
|---|---|
| started from | {{ origin.start }} |
| teacher | {{ origin.learned_from }} |
| data | {{ origin.corpus }} |
| weights | {{ dtype }} |
| licence | {{ license }} |

## Held-out numbers

{{ scores[0] }}
Not measured yet.
{{ scores[1] }}

## Use

```python
from transformers import pipeline

write = pipeline("text-generation", model="{{ model }}")
print(write({{ prompt }}, max_new_tokens=100)[0]["generated_text"])
```

```bash
vllm serve {{ model }}
```

## Training

| learned from | |
|---|---|
{% for name, value in facts.items() -%}
| {{ name }} | `{{ value }}` |
{% endfor %}
| training ended with | |
|---|---|
{% for name, value in metrics.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
Losses are means over the positions since the log line before, in nats.

```yaml
{{ config }}```
"""
_WAYS = {
    "output": "text",
    "logit": "a teacher's distributions",
    "hybrid": "text and a teacher's distributions",
}
_METRICS = ("total_loss", "hard_loss", "soft_loss", "perplexity")
_HELD_OUT = {"eval_loss": "held-out loss", "eval_kl": "KL to the teacher on held-out text"}


def write_card(
    name: str,
    *,
    origin: Origin,
    facts: Mapping[str, str],
    summary: TrainingSummary,
    student: Student,
    training: Training,
    curve: list[dict[str, float]],
    is_chat: bool,
) -> str:
    """Return the card as Markdown.

    `facts`: digests of what the student was trained on, by name; `is_chat`: it has a chat template; `curve`: Trainer's
    log history, whose last entry with a loss is shown, and the held-out loss of the student's own step.
    """
    sections = {"student": describe_section(student), "training": describe_section(training)}
    if not student.is_pruned:
        sections["student"].pop("from_teacher", None)
    message = [{"role": "user", "content": "Hello!"}]
    kind = training.distillation_type
    card = ModelCard.from_template(
        _describe_for_hub(origin, kind),
        template_str=_TEMPLATE,
        name=name,
        parameters=summary.student_parameters,
        way=_WAYS[kind].replace(
            "a teacher's", "several teachers'" if origin.is_mixed else "a teacher's"
        ),
        origin=origin,
        dtype=training.save_dtype,
        license=_describe_license(origin),
        scores=SCORES,
        model=MODEL,
        prompt=json.dumps(message if is_chat else "Once upon a time"),
        facts=facts,
        metrics=_list_metrics(summary, curve),
        config=yaml.safe_dump(sections, sort_keys=False),
    )
    return str(card)


def _list_metrics(summary: TrainingSummary, curve: list[dict[str, float]]) -> dict[str, str]:
    """Return what training ended with, by name: sizes, the last entry's losses, the student's own held-out losses."""
    last = next((entry for entry in reversed(curve) if "total_loss" in entry), {})
    metrics = {
        "optimizer steps": f"{summary.steps:,}",
        "positions": f"{summary.trained_positions:,}",
    }
    if summary.trained_parameters not in (None, summary.student_parameters):
        metrics["parameters trained"] = f"{summary.trained_parameters:,}"
    metrics |= {key: f"{last[key]:.4f}" for key in _METRICS if key in last}
    step = summary.steps
    if summary.best_step is not None:
        step = summary.best_step
        metrics["the student is that of step"] = f"{step:,}, the best"
    for entry in curve:
        if entry.get("step") == step:
            metrics |= {
                name: f"{entry[key]:.4f}" for key, name in _HELD_OUT.items() if key in entry
            }
    return metrics


def _describe_for_hub(origin: Origin, kind: str) -> ModelCardData:
    """Return what the Hub reads at the top of a card; `kind`: training.distillation_type."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=origin.license,
        base_model=origin.base_model,
        datasets=list(origin.datasets) or None,
        tags=["retort", *(["distillation"] if kind != "output" else [])],
    )
    if origin.base_model:
        data["base_model_relation"] = "finetune"
    return data


def replace_card(folder: Path, text: str) -> None:
    """Write the card in final/, `folder`, atomically: while it is written, the folder holds no other file."""
    temporary = temporary_name(folder.parent / CARD)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / CARD)
    finally:
        temporary.unlink(missing_ok=True)


def _describe_license(origin: Origin) -> str:
    bound = "those of base model, teacher and data, named above, bind it"
    if origin.license is None:
        return f"**fill in** (here, and `license:` at the top of this file): {bound}"
    of = f", that of {origin.license_source}" if origin.license_source else ""
    return f"{origin.license}{of}; {bound}"
