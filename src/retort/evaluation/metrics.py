"""Two models at held-out positions: a number for each position and metric.

Legend: P counted positions, V vocabulary, K most probable tokens. p is the teacher's distribution of the next token, q
the student's, both over the whole vocabulary at temperature 1; y is the text's own token. Logarithms are natural.
What the numbers become (means, intervals, classes) is the room `scores`'s affair.

Memory is that of a few million logits, whatever the vocabulary: some rows at a time are worked on.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from retort.models.load import CausalLM
from retort.teacher.features import TeacherFeatures, iterate_rows
from retort.teacher.scoring import Scorer, score_features
from retort.tokens.sequences import SequenceTable
from retort.training.losses import MIN_LOG_MASS

TOP = 10  # tokens compared by `overlap`
# Logits of one model at once, 16 MB, so that the head's product has some rows; and how many of them are measured at
# once on a CPU, whose cache is small.
_CELLS, _CPU_CELLS = 1 << 22, 1 << 21
_MOST_ROWS = 1024

Columns = dict[str, NDArray[np.float64]]


def next_tokens(table: SequenceTable) -> Tensor:
    """Return the token that each counted position predicts, int64 [P], in the table's order."""
    counted = np.flatnonzero(table.loss_mask)
    return torch.from_numpy(np.asarray(table.ids)[counted + 1].astype(np.int64))


@torch.inference_mode()
def measure_positions(
    student: CausalLM, table: SequenceTable, *, teacher: TeacherFeatures | None, batch_size: int
) -> Columns:
    """Return one float64 array [P] for each measure of the student (`measure_model`), in the table's order.

    With a teacher, scored on the same table: its own measures, with "teacher_" before their names, and those of both
    (`compare`).
    """
    targets_P = next_tokens(table)
    columns: Columns = {}
    for rows, logq_PV in _read_logprobs(student, table, batch_size=batch_size):
        logp_PV = None
        if teacher is not None:
            logp_PV = _floor(teacher.logprobs("val", rows)).to(logq_PV.device)
        at_once = _CPU_CELLS // logq_PV.shape[1] if logq_PV.device.type == "cpu" else len(logq_PV)
        for piece in iterate_rows(len(logq_PV), rows=max(1, at_once)):
            place = slice(rows.start + piece.start, rows.start + piece.stop)
            targets = targets_P[place].to(logq_PV.device)
            found = measure_model(logq_PV[piece], targets)
            if logp_PV is not None:
                own = measure_model(logp_PV[piece], targets)
                found |= {f"teacher_{name}": values for name, values in own.items()}
                found |= compare(logp_PV[piece], logq_PV[piece])
            for name, values in found.items():
                column = columns.setdefault(name, np.zeros(len(targets_P)))
                column[place] = values.double().cpu().numpy()
    return columns


def _floor(logp_PV: Tensor) -> Tensor:
    """Return the logprobs with exp(-30) in the place of zeros: of tokens that the teacher does not have."""
    return logp_PV.masked_fill_(logp_PV == -torch.inf, MIN_LOG_MASS)


def _read_logprobs(
    student: CausalLM, table: SequenceTable, *, batch_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows among all counted positions, float32 logprobs [rows, V]) on the student's device."""
    bounds = table.position_offsets
    at_once = min(_MOST_ROWS, max(1, _CELLS // student.vocabulary))
    for index, features_PD in score_features(Scorer(student, batch_size), table):
        for rows in iterate_rows(len(features_PD), rows=at_once):
            start = int(bounds[index])
            logits_PV = student.head.logits(features_PD[rows])
            yield slice(start + rows.start, start + rows.stop), logits_PV.log_softmax(dim=-1)


def measure_model(logq_PV: Tensor, targets_P: Tensor) -> dict[str, Tensor]:
    """Return what one model's logprobs say of the text, each [P].

    loss: - log q(y), nats. entropy: - sum_v q(v) log q(v), nats. confidence: max_v q(v). accuracy: 1 where y is the
    most probable token, else 0.
    """
    confidence_P, best_P = logq_PV.max(dim=-1)
    return {
        "loss": F.nll_loss(logq_PV, targets_P, reduction="none"),
        "entropy": -(logq_PV.exp().mul_(logq_PV)).sum(dim=-1),
        "confidence": confidence_P.double().exp(),
        "accuracy": best_P == targets_P,
    }


def compare(logp_PV: Tensor, logq_PV: Tensor) -> dict[str, Tensor]:
    """Return what tells teacher and student apart, each [P]; of two widths, the student's is taken.

    kl_to_teacher: KL(p || q) = sum_v p(v) (log p(v) - log q(v)), nats (Kullback and Leibler, 1951).
    reverse_kl: KL(q || p), nats.
    agreement: 1 where both have the same most probable token.
    overlap: share of the teacher's ten most probable tokens that are among the student's ten.
    acceptance: sum_v min(p(v), q(v)), the probability with which speculative decoding keeps a token that the student
    drafts for the teacher (Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding, 2023,
    corollary 3.6).

    Logprobs are finite; a token that the teacher does not have counts as exp(-30), which only reverse_kl notices.
    """
    width = logq_PV.shape[1]
    missing = max(0, width - logp_PV.shape[1])
    logp_PV = F.pad(logp_PV[:, :width], (0, missing), value=MIN_LOG_MASS)
    p_PV, q_PV, ratio_PV = logp_PV.exp(), logq_PV.exp(), logp_PV - logq_PV
    k = min(TOP, width)
    top_p_PK, top_q_PK = (x.topk(k, dim=-1, sorted=False).indices for x in (logp_PV, logq_PV))
    shared_PK = (top_p_PK[:, :, None] == top_q_PK[:, None, :]).any(dim=-1)
    return {
        "agreement": logp_PV.argmax(dim=-1) == logq_PV.argmax(dim=-1),
        "overlap": shared_PK.double().mean(dim=-1),
        "acceptance": torch.minimum(p_PV, q_PV).sum(dim=-1),
        "kl_to_teacher": p_PV.mul_(ratio_PV).sum(dim=-1),
        "reverse_kl": -q_PV.mul_(ratio_PV).sum(dim=-1),
    }
