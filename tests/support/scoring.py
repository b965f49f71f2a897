"""Random tables and teachers with little memory, and references for what scoring and selection return."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from retort.cache.codec import Codec, SparseTargets
from retort.cache.entropy_codec import EntropyCodec
from retort.cache.sparse_streams import TAIL_UNIT
from retort.cache.top_k_codec import TopKCodec
from retort.models.causal_lm import CausalLM
from retort.teacher.batches import batch_by_length
from retort.teacher.scoring import Scorer, score_part
from retort.teacher.selection import select_probable, select_top_k
from retort.tokens.sequences import SequenceTable, build_table
from support.tiny import NUM_TOKENS

TEMPERATURES = (0.5, 1.0, 2.0)


def make_codec(top_k: int, vocabulary: int) -> TopKCodec:
    return TopKCodec(TEMPERATURES, vocabulary, top_k)


def log_softmax(z_PV: Any) -> Any:
    z_PV = np.asarray(z_PV, dtype=np.float64)
    z_PV = z_PV - z_PV.max(axis=1, keepdims=True)
    return z_PV - np.log(np.exp(z_PV).sum(axis=1, keepdims=True))


def random_table(
    lengths: list[int], *, seed: int = 0, vocabulary: int = NUM_TOKENS
) -> SequenceTable:
    rng = np.random.default_rng(seed)
    rows = []
    for document, length in enumerate(lengths):
        mask = [bool(b) for b in rng.random(length - 1) < 0.7] + [False]
        mask[0] = True
        ids = rng.integers(3, vocabulary, length).tolist()
        rows.append((ids, mask, document, ("", "")))
    return build_table(rows)


def score_top_k(
    scorer: Scorer, table: SequenceTable, codec: Codec, *, num_tokens: int = NUM_TOKENS
) -> SparseTargets:
    """Score all sequences of a table as one part."""
    sequences = score_part(scorer, table, codec, num_tokens=num_tokens).sequences
    return SparseTargets.concatenate(sequences)


class Small(CausalLM):
    """A teacher on a device with memory for `max_tokens` at once; `tried`: the sizes of its batches."""

    @classmethod
    def of(cls, teacher: CausalLM, max_tokens: int) -> "Small":
        small = cls(teacher.model, teacher.head, teacher.vocabulary, is_split=True)
        small.__dict__.update(max_tokens=max_tokens, tried=[])
        return small

    def features(self, input_ids_BT: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__["tried"].append(input_ids_BT.numel())
        if input_ids_BT.numel() > self.__dict__["max_tokens"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().features(input_ids_BT, *args, **kwargs)


def check_batches(lengths: list[int], batch_size: int) -> None:
    """Batches cover every sequence once, longest first, are full, and pad at most an eighth."""
    table = random_table(lengths)
    batches = [batch.indices for batch in batch_by_length(table, batch_size)]
    indices = np.concatenate([np.empty(0, np.int64), *batches])
    assert sorted(indices.tolist()) == list(range(len(lengths)))
    in_order = table.lengths[indices]
    assert (np.diff(in_order) <= 0).all()
    max_tokens = batch_size * max(lengths, default=0)
    widths = [int(table.lengths[batch].max()) for batch in batches]
    assert all(len(batch) * w <= max_tokens for batch, w in zip(batches, widths, strict=True))
    for batch, following, width in zip(batches, batches[1:], widths, strict=False):
        assert table.lengths[batch].min() >= 0.875 * width
        is_full = (len(batch) + 1) * width > max_tokens
        assert is_full or table.lengths[following].max() < 0.875 * width


def check_top_k(*, vocabulary: int, num_tokens: int, top_k: int, scale: float, seed: int) -> None:
    """Compare select_top_k of random rows with a float64 reference in numpy."""
    rng = np.random.default_rng(seed)
    logits_PV = (scale * rng.standard_normal((4, vocabulary))).astype(np.float32)
    found = select_top_k(
        torch.from_numpy(logits_PV.copy()), make_codec(top_k, vocabulary), num_tokens=num_tokens
    )
    logprobs_PV = log_softmax(logits_PV[:, :num_tokens])
    order_PV = np.argsort(-logprobs_PV, axis=1)
    np.testing.assert_array_equal(found.to_rows()[0], order_PV[:, :top_k])
    expected_PK = np.take_along_axis(logprobs_PV, order_PV[:, :top_k], axis=1)
    np.testing.assert_allclose(found.to_rows()[1], expected_PK, rtol=1e-5, atol=1e-5)
    for column, temperature in enumerate(TEMPERATURES):
        p_PV = np.exp(log_softmax(logits_PV[:, :num_tokens] / temperature))
        tail_P = np.take_along_axis(p_PV, order_PV[:, top_k:], axis=1).sum(axis=1)
        tail_logprobs_P = found.tail_logprobs[:, column].astype(np.float64)
        # At temperature 2, probabilities below 1e-38 are lost: masses of some 1e-19 each.
        np.testing.assert_allclose(np.exp(tail_logprobs_P), tail_P, rtol=2e-4, atol=1e-18)


def check_top_k_of_wide_rows(*, width: int, num_tokens: int, top_k: int, seed: int) -> None:
    """Compare select_top_k of rows of many blocks with torch's topk."""
    rng = np.random.default_rng(seed)
    logits_PV = torch.from_numpy(5 * rng.standard_normal((5, width))).float()
    found = select_top_k(logits_PV.clone(), make_codec(top_k, width), num_tokens=num_tokens)
    expected = logits_PV[:, :num_tokens].topk(top_k, dim=-1)
    np.testing.assert_array_equal(found.to_rows()[0], expected.indices)
    logprobs_PV = logits_PV[:, :num_tokens].double().log_softmax(dim=-1)
    np.testing.assert_allclose(
        found.to_rows()[1], logprobs_PV.gather(1, expected.indices), atol=1e-5
    )


def check_probable(*, width: int, least: float, seed: int) -> None:
    """Compare select_probable (top_p) of rows of many blocks with a float64 softmax."""
    rng = np.random.default_rng(seed)
    sharpness = rng.uniform(0, 5, (6, 1))
    logits_PV = torch.from_numpy(sharpness * rng.standard_normal((6, width))).float()
    codec = EntropyCodec((1.0, 2.0, 5.0), width, "top_p", least, 60, "order")
    found = select_probable(logits_PV.clone(), codec, num_tokens=width, uniform_P=np.empty(0))
    starts = np.concatenate([[0], np.cumsum(found.sizes)])
    for row, logits_V in enumerate(logits_PV.double()):
        probs_V = logits_V.softmax(dim=-1)
        own = slice(starts[row], starts[row + 1])
        expected = set((probs_V >= least).nonzero()[:, 0].tolist()) or {int(probs_V.argmax())}
        # In float32, a probability this near to the bound is on either side of it; so is one near to the largest, which
        # is kept if no token reaches the bound.
        bounds = (least, float(probs_V.max())) if float(probs_V.max()) < least else (least,)
        near_V = torch.stack([(probs_V / bound - 1).abs() < 1e-5 for bound in bounds]).any(dim=0)
        borderline = set(near_V.nonzero()[:, 0].tolist())
        assert set(found.ids[own].tolist()) ^ expected <= borderline
        np.testing.assert_allclose(found.probs[own], probs_V[found.ids[own]], rtol=1e-5)
        for column, temperature in enumerate(codec.temperatures):
            outside_V = (logits_V / temperature).softmax(dim=-1)
            outside_V[found.ids[own]] = 0.0
            np.testing.assert_allclose(
                found.tails[row, column], float(outside_V.sum()) * TAIL_UNIT, atol=1.0
            )
