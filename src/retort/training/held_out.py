"""The held-out loss of a student while it is trained, on one sample of the held-out text for all runs.

An evaluation changes nothing that is trained: it draws no random number, reads no training batch, and runs the student
without dropout, in the precision of the training.

Legend: S sequences of the sample, P their counted positions, D the teacher's hidden size.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retort.cluster.ranks import rank, world_size
from retort.config.sections import Evaluation, Training
from retort.losses.held_out import HeldOutSums, HeldOutTargets, MixedOutputs, TeacherOutputs
from retort.models.causal_lm import evaluating
from retort.models.heads import Head
from retort.teacher.batches import Batch, batch_by_length, copy_to, pad_batch
from retort.teacher.features import read_features
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable, concatenate_tables

logger = logging.getLogger(__name__)

_SHARE_OF_TIME = 0.02  # at most, for evaluations under training.eval_steps: auto
_MAX_EVALUATIONS = 10  # under auto
_NAMES = {"eval_loss": "held-out loss", "eval_kl": "KL to the teacher"}


@dataclass(frozen=True)
class HeldOutTeacher:
    """The teacher's features at the counted positions of each sequence of a sample, and its head, in host memory."""

    features: Sequence[Tensor]
    head: Head
    num_tokens: int

    def take(self, batch: Batch, head: Head) -> TeacherOutputs:
        """Return its outputs at the positions of a batch; `head`: where it is needed."""
        features_PD = torch.cat([self.features[i] for i in batch.indices.tolist()])
        device = features_PD.device if head.weight is None else head.weight.device
        return TeacherOutputs(copy_to(features_PD, device), head, self.num_tokens)


@dataclass(frozen=True)
class HeldOut:
    """The sample: its sequences, what teachers say to them (none: not compared), sequences read at once, and weights.

    weights: of several teachers, whose mixture the student is compared with.
    """

    table: SequenceTable
    teachers: tuple[HeldOutTeacher, ...]
    batch_size: int
    weights: tuple[float, ...] = (1.0,)

    @torch.no_grad()  # not inference_mode, whose tensors FSDP would keep for the next step
    def measure(self, model: nn.Module, *, device: torch.device, needs_mask: bool) -> HeldOutSums:
        """Return the means over the sample's positions, on every rank; each reads its share of the batches.

        Called by every rank. `model`: one that `attach_loss` has patched. needs_mask: see `models.causal_lm`.
        """
        batches = list(batch_by_length(self.table, self.batch_size))
        heads = [_move(teacher.head, device) for teacher in self.teachers]
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        # A compiled student would be compiled once more for this.
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            for first in range(0, len(batches), world_size()):
                mine = first + rank()
                # FSDP needs every rank at every pass: one without a batch of its own reads the last one again.
                batch = batches[min(mine, len(batches) - 1)]
                found = self._measure_batch(model, batch, heads, device, needs_mask)
                if mine < len(batches):
                    sums[0] += found.loss
                    if found.kl is not None:
                        sums[1] += found.kl
        if world_size() > 1:
            torch.distributed.all_reduce(sums)
        loss, kl = sums / self.table.num_positions
        return HeldOutSums(loss, kl if self.teachers else None)

    def _measure_batch(
        self,
        model: nn.Module,
        batch: Batch,
        heads: Sequence[Head],
        device: torch.device,
        needs_mask: bool,
    ) -> HeldOutSums:
        inputs = pad_batch(batch.rows, device=device, needs_mask=needs_mask)
        labels = torch.from_numpy(np.concatenate([row.next_ids for row in batch.rows])).long()
        pairs = zip(self.teachers, heads, strict=True)
        members = tuple(teacher.take(batch, head) for teacher, head in pairs)
        outputs = MixedOutputs(members, self.weights) if len(members) > 1 else (*members, None)[0]
        targets = HeldOutTargets(copy_to(inputs.counted, device), copy_to(labels, device), outputs)
        mask = {} if inputs.attention is None else {"attention_mask": inputs.attention}
        found: HeldOutSums = model(input_ids=inputs.ids, **mask, targets=targets)
        return found


def _move(head: Head, device: torch.device) -> Head:
    """Return a head on a device, for one evaluation: a large teacher's takes gigabytes there."""
    weight, bias = (None if t is None else t.to(device) for t in (head.weight, head.bias))
    return replace(head, weight=weight, bias=bias)


def open_held_out(
    index: TokenIndex,
    training: Training,
    evaluation: Evaluation,
    *,
    features: Mapping[Path, str | None],
    weights: tuple[float, ...] = (1.0,),
) -> HeldOut | None:
    """Return the sample of training.eval_sequences held-out sequences, evenly spaced among those of the evaluation.

    None without training.eval_steps, and, if it is auto, where nothing is held out. features: files of
    `score_validation`, with the fingerprint of their teacher's weights where it is known; empty to leave out teachers.
    weights: of several teachers. Raises ValueError where nothing is held out, and when features are needed and missing,
    or of another teacher or of other sequences.
    """
    if training.eval_steps is None:
        return None
    whole = index.read_split("val", max_positions=evaluation.max_positions)
    if whole.num_positions == 0:
        if training.eval_steps == "auto":
            return None
        raise ValueError(
            f"training.eval_steps is {training.eval_steps}, but no document is held out: raise "
            "dataset.validation_fraction, add documents, or set training.eval_steps: null."
        )
    if training.best_metric == "eval_kl" and not features:
        raise ValueError(
            "training.metric_for_best_model is eval_kl, but the teacher's held-out scores are not given: give "
            "--features, the teacher_validation.safetensors of score_validation, or use eval_loss."
        )
    chosen = choose_sample(len(whole), training.eval_sequences)
    teachers = tuple(
        _read_teacher(path, whole, chosen, weights=known, index=index)
        for path, known in features.items()
    )
    table = concatenate_tables(whole.slice(i, i + 1) for i in chosen)
    return HeldOut(table, teachers, evaluation.batch_size, weights)


def choose_sample(number: int, size: int) -> list[int]:
    """Return `size` evenly spaced indices in range(number), all of them if there are no more."""
    found: list[int] = np.unique(np.linspace(0, number - 1, min(size, number)).astype(int)).tolist()
    return found


def _read_teacher(
    path: Path,
    whole: SequenceTable,
    chosen: Sequence[int],
    *,
    weights: str | None,
    index: TokenIndex,
) -> HeldOutTeacher:
    found = read_features(path)
    found.require("val", whole, source=path)
    if weights is not None:
        found.require_teacher(weights, source=path, made_from=index.path)
    bounds = whole.position_offsets.tolist()
    # Copies, so that the whole file need not stay in memory.
    features = [found.features["val"][bounds[i] : bounds[i + 1]].clone() for i in chosen]
    return HeldOutTeacher(features, found.head, found.num_tokens)


def choose_eval_steps(
    training: Training, held_out: HeldOut, *, max_steps: int, num_tokens: float, parameters: int
) -> int | None:
    """Return the steps between two evaluations: training.eval_steps, or under auto so many that there are ten.

    There are fewer where these would take more than 2 % of the time, and None where one would. num_tokens: read in the
    training; parameters: of the student. A token that is evaluated counts as a third of one that is trained, and so
    much more as the teacher's head adds to the student's weights.
    """
    if training.eval_steps != "auto":
        return training.eval_steps
    heads = [teacher.head.weight for teacher in held_out.teachers]
    added = sum(weight.numel() for weight in heads if weight is not None)
    cost = len(held_out.table.ids) * (parameters + added) / (3 * parameters)
    number = min(_MAX_EVALUATIONS, int(_SHARE_OF_TIME * num_tokens / cost))
    return math.ceil(max_steps / number) if number else None


class EvaluationCallback(TrainerCallback):  # type: ignore[misc]
    """Has the held-out loss measured every `steps` steps and after the last one, and the best checkpoint saved.

    name: of the run; best_metric: eval_loss or eval_kl, None if no best checkpoint is kept. The best so far is in the
    trainer's state, and so in every checkpoint.
    """

    def __init__(self, name: str, *, steps: int, best_metric: str | None) -> None:
        self.name, self.steps, self.best_metric = name, steps, best_metric

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for an evaluation where one is due."""
        is_last = state.global_step >= state.max_steps
        control.should_evaluate |= is_last or state.global_step % self.steps == 0

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **_: Any,
    ) -> None:
        """Say what was measured, and have a checkpoint saved if it is the best."""
        where = f"step {state.global_step}/{state.max_steps}"
        shown = ", ".join(f"{_NAMES[name]} {value:.4f}" for name, value in metrics.items())
        if rank() == 0:
            logger.info(f"train {self.name}  {where}  {shown}")
        if self.best_metric is None:
            return
        value = metrics[self.best_metric]
        if state.best_metric is None or value < state.best_metric:
            state.best_metric, state.best_global_step = value, state.global_step
            control.should_save = True
