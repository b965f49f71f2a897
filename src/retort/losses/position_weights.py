"""Weights of the soft loss at each position, from the teacher's distribution there; between 0 and 1.

    teacher_entropy     H(p) / ln V, more where the teacher is uncertain, and its distribution says more than one token
                        (Su et al.: EA-KD, arXiv 2311.13621, 2023, which multiplies it by the student's entropy too)
    teacher_confidence  p(y), the teacher's probability of the text's token y: less where it contradicts the text (as
                        the weights of teachers in Zhang et al.: CA-MKD, arXiv 2201.00007, 2022)

p is at the training's temperature, V the width of the student's output layer. A weight depends on its own position
alone, not on a mean over others, so it does not matter how a step is cut into forward passes. From a cache, H is that
of the kept tokens and one bucket for the tail (a lower bound, exact where all are kept), and p(y) is 0 where y was not
kept.

Legend: P positions, C positions of a chunk, V vocabulary, N kept tokens of all positions.
"""

import math

import torch
from torch import Tensor

from retort.losses.teacher_rows import ChunkRows


def weigh_rows(kind: str, teacher: ChunkRows, labels_C: Tensor, *, vocabulary: int) -> Tensor:
    """Return the weights [C] from kept tokens and tails; labels_C: the text's tokens, int64."""
    p_N = teacher.logprobs_N.exp()
    if kind == "teacher_entropy":
        terms_N = (p_N * teacher.logprobs_N).masked_fill_(p_N == 0, 0.0)
        tails_C = teacher.tail_C.exp() * teacher.tail_C
        return -(teacher.sum_rows(terms_N) + tails_C) / math.log(vocabulary)
    labels_N = teacher.rows_N * vocabulary + labels_C[teacher.rows_N]
    return teacher.sum_rows(torch.where(teacher.flat_N == labels_N, p_N, 0.0))


def weigh_dense(kind: str, logp_PV: Tensor, labels_P: Tensor, *, vocabulary: int) -> Tensor:
    """Return the weights [P] from the teacher's logprobs of all its tokens, which may be fewer than `vocabulary`."""
    if kind == "teacher_entropy":
        terms_PV = (logp_PV.exp() * logp_PV).masked_fill_(logp_PV == -torch.inf, 0.0)
        return -terms_PV.sum(dim=-1) / math.log(vocabulary)
    return logp_PV.gather(1, labels_P[:, None])[:, 0].exp()
