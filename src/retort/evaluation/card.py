"""The held-out numbers in a student's model card: a table, and the Hub's model-index."""

import logging
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from retort.evaluation.formatting import format_metric, name_metric
from retort.evaluation.records import Metrics
from retort.training.model_card import CARD, SCORES, replace_card

logger = logging.getLogger(__name__)

_SHOWN = ("perplexity", "loss", "kl_to_teacher", "agreement")
_IN_INDEX = {"perplexity": "perplexity", "loss": "loss"}  # metric -> its type on the Hub


def complete_card(folder: Path, metrics: Metrics) -> None:
    """Write the numbers into README.md of final/, `folder`, atomically; a folder without a card stays as it is.

    A card that cannot be read or written is a warning: the numbers are in metrics.json.
    """
    path = folder / CARD
    if not path.exists():
        return
    try:
        replace_card(folder, add_scores(path.read_text(encoding="utf-8"), metrics))
    except (OSError, ValueError) as error:
        logger.warning(f"{path} stays without the held-out numbers: {error}")


def add_scores(text: str, metrics: Metrics) -> str:
    """Return a card with these numbers in the place of earlier ones, at its end where it has no place for them.

    They are in its model-index too if the corpus is one dataset of the Hub: a result there names a dataset.
    Raises ValueError when the metadata at the top of the card is not that of a model.
    """
    card = ModelCard(text)
    datasets = card.data.get("datasets") or []
    if len(datasets) == 1:
        card.data["model_name"] = card.data.get("model_name") or metrics.training.run
        card.data["eval_results"] = _list_results(metrics, datasets[0])
    begin, end = SCORES
    table = f"{begin}\n{describe_scores(metrics)}\n{end}"
    before, is_marked, after = card.text.partition(begin)
    if is_marked:
        body = before + table + after.partition(end)[2]
    else:
        body = f"{card.text.rstrip()}\n\n## Held-out numbers\n\n{table}\n"
    card.text = body
    return str(card)


def describe_scores(metrics: Metrics) -> str:
    """Return the numbers as a table in Markdown, of the student and of its teacher, with 95 % intervals."""
    found = {"this model": metrics.scores.student}
    if metrics.scores.teacher:
        found["teacher"] = metrics.scores.teacher
    lines = [f"| | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for name in _SHOWN:
        cells = []
        for card in found.values():
            value, interval = (
                format_metric(name, card.metrics[name]) if name in card.metrics else ("", "")
            )
            cells.append(f"{value} ({interval})" if interval else value)
        if any(cells):
            label = name_metric(name).replace("|", r"\|")  # else it would begin another cell
            lines.append(f"| {label} | {' | '.join(cells)} |")
    student = metrics.scores.student
    lines += [
        "",
        f"Means over {student.positions:,} tokens of {student.documents:,} held-out documents; in brackets 95 % "
        "intervals, which resample the documents. Perplexity is that of a token of this model's tokenizer.",
    ]
    return "\n".join(lines)


def _list_results(metrics: Metrics, dataset: str) -> list[EvalResult]:
    found = metrics.scores.student.metrics
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=dataset,
            dataset_name=f"{dataset}, held-out documents",
            metric_type=kind,
            metric_name=name_metric(name),
            metric_value=round(found[name].value, 4),
        )
        for name, kind in _IN_INDEX.items()
        if name in found
    ]
