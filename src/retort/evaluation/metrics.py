"""Metrics of student and teacher at each held-out position; `scores` turns them into means with intervals.

Legend: P counted positions, V vocabulary, K most probable tokens. p is the teacher's distribution of the next token, q
the student's, both over the whole vocabulary at temperature 1; y is the text's token. Logarithms are natural.

Rows are processed in blocks, so memory is that of a few million logits at any size of vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from retort.models.causal_lm import CausalLM
from retort.teacher.features import MixedFeatures, TeacherFeatures, iterate_rows
from retort.teacher.scoring import Scorer, score_features
from retort.tokens.sequences import SequenceTable

TOP = 10  # tokens compared by `overlap`
# Stands for log 0, as in the losses: exp(-30) = 1e-13 is below the rounding of any metric here but reverse_kl.
_MIN_LOGPROB = -30.0
_MAX_CELLS = 1 << 22  # logits of one model in a block, 16 MB: enough rows for the head's product
_MAX_CPU_CELLS = 1 << 21  # of these, measured at once on a CPU, whose cache is small
_MAX_ROWS = 1024

Columns = dict[str, NDArray[np.float64]]


@torch.inference_mode()
def measure_positions(
    student: CausalLM,
    table: SequenceTable,
    *,
    teacher: TeacherFeatures | MixedFeatures | None,
    batch_size: int,
) -> Columns:
    """Return the metrics of the student (`measure_model`) by name, float64 [P] each.

    With a teacher that was scored on the same table, also its own metrics, prefixed with "teacher_", and those of both
    (`compare_distributions`).
    """
    targets_P = torch.from_numpy(table.next_ids.astype(np.int64))
    columns: Columns = {}
    for rows, logq_PV in _read_logprobs(student, table, batch_size=batch_size):
        logp_PV = None
        if teacher is not None:
            logp_PV = _replace_zeros(teacher.logprobs("val", rows)).to(logq_PV.device)
        is_cpu = logq_PV.device.type == "cpu"
        num_rows = max(1, _MAX_CPU_CELLS // logq_PV.shape[1]) if is_cpu else len(logq_PV)
        for block in iterate_rows(len(logq_PV), rows=num_rows):
            block_P = slice(rows.start + block.start, rows.start + block.stop)
            targets = targets_P[block_P].to(logq_PV.device)
            found = measure_model(logq_PV[block], targets)
            if logp_PV is not None:
                own = measure_model(logp_PV[block], targets)
                found |= {f"teacher_{name}": values for name, values in own.items()}
                found |= compare_distributions(logp_PV[block], logq_PV[block])
            for name, values in found.items():
                column = columns.setdefault(name, np.zeros(len(targets_P)))
                column[block_P] = values.double().cpu().numpy()
    return columns


def _replace_zeros(logp_PV: Tensor) -> Tensor:
    """Replace the zero probabilities of tokens that the teacher does not have by exp(-30), in place."""
    return logp_PV.masked_fill_(logp_PV == -torch.inf, _MIN_LOGPROB)


def _read_logprobs(
    student: CausalLM, table: SequenceTable, *, batch_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of the counted positions, float32 logprobs [rows, V] on the student's device)."""
    bounds = table.position_offsets
    num_rows = min(_MAX_ROWS, max(1, _MAX_CELLS // student.vocabulary))
    for index, features_PD in score_features(Scorer(student, batch_size), table):
        for rows in iterate_rows(len(features_PD), rows=num_rows):
            start = int(bounds[index])
            logits_PV = student.head.logits(features_PD[rows])
            yield slice(start + rows.start, start + rows.stop), logits_PV.log_softmax(dim=-1)


def measure_model(logq_PV: Tensor, targets_P: Tensor) -> dict[str, Tensor]:
    """Return the metrics of one model from its logprobs [P, V] and the text's tokens [P], each [P].

    loss: - log q(y), nats.
    entropy: - sum_v q(v) log q(v), nats.
    confidence: max_v q(v).
    accuracy: 1 where y is the most probable token, else 0.
    """
    confidence_P, best_P = logq_PV.max(dim=-1)
    return {
        "loss": F.nll_loss(logq_PV, targets_P, reduction="none"),
        "entropy": -(logq_PV.exp().mul_(logq_PV)).sum(dim=-1),
        "confidence": confidence_P.double().exp(),
        "accuracy": best_P == targets_P,
    }


def compare_distributions(logp_PV: Tensor, logq_PV: Tensor) -> dict[str, Tensor]:
    """Return the metrics that compare teacher and student from their logprobs [P, V], each [P].

    kl_to_teacher: KL(p || q) = sum_v p(v) (log p(v) - log q(v)), nats (Kullback and Leibler, 1951).
    reverse_kl: KL(q || p), nats.
    agreement: 1 where both have the same most probable token, else 0.
    overlap: share of the teacher's ten most probable tokens that are among the student's ten.
    acceptance: sum_v min(p(v), q(v)), the probability that speculative decoding accepts a token that the student drafts
    for the teacher (Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding, 2023,
    corollary 3.6).

    Logprobs must be finite. If the vocabularies differ in size, the student's is used; tokens that the teacher does not
    have get logprob -30, which matters to reverse_kl only.
    """
    width = logq_PV.shape[1]
    missing = max(0, width - logp_PV.shape[1])
    logp_PV = F.pad(logp_PV[:, :width], (0, missing), value=_MIN_LOGPROB)
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
