"""Held-out metrics of students and teachers.

Legend: P counted positions, V vocabulary. All in nats over the whole vocabulary at temperature 1, means over counted
held-out positions unless said otherwise:

    loss            - log q(y), y the text's own token;  perplexity = exp(loss)
    kl_to_teacher   KL(p || q) = sum_v p(v) (log p(v) - log q(v)), p the teacher, q the student
    agreement       share of positions at which teacher and student have the same most probable token
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from retort.config import Evaluation
from retort.features import TeacherFeatures, digest_keys, iterate_rows, read_features
from retort.index import TokenIndex
from retort.losses import perplexity
from retort.models import CausalLM, choose_device, load_pretrained, split_model
from retort.provenance import compare_digests, digest_folder, read_json, write_json
from retort.teacher import Scorer, score_features
from retort.tokens import SequenceTable

METRICS_FROM_TRAINING = (
    "run",
    "id",
    "distillation_type",
    "alpha",
    "temperature",
    "seed",
    "student_parameters",
    "steps",
    "device",
)
METRICS_FROM_MANIFEST = (
    "bytes_per_position",
    "positions",
    "method",
    "top_k",
    "min_probability",
    "tail_mass",
    "fidelity_kl",
    "fidelity_agreement",
)
_ROWS = 1024  # logits held at once: [_ROWS, V] float32


@dataclass
class Sums:
    """Sums over positions; float64, so that their order does not show."""

    positions: int = 0
    loss: float = 0.0
    kl: float = 0.0
    agreement: float = 0.0
    teacher_loss: float = 0.0


def next_tokens(table: SequenceTable) -> Tensor:
    """Return the token that each counted position predicts, int64 [P], in the table's order."""
    counted = np.flatnonzero(table.loss_mask)
    return torch.from_numpy(np.asarray(table.ids)[counted + 1].astype(np.int64))


def _student_logprobs(
    student: CausalLM, table: SequenceTable, *, batch_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows among all counted positions, float32 logprobs [rows, V])."""
    bounds = table.position_offsets
    for index, features_PD in score_features(Scorer(student, batch_size), table):
        for rows in iterate_rows(len(features_PD), rows=_ROWS):
            start = int(bounds[index])
            logits = student.head.logits(features_PD[rows])
            yield slice(start + rows.start, start + rows.stop), logits.log_softmax(dim=-1).cpu()


@torch.inference_mode()
def evaluate_student(
    student: CausalLM, table: SequenceTable, *, teacher: TeacherFeatures | None, batch_size: int
) -> dict[str, Any]:
    """Return {"validation": {...}, "teacher_validation": {...} | None} of one student on held-out sequences.

    Raises ValueError when there is nothing held out.
    """
    if table.num_positions == 0:
        raise ValueError(
            "no held-out position to evaluate on: raise dataset.validation_fraction, or give more documents."
        )
    targets_P = next_tokens(table)
    sums = Sums()
    for rows, student_PV in _student_logprobs(student, table, batch_size=batch_size):
        sums.positions += len(student_PV)
        sums.loss += float(F.nll_loss(student_PV, targets_P[rows], reduction="sum"))
        if teacher is not None:
            _add_comparison(sums, student_PV, teacher.logprobs("val", rows), targets_P[rows])
    n = sums.positions
    has_teacher = teacher is not None
    return {
        "validation": {
            "loss": sums.loss / n,
            "perplexity": perplexity(sums.loss / n),
            "positions": n,
            "documents": len(np.unique(table.documents)),
            "kl_to_teacher": sums.kl / n if has_teacher else None,
            "agreement": sums.agreement / n if has_teacher else None,
        },
        "teacher_validation": (
            {"loss": sums.teacher_loss / n, "perplexity": perplexity(sums.teacher_loss / n)}
            if has_teacher
            else None
        ),
    }


def _add_comparison(sums: Sums, student_PV: Tensor, teacher_PV: Tensor, targets_P: Tensor) -> None:
    """Add KL(teacher || student), agreement and the teacher's loss; a student's layer may be the wider one."""
    width = min(student_PV.shape[1], teacher_PV.shape[1])
    teacher_PV, student_cut_PV = teacher_PV[:, :width], student_PV[:, :width]
    terms_PV = teacher_PV.exp() * (teacher_PV - student_cut_PV)
    sums.kl += float(terms_PV.masked_fill(teacher_PV == -torch.inf, 0.0).double().sum())
    sums.agreement += int((teacher_PV.argmax(dim=-1) == student_PV.argmax(dim=-1)).sum())
    sums.teacher_loss += float(F.nll_loss(teacher_PV, targets_P, reduction="sum"))


def _refuse_other_student(folder: Path, record: dict[str, Any], source: Path) -> None:
    """Raise ValueError when the student is not the one that training.json was written for."""
    faults = compare_digests(record["final"], digest_folder(folder))
    if faults:
        raise ValueError(
            f"{folder} is not what {source} records: {', '.join(faults)}. Delete {source} and run the same command "
            "again: training goes on from its last checkpoint and writes the student anew."
        )


def evaluate_run(
    out: Path,
    *,
    index_path: Path,
    training_path: Path,
    features_path: Path | None,
    manifest_path: Path | None,
    evaluation: Evaluation,
    device: str,
    cpu_threads: int,
) -> str:
    """Evaluate the student in final/ beside training.json, write metrics.json, return its line.

    Raises ValueError when final/ is not what training wrote, or the teacher is not the one that was trained with.
    """
    torch.set_num_threads(cpu_threads)
    index = TokenIndex.read(index_path)
    record = read_json(training_path)
    folder = training_path.parent / "final"
    _refuse_other_student(folder, record, training_path)
    table = index.read_split("val", max_positions=evaluation.max_positions)
    teacher = read_features(features_path) if features_path else None
    if teacher is not None and features_path is not None:
        teacher.require("val", table, source=features_path)
        if record["teacher"] is not None:
            teacher.require_teacher(
                record["teacher"], source=features_path, made_from=training_path
            )
    model = load_pretrained(str(folder), dtype=torch.float32).to(choose_device(device)).eval()
    found = evaluate_student(
        split_model(model), table, teacher=teacher, batch_size=evaluation.batch_size
    )
    found["validation"]["content"] = digest_keys(table)
    manifest = read_json(manifest_path) if manifest_path else None
    is_measured = manifest is not None and manifest["fidelity_kl"] is not None
    metrics = {
        **{name: record[name] for name in METRICS_FROM_TRAINING},
        "trained_tokens": record["trained_positions"],
        "training_seconds": record["seconds"],
        "teacher_parameters": teacher.num_parameters if teacher else None,
        "teacher": teacher.name if teacher else None,
        **found,
        "cache": {name: manifest[name] for name in METRICS_FROM_MANIFEST}
        if manifest and is_measured
        else None,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, metrics)
    scores = found["validation"]
    against = (
        f", KL to the teacher {scores['kl_to_teacher']:.4f}, agreement {scores['agreement']:.1%}"
        if teacher
        else ""
    )
    return f"evaluate {record['run']}  held-out loss {scores['loss']:.4f} nats/token{against}"
