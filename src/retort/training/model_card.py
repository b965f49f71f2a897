"""The model card of a finished student: what it was trained on, how, and its last losses."""

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from retort.training.record import TrainingSummary

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A language model of {{ "{:,}".format(parameters) }} parameters that learned from {{ way }}, by Retort.
How it does on held-out text is in `evaluation/` beside this folder, the whole curve in `training_log.csv`.

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
    distillation_type: str,
    facts: Mapping[str, str],
    summary: TrainingSummary,
    config: Mapping[str, Any],
    curve: list[dict[str, float]],
) -> str:
    """Return the card as Markdown.

    `facts`: what the student was trained on, by name; `config`: shown as YAML; `curve`: Trainer's
    log history, whose last entry with a loss is shown, and the held-out loss of the student's own step.
    """
    last = next((entry for entry in reversed(curve) if "total_loss" in entry), {})
    metrics = {
        "optimizer steps": f"{summary.steps:,}",
        "positions": f"{summary.trained_positions:,}",
    }
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
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["retort", *(["distillation"] if distillation_type != "output" else [])],
    )
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=name,
        parameters=summary.student_parameters,
        way=_WAYS[distillation_type],
        facts=facts,
        metrics=metrics,
        config=yaml.safe_dump(dict(config), sort_keys=False),
    )
    return str(card)
