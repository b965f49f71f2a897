"""What is measured of a student of the quality benchmark.

Legend: P positions, T those of a sequence, C those of a chunk, V vocabulary, D width of the student.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks.quality.experiment import CHUNK, Experiment

NUM_BINS = 15  # of the calibration error


@torch.inference_mode()
def evaluate(experiment: Experiment, model: PreTrainedModel | None) -> dict[str, float]:
    """Return means over the evaluated positions; without a model, of the teacher itself.

    loss: of the text, nats. kl: KL(teacher || student) over the whole vocabulary, nats. ece: expected calibration
    error of the most probable id, NUM_BINS bins of equal width (Guo et al., arXiv 1706.04599, equation 3).
    acceptance: the probability that the teacher accepts a token that the student drafted, sum of min(p, q) (Leviathan
    et al., arXiv 2211.17192, section 3).
    """
    sums: dict[str, list[Tensor]] = {"loss": [], "kl": [], "acceptance": []}
    confidences, hits = [], []
    for i in range(experiment.num_train, len(experiment.data.tokens)):
        features_TD = (
            None if model is None else experiment.compute_features(model, experiment.rows(i))
        )
        for start in range(0, experiment.length, CHUNK):
            rows = slice(experiment.rows(i).start + start, experiment.rows(i).start + start + CHUNK)
            logp_CV, labels_C = experiment.logprobs(rows), experiment.labels(rows)
            logq_CV = logp_CV
            if model is not None and features_TD is not None:
                logits_CV = experiment.compute_logits(model, features_TD[start : start + CHUNK])
                logq_CV = logits_CV.log_softmax(dim=-1)
            p_CV, q_CV = logp_CV.exp(), logq_CV.exp()
            sums["loss"].append(F.nll_loss(logq_CV, labels_C, reduction="none"))
            sums["acceptance"].append(torch.minimum(p_CV, q_CV).sum(dim=-1))
            sums["kl"].append((p_CV * (logp_CV - logq_CV)).sum(dim=-1))
            best = q_CV.max(dim=-1)
            confidences.append(best.values)
            hits.append(best.indices == labels_C)
    found = {name: torch.cat(values).double().mean().item() for name, values in sums.items()}
    return found | {"ece": compute_ece(torch.cat(confidences), torch.cat(hits))}


def compute_ece(confidences_P: Tensor, hits_P: Tensor) -> float:
    """Return the gap between mean confidence and accuracy of each bin, weighed by its positions."""
    bins_P = (confidences_P * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins_P, confidences_P.double() - hits_P.double())
    return gaps.abs().sum().item() / len(hits_P)
